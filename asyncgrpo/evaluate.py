"""Accuracy on held-out prompts at one fixed policy version."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from asyncgrpo.types import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """One evaluation. Shares are of the prompts that were answered."""

    version: int
    num_prompts: int
    num_answered: int  # fewer than num_prompts when an actor died on the way
    accuracy: float
    reward_mean: float
    mean_tokens: float
    accuracy_by_source: dict[str, float] = field(default_factory=dict)

    def as_fields(self) -> dict[str, Any]:
        """Plain values, for the wire and for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def is_correct(scores: Sequence[float], correct_above: float) -> list[bool]:
    """Correctness from the first reward function's scores; NaN (not applicable) is wrong."""
    return [bool(score > correct_above) for score in scores]


def summarise(
    groups: Iterable[Group], *, version: int, num_prompts: int, correct_above: float
) -> EvalReport:
    """Averages over all completions of the groups; 0.0 where there is nothing to average."""
    by_source: dict[str, list[bool]] = {}
    rewards: list[float] = []
    tokens: list[int] = []
    answered = 0
    for group in groups:
        first_part = next(iter(group.reward_parts.values()))
        right = is_correct([float(score) for score in first_part], correct_above)
        by_source.setdefault(group.lease.prompt.data_source, []).extend(right)
        rewards += [float(reward) for reward in group.rewards]
        tokens += [len(completion.token_ids) for completion in group.completions]
        answered += 1
    everything = [right for rights in by_source.values() for right in rights]
    return EvalReport(
        version=version,
        num_prompts=num_prompts,
        num_answered=answered,
        accuracy=_mean(everything),
        reward_mean=_mean(rewards),
        mean_tokens=_mean(tokens),
        accuracy_by_source={name: _mean(by_source[name]) for name in sorted(by_source)},
    )


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values) if values else 0.0
