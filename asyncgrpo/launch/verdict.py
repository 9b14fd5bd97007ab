"""Decides what the end of one process means for the run: pure functions of role and exit code."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from asyncgrpo.errors import EXIT_BAD_INPUT, AsyncGRPOError, BadInput, RoleFailed
from asyncgrpo.launch.error_file import RecordedError
from asyncgrpo.launch.plan import RoleName

Verdict = Literal["done", "early", "left", "restart", "fail"]

GOOD_ENDS: dict[RoleName, Verdict] = {"learner": "done", "actor": "left", "buffer": "early"}


def judge_exit(role: RoleName, exit_code: int, restarts: int, max_restarts: int) -> Verdict:
    """done: the run is complete. early: fine if the learner ends now, too. restart, fail: as said.

    left: an actor was asked to go (SIGTERM) and has handed back its work.

    restarts: those within launch.restart_window_seconds. Exit code 2 is bad input, which a second
    life would meet again.
    """
    if exit_code == 0:
        return GOOD_ENDS[role]
    if exit_code != EXIT_BAD_INPUT and restarts < max_restarts:
        return "restart"
    return "fail"


def describe_exit(exit_code: int) -> str:
    """An exit code in words; negative ones are signals, as in subprocess."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = " (often: out of memory, see dmesg)" if exit_code == -signal.SIGKILL else ""
    return f"was ended by {name}{hint}"


def failure(
    name: str,
    exit_code: int,
    restarts: int,
    recorded: RecordedError | None,
    log_file: Path,
    log_lines: Sequence[str],
) -> AsyncGRPOError:
    """The error that ends the run: BadInput when the role found some, RoleFailed otherwise."""
    if recorded is not None and recorded.exit_code == EXIT_BAD_INPUT:
        return BadInput(recorded.message)
    shown = "".join(f"\n  {line}" for line in log_lines) or " (empty)"
    log = f"last lines of {log_file}:{shown}"
    if exit_code == EXIT_BAD_INPUT:
        return BadInput(f"{name} refused its input; {log}")
    again = f" after {restarts} restarts (launch.max_restarts)" if restarts else ""
    early = " before the learner was done" if exit_code == 0 else ""
    reason = f": {recorded.message}" if recorded is not None else ""
    return RoleFailed(f"{name} {describe_exit(exit_code)}{early}{again}{reason}; {log}")
