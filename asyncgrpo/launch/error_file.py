"""How a role tells the launcher why it ended, also through torchrun, which hides exit codes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from asyncgrpo.errors import EXIT_ROLE_FAILED, AsyncGRPOError

ERROR_FILE = "ASYNCGRPO_ERROR_FILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedError:
    """What a role wrote before it ended."""

    exit_code: int
    message: str


def record_error(error: Exception) -> None:
    """Leaves the error where the launcher looks; does nothing in a process it did not start.

    Of several ranks the first one counts: the others mostly fail because of it.
    """
    code, message = EXIT_ROLE_FAILED, f"{type(error).__name__}: {error}"
    if isinstance(error, AsyncGRPOError):
        code, message = error.exit_code, str(error)
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    record = json.dumps({"exit_code": code, "message": message})
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(record)
    except FileExistsError:
        return


def read_error(path: Path) -> RecordedError | None:
    """What the role left; None when it ended without a word."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return RecordedError(**json.loads(text))
    except (ValueError, TypeError):  # killed while it wrote
        return RecordedError(exit_code=EXIT_ROLE_FAILED, message=text)
