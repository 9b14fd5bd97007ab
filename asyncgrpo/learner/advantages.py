"""Advantages of a group: what each reward says against the others. Every public function is one.

The name is what `algo.advantage` takes. Each gets one group and returns [G] numbers; groups whose
rewards are all equal never get here: their advantages are exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, nan, sqrt

import numpy as np
from numpy.typing import NDArray

from asyncgrpo.settings.algo import AlgoSettings

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRewards:
    """What an estimator may look at: one group of G completions."""

    rewards: Float64  # [G] after length penalties and KL, if these are in the reward
    lengths: NDArray[np.int64]  # [G] completion tokens
    is_correct: NDArray[np.bool_]  # [G] first reward function above reward.correct_above
    batch_std: float = nan  # of all rewards of the batch, all ranks


def grpo(group: GroupRewards, algo: AlgoSettings) -> Float64:
    """Centred on the group's mean, divided by its standard deviation.

    A_i = (R_i - mean R) / (std R + advantage_eps), std with G - advantage_ddof degrees of freedom
    Source: DeepSeekMath, arXiv 2402.03300 section 4.1.2
    Settings: advantage_eps advantage_ddof
    Use: the default. Needs algo.drop_uniform_groups when rewards hold a length penalty.
    """
    spread = group.rewards.std(ddof=algo.advantage_ddof)
    return (group.rewards - group.rewards.mean()) / (spread + algo.advantage_eps)


def dr_grpo(group: GroupRewards, algo: AlgoSettings) -> Float64:
    """Centred only: easy and hard questions are not blown up to the same size.

    A_i = R_i - mean R
    Source: Dr. GRPO, arXiv 2503.20783
    Use: with aggregation dr_grpo, or wherever dividing by a small spread hurts.
    """
    return group.rewards - group.rewards.mean()


def rloo(group: GroupRewards, algo: AlgoSettings) -> Float64:
    """Against the mean of the others: an unbiased baseline.

    A_i = R_i - mean of R_j, j != i = G / (G - 1) (R_i - mean R)
    Source: RLOO, arXiv 2402.14740
    Use: small groups.
    """
    count = len(group.rewards)
    return (group.rewards - group.rewards.mean()) * count / (count - 1)


def batch_std(group: GroupRewards, algo: AlgoSettings) -> Float64:
    """Centred on the group's mean, divided by the spread of the whole batch.

    A_i = (R_i - mean R) / (std of all rewards of the batch + advantage_eps)
    Source: TRL's scale_rewards = batch; arXiv 2508.08221
    Settings: advantage_eps advantage_ddof
    Use: keeps the scale of grpo without blowing up groups that hardly differ.
    """
    return (group.rewards - group.rewards.mean()) / (group.batch_std + algo.advantage_eps)


def opo(group: GroupRewards, algo: AlgoSettings) -> Float64:
    """Against the length-weighted mean: the baseline of least variance, roughly.

    A_i = R_i - sum_j L_j R_j / sum_j L_j
    Source: OPO, arXiv 2505.23585
    Use: exactly on-policy runs (max_staleness 0) with lengths that differ widely.
    """
    total = max(int(group.lengths.sum()), 1)  # a group of empty completions has no length
    return group.rewards - (group.lengths * group.rewards).sum() / total


def pass_at_k(group: GroupRewards, algo: AlgoSettings) -> Float64:
    """Rewards sets of k answers that hold a right one: keeps exploring where one is enough.

    m = 1 - C(wrong, k) / C(G, k); A_right = (1 - m) / s, s = sqrt(m (1 - m))
    A_wrong = (1 - m - C(wrong - 1, k - 1) / C(G - 1, k - 1)) / s
    Source: arXiv 2508.10751 (its analytic form)
    Settings: pass_k
    Use: when accuracy among many samples counts. Looks at correctness only, not at reward sizes.
    """
    count, k = len(group.rewards), algo.pass_k
    wrong = int((~group.is_correct).sum())
    mean = 1.0 - comb(wrong, k) / comb(count, k)
    if wrong in (0, count) or mean == 1.0:  # every set, or none, holds a right answer: no spread
        return np.zeros(count)
    spread = sqrt(mean * (1.0 - mean))
    right_advantage = (1.0 - mean) / spread
    others = comb(wrong - 1, k - 1) / comb(count - 1, k - 1)
    wrong_advantage = (1.0 - mean - others) / spread
    return np.where(group.is_correct, right_advantage, wrong_advantage)
