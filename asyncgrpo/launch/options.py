"""Options that several commands have, and what they make of the settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path | None, typer.Option(help="TOML settings or preset name")]
Actors = Annotated[int | None, typer.Option(help="actor processes, one engine each")]
Learners = Annotated[int | None, typer.Option(help="learner ranks under torchrun")]
NewFolder = Annotated[Path | None, typer.Option(help="new folder for everything written")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="room.key=value, repeatable")]
Seed = Annotated[int | None, typer.Option(help="of prompts and sampling")]


def overridden(
    asked: Sequence[str] | None, flags: Mapping[str, Path | str | int | None]
) -> list[str]:
    """What --set asks for, then the flags by their settings' names; None is a flag not given."""
    given = {key: str(v) if isinstance(v, Path) else v for key, v in flags.items() if v is not None}
    words = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items())
    return [*(asked or ()), *words]
