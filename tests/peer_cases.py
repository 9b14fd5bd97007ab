"""Our loss on the samples that trl's is called on, and settings under which the two are equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from trl_standin import MAX_TOKENS, Measured, Sample

from asyncgrpo.learner.inputs import LossInputs, Totals
from asyncgrpo.learner.objective import objective
from asyncgrpo.settings.algo import AlgoSettings

TOLERANCE = 1e-5
SEEDS = range(4)
UNCAPPED = 1e6


def our_loss(
    sample: Sample,
    algo: AlgoSettings,
    *,
    kl_coef: float = 0.0,
    micro_batches: int = 1,
    num_tokens: int | None = None,
    num_sequences: int | None = None,
) -> Measured:
    """Our objective, summed over micro-batches; the counts are those of trl unless given."""
    present, entropy = sample.present.clone(), sample.entropy.clone()
    leaves = (present.requires_grad_(), entropy.requires_grad_())
    totals = Totals(
        num_tokens=int(sample.mask.sum()) if num_tokens is None else num_tokens,
        num_sequences=len(sample.lengths) if num_sequences is None else num_sequences,
        num_microbatches=micro_batches,
        max_completion_tokens=MAX_TOKENS,
    )
    loss, values = torch.zeros(()), torch.zeros_like(sample.mask)
    for rows in torch.arange(len(sample.lengths)).chunk(micro_batches):
        row = torch.cat([torch.full((sample.lengths[int(n)],), int(n)) for n in rows])
        place = torch.cat([torch.arange(sample.lengths[int(n)]) for n in rows])
        inputs = _inputs(sample, algo, leaves, (row, place), totals, kl_coef)
        found = objective(inputs, algo, kl_coef)
        loss = loss + found.loss
        values[row, place] = found.per_token
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradient, entropy_gradient = (torch.zeros_like(present) if g is None else g for g in grads)
    return Measured(
        loss=loss.item(), gradient=gradient, entropy_gradient=entropy_gradient, values=values
    )


def _inputs(
    sample: Sample,
    algo: AlgoSettings,
    leaves: tuple[Tensor, Tensor],
    at: tuple[Tensor, Tensor],
    totals: Totals,
    kl_coef: float,
) -> LossInputs:
    """The tokens at (rows, places) as one packed row."""
    row, place = at
    mask = sample.mask[row, place]
    present, entropy = (leaf[row, place] * mask for leaf in leaves)
    behavior, proximal = (v[row, place] * mask for v in (sample.behavior, sample.proximal))
    return LossInputs(
        logprobs=present,
        behavior_logprobs=behavior,
        proximal_logprobs=proximal,
        old_logprobs=behavior if "bypass" in algo.correction else proximal,
        ref_logprobs=sample.ref[row, place] * mask if kl_coef else None,
        advantages=sample.advantages[row] * mask,
        mask=mask,
        staleness=torch.zeros_like(mask),
        entropy=entropy,
        sequence_ids=row - row.min(),
        num_sequences=len(row.unique()),
        totals=totals,
    )


def assert_same(
    ours: Measured, loss: float, gradient: Tensor, entropy_gradient: Tensor | None = None
) -> None:
    assert gradient.abs().max() > 1e-3, "nothing is compared"
    assert ours.loss == pytest.approx(loss, abs=TOLERANCE, rel=TOLERANCE)
    torch.testing.assert_close(ours.gradient, gradient, atol=TOLERANCE, rtol=TOLERANCE)
    if entropy_gradient is not None:
        torch.testing.assert_close(
            ours.entropy_gradient, entropy_gradient, atol=TOLERANCE, rtol=TOLERANCE
        )


CLIPS = {"epsilon": 0.2, "epsilon_high": 0.28}
PLAIN = {"correction": "none", "minibatches": 2}


def weighed(mode: str, low: float | None, high: float, loss_type: str = "dapo") -> dict[str, Any]:
    """trl's settings for a correction of the engine's log-probs."""
    return {
        "use_vllm": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
        "loss_type": loss_type,
        **CLIPS,
    }


# name -> ours, theirs: equal as they stand
EQUAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({**PLAIN, "preset": "grpo"}, {"loss_type": "grpo"}),
    "dapo": ({**PLAIN, "preset": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": ({**PLAIN, "preset": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    "bnpo": ({**PLAIN, "aggregation": "bnpo"}, {"loss_type": "bnpo", **CLIPS}),
    "bypass": ({"correction": "bypass"}, {"loss_type": "dapo", **CLIPS}),
    "dual_clip": ({**PLAIN, "dual_clip": 1.5}, {"loss_type": "dapo", "delta": 1.5, **CLIPS}),
    "cispo": (
        {"loss": "cispo", "cispo": {"cap": 1.3}, "correction": "bypass"},
        {"loss_type": "cispo", "epsilon_high": 1.3},
    ),
    "sapo": (
        {"loss": "sapo", "correction": "bypass", "aggregation": "sequence_mean"},
        {"loss_type": "sapo"},
    ),
    "sapo_steep": (
        {**PLAIN, "loss": "sapo", "sapo": {"tau_positive": 2.0, "tau_negative": 5.0}}
        | {"aggregation": "sequence_mean"},
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 5.0},
    ),
    "vespo": ({"loss": "vespo", "correction": "bypass"}, {"loss_type": "vespo"}),
    "vespo_other": (
        {"loss": "vespo", "correction": "bypass"}
        | {"vespo": {"positive": (1.0, 1.5), "negative": (2.0, 0.5)}},
        {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.5}
        | {"vespo_k_neg": 2.0, "vespo_lambda_neg": 0.5},
    ),
    "gspo": (
        {**PLAIN, "loss": "gspo", "gspo": {"clip_low": 0.1, "clip_high": 0.15}}
        | {"aggregation": "sequence_mean"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"}
        | {"epsilon": 0.1, "epsilon_high": 0.15},
    ),
    "gspo_bypass_token_mean": (
        {"loss": "gspo", "gspo": {"clip_low": 0.1, "clip_high": 0.15}, "correction": "bypass"},
        {"loss_type": "dapo", "importance_sampling_level": "sequence"}
        | {"epsilon": 0.1, "epsilon_high": 0.15},
    ),
    "decoupled": ({"correction_cap": 1.3}, weighed("token_truncate", None, 1.3)),
    "tis_sequence_mean": (
        {"correction": "tis", "correction_cap": 1.3, "aggregation": "sequence_mean"},
        weighed("token_truncate", None, 1.3, "grpo"),
    ),
    "tis_sequence": (
        {"correction": "tis_sequence", "tis_sequence": {"cap": 1.5}},
        weighed("sequence_truncate", None, 1.5),
    ),
    "icepop": (
        {"correction": "icepop", "icepop": {"low": 0.8, "high": 1.3}},
        weighed("token_mask", 0.8, 1.3),
    ),
    "opsm": (
        {"correction": "opsm", "opsm": {"threshold": 0.05}},
        {"loss_type": "dapo", "off_policy_mask_threshold": 0.05, **CLIPS},
    ),
    "opsm_decoupled": (
        {"correction": ("opsm", "decoupled"), "opsm": {"threshold": 0.05}, "correction_cap": 1.3},
        {**weighed("token_truncate", None, 1.3), "off_policy_mask_threshold": 0.05},
    ),
    "kl": ({**PLAIN}, {"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False, **CLIPS}),
    "kl_sequence_mean": (
        {**PLAIN, "preset": "grpo"},
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    ),
    "entropy": (
        {**PLAIN, "entropy_coef": 0.2},
        {"loss_type": "dapo", "entropy_coef": 0.2, **CLIPS},
    ),
    "everything": (
        {"correction": ("opsm", "icepop"), "icepop": {"low": 0.8, "high": 1.3}}
        | {"opsm": {"threshold": 0.05}, "entropy_coef": 0.2, "dual_clip": 1.5, "minibatches": 2},
        {**weighed("token_mask", 0.8, 1.3), "off_policy_mask_threshold": 0.05}
        | {"entropy_coef": 0.2, "delta": 1.5},
    ),
}
