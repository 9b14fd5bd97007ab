"""The buffer process: the core behind a socket, with a clock, a metrics endpoint and files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from asyncgrpo.buffer.core import BufferCore, Replies
from asyncgrpo.data.prompts import open_prompts
from asyncgrpo.observe.exporter import Exporter, own_address
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
    metrics_host = own_address(run.endpoints.buffer)
    exporter = Exporter("buffer", run.endpoints.metrics.get("buffer", 0), run.path, metrics_host)
    log.info("listening on %s", run.endpoints.buffer)
    shown_at = 0.0
    while not stopping():
        for peer, packet in server.receive(POLL_SECONDS):
            _send(server, core, core.handle(peer, packet, time.monotonic()))
        now = time.monotonic()
        _send(server, core, core.tick(now))
        if now - shown_at >= SHOW_SECONDS:
            exporter.show(core.metrics())
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
