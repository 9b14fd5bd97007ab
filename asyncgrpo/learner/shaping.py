"""From a group's rewards to its advantages: penalties, combination, estimator."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from asyncgrpo.algorithms import call
from asyncgrpo.config import Config
from asyncgrpo.errors import AlgorithmError
from asyncgrpo.evaluate import is_correct
from asyncgrpo.imports import shown
from asyncgrpo.learner.advantages import Float64, GroupRewards
from asyncgrpo.settings.algo import AlgoSettings
from asyncgrpo.types import Float32, Group, Int32


def penalties(group: Group, config: Config) -> Float64:
    """float64 [G], never positive: grows over the last algo.overlong_buffer tokens to the limit.

    Soft overlong punishment of DAPO, arXiv 2503.14476 eq. 13, times algo.overlong_penalty.
    """
    limit, buffer = config.sampling.max_completion_tokens, config.algo.overlong_buffer
    lengths = _lengths(group)
    if not buffer:
        return np.zeros(len(lengths))
    over = np.clip((lengths - (limit - buffer)) / buffer, 0.0, 1.0)
    return -config.algo.overlong_penalty * over


def advantages(
    group: Group, config: Config, extra: Float64, batch_std: float = math.nan
) -> Float32:
    """float32 [G]; exactly 0 where all rewards of a group are equal.

    extra: float64 [G], added to the reward (penalties, KL). batch_std: see `batch_std`.
    """
    algo = config.algo
    first = next(iter(group.reward_parts.values()), group.rewards)
    whole = GroupRewards(
        rewards=group.rewards.astype(np.float64) + extra,
        lengths=_lengths(group),
        is_correct=np.array(is_correct(first.tolist(), config.reward.correct_above), np.bool_),
        batch_std=batch_std,
    )
    if algo.reward_combination == "sum":
        return estimate(whole, algo).astype(np.float32)
    weights = {function.label: function.weight for function in config.reward.functions}
    total = estimate(replace(whole, rewards=extra), algo)
    for label, part in group.reward_parts.items():
        applies = ~np.isnan(part)  # where a function does not apply it does not count either
        chosen = GroupRewards(
            rewards=part[applies].astype(np.float64),
            lengths=whole.lengths[applies],
            is_correct=whole.is_correct[applies],
        )
        total[applies] += weights.get(label, 1.0) * estimate(chosen, algo)
    return total.astype(np.float32)


def reward_to_go(values: Float64, cu_seqlens: Int32) -> Float64:
    """float64 [S] -> [S]: at each place the sum from there to the end of its sequence."""
    before = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.repeat(cu_seqlens[1:], np.diff(cu_seqlens))
    return before[ends] - before[:-1]


def estimate(group: GroupRewards, algo: AlgoSettings) -> Float64:
    """float64 [G] by algo.advantage; AlgorithmError when a user's own estimator breaks."""
    # Judged by the spread: a mean of equal rewards that is off by rounding would be blown up by a
    # small std + eps to advantages of size 1, and the std of a single reward is NaN.
    if len(group.rewards) == 0 or np.ptp(group.rewards) == 0.0:
        return np.zeros(len(group.rewards))
    returned = call("advantage", algo.advantage, group, algo)
    try:
        found = np.array(returned, np.float64)
    except (TypeError, ValueError):
        found = np.full(0, np.nan)
    if found.shape != group.rewards.shape or not np.isfinite(found).all():
        raise AlgorithmError(
            f"advantage {algo.advantage!r} returned {shown(returned)} for rewards "
            f"{group.rewards.tolist()}; return one finite number per completion"
        )
    return found


def _lengths(group: Group) -> NDArray[np.int64]:
    return np.array(group.completions.lengths, np.int64)
