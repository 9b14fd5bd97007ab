"""Reads the log files that the roles write: whole new lines, and the last ones of a dead role."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

TAIL_BYTES = 64 << 10  # enough for the last lines, however long the log is
TORCHRUN_REPORT = re.compile(r"[WE]\d{4} .*torch/distributed/elastic/")
READ_BYTES = 1 << 20  # per call: a role that floods its log must not stop the others


class LogTail:
    """Hands out what was appended to a file since the last call, in whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._rest = b""

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
    """The last non-empty lines of a file; [] when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = [_shown(line) for line in file.read().split(b"\n")]
    except FileNotFoundError:
        return []
    return [line for line in lines if line.strip()][-count:]


def before_torchrun_report(lines: Sequence[str]) -> list[str]:
    """Without the 40 lines that torchrun adds when a rank fails: the cause stands above them."""
    for place, line in enumerate(lines):
        if place and TORCHRUN_REPORT.match(line):
            return list(lines[:place])
    return list(lines)


def _shown(line: bytes) -> str:
    """As a terminal would show it: of a progress bar's states only the last."""
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
