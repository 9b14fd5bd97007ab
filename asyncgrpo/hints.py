"""What is usual for settings whose best value depends on model and task: hints, never limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from asyncgrpo.config import Config

LORA_FACTOR = 10  # an adapter wants about ten times the learning rate of all weights


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
