"""The buffer process: the core behind a socket, with a clock, a ledger, metrics and files.

Whatever a round of packets changes is committed before any of it is answered.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from asyncgrpo.buffer.core import BufferCore, Replies
from asyncgrpo.buffer.ledger import Ledger
from asyncgrpo.data.prompts import open_prompts
from asyncgrpo.observe.exporter import serve_metrics
from asyncgrpo.observe.metrics import counters
from asyncgrpo.observe.trajectories import TrajectoryWriter
from asyncgrpo.rows import replace_file
from asyncgrpo.rundir import FLOW_FILE, RunDir
from asyncgrpo.wire.keys import read_keys
from asyncgrpo.wire.sockets import Server

log = logging.getLogger(__name__)
POLL_SECONDS, SHOW_SECONDS = 0.2, 1.0


def run_buffer(run: RunDir, stopping: Callable[[], bool]) -> None:
    """Serves until stopped; goes on where the run directory's ledger ends."""
    config = run.config
    server = Server(run.endpoints.buffer, read_keys(run, "server"))
    ledger = Ledger(run.path)
    ledger.checkpoint_aside()
    samples = TrajectoryWriter(run.path, config)
    core = BufferCore(
        config,
        open_prompts(config),
        samples,
        ledger,
        time.monotonic(),
        rewind=partial(samples.rewind, state=ledger.state),
    )
    exporter = serve_metrics(run, "buffer")
    exporter.show(
        {
            # A counter that begins at 0 is known before the first thing it counts.
            **dict.fromkeys(counters("buffer"), 0.0),
            **core.metrics(),
            "setting/actors": config.launch.actors,
            "setting/groups_per_step": config.buffer.groups_per_step,
            "setting/max_staleness": config.buffer.max_staleness,
            "setting/max_steps": config.run.max_steps,
        }
    )
    flow = FlowFile(run.path)
    log.info("listening on %s, start %d of this run", run.endpoints.buffer, ledger.life)
    shown_at = 0.0
    gc.freeze()  # else a full collection looks at all modules, and actors wait for 60 ms
    while not stopping():
        requests = server.receive(POLL_SECONDS)
        now = time.monotonic()
        core.num_refused = server.num_refused
        send(server, core, ledger, core.turn(requests, now))
        if now - shown_at >= SHOW_SECONDS:
            exporter.show({**core.metrics(), "disk_free_bytes": shutil.disk_usage(run.path).free})
            flow.write(core, now)
            shown_at = now
    ledger.close()
    server.close()
    exporter.close()


def send(server: Server, core: BufferCore, ledger: Ledger, replies: Replies) -> None:
    """Sends what is durable; work that was given to a peer that is gone goes to others."""
    ledger.commit()
    for peer, packet in replies:
        reached = server.answer(peer, packet) if packet.request_id else server.push(peer, packet)
        if not reached:
            log.warning("%s is gone; its leases are handed out again", peer)
            send(server, core, ledger, core.lost(peer, time.monotonic()))


class FlowFile:
    """Who waits for whom since when, for the launcher to look at; written anew once in a while."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FLOW_FILE
        self._since: dict[tuple[str, str], float] = {}  # (who, for what) -> first seen

    def write(self, core: BufferCore, now: float) -> None:
        """Replaces the file; now: on the caller's clock."""
        waits = {wait: self._since.get(wait, now) for wait in core.waits()}
        self._since = waits
        lines = [
            f"{who} has waited {now - at:.0f} s for {what}" for (who, what), at in waits.items()
        ]
        replace_file(self._path, json.dumps({"events": core.events, "waits": lines}))
