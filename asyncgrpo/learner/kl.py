"""Estimators of the KL divergence from pi to a reference, per token. Every public function is one.

delta = log ref - log pi at the sampled token. http://joschu.net/blog/kl-approx.html
"""

from __future__ import annotations

from torch import Tensor

from asyncgrpo.learner.inputs import MAX_LOG_RATIO


def k1(delta: Tensor) -> Tensor:
    """The log-ratio: unbiased, noisy, may be negative.

    -delta
    Source: Schulman 2020, k1
    Use: in the reward. In the loss its expected gradient is zero: refused there.
    """
    return -delta


def k2(delta: Tensor) -> Tensor:
    """Half the squared log-ratio: low variance, its gradient is the KL's.

    delta^2 / 2
    Source: Schulman 2020, k2
    Use: in the loss, where the exact direction of the gradient matters.
    """
    return delta.square() / 2


def k3(delta: Tensor) -> Tensor:
    """Unbiased and never negative: the usual choice.

    exp(delta) - delta - 1
    Source: Schulman 2020, k3; GRPO, arXiv 2402.03300 eq. 4
    Use: the default, in the loss.
    """
    bounded = delta.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    # expm1: exp(delta) - 1 loses all digits of the k3 of nearly equal policies.
    return bounded.expm1() - bounded


def abs(delta: Tensor) -> Tensor:
    """The size of the log-ratio: pulls back with the same force at any distance.

    |delta|
    Source: the abs penalty of RLHF trainers (Ziegler et al., arXiv 1909.08593, code)
    Use: to compare.
    """
    return delta.abs()
