"""Token losses. Every public function here is one: its name is what `algo.loss` takes.

Each gets the inputs (see inputs.py for mu, p, pi, r, rho, A) and algo settings, and returns what
is minimised at each token, before mask, correction and aggregation. sg = stop gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncgrpo.learner.inputs import MAX_LOG_RATIO, LossInputs, safe_exp
from asyncgrpo.settings.algo import AlgoSettings

# A smaller sequence ratio has no weight left, and its square would be 0 in float32.
MIN_LOG_SEQUENCE_RATIO = -18.42


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """One loss per token, not yet masked or corrected."""

    loss: Tensor  # float32 [S], to be minimised
    is_clipped_low: Tensor | None = None  # bool [S] where a lower clip took the gradient away
    is_clipped_high: Tensor | None = None  # bool [S] where an upper clip did, or capped a weight


def ppo_clip(inputs: LossInputs, algo: AlgoSettings) -> TokenLoss:
    """Clipped surrogate of PPO; the two clips apart as in DAPO, optionally a dual clip.

    loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and for A < 0 at most -dual_clip A
    Source: PPO, arXiv 1707.06347 eq. 7; clip-higher arXiv 2503.14476; dual clip arXiv 1912.09729
    Settings: clip_low clip_high dual_clip
    Use: the default. With one optimizer step per batch r = 1 and only the correction acts.
    Staleness: 4 with correction decoupled, 16 with bypass, 2 uncorrected
    """
    dual = math.inf if algo.dual_clip is None else algo.dual_clip
    return _clipped(inputs.ratio, inputs, algo.clip_low, algo.clip_high, dual)


def cispo(inputs: LossInputs, algo: AlgoSettings) -> TokenLoss:
    """Caps the importance weight instead of the update: no token loses its gradient.

    loss = -sg(clip(rho, cispo.floor, cispo.cap)) A log pi
    Source: MiniMax-M1, arXiv 2506.13585; ScaleRL, arXiv 2510.13786 (cap 4 to 8, no floor)
    Settings: cispo.cap cispo.floor
    Use: long completions whose rare tokens a clip would silence. Needs correction bypass.
    Staleness: 4 (91 %), 8 (84 %)
    """
    ratio, cap, floor = inputs.behavior_ratio, algo.cispo.cap, algo.cispo.floor
    weight = ratio.clamp(min=floor, max=cap)
    return TokenLoss(
        loss=-weight * inputs.advantages * inputs.logprobs,
        is_clipped_low=weight > ratio,
        is_clipped_high=weight < ratio,
    )


def gspo(inputs: LossInputs, algo: AlgoSettings) -> TokenLoss:
    """Clips the sequence's geometric mean ratio: a sequence is trained whole or not at all.

    s = exp(mean_t log r); loss = -min(s A, clip(s, 1 - gspo.clip_low, 1 + gspo.clip_high) A)
    Source: GSPO, arXiv 2507.18071 eq. 5-7
    Settings: gspo.clip_low gspo.clip_high
    Use: mixture-of-experts models. With correction bypass, or several optimizer steps per batch.
        Meant for aggregation sequence_mean; token_mean weighs long sequences more.
    Staleness: 16 (92 %); starves when most sequences are clipped
    """
    ratio = inputs.on_tokens(safe_exp(inputs.sequence_mean(inputs.logprobs - inputs.old_logprobs)))
    return _clipped(ratio, inputs, algo.gspo.clip_low, algo.gspo.clip_high)


def gspo_token(inputs: LossInputs, algo: AlgoSettings) -> TokenLoss:
    """GSPO's clip with a gradient per token, for advantages that differ inside a sequence.

    s_t = sg(s) pi / sg(pi) with s as in gspo; loss = -min(s_t A, clip(s_t, ...) A)
    Source: arXiv 2507.18071 section 4.3
    Settings: gspo.clip_low gspo.clip_high
    Use: as gspo, with KL in the reward per token or a custom advantage per token.
    Staleness: as gspo
    """
    delta = (inputs.logprobs - inputs.old_logprobs).detach()
    ratio = inputs.on_tokens(safe_exp(inputs.sequence_mean(delta)))
    ratio = ratio * (inputs.logprobs - inputs.logprobs.detach()).exp()
    return _clipped(ratio, inputs, algo.gspo.clip_low, algo.gspo.clip_high)


def sapo(inputs: LossInputs, algo: AlgoSettings) -> TokenLoss:
    """A soft gate around r = 1 in place of a hard clip: the gradient fades, it never jumps.

    loss = -(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A
    Source: SAPO, arXiv 2511.20347
    Settings: sapo.tau_positive sapo.tau_negative
    Use: where hard clips make training jumpy. With bypass, or several optimizer steps per batch.
    Staleness: 2 (93 %), 4 (88 %); 76 % at 16: the gate still pulls far from r = 1
    """
    positive, negative = algo.sapo.tau_positive, algo.sapo.tau_negative
    tau = torch.where(inputs.advantages > 0, positive, negative)
    gate = torch.sigmoid(tau * (inputs.ratio - 1.0)) * 4.0 / tau
    return TokenLoss(loss=-gate * inputs.advantages)


def dppo_tv(inputs: LossInputs, algo: AlgoSettings) -> TokenLoss:
    """Trust region in probability, not in ratio: rare tokens are not clipped for tiny moves.

    A token leaves when pi - mu > delta (A > 0) or pi - mu < -delta (A <= 0);
    otherwise loss = -sg(min(rho, cap)) A log pi
    Source: DPPO, arXiv 2602.04879 (binary total variation; section 5.4 for the cap)
    Settings: dppo_tv.delta dppo_tv.cap
    Use: large vocabularies with many rare tokens. Needs correction bypass.
    Staleness: 16 (90 %)
    """
    ratio = inputs.behavior_ratio
    moved = (inputs.logprobs.exp() - inputs.behavior_logprobs.exp()).detach()
    is_high = (inputs.advantages > 0) & (moved > algo.dppo_tv.delta)
    is_low = (inputs.advantages <= 0) & (moved < -algo.dppo_tv.delta)
    loss = -ratio.clamp(max=algo.dppo_tv.cap) * inputs.advantages * inputs.logprobs
    return TokenLoss(
        loss=loss.masked_fill(is_high | is_low, 0.0), is_clipped_low=is_low, is_clipped_high=is_high
    )


def vespo(inputs: LossInputs, algo: AlgoSettings) -> TokenLoss:
    """Weighs a sequence by a smooth function of its ratio W that is 1 at W = 1 and fades around.

    loss = -sg(W^k exp(c (1 - W))) A log pi, W = prod_t rho; (k, c) by the sign of A
    Source: VESPO, arXiv 2602.10693 (gamma weights)
    Settings: vespo.positive vespo.negative
    Use: long lag with short or medium completions: W spreads with the square root of the length.
        Needs correction bypass.
    Staleness: 16 (91 %); 64 in its source; look at masks by length decile
    """
    log_ratio = (inputs.logprobs - inputs.behavior_logprobs).detach()
    total = inputs.sequence_sum(log_ratio).clamp(MIN_LOG_SEQUENCE_RATIO, MAX_LOG_RATIO)
    log_w = inputs.on_tokens(total)
    is_up = inputs.advantages >= 0
    power = torch.where(is_up, algo.vespo.positive[0], algo.vespo.negative[0])
    rate = torch.where(is_up, algo.vespo.positive[1], algo.vespo.negative[1])
    weight = (rate + power * log_w - rate * log_w.exp()).exp()
    return TokenLoss(loss=-weight * inputs.advantages * inputs.logprobs)


def topr(inputs: LossInputs, algo: AlgoSettings) -> TokenLoss:
    """Learns from good samples as they are, from bad ones only while they are still likely.

    loss = -A log pi for A > 0, -sg(min(ratio, 1)) A log pi for A < 0
    ratio is the whole sequence's prod_t rho (topr.level = sequence) or the token's rho (token)
    Source: TOPR, arXiv 2503.14286 eq. 8 (there by the sign of the reward)
    Settings: topr.level
    Use: data of any age, no trust region at all. Needs correction bypass.
    Staleness: 16 (92 %); unbounded in its source, with small learning rates
    """
    log_ratio = (inputs.logprobs - inputs.behavior_logprobs).detach()
    if algo.topr.level == "sequence":
        log_ratio = inputs.on_tokens(inputs.sequence_sum(log_ratio))
    ratio = safe_exp(log_ratio)
    is_bad = inputs.advantages < 0
    weight = torch.where(is_bad, ratio.clamp(max=1.0), 1.0)
    return TokenLoss(
        loss=-weight * inputs.advantages * inputs.logprobs,
        is_clipped_high=is_bad & (ratio > 1.0),
    )


def _clipped(
    ratio: Tensor, inputs: LossInputs, low: float, high: float, dual: float = math.inf
) -> TokenLoss:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), and for A < 0 at most -dual A."""
    low, high, advantages = 1.0 - low, 1.0 + high, inputs.advantages
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    ceiling = torch.where(advantages < 0, -dual * advantages, math.inf)
    is_above = loss > ceiling
    return TokenLoss(
        loss=torch.where(is_above, ceiling, loss),
        is_clipped_low=(ratio < low) & (advantages < 0),
        is_clipped_high=(ratio > high) & (advantages > 0) | is_above,
    )
