"""The policy loss of one micro-batch and the sums from which a step's metrics are made.

Notation: mu behaviour, p proximal, pi present policy; r = pi / p, w = p / mu. A micro-batch
yields sums over its loss tokens in the fixed order of SUM_KEYS, and maxima in that of MAX_KEYS:
ranks add and compare these vectors, then `finish_metrics` divides once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncgrpo.config import AlgoSettings
from asyncgrpo.learner.batch import Batch
from asyncgrpo.learner.corrections import CORRECTIONS, MAX_LOG_RATIO, Correction, safe_exp

SUM_KEYS = (
    "loss",  # already divided by the global token count: sums up to the step's loss
    "tokens",
    "weight",
    "weight_squared",
    "kl_k1",
    "kl_k3",
    "logprob_diff",
    "clip_low",
    "clip_high",
    "capped",
    "staleness",
    "entropy",
)
MAX_KEYS = ("logprob_diff", "staleness")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a loss may look at; it never sees logits. All float32 [S], 0 where mask is 0."""

    logprobs: Tensor  # log pi of the target, with gradient
    behavior_logprobs: Tensor  # log mu
    proximal_logprobs: Tensor  # log p, no gradient
    advantages: Tensor
    mask: Tensor  # 1 = in the loss
    staleness: Tensor  # policy versions
    entropy: Tensor  # nats, no gradient; only for metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """One loss per token, not yet masked or corrected."""

    loss: Tensor  # float32 [S], to be minimised
    is_clipped_low: Tensor  # float32 [S] 1 where the lower clip took the gradient away
    is_clipped_high: Tensor  # float32 [S]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """Loss of one micro-batch with its part of the step's metrics."""

    loss: Tensor  # float32 scalar with gradient
    sums: Tensor  # float64 [len(SUM_KEYS)], to be added over micro-batches and ranks
    maxima: Tensor  # float64 [len(MAX_KEYS)], to be maximised over micro-batches and ranks


def loss_inputs(batch: Batch, logprobs: Tensor, entropy: Tensor) -> LossInputs:
    """Inputs for one optimizer step per batch, where p is pi without its gradient.

    logprobs, entropy: float32 [S] on any device; the batch's arrays follow them there.
    """

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(getattr(batch, name)).to(logprobs.device, torch.float32)

    return LossInputs(
        logprobs=logprobs,
        behavior_logprobs=tensor("behavior_logprobs"),
        proximal_logprobs=logprobs.detach(),
        advantages=tensor("advantages"),
        mask=tensor("loss_mask"),
        staleness=tensor("staleness"),
        entropy=entropy,
    )


def ppo_clip(inputs: LossInputs, algo: AlgoSettings) -> TokenLoss:
    """loss = -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A).

    PPO, arXiv 1707.06347, equation 7, with the two clips apart as in DAPO, arXiv 2503.14476
    (clip-higher).
    """
    low, high = 1.0 - algo.clip_low, 1.0 + algo.clip_high
    ratio = safe_exp(inputs.logprobs - inputs.proximal_logprobs)
    advantages = inputs.advantages
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    return TokenLoss(
        loss=-objective,
        is_clipped_low=((ratio < low) & (advantages < 0)).float(),
        is_clipped_high=((ratio > high) & (advantages > 0)).float(),
    )


TOKEN_LOSSES: dict[str, Callable[[LossInputs, AlgoSettings], TokenLoss]] = {"ppo_clip": ppo_clip}


def policy_loss(
    inputs: LossInputs,
    algo: AlgoSettings,
    num_loss_tokens_global: int,
    token_loss: str = "ppo_clip",
) -> LossOutput:
    """Token mean over the global batch: sum(mask * weight * loss) / num_loss_tokens_global.

    Token-level aggregation of DAPO, arXiv 2503.14476. Losses of all micro-batches and ranks add
    up to the loss of the step, and so do their gradients: DistributedDataParallel averages
    gradients over ranks, so multiply by the number of ranks before backward().
    """
    token = TOKEN_LOSSES[token_loss](inputs, algo)
    correction = CORRECTIONS[algo.correction](inputs, algo)
    # max: a batch of empty completions has count 0, and 0 / 0 would make the weights NaN.
    count = max(num_loss_tokens_global, 1)
    loss = (inputs.mask * correction.weight * token.loss).sum() / count
    with torch.no_grad():
        sums, maxima = _measure(inputs, token, correction)
        sums[SUM_KEYS.index("loss")] = loss.double()
    return LossOutput(loss=loss, sums=sums, maxima=maxima)


def _measure(inputs: LossInputs, token: TokenLoss, correction: Correction) -> tuple[Tensor, Tensor]:
    """Sums and maxima over the loss tokens; the place of the loss itself is left 0.

    With delta = log p - log mu: k1 = -delta, k3 = exp(delta) - delta - 1 (both estimate
    KL(mu || p), http://joschu.net/blog/kl-approx.html), w = exp(delta).
    """
    mask = inputs.mask
    delta = inputs.proximal_logprobs - inputs.behavior_logprobs
    weight = safe_exp(delta)
    bounded = delta.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    per_token = {
        "loss": torch.zeros_like(mask),
        "tokens": torch.ones_like(mask),
        "weight": weight,
        "weight_squared": weight.double().square(),
        "kl_k1": -delta,
        # expm1: exp(delta) - 1 loses all digits of the k3 of nearly equal policies.
        "kl_k3": bounded.expm1() - bounded,
        "logprob_diff": delta.abs(),
        "clip_low": token.is_clipped_low,
        "clip_high": token.is_clipped_high,
        "capped": correction.is_capped,
        "staleness": inputs.staleness,
        "entropy": inputs.entropy,
    }
    # float64: a float32 sum over a large batch would depend on how it was split.
    sums = torch.stack([(mask * per_token[key]).sum(dtype=torch.float64) for key in SUM_KEYS])
    maxima = torch.stack([(mask * per_token[key]).max().double() for key in MAX_KEYS])
    return sums, maxima


def finish_metrics(sums: Sequence[float], maxima: Sequence[float]) -> dict[str, float]:
    """The step's numbers from its sums and maxima over all micro-batches and ranks.

    Means are per loss token; ess is Kish's effective share of samples (sum w)^2 / (n sum w^2).
    A step without loss tokens reports 0 throughout.
    """
    total = dict(zip(SUM_KEYS, map(float, sums), strict=True))
    largest = dict(zip(MAX_KEYS, map(float, maxima), strict=True))
    count = max(total["tokens"], 1.0)  # an empty step would divide by zero
    squares = total["weight_squared"]
    return {
        "loss": total["loss"],
        "kl": total["kl_k3"] / count,
        "kl_k1": total["kl_k1"] / count,
        "ess": total["weight"] ** 2 / (count * squares) if squares > 0 else 0.0,
        "clip_low_share": total["clip_low"] / count,
        "clip_high_share": total["clip_high"] / count,
        "cap_share": total["capped"] / count,
        "logprob_diff_mean": total["logprob_diff"] / count,
        "logprob_diff_max": largest["logprob_diff"],
        "staleness_mean": total["staleness"] / count,
        "staleness_max": largest["staleness"],
        "entropy": total["entropy"] / count,
    }
