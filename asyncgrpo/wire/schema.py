"""The requests that servers take: their kinds, and what each field must hold.

Checked before anybody acts on a request, so that half of a bad one leaves no trace.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, get_args

from asyncgrpo.errors import WireError
from asyncgrpo.types import FinishReason

Table = Mapping[str, Mapping[str, Callable[[Any], bool]]]  # kind -> field -> check
REST = "*"  # a check of all fields without their own
FINISH_REASONS = frozenset(get_args(FinishReason))


def anything(value: Any) -> bool:
    """there"""
    return True


def count(value: Any) -> bool:
    """a whole number from 0 to 2^31 - 1"""
    return type(value) is int and 0 <= value < 1 << 31


def number(value: Any) -> bool:
    """a finite number"""
    return type(value) in (int, float) and math.isfinite(value)


def name(value: Any) -> bool:
    """a text of at most 256 characters"""
    return isinstance(value, str) and len(value) <= 256


def texts(value: Any) -> bool:
    """a list of texts"""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def numbers(value: Any) -> bool:
    """a list of numbers"""
    return isinstance(value, list) and all(type(item) in (int, float) for item in value)


def counts(value: Any) -> bool:
    """a list of whole numbers from 0 to 2^31 - 1"""
    return isinstance(value, list) and all(map(count, value))


def timings(value: Any) -> bool:
    """finite numbers by name"""
    return isinstance(value, dict) and all(map(name, value)) and all(map(number, value.values()))


def finish_reasons(value: Any) -> bool:
    """a list of finish reasons"""
    return texts(value) and FINISH_REASONS.issuperset(value)


BUFFER_REQUESTS: Table = {
    "hello": {"actor": name},
    "lease": {"version": count, "max": count},
    "accept": {"lease_ids": texts, "refused": texts},
    "put": {"groups": anything},  # codec.groups_from checks them
    "fail": {"lease_id": name, "reason": name},
    "held": {"version": count},
    "status": {"actor": name, REST: number},
    "take": {"step": count, "rank": count, "world_size": count},
    "trained": {"step": count},
    "evaluate": {"version": count},
    "results": {"version": count},
}
WEIGHTS_REQUESTS: Table = {
    "join": {"actor": name},
    "ready": {"actor": name, "round": count},
    "later": {"actor": name, "round": count},
    "free": {"actor": name},
    "alive": {"actor": name},
    "loaded": {
        "actor": name,
        "version": count,
        "digests": numbers,
        "copy_seconds": number,
        "stall_seconds": number,
        "canary_tokens": counts,
        "canary_logprobs": numbers,
    },
}
PARTS: Table = {
    "group": {
        "lease": anything,  # compared with the one that was given out
        "finish_reasons": finish_reasons,
        "texts": texts,
        "reward_parts": texts,
        "actor": name,
        "timings": timings,
    }
}


def check_fields(kind: str, fields: Mapping[Any, Any], table: Table) -> None:
    """WireError names the kind that is unknown, or the first field that is missing or wrong."""
    if kind not in table:
        raise WireError(f"unknown kind {reprlib.repr(kind)}")
    checks = table[kind]
    missing = [key for key in checks if key not in fields and key != REST]
    if missing:
        raise WireError(f"{kind}: {missing[0]} is missing")
    for key, value in fields.items():
        check = checks.get(key, checks.get(REST, anything))
        if not check(value):
            raise WireError(f"{kind}: {key}={reprlib.repr(value)} is not {check.__doc__}")
