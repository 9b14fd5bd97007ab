"""How a role tells why it ended, by file and by log, and what its end means for the run."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from asyncgrpo.errors import EXIT_BAD_INPUT, EXIT_ROLE_FAILED, AsyncGRPOError, BadInput, RoleFailed

ERROR_FILE = "ASYNCGRPO_ERROR_FILE"
SHOWN_LINES = 15
TAIL_BYTES, TAIL_LINES = 64 << 10, 100  # of a log; enough, however long it is
TORCHRUN_REPORT = re.compile(r"[WE]\d{4} .*torch/distributed/elastic/")
Verdict = Literal["done", "early", "left", "restart", "fail"]
GOOD_ENDS: dict[str, Verdict] = {"learner": "done", "actor": "left", "buffer": "early"}


class RecordedError(NamedTuple):
    """What a role wrote before it ended."""

    exit_code: int
    message: str


def record_error(error: Exception) -> None:
    """Leaves the error where the launcher looks; does nothing in a process it did not start.

    Of several ranks the first one counts: the others mostly fail because of it.
    """
    recorded = RecordedError(EXIT_ROLE_FAILED, f"{type(error).__name__}: {error}")
    if isinstance(error, AsyncGRPOError):
        recorded = RecordedError(error.exit_code, str(error))
    if path := os.environ.get(ERROR_FILE):
        with suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(recorded._asdict()))


def read_error(path: Path) -> RecordedError | None:
    """What the role left; None when it ended without a word."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return RecordedError(**json.loads(text))
    except (ValueError, TypeError):  # killed while it wrote
        return RecordedError(EXIT_ROLE_FAILED, text)


def judge_exit(role: str, exit_code: int, restarts: int, max_restarts: int) -> Verdict:
    """done: the run is complete. early: fine if the learner ends now, too. left: an actor was asked
    to go and has handed back its work. restart, fail: as said; bad input would be met again.

    restarts: those within launch.restart_window_seconds.
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
    hint = " (often: out of memory, see dmesg)" if exit_code == -signal.SIGKILL else ""
    names = {number.value: number.name for number in signal.Signals}  # not all signals have one
    return f"was ended by {names.get(-exit_code, f'signal {-exit_code}')}{hint}"


def failure(
    name: str, exit_code: int, restarts: int, error_file: Path, log_file: Path
) -> AsyncGRPOError:
    """The error that ends the run: BadInput when the role found some, RoleFailed otherwise."""
    recorded = read_error(error_file)
    if recorded is not None and recorded.exit_code == EXIT_BAD_INPUT:
        return BadInput(recorded.message)
    shown = "".join(f"\n  {line}" for line in last_lines(log_file, SHOWN_LINES)) or " (empty)"
    log = f"last lines of {log_file}:{shown}"
    if exit_code == EXIT_BAD_INPUT:
        return BadInput(f"{name} refused its input; {log}")
    again = f" after {restarts} restarts (launch.max_restarts)" if restarts else ""
    early = " before the learner was done" if exit_code == 0 else ""
    reason = f": {recorded.message}" if recorded is not None else ""
    return RoleFailed(f"{name} {describe_exit(exit_code)}{early}{again}{reason}; {log}")


def last_lines(path: Path, count: int) -> list[str]:
    """The last non-empty lines of a file; [] when there is none.

    Without the 40 lines that torchrun adds when a rank fails: the cause stands above them.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = [line for line in map(as_shown, file) if line.strip()][-TAIL_LINES:]
    except FileNotFoundError:
        return []
    report = [place for place, line in enumerate(lines) if place and TORCHRUN_REPORT.match(line)]
    return lines[: min(report, default=None)][-count:]


def as_shown(line: bytes) -> str:
    """As a terminal would show it: of a progress bar's states only the last."""
    return line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
