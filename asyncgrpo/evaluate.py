"""Accuracy, pass@k, reward and length on held-out prompts at one fixed policy version."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from asyncgrpo.settings.reward import EvalSettings
from asyncgrpo.types import Group


def is_correct(scores: Sequence[float], correct_above: float) -> list[bool]:
    """Correctness from the first reward function's scores; NaN (not applicable) is wrong."""
    return [bool(score > correct_above) for score in scores]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that one of k samples is correct, estimated from n >= k of which c are.

    The share of all k-subsets of the n that hold a correct one, 1 - C(n-c, k) / C(n, k): unbiased
    (Chen et al. 2021, arXiv:2107.03374, eq. 1). Whole numbers until the one division: exact.
    """
    subsets = math.comb(num_samples, k)
    return (subsets - math.comb(num_samples - num_correct, k)) / subsets


def summarise(
    groups: Iterable[Group],
    block: EvalSettings,
    *,
    version: int,
    num_prompts: int,
    correct_above: float,
    seconds: float,
) -> dict[str, Any]:
    """The report of one evaluation: shares and means over the prompts that were answered.

    num_answered is less than num_prompts when an actor died on the way; accuracy and
    truncated_share are of all completions; where there is nothing to average, 0.0.
    """
    groups = list(groups)
    first_parts = [next(iter(group.reward_parts.values())).tolist() for group in groups]
    correct = [is_correct(scores, correct_above) for scores in first_parts]
    by_source: dict[str, list[bool]] = {}
    for group, right in zip(groups, correct, strict=True):
        by_source.setdefault(group.lease.prompt.data_source, []).extend(right)
    completions = [completion for group in groups for completion in group.completions]
    return {
        "name": block.name,
        "version": version,
        "num_prompts": num_prompts,
        "num_answered": len(groups),
        "num_samples": block.num_samples,
        "temperature": block.sampling.temperature,
        "accuracy": _mean([right for rights in correct for right in rights]),
        "pass_at_k": {
            str(k): _mean([pass_at_k(len(right), sum(right), k) for right in correct])
            for k in block.k
        },
        "reward_mean": _mean([reward for group in groups for reward in group.rewards.tolist()]),
        "mean_tokens": _mean([len(completion.token_ids) for completion in completions]),
        "truncated_share": _mean([c.finish_reason == "length" for c in completions]),
        "accuracy_by_source": {name: _mean(by_source[name]) for name in sorted(by_source)},
        "seconds": seconds,
    }


def _mean(values: Sequence[float]) -> float:
    """Exactly rounded, so that it does not depend on the order in which answers arrived."""
    return math.fsum(values) / len(values) if values else 0.0
