"""All reward functions of a run: scores groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from asyncgrpo.config import RewardSettings
from asyncgrpo.errors import RewardError
from asyncgrpo.rewards.finding import bind, find
from asyncgrpo.rewards.function import MAX_FLOAT32, BoundFunction, Score
from asyncgrpo.types import Float32, Prompt

__all__ = ["RewardSet", "Scores", "bind", "load_rewards"]
PROBES = ("", "0")  # harmless completions that show contract errors before anything starts


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Rewards of one group of G completions."""

    rewards: Float32  # [G] weighted sum of the parts that apply
    parts: Mapping[str, Float32] = field(default_factory=dict)  # each [G]; NaN = not applicable


class RewardSet:
    """All reward functions of a run."""

    def __init__(self, functions: Sequence[BoundFunction]) -> None:
        self._functions = tuple(functions)

    def score(self, prompt: Prompt, completions: Sequence[str]) -> Scores:
        """Weighted sums and parts; RewardError when a function breaks its contract.

        Also when no function applies to a completion: then there is nothing to learn from.
        """
        return _combine([f.weight for f in self._functions], self._parts(prompt, completions))

    def probe(self, prompt: Prompt) -> None:
        """Calls each function with two harmless completions; RewardError as in `score`."""
        self._parts(prompt, PROBES)

    def _parts(self, prompt: Prompt, completions: Sequence[str]) -> dict[str, list[Score]]:
        # All are started before any is waited for: async ones are under way together.
        calls = {f.label: f.start(prompt, completions) for f in self._functions}
        return {
            label: [score for call in started for score in call.scores()]
            for label, started in calls.items()
        }


def load_rewards(settings: RewardSettings) -> RewardSet:
    """Finds every function of the settings; RewardError says which is missing and what to do."""
    return RewardSet([find(function) for function in settings.functions])


def _combine(weights: Sequence[float], parts: Mapping[str, list[Score]]) -> Scores:
    rewards = [
        _weighted_sum(weights, scores, index)
        for index, scores in enumerate(zip(*parts.values(), strict=True))
    ]
    return Scores(
        rewards=np.array(rewards, dtype=np.float32),
        parts={
            label: np.array([math.nan if s is None else s for s in scores], dtype=np.float32)
            for label, scores in parts.items()
        },
    )


def _weighted_sum(weights: Sequence[float], scores: Sequence[Score], index: int) -> float:
    terms = [w * s for w, s in zip(weights, scores, strict=True) if s is not None]
    if not terms:
        raise RewardError(
            f"no reward function applies to completion {index}: all returned None; let one of them "
            "return a number"
        )
    total = sum(terms)
    if not abs(total) <= MAX_FLOAT32:
        raise RewardError(
            f"the weighted reward of completion {index} is {total}, too large for float32; use "
            "smaller weights in reward.functions"
        )
    return total
