"""Group-relative advantages: what each completion's reward says against its own group."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from asyncgrpo.types import Float32

Advantage = Callable[[Float32, float], Float32]  # (rewards [G], eps) -> advantages [G]


def grpo(rewards: Float32, eps: float) -> Float32:
    """A_i = (R_i - mean R) / (std R + eps), std with G - 1 degrees of freedom.

    DeepSeekMath, arXiv 2402.03300. rewards float32 [G] -> float32 [G].
    """
    if _is_uniform(rewards):
        return np.zeros(len(rewards), np.float32)
    wide = rewards.astype(np.float64)
    scaled: Float32 = ((wide - wide.mean()) / (wide.std(ddof=1) + eps)).astype(np.float32)
    return scaled


def dr_grpo(rewards: Float32, eps: float) -> Float32:
    """A_i = R_i - mean R (eps is not used).

    Dr. GRPO, arXiv 2503.20783. rewards float32 [G] -> float32 [G].
    """
    if _is_uniform(rewards):
        return np.zeros(len(rewards), np.float32)
    wide = rewards.astype(np.float64)
    centred: Float32 = (wide - wide.mean()).astype(np.float32)
    return centred


ADVANTAGES: dict[str, Advantage] = {"grpo": grpo, "dr_grpo": dr_grpo}


def group_advantages(name: str, rewards: Float32, eps: float) -> Float32:
    """Advantages of one group by the estimator called `name`; exactly 0 for equal rewards.

    rewards: float32 [G]; eps: added to the standard deviation. Returns float32 [G].
    """
    return ADVANTAGES[name](rewards, eps)


def _is_uniform(rewards: Float32) -> bool:
    # Judged by the spread: a mean of equal rewards that is off by rounding would be blown up by a
    # small std + eps to advantages of size 1, and the std of a single reward is NaN.
    return len(rewards) == 0 or bool(rewards.max() == rewards.min())
