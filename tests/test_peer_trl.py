"""Our losses and corrections against the released code of trl, on the same numbers.

Their code is called, never copied (see trl_standin.py). Where the two are defined differently:
test_peer_trl_differences.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peer_cases import EQUAL, SEEDS, assert_same, our_loss
from torch import Tensor
from trl_standin import Sample, random_sample, their_config, their_loss

from asyncgrpo.settings.algo import AlgoSettings

pytestmark = pytest.mark.peer


def assert_as_in_trl(
    sample: Sample, ours: dict[str, Any], theirs: dict[str, Any], **both: Any
) -> None:
    """Ours and theirs agree; with bypass their old policy is given our mu."""
    algo = AlgoSettings(**ours)
    seen = replace(sample, proximal=sample.behavior) if "bypass" in algo.correction else sample
    expected = their_loss(seen, **theirs, **both)
    found = our_loss(sample, algo, kl_coef=theirs.get("beta", 0.0), **both)
    assert_same(found, expected.loss, expected.gradient, expected.entropy_gradient)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", EQUAL)
def test_loss_and_gradient_are_those_of_trl(name: str, seed: int) -> None:
    assert_as_in_trl(random_sample(seed), *EQUAL[name])


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo"])
def test_micro_batches_add_up_as_in_trl(name: str) -> None:
    """Equally many sequences in each, as trl always has; otherwise its sequence mean differs."""
    assert_as_in_trl(random_sample(0), *EQUAL[name], micro_batches=2)


def test_every_clip_cap_and_mask_acts_in_these_samples() -> None:
    samples = [random_sample(seed) for seed in SEEDS]
    for sample in samples:
        assert sample.mask.sum() < sum(sample.lengths)
        weight = (sample.proximal - sample.behavior).exp()[sample.mask > 0]
        assert weight.min() < 0.8
        assert weight.max() > 1.3
    far = torch.cat([_is_far(sample)[sample.advantages < 0] for sample in samples])
    assert 0.2 < far.float().mean() < 0.8  # opsm
    for old in ("proximal", "behavior"):
        signed = torch.cat([_signed_ratio(sample, old) for sample in samples])
        assert signed.max() > 1.3  # upper clip and cispo's cap
        assert ((signed < 0) & (signed > -0.8)).any()  # lower clip
        assert signed.min() < -1.5  # dual clip


def _is_far(sample: Sample) -> Tensor:
    distance = ((sample.behavior - sample.present) * sample.mask).sum(1) / sample.mask.sum(1)
    return distance > 0.05


def _signed_ratio(sample: Sample, old: str) -> Tensor:
    """The ratios of all loss tokens, negative where the advantage is."""
    ratio = (sample.present - getattr(sample, old)).exp() * sample.advantages.sign()[:, None]
    return ratio[sample.mask > 0]


def test_defaults_that_both_take_from_a_paper_are_the_same() -> None:
    theirs, ours = their_config(), AlgoSettings()
    assert theirs.epsilon == ours.clip_low
    assert theirs.sapo_temperature_pos == ours.sapo.tau_positive
    assert theirs.sapo_temperature_neg == ours.sapo.tau_negative
    assert (theirs.vespo_k_pos, theirs.vespo_lambda_pos) == ours.vespo.positive
    assert (theirs.vespo_k_neg, theirs.vespo_lambda_neg) == ours.vespo.negative
