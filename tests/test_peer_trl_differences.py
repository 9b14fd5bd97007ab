"""Where our objective is defined differently from trl's: each test says how, and holds the rest.

Our value equals theirs after the stated difference. mu, p, pi, w, rho: see learner/inputs.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import make_group, make_lease
from peer_cases import CLIPS, EQUAL, PLAIN, SEEDS, UNCAPPED, assert_same, our_loss, weighed
from torch import Tensor
from trl_standin import Measured, Sample, random_sample, released, their_loss, their_scoring

from asyncgrpo.config import from_mapping
from asyncgrpo.learner.batch import pack
from asyncgrpo.settings.algo import AlgoSettings
from asyncgrpo.types import Completions

pytestmark = pytest.mark.peer


def their_weight(sample: Sample, name: str) -> tuple[Tensor, dict[str, Any]]:
    """What trl multiplies its policy term with, float32 [N, T], and the settings for that."""
    settings = EQUAL[name][1]
    if name != "opsm":
        return their_scoring(sample, **settings)["importance_sampling_ratio"], settings
    keep = released()[0].get_off_policy_mask(
        sample.advantages[:, None], sample.present, sample.behavior, sample.mask, 0.05
    )
    return keep, settings


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["decoupled", "tis_sequence", "icepop", "opsm"])
def test_our_kl_has_the_weight_of_the_policy_term_and_that_of_trl_has_none(
    name: str, seed: int
) -> None:
    """trl adds beta * KL after the correction and the off-policy mask: KL is never corrected."""
    sample = random_sample(seed)
    weight, settings = their_weight(sample, name)
    policy = their_loss(sample, **settings)
    kl = their_kl(sample, loss_type="dapo", use_bias_correction_kl=False)
    expected = policy.loss + (weight * kl.values).sum().item()
    ours = our_loss(sample, AlgoSettings(**EQUAL[name][0]), kl_coef=0.3)
    assert_same(ours, expected, policy.gradient + weight * kl.gradient)
    assert abs(expected - policy.loss - kl.loss) > 1e-3


def their_kl(sample: Sample, **settings: Any) -> Measured:
    """trl's KL term alone: no advantage, no policy term."""
    nothing = replace(sample, advantages=torch.zeros_like(sample.advantages))
    return their_loss(nothing, beta=0.3, **settings)


@pytest.mark.parametrize("seed", SEEDS)
def test_with_bypass_our_kl_has_the_value_of_the_bias_corrected_kl_of_trl_but_no_score_term(
    seed: int,
) -> None:
    """trl multiplies KL by rho with gradient (its default), we by a detached min(rho, cap).

    d (rho k) / d log pi = rho k' + rho k; ours has the first term alone.
    """
    sample = random_sample(seed)
    seen = replace(sample, proximal=sample.behavior)
    settings = {"loss_type": "dapo", "use_bias_correction_kl": True, **CLIPS}
    policy = their_loss(seen, loss_type="dapo", **CLIPS)
    kl = their_kl(seen, **settings)
    algo = AlgoSettings(correction="bypass", correction_cap=UNCAPPED)
    ours = our_loss(sample, algo, kl_coef=0.3)
    assert_same(ours, policy.loss + kl.loss, policy.gradient + kl.gradient - kl.values)


@pytest.mark.parametrize("seed", SEEDS)
def test_our_entropy_bonus_is_aggregated_as_the_loss_and_that_of_trl_is_a_token_mean(
    seed: int,
) -> None:
    """With sequence_mean ours is the mean over sequences of what trl has for each one alone."""
    sample, coef = random_sample(seed), 0.2
    policy = their_loss(sample, loss_type="grpo")
    alone = [their_loss(_only(sample, n), loss_type="grpo", entropy_coef=coef) for n in range(6)]
    bonus = sum(measured.loss for measured in alone) / 6
    slopes = torch.stack([measured.entropy_gradient for measured in alone]).mean(0)
    ours = our_loss(sample, AlgoSettings(**EQUAL["grpo"][0], entropy_coef=coef))
    assert_same(ours, policy.loss + bonus, policy.gradient, slopes)
    both = their_loss(sample, loss_type="grpo", entropy_coef=coef)
    assert abs(both.loss - policy.loss - bonus) > 1e-4


def _only(sample: Sample, row: int) -> Sample:
    """Without a policy term, and with one completion's tokens in the loss."""
    mask = sample.mask * (torch.arange(len(sample.mask)) == row)[:, None]
    return replace(sample, mask=mask, advantages=torch.zeros_like(sample.advantages))


TRUNCATED = 4


@pytest.mark.parametrize(("preset", "loss_type"), [("grpo", "grpo"), ("dr_grpo", "dr_grpo")])
def test_masked_truncated_completions_leave_our_sequence_count_and_stay_in_that_of_trl(
    preset: str, loss_type: str
) -> None:
    """trl masks their tokens, and still divides by the number of all completions."""
    sample = _truncated()
    ours = our_loss(sample, AlgoSettings(**EQUAL[preset][0]), num_sequences=_counts(sample)[1])
    theirs = their_loss(sample, loss_type=loss_type, mask_truncated_completions=True)
    assert _counts(sample)[1] == 5
    assert_same(ours, theirs.loss * 6 / 5, theirs.gradient * 6 / 5)


def test_masked_truncated_completions_leave_the_token_count_of_both() -> None:
    sample = _truncated()
    ours = our_loss(sample, AlgoSettings(**EQUAL["dapo"][0]), num_tokens=_counts(sample)[0])
    settings = {**EQUAL["dapo"][1], "mask_truncated_completions": True}
    theirs = their_loss(sample, **settings)
    assert_same(ours, theirs.loss, theirs.gradient)


def test_masked_stale_completions_stay_in_our_token_count_and_leave_that_of_trl() -> None:
    """Both keep them in the number of sequences; trl counts only the tokens that its mask keeps."""
    sample = _whole(random_sample(1))
    sample = replace(sample, mask=_without_row(sample.mask))
    num_tokens, num_sequences = _counts(sample, stale=TRUNCATED)
    for name in ("grpo", "dapo"):
        algo, theirs = AlgoSettings(**EQUAL[name][0]), their_loss(sample, **EQUAL[name][1])
        scale = float(sample.mask.sum()) / num_tokens if name == "dapo" else 1.0
        assert scale == 1.0 or scale < 0.95
        ours = our_loss(sample, algo, num_tokens=num_tokens, num_sequences=num_sequences)
        assert_same(ours, theirs.loss * scale, theirs.gradient * scale)


def _truncated() -> Sample:
    sample = _whole(random_sample(1))
    return replace(sample, mask=_without_row(sample.mask), truncated=(TRUNCATED,))


def _whole(sample: Sample) -> Sample:
    """Every token of a completion in the loss, as without tools."""
    lengths = torch.tensor(sample.lengths)[:, None]
    return replace(sample, mask=(torch.arange(sample.mask.shape[1]) < lengths).float())


def _without_row(mask: Tensor) -> Tensor:
    return mask * (torch.arange(len(mask)) != TRUNCATED)[:, None]


def _counts(sample: Sample, stale: int | None = None) -> tuple[int, int]:
    """Tokens and sequences that we divide by, from our own packing of such completions."""
    versions = [[0 if n == stale else 9] * length for n, length in enumerate(sample.lengths)]
    group = make_group(make_lease(group_size=len(versions)), versions=versions)
    ends = ["length" if n in sample.truncated else "stop" for n in range(len(versions))]
    cut = [
        replace(completion, finish_reason=end)
        for completion, end in zip(group.completions, ends, strict=True)
    ]
    room = {"max_staleness": 4, "staleness_action": "mask"}
    config = from_mapping({"buffer": room, "algo": {"mask_truncated": True}})
    _, report = pack([replace(group, completions=Completions.of(cut))], 9, config)
    return report.num_counted_tokens, report.num_counted_sequences


def test_our_ratio_is_held_at_e_to_the_20_without_gradient_and_that_of_trl_is_not() -> None:
    sample = random_sample(2)
    row, place = 1, 0  # a negative advantage: no clip bounds the upper side
    there = float(sample.present[row, place])
    ours = our_loss(sample.with_one("proximal", row, place, there - 25), AlgoSettings(**PLAIN))
    held = their_loss(
        sample.with_one("proximal", row, place, there - 20), loss_type="dapo", **CLIPS
    )
    expected = held.gradient.clone()
    assert expected[row, place] > 1e6
    expected[row, place] = 0.0
    assert_same(ours, held.loss, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_our_vespo_takes_the_whole_ratio_and_that_of_trl_truncates_p_over_mu(seed: int) -> None:
    """trl: W = prod (pi / p) min(p / mu, cap); ours is that for log mu >= log p - log cap."""
    sample, cap = random_sample(seed), 1.2
    theirs = their_loss(sample, **weighed("token_truncate", None, cap, "vespo"))
    algo = AlgoSettings(**EQUAL["vespo"][0])
    raised = torch.maximum(sample.behavior, sample.proximal - np.log(cap))
    assert_same(our_loss(replace(sample, behavior=raised), algo), theirs.loss, theirs.gradient)
    whole = their_loss(sample, **weighed("token_truncate", None, UNCAPPED, "vespo"))
    assert_same(our_loss(sample, algo), whole.loss, whole.gradient)
    assert abs(whole.loss - theirs.loss) > 1e-4


def test_our_sequence_mask_bounds_the_mean_log_weight_and_that_of_trl_the_sum() -> None:
    """And trl's also weighs with the product. Completions of one length have bands in common."""
    length, low, high = 4, 0.9, 1.1
    kept = set()
    for seed in SEEDS:
        sample = _whole(random_sample(seed, lengths=[length] * 6, spread=0.2))
        settings = weighed("sequence_mask", low**length, high**length)
        ratio = their_scoring(sample, **settings)["importance_sampling_ratio"]
        kept |= set((ratio > 0).flatten().tolist())
        theirs = their_loss(sample, **settings)
        algo = AlgoSettings(
            correction=("geometric_mask", "tis_sequence"),
            geometric_mask={"low": low, "high": high},
            tis_sequence={"cap": UNCAPPED},
        )
        assert_same(our_loss(sample, algo), theirs.loss, theirs.gradient)
    assert kept == {True, False}
