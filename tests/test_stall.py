"""The stall report: who waits for whom, and the stacks of processes, even of one stuck in C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asyncgrpo.buffer.core import BufferCore
from asyncgrpo.buffer.server import FlowFile
from asyncgrpo.config import from_mapping
from asyncgrpo.data.prompts import open_prompts
from asyncgrpo.errors import RunError
from asyncgrpo.launch.lifeline import RUN_ID
from asyncgrpo.launch.stall import StallWatch
from asyncgrpo.rundir import FLOW_FILE
from asyncgrpo.settings.run import LaunchSettings
from asyncgrpo.wire.codec import Packet

SCRIPT = (
    "import ctypes, sys\n"
    "from pathlib import Path\n"
    "from asyncgrpo.launch.stall import answer_with_stacks\n"
    "answer_with_stacks(Path(sys.argv[1]), sys.argv[2])\n"
    "print('ready', flush=True)\n"
    "def stuck_here():\n"
    "    while True:\n"
    "        ctypes.PyDLL(None).sleep(60)\n"  # holds the interpreter lock; ends at a signal
    "stuck_here()\n"
)


@pytest.fixture
def stuck(tmp_path):
    """Two processes of run "r", both in C code that does not come back."""
    started = []
    for name in ("learner-0", "actor-1"):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path), name],
            stdout=subprocess.PIPE,
            env={**os.environ, RUN_ID: tmp_path.name},
            text=True,
        )
        assert process.stdout.readline() == "ready\n"
        started.append(process)
    yield started
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def write_flow(folder: Path, events: int) -> None:
    text = json.dumps({"events": events, "waits": ["learner-0 has waited 9 s for the batch"]})
    (folder / FLOW_FILE).write_text(text)


def watch(folder: Path, said: list[str], **changes: object) -> StallWatch:
    settings = LaunchSettings(**{"stall_seconds": 0.05, **changes})
    return StallWatch(folder, settings, folder.name, said.append)


def test_a_stall_is_reported_once_with_waits_and_stacks_and_so_is_its_end(tmp_path, stuck):
    said: list[str] = []
    look = watch(tmp_path, said)
    write_flow(tmp_path, 1)
    look()
    assert said == []
    os.kill(stuck[1].pid, signal.SIGSTOP)
    time.sleep(0.1)
    look()
    look()
    assert len(said) == 1
    assert "learner-0 has waited 9 s for the batch" in said[0]
    (report,) = (tmp_path / "stalls").iterdir()
    assert str(report) in said[0]
    first, waits, *stacks = report.read_text().split("\n\n")
    assert first.startswith("nothing has happened for")
    assert waits == "learner-0 has waited 9 s for the batch"
    actor, learner = sorted(stacks)
    assert f"actor-1 (pid {stuck[1].pid}, stopped by a signal)\nno answer" in actor
    assert f"learner-0 (pid {stuck[0].pid}, runs or sleeps)" in learner
    assert "in stuck_here" in learner
    write_flow(tmp_path, 2)
    look()
    assert "the run goes on" in said[1]


def test_a_run_ends_at_a_stall_when_that_is_wanted(tmp_path):
    look = watch(tmp_path, [], on_stall="abort")
    look()
    time.sleep(0.1)
    with pytest.raises(RunError, match=r"the buffer has told nothing yet.*launch.on_stall"):
        look()


def test_what_moves_is_no_stall(tmp_path):
    said: list[str] = []
    look = watch(tmp_path, said, stall_seconds=0.2)
    for events in range(8):
        write_flow(tmp_path, events)
        look()
        time.sleep(0.05)
    assert said == []


def test_the_buffer_says_who_waits_for_whom_since_when(tmp_path):
    config = from_mapping({"launch": {"learners": 1}})
    core = BufferCore(config, open_prompts(config), lambda step, ended: None)
    flow = FlowFile(tmp_path)

    def waits(now: float) -> list[str]:
        flow.write(core, now)
        return json.loads((tmp_path / FLOW_FILE).read_text())["waits"]

    assert waits(0.0) == ["the buffer has waited 0 s for an actor"]
    core.handle("a", Packet(kind="hello", request_id=1, fields={"actor": "actor-0"}), 0.0)
    take = {"step": 0, "rank": 0, "world_size": 1}
    core.handle("l", Packet(kind="take", request_id=1, fields=take), 0.0)
    assert waits(1.0) == ["learner-0 has waited 0 s for the batch of step 0"]
    lease = {"version": 0, "max": 1}
    core.handle("a", Packet(kind="lease", request_id=2, fields=lease), 0.0)
    assert waits(5.0) == [
        "learner-0 has waited 4 s for the batch of step 0",
        "the buffer has waited 0 s for actor-0 to answer its leases",
    ]
    core.handle("a", Packet(kind="lease", request_id=3, fields={**lease, "max": 10_000}), 0.0)
    core.handle("a", Packet(kind="lease", request_id=4, fields={**lease, "max": 10_000}), 0.0)
    assert "actor-0 has waited 0 s for work, holding version 0" in waits(6.0)
    assert core.events == 0  # nothing of this brings a run on
