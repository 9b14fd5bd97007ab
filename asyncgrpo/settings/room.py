"""Base of every section of the settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Unbounded = Annotated[float, Field(allow_inf_nan=True)]  # inf is no bound; limits refuse nan
# Which form of data.train or eval an error is about.
TEXT, TABLE, TABLES = "<text>", "<table>", "<tables>"


class Room(BaseModel):
    """Base of every section: frozen once read; unknown keys and inf are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )
