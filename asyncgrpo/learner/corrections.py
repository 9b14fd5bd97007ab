"""Corrections for data of older policies. Every public function is one: `algo.correction` names.

Each says which tokens stay (keep) and what their loss is multiplied with (weight). They look at
w = p / mu and never carry gradient. Masks act first, then the one weight (see objective.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from asyncgrpo.learner.inputs import LossInputs, moves_on, safe_exp
from asyncgrpo.settings.algo import AlgoSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What one rule does to the tokens; None: it does not mask, or does not weigh."""

    keep: Tensor | None = None  # bool [S]
    weight: Tensor | None = None  # float32 [S]
    is_capped: Tensor | None = None  # bool [S] where the importance weight was cut off


def none(inputs: LossInputs, algo: AlgoSettings) -> Correction:
    """Takes stale data as if p had sampled it.

    weight = 1, the loss's ratio is pi / p: mu is ignored
    Source: the baseline that asynchronous training fails with (AReaL, arXiv 2505.24298)
    Use: only to compare, or with max_staleness 0. Stands alone.
    Staleness: 2; 88 % at 4, 63 % at 16 where corrected runs keep 85 to 92 %
    """
    return Correction()


def bypass(inputs: LossInputs, algo: AlgoSettings) -> Correction:
    """The loss's own ratio is taken against mu: one ratio both corrects and clips.

    weight = 1, p := mu in the loss, so r = pi / mu
    Source: PPO as written, arXiv 1707.06347; the bypass mode of verl
    Use: losses that weigh by rho themselves (cispo, dppo_tv, vespo, topr); ppo_clip at short lag.
        May be combined with masks, not with weights: these would correct twice.
    Staleness: 16; at small learning rates clipped tokens give no gradient and learning starves
    """
    return Correction()


def decoupled(inputs: LossInputs, algo: AlgoSettings) -> Correction:
    """Decoupled PPO: w corrects for staleness, the clip bounds the step from p.

    weight = sg(min(w, correction_cap)), the loss's ratio is pi / p
    Source: Hilton et al., arXiv 2110.00641; asynchronous use: AReaL, arXiv 2505.24298
    Settings: correction_cap proximal
    Use: the default; holds at high learning rates and at long lag.
    Staleness: 4 (89 %), 8 (90 %); AReaL: 42.2 at 4, 41.0 at 8, 38.7 at 16
    """
    return _capped(safe_exp(inputs.log_weight), algo.correction_cap)


def tis(inputs: LossInputs, algo: AlgoSettings) -> Correction:
    """Truncated importance sampling per token: the same weight as decoupled, by its other name.

    weight = sg(min(w, correction_cap))
    Source: Ionides 2008; for engine mismatch: fengyao.notion.site/off-policy-rl (2025)
    Settings: correction_cap proximal
    Use: as decoupled. Two names since both are known; naming both is refused.
    Staleness: as decoupled; collapses at 12 in its sources without a clip
    """
    return _capped(safe_exp(inputs.log_weight), algo.correction_cap)


def tis_sequence(inputs: LossInputs, algo: AlgoSettings) -> Correction:
    """Truncated importance sampling of whole sequences: unbiased up to the cap.

    weight = sg(min(prod_t w, tis_sequence.cap)), the same for all tokens of a sequence
    Source: Ionides 2008; sequence form in verl's rollout correction
    Settings: tis_sequence.cap proximal
    Use: large batches with learner.ess_scaled_lr: the product spreads with the length.
    Staleness: 4 (90 %), 8 (88 %); 128 in its source with large batches and an ESS-scaled rate
    """
    log_weight = inputs.on_tokens(inputs.sequence_sum(inputs.log_weight))
    return _capped(safe_exp(log_weight), algo.tis_sequence.cap)


def icepop(inputs: LossInputs, algo: AlgoSettings) -> Correction:
    """Drops tokens on which engine and learner disagree too much, weighs the others.

    keep low <= w <= high; weight = sg(w) unless a capped weight is named too
    Source: Ring-1T, arXiv 2510.18855 (IcePop)
    Settings: icepop.low icepop.high
    Use: mixture-of-experts models, low-precision engines.
    Staleness: 4 (92 %), 8 (88 %)
    """
    weight = safe_exp(inputs.log_weight)
    keep = (weight >= algo.icepop.low) & (weight <= algo.icepop.high)
    return Correction(keep=keep, weight=weight)


def geometric_mask(inputs: LossInputs, algo: AlgoSettings) -> Correction:
    """Drops sequences whose mean log-ratio leaves a band.

    keep low <= exp(mean_t log w) <= high
    Source: Liu et al. 2025 (geometric rejection sampling), in verl's rollout correction
    Settings: geometric_mask.low geometric_mask.high
    Use: only calibrated: look at masked/geometric_mask/decile_*; the band is a length filter
        or does nothing. Combine with decoupled for weights.
    Staleness: 0 with the default band, which is for engine mismatch; 8 (89 %) with 0.5 to 2
    """
    mean = inputs.on_tokens(safe_exp(inputs.sequence_mean(inputs.log_weight)))
    return Correction(keep=(mean >= algo.geometric_mask.low) & (mean <= algo.geometric_mask.high))


def opsm(inputs: LossInputs, algo: AlgoSettings) -> Correction:
    """Off-policy sequence masking: bad sequences that pi has already left are not pushed further.

    drop a sequence if A < 0 and mean_t (log mu - log pi) > threshold
    Source: DeepSeek-V3.2, arXiv 2512.02556 eq. 9 (with the present pi, as here)
    Settings: opsm.threshold
    Use: an add-on to decoupled where negative samples destabilise.
    Staleness: 16 (90 %) with decoupled
    """
    distance = inputs.sequence_mean((inputs.behavior_logprobs - inputs.logprobs).detach())
    is_far = inputs.on_tokens(distance) > algo.opsm.threshold
    return Correction(keep=~(is_far & (inputs.advantages < 0)))


def m2po(inputs: LossInputs, algo: AlgoSettings) -> Correction:
    """Masks the tokens with the largest log(w)^2 until their mean over the batch is small enough.

    among tokens pushed further the way they went (A > 0 and w > 1, or A < 0 and w < 1):
    keep log(w)^2 <= cut, the largest cut with mean of the kept log(w)^2 <= threshold
    Source: M2PO, arXiv 2510.01161 section 5.2 and algorithm 1 (there with pi / mu)
    Settings: m2po.threshold
    Use: very long lag. Costs one more forward pass: the cut is one number for the whole batch.
    Staleness: 16 (91 %) with decoupled; 256 in its source
    """
    log_weight = inputs.log_weight
    is_small = log_weight.square() <= inputs.totals.second_moment_cut
    return Correction(keep=is_small | ~moves_on(log_weight, inputs.advantages))


def _capped(weight: Tensor, cap: float) -> Correction:
    return Correction(weight=weight.clamp(max=cap), is_capped=weight > cap)
