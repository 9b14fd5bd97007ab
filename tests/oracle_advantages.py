"""The formulas of the advantages as slow float64 loops, to check the fast code by.

In each of them a group without spread gives exactly 0: tested on the rewards, since rounding
leaves neither their mean nor their standard deviation exact.
"""

from __future__ import annotations

import math

EPS = 1e-4


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def sample_std(values: list[float]) -> float:
    """With the divisor n − 1; 0 for a single value."""
    middle = mean(values)
    squares = sum((value - middle) ** 2 for value in values)
    return math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0


def spreads(values: list[float]) -> bool:
    return max(values) > min(values)


def grpo(rewards: list[float], eps: float = EPS) -> list[float]:
    """(R_i − mean) / (std + ε), std of a sample. DeepSeekMath 2402.03300 §4.1.2."""
    if not spreads(rewards):
        return [0.0 for _ in rewards]
    middle, std = mean(rewards), sample_std(rewards)
    return [(reward - middle) / (std + eps) for reward in rewards]


def dr_grpo(rewards: list[float]) -> list[float]:
    """R_i − mean. Dr. GRPO 2503.20783."""
    middle = mean(rewards)
    return [reward - middle if spreads(rewards) else 0.0 for reward in rewards]


def rloo(rewards: list[float]) -> list[float]:
    """R_i − mean of the others. 2402.14740 §3.3; 0 for a group of one."""
    if not spreads(rewards):
        return [0.0 for _ in rewards]
    total = sum(rewards)
    return [reward - (total - reward) / (len(rewards) - 1) for reward in rewards]


def batch_std(groups: list[list[float]], eps: float = EPS) -> list[list[float]]:
    """(R_i − mean of its group) / (std + ε), std of the raw rewards of the whole batch.

    2508.08221 (Lite PPO); TRL's scale_rewards="batch".
    """
    std = sample_std([reward for group in groups for reward in group])
    return [[value / (std + eps) for value in dr_grpo(group)] for group in groups]


def opo(rewards: list[float], lengths: list[int]) -> list[float]:
    """R_i − Σ L R / Σ L, L the completion tokens. OPO 2505.23585."""
    weighted = sum(size * reward for size, reward in zip(lengths, rewards, strict=True))
    baseline = weighted / sum(lengths)
    return [reward - baseline if spreads(rewards) else 0.0 for reward in rewards]


def pass_at_k(correct: list[bool], k: int) -> list[float]:
    """Advantage of each of N samples when random k of them are rewarded if one is correct.

    With n wrong ones: F = C(n, k) / C(N, k) (the chance that k samples all fail), σ² = F (1 − F);
    correct: F / σ, wrong: (F − C(n − 1, k − 1) / C(N − 1, k − 1)) / σ; 0 where σ = 0.
    2508.10751 eq. 11–15, with F = 1 − R̄. No ε.
    """
    count, wrong = len(correct), sum(1 for c in correct if not c)
    fail = math.comb(wrong, k) / math.comb(count, k)
    if fail in (0.0, 1.0):
        return [0.0 for _ in correct]
    sigma = math.sqrt(fail * (1 - fail))
    others_fail = math.comb(wrong - 1, k - 1) / math.comb(count - 1, k - 1)
    return [(fail if c else fail - others_fail) / sigma for c in correct]
