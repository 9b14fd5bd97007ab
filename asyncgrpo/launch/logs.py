"""Reads the log files that the roles write: whole new lines, and the last ones of a dead role."""

from __future__ import annotations

import re
from pathlib import Path

TAIL_BYTES = 64 << 10  # enough for the last lines, however long the log is
TAIL_LINES = 100  # of these
TORCHRUN_REPORT = re.compile(r"[WE]\d{4} .*torch/distributed/elastic/")
READ_BYTES = 1 << 20  # per call: a role that floods its log must not stop the others


class LogTail:
    """Hands out what was appended to a file since the last call, in whole lines."""

    def __init__(self, path: Path) -> None:
        self._path, self._position, self._rest = path, 0, b""

    def new_lines(self, *, at_end: bool = False) -> list[str]:
        """New whole lines; with `at_end` everything, an unfinished last line included."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                read = file.read() if at_end else file.read(READ_BYTES)
        except FileNotFoundError:
            return []
        self._position += len(read)
        *lines, self._rest = (self._rest + read).split(b"\n")
        if at_end and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        return [_shown(line) for line in lines]


def last_lines(path: Path, count: int) -> list[str]:
    """The last non-empty lines of a file; [] when there is none.

    Without the 40 lines that torchrun adds when a rank fails: the cause stands above them.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = [line for line in map(_shown, file) if line.strip()][-TAIL_LINES:]
    except FileNotFoundError:
        return []
    report = [place for place, line in enumerate(lines) if place and TORCHRUN_REPORT.match(line)]
    return lines[: min(report, default=None)][-count:]


def _shown(line: bytes) -> str:
    """As a terminal would show it: of a progress bar's states only the last."""
    return line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
