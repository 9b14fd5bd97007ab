"""The requests that servers take, and what their fields must hold.

Checked before anybody acts on a request, so that half of a bad one leaves no trace.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, create_model

from asyncgrpo.errors import WireError
from asyncgrpo.types import FinishReason

Version = Annotated[int, Field(ge=-1, lt=1 << 31)]
Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=256)]
Names = list[Name]
Table = Mapping[str, type[BaseModel]]  # by kind


class Status(BaseModel):
    """Who, and any counters."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, Number]
    actor: Name


STRICT = ConfigDict(strict=True)


def _row(config: ConfigDict = STRICT, /, **fields: Any) -> type[BaseModel]:
    """fields: a type, or a type and a default."""
    kinds: dict[str, Any] = {n: k if isinstance(k, tuple) else (k, ...) for n, k in fields.items()}
    return create_model("Row", __config__=config, **kinds)


GROUP = {
    "group": _row(
        ConfigDict(strict=True, extra="forbid"),  # it goes on as it came
        lease=bytes,  # compared with the one that was given out
        finish_reasons=list[FinishReason],
        texts=list[str],
        reward_parts=Names,
        actor=Name,
        timings=dict[Name, Number],
    )
}
BUFFER_REQUESTS: Table = {
    # version: -1 when its engine holds none yet; leases: what it is at work on
    "hello": _row(actor=Name, version=(Version, -1), leases=(Names, [])),
    "bye": _row(actor=Name),
    "lease": _row(version=Count, max=Count),
    "accept": _row(lease_ids=Names, refused=Names),
    "put": _row(),  # and a GROUP
    "fail": _row(lease_id=Name, reason=Name),
    "held": _row(version=Count),
    "status": Status,
    "begin": _row(step=Count),
    "take": _row(step=Count, rank=Count, world_size=Count),
    "trained": _row(step=Count, world_size=Count, covered=Count, advantages=bytes),
    "evaluate": _row(version=Count, blocks=Names),
    "results": _row(),
    "stop": _row(),
    "summary": _row(),
}
PROOF = {"digests": list[int], "canary_tokens": list[Count], "canary_logprobs": list[float]}
WEIGHTS_REQUESTS: Table = {
    "join": _row(actor=Name, ranks=PositiveInt),
    "ready": _row(actor=Name, round=Count),
    "later": _row(actor=Name, round=Count),
    "free": _row(actor=Name),
    "alive": _row(actor=Name),
    "asleep": _row(actor=Name),
    "loaded": _row(actor=Name, version=Count, copy_seconds=Number, stall_seconds=Number, **PROOF),
}


def check_fields(kind: str, fields: Any, table: Table) -> None:
    """WireError names the kind that is unknown, or the first field that is missing or wrong."""
    if kind not in table:
        raise WireError(f"unknown kind {reprlib.repr(kind)}")
    try:
        table[kind].model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise WireError(
            f"{kind}: {place}: {first['msg']}, not {reprlib.repr(first['input'])}"
        ) from None
