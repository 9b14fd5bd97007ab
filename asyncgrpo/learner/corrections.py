"""Off-policy corrections: what each token's loss is multiplied with, for data of older policies.

Notation: mu the behaviour policy that sampled a token, p the proximal policy (the learner's at
the start of the step), w = p / mu the importance weight of the token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from asyncgrpo.config import AlgoSettings
    from asyncgrpo.learner.losses import LossInputs

# exp of a larger difference of log-probs overflows float32 once squared (e^40 = 2e17 is safe,
# e^89 is infinite), and inf * 0 is NaN in every sum after it.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Multiplies the token losses. No gradient flows through it."""

    weight: Tensor  # float32 [S]
    is_capped: Tensor  # float32 [S] 1 where the importance weight was cut off


def safe_exp(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), the exponent held within +-MAX_LOG_RATIO; gradient 0 outside."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def decoupled(inputs: LossInputs, algo: AlgoSettings) -> Correction:
    """weight = sg(min(w, cap)) with w = p / mu, for a loss clipped on pi / p.

    Decoupled PPO objective of Hilton et al., arXiv 2110.00641, used asynchronously by AReaL, arXiv
    2505.24298. Truncation of w at algo.correction_cap bounds its variance.
    """
    ratio = safe_exp(inputs.proximal_logprobs - inputs.behavior_logprobs).detach()
    cap = algo.correction_cap
    return Correction(weight=ratio.clamp(max=cap), is_capped=(ratio > cap).float())


def none(inputs: LossInputs, algo: AlgoSettings) -> Correction:
    """weight = 1: stale data is taken as if p had sampled it."""
    ones = torch.ones_like(inputs.behavior_logprobs)
    return Correction(weight=ones, is_capped=torch.zeros_like(ones))


CORRECTIONS: dict[str, Callable[[LossInputs, AlgoSettings], Correction]] = {
    "decoupled": decoupled,
    "none": none,
}
