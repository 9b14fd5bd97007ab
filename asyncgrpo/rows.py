"""Files of a run: rows of JSON, one per line, and texts that are replaced whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def numbered_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number, from 1, and row; None for a line that is still written, or cut by a kill."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows; none without a file."""
    numbered = numbered_rows(path) if path.exists() else ()
    return [row for _, row in numbered if isinstance(row, dict)]


def as_line(row: Mapping[str, Any]) -> str:
    """A row as a line of JSONL, its text as it is read: not escaped."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Takes all other rows out of a file, which is made if it is missing; returns what stays."""
    rows = [row for row in whole_rows(path) if keep(row)]
    replace_file(path, "".join(map(as_line, rows)))
    return rows


def replace_file(path: Path, text: str) -> None:
    """Writes a text that others see whole or not at all."""
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(text, encoding="utf-8")
    draft.rename(path)
