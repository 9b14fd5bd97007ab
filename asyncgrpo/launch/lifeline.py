"""Stops all processes of a run when its launcher was killed without a chance to do so itself.

Run as a script with the standard library only (`python -I -S lifeline.py RUN_ID GRACE`), in a
session of its own. It reads a pipe that the launcher holds: a byte is a goodbye, the end of the
file without one means that the launcher is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable

RUN_ID, ROLE = "ASYNCGRPO_RUN_ID", "ASYNCGRPO_ROLE"
POLL_SECONDS, KILL_SECONDS = 0.05, 5.0


def find_run_processes(run_id: str, role: str = "") -> list[int]:
    """Live processes that carry the run id (and role) in their environment, and their descendants.

    The environment finds what left its group, session or parent; descent finds what overwrote its
    environment (setproctitle does). The caller and zombies are left out.
    """
    marks = {f"{RUN_ID}={run_id}".encode()} | ({f"{ROLE}={role}".encode()} if role else set())
    parents = _live_parents()
    found = {pid for pid in parents if marks <= {*_read(f"/proc/{pid}/environ").split(b"\0")}}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Signals each process that is still there and ours."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue  # it ended by itself, or changed its user: not for us to end


def kill_processes(run_id: str, role: str = "") -> tuple[list[int], list[int]]:
    """Kills what carries the run id (and role) until it is gone; (all of it, what survives)."""
    killed: set[int] = set()
    deadline = time.monotonic() + KILL_SECONDS
    while (left := find_run_processes(run_id, role)) and time.monotonic() < deadline:
        send(left, signal.SIGKILL)
        killed.update(left)
        time.sleep(0.005)
    return sorted(killed), left


def _live_parents() -> dict[int, int]:
    """Process -> its parent, without zombies."""
    parents: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        # The command name in brackets may hold anything, brackets included: look behind it.
        fields = _read(f"/proc/{name}/stat").rpartition(b")")[2].split()
        if fields and fields[0] not in (b"Z", b"X"):
            parents[int(name)] = int(fields[1])
    return parents


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""  # it ended while we looked, or belongs to somebody else


def main() -> None:
    """Waits for the launcher's goodbye, or for its end: then SIGTERM, after the grace SIGKILL."""
    run_id, grace_seconds = sys.argv[1], float(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read(1) == b"":
        found = find_run_processes(run_id)
        send(found, signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while find_run_processes(run_id) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        kill_processes(run_id)  # looks once more: a fork may hide between two readings of /proc
        print(f"the launcher was killed; stopped its processes {found}")


if __name__ == "__main__":
    main()
