"""Notices that a run no longer gets anywhere, and says who waits for whom and where each one is.

The buffer, which everybody waits at, writes flow.json once a second: a counter of what has
happened, and the waits. A counter that stands still for launch.stall_seconds is a stall; then
stalls/<time>.txt gets the waits and the stack of every thread of every process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from asyncgrpo.errors import RunError
from asyncgrpo.launch.lifeline import find_run_processes, send
from asyncgrpo.rundir import FLOW_FILE
from asyncgrpo.settings.run import LaunchSettings

STACKS, REPORTS = "stacks", "stalls"
SIGNAL = signal.SIGUSR1
ANSWER_SECONDS = 2.0  # for all processes together; a handler in C answers at once, unless stopped
NOTHING_TOLD: dict[str, Any] = {"events": None, "waits": ["the buffer has told nothing yet"]}
STATES = {"T": "stopped by a signal", "D": "waits for a device or disk", "Z": "has ended"}


def answer_with_stacks(run_dir: Path, name: str) -> None:
    """From now on SIGUSR1 writes the stacks of this process, even while it is stuck in C code."""
    folder = run_dir / STACKS
    folder.mkdir(exist_ok=True)
    # Left open: the handler writes to its descriptor.
    file = (folder / f"{name}.{os.getpid()}.txt").open("w", encoding="utf-8")
    faulthandler.register(SIGNAL, file=file, all_threads=True, chain=False)


class StallWatch:
    """The launcher's look at the progress of a run; call it often."""

    def __init__(
        self, run_dir: Path, settings: LaunchSettings, run_id: str, say: Callable[[str], None]
    ) -> None:
        """run_id: of the processes; say: gets one line when there is a stall, and when it ends."""
        self._run_dir, self._settings = run_dir, settings
        self._run_id, self._say = run_id, say
        self._seen: Any = None
        self._since = time.monotonic()
        self._is_stalled = False

    def __call__(self) -> None:
        """RunError when the run stands still and launch.on_stall is "abort"."""
        now, flow = time.monotonic(), self._run_dir / FLOW_FILE
        told = json.loads(flow.read_text(encoding="utf-8")) if flow.exists() else NOTHING_TOLD
        if told["events"] != self._seen:
            if self._is_stalled:
                self._say(f"the run goes on after {now - self._since:.0f} s")
            self._seen, self._since, self._is_stalled = told["events"], now, False
        elif not self._is_stalled and now - self._since > self._settings.stall_seconds:
            self._is_stalled = True
            self._report(f"nothing has happened for {now - self._since:.0f} s", told["waits"])

    def _report(self, head: str, waits: Sequence[str]) -> None:
        path = self._run_dir / REPORTS / f"{time.strftime('%Y%m%d-%H%M%S')}.txt"
        path.parent.mkdir(exist_ok=True)
        blocks = [head, "\n".join(waits), *self._stacks()]
        path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
        message = f"{head}; {'; '.join(waits)}; stacks of all processes: {path}"
        if self._settings.on_stall == "abort":
            raise RunError(f"{message}; stopped by launch.on_stall = 'abort'")
        self._say(message)

    def _stacks(self) -> list[str]:
        """A block for each process of the run that answers with its stacks, and its state."""
        alive = set(find_run_processes(self._run_id))
        files = sorted((self._run_dir / STACKS).glob("*.*.txt"))
        pids = {path: pid for path in files if (pid := int(path.suffixes[-2][1:])) in alive}
        before = {path: path.stat().st_size for path in pids}
        send(pids.values(), SIGNAL)
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline and any(p.stat().st_size == n for p, n in before.items()):
            time.sleep(0.05)
        return [_block(path, pid, before[path]) for path, pid in pids.items()]


def _block(path: Path, pid: int, before: int) -> str:
    """What a process has answered behind so many bytes, and its state by proc_pid_stat(5)."""
    state = "Z"
    with suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state = stat.rpartition(")")[2].split()[0]
    said = path.read_bytes()[before:].decode(errors="replace").strip() or "no answer"
    name = path.name.partition(".")[0]
    return f"-- {name} (pid {pid}, {STATES.get(state, 'runs or sleeps')})\n{said}"
