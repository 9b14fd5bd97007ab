"""Hints: the name that somebody may have meant, and values that are usual for a setting."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from asyncgrpo.config import Config

LORA_FACTOR = 10  # an adapter wants about ten times the learning rate of all weights


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one that begins with `name`, or else is spelled most like it."""
    known = list(names)
    near = [other for other in known if name and other.startswith(name)]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return near[0] if near else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """ "did you mean 'x'? " or nothing."""
    near = nearest(name, names)
    return f"did you mean {near!r}? " if near else ""


class Usual(NamedTuple):
    low: float
    high: float
    why: str


USUAL: Mapping[str, Usual] = {
    "learner.lr": Usual(
        5e-7, 1e-5, "for all weights of a pretrained model; learner.lora wants ten times as much"
    ),
    "sampling.temperature": Usual(
        0.5, 1.2, "below, completions of a group are alike; above, they are mostly noise"
    ),
    "algo.group_size": Usual(4, 16, "more is a steadier signal and costs as much more"),
    "algo.kl_coef": Usual(1e-3, 0.2, "or 0; above, the policy hardly leaves the reference"),
}


def unusual(config: Config) -> Iterator[str]:
    """A warning for each setting outside of what is usual; 0 (off) and the embedded model pass."""
    for key, (low, high, why) in USUAL.items():
        room, name = key.split(".")
        value = getattr(getattr(config, room), name)
        if key == "learner.lr":
            if Path(config.model.path).name.startswith("tiny"):  # by name, or its folder
                continue
            high *= LORA_FACTOR if config.learner.lora else 1
        if value and not low <= value <= high:
            yield f"{key}={value:g} is not usual: {low:g} to {high:g} is ({why})"
