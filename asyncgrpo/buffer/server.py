"""The buffer process: the core behind a socket, with a clock, a metrics endpoint and files."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable

from asyncgrpo.buffer.core import BufferCore, Replies
from asyncgrpo.data.prompts import open_prompts
from asyncgrpo.observe.exporter import Exporter
from asyncgrpo.observe.metrics import TABLE
from asyncgrpo.observe.trajectories import TrajectoryWriter
from asyncgrpo.rundir import RunDir
from asyncgrpo.wire.sockets import Server

log = logging.getLogger(__name__)
POLL_SECONDS, SHOW_SECONDS = 0.2, 1.0


def run_buffer(run: RunDir, stopping: Callable[[], bool]) -> None:
    """Serves until stopped."""
    config = run.config
    server = Server(run.endpoints.buffer)
    core = BufferCore(config, open_prompts(config), TrajectoryWriter(run.path, config))
    exporter = Exporter("buffer", run.endpoints.metrics.get("buffer", 0), run.path)
    exporter.show(
        {
            # A counter that begins at 0 is known before the first thing it counts.
            **dict.fromkeys(TABLE["counter", "buffer"], 0.0),
            "setting/actors": config.launch.actors,
            "setting/groups_per_step": config.buffer.groups_per_step,
            "setting/max_staleness": config.buffer.max_staleness,
            "setting/max_steps": config.run.max_steps,
        }
    )
    log.info("listening on %s", run.endpoints.buffer)
    shown_at = 0.0
    while not stopping():
        for peer, packet in server.receive(POLL_SECONDS):
            _send(server, core, core.handle(peer, packet, time.monotonic()))
        now = time.monotonic()
        _send(server, core, core.tick(now))
        if now - shown_at >= SHOW_SECONDS:
            exporter.show({**core.metrics(), "disk_free_bytes": shutil.disk_usage(run.path).free})
            shown_at = now
    server.close()


def _send(server: Server, core: BufferCore, replies: Replies) -> None:
    """Sends; work that was given to a peer that is gone goes to others."""
    while replies:
        peer, packet = replies.pop(0)
        reached = server.answer(peer, packet) if packet.request_id else server.push(peer, packet)
        if not reached:
            log.warning("%s is gone; its leases are handed out again", peer)
            server.forget(peer)
            replies += core.lost(peer, time.monotonic())
