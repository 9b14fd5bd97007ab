"""The oracles against numbers worked out by hand, so that they can be trusted to check others."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import oracle_advantages as advantages
import oracle_corrections as corrections
import oracle_sums as sums
import oracles
import pytest
from oracles import Batch, Rows, gradient, random_case

LOG2 = math.log(2)


def one(advantage: float, *ratios: float, p: float = 0.25, **others: object) -> Batch:
    """One sequence of tokens with these π/p and p = μ = ref, of probability `p`."""
    base = np.full(len(ratios), math.log(p))
    return [
        {
            "logprobs": base + np.log(np.array(ratios)),
            "behavior": base.copy(),
            "proximal": base.copy(),
            "ref": base.copy(),
            "mask": np.ones(len(ratios)),
            "staleness": np.zeros(len(ratios), dtype=int),
            "advantage": advantage,
            **others,
        }
    ]


def drifted(*log_w: float, advantage: float = 1.0) -> Batch:
    """One sequence whose log p − log μ are these, π = p."""
    row = np.array(log_w) - 5.0
    return one(advantage, *np.ones(len(row)), logprobs=row, proximal=row, p=math.exp(-5.0))


def slope_of(loss: Callable[..., Rows], batch: Batch, weight: Rows | None = None, **set_: object):
    """Gradient of the summed loss, by differences, with the stop-gradient parts held."""
    held = [sequence["logprobs"] for sequence in batch]

    def total(rows: Rows) -> float:
        values = loss(batch, rows, held, **set_)
        return sums.token_sum(batch, values if weight is None else sums.product(values, weight))

    return gradient(total, held)


def assert_rows(actual: Rows, expected: Rows, **tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


# --- token losses -------------------------------------------------------------------------------


def test_ppo_clip_takes_the_worse_of_the_ratio_and_the_clipped_ratio():
    assert_rows(oracles.ppo_clip(one(2.0, 0.5, 1.1, 2.0)), [[-1.0, -2.2, -2.56]])
    assert_rows(oracles.ppo_clip(one(-2.0, 0.5, 1.1, 2.0)), [[1.6, 2.2, 4.0]])


def test_dual_clip_bounds_the_loss_of_a_bad_token_only():
    assert_rows(oracles.ppo_clip(one(-2.0, 2.0, 5.0), dual_clip=3.0), [[4.0, 6.0]])
    assert_rows(oracles.ppo_clip(one(2.0, 0.1, 5.0), dual_clip=3.0), [[-0.2, -2.56]])


def test_the_gradient_of_ppo_clip_is_minus_r_a_inside_of_the_clip_and_0_outside():
    good = slope_of(oracles.ppo_clip, one(2.0, 0.5, 1.1, 2.0))
    bad = slope_of(oracles.ppo_clip, one(-2.0, 0.5, 1.1, 2.0))
    dual = slope_of(oracles.ppo_clip, one(-2.0, 2.0, 5.0), dual_clip=3.0)
    assert_rows(good, [[-1.0, -2.2, 0.0]], atol=1e-8)
    assert_rows(bad, [[0.0, 2.2, 4.0]], atol=1e-8)
    assert_rows(dual, [[4.0, 0.0]], atol=1e-8)


def test_cispo_weighs_the_log_prob_by_the_capped_ratio_without_a_gradient_through_it():
    batch = one(2.0, 0.5, 8.0, p=0.1)
    assert_rows(oracles.cispo(batch), [[-math.log(0.05), -10 * math.log(0.8)]])
    assert_rows(slope_of(oracles.cispo, batch), [[-1.0, -10.0]], atol=1e-8)
    assert_rows(slope_of(oracles.cispo, batch, clip_low=0.9), [[-1.8, -10.0]], atol=1e-8)


def test_gspo_uses_the_geometric_mean_over_the_unmasked_tokens():
    batch = one(3.0, 2.0, 0.5, 9.0, mask=np.array([1.0, 1.0, 0.0]))
    wide = {"clip_low": 0.5, "clip_high": 0.5}
    assert_rows(oracles.gspo(batch, **wide), [[-3.0, -3.0, 0.0]])
    assert_rows(slope_of(oracles.gspo, batch, **wide), [[-3.0, -3.0, 0.0]], atol=1e-7)
    assert_rows(oracles.gspo(one(1.0, 1.1)), [[-1.0004]])
    assert_rows(oracles.gspo(one(-1.0, 0.9)), [[0.9997]])


def test_gspo_and_its_token_form_agree_in_value_and_under_the_sequence_mean_in_gradient():
    batch = random_case(np.random.default_rng(3))
    wide = {"clip_low": 9.0, "clip_high": 9.0}
    weight = [np.full(len(s["mask"]), 1 / max(oracles.length(s), 1)) for s in batch]
    assert_rows(oracles.gspo(batch), oracles.gspo_token(batch))
    whole = slope_of(oracles.gspo, batch, weight, **wide)
    assert_rows(slope_of(oracles.gspo_token, batch, weight, **wide), whole, atol=1e-7)
    assert max(abs(row).max() for row in whole) > 0.01


def test_sapo_is_plain_policy_gradient_at_ratio_1_and_fades_away_from_it():
    assert_rows(oracles.sapo(one(2.0, 1.0)), [[-4.0]])
    assert_rows(oracles.sapo(one(-2.1, 1.0)), [[4.0]])
    assert_rows(slope_of(oracles.sapo, one(-3.0, 1.0)), [[3.0]], atol=1e-7)
    at_3 = -4 * 3 * math.exp(-2) / (1 + math.exp(-2)) ** 2
    assert_rows(slope_of(oracles.sapo, one(1.0, 3.0)), [[at_3]], atol=1e-7)


def test_dppo_drops_tokens_whose_probability_moved_too_far_the_way_of_the_advantage():
    moved = {"behavior": np.log([0.1, 0.5, 0.9]), "logprobs": np.log([0.4, 0.5, 0.6])}
    assert_rows(
        oracles.dppo_tv(one(1.0, 1, 1, 1, **moved)), [[0, -math.log(0.5), -math.log(0.6) / 1.5]]
    )
    assert_rows(
        oracles.dppo_tv(one(-1.0, 1, 1, 1, **moved)), [[4 * math.log(0.4), math.log(0.5), 0]]
    )
    rare = one(-1.0, 1, behavior=np.log([0.01]), logprobs=np.log([0.5]))
    assert_rows(slope_of(oracles.dppo_tv, rare), [[20.0]], atol=1e-6)


def test_vespo_weighs_a_sequence_by_its_ratio_and_leaves_ratio_1_alone():
    phi = {1.0: 2**2 * math.exp(-3), -1.0: 2**3 * math.exp(-2)}
    for sign, weight in phi.items():
        assert_rows(slope_of(oracles.vespo, one(sign, 4.0, 0.5)), [[-sign * weight] * 2], atol=1e-7)
        assert_rows(slope_of(oracles.vespo, one(sign, 4.0, 0.25)), [[-sign] * 2], atol=1e-7)


def test_topr_weighs_only_bad_tokens_and_never_above_1():
    assert_rows(slope_of(oracles.topr, one(2.0, 0.5, 3.0)), [[-2.0, -2.0]], atol=1e-7)
    assert_rows(slope_of(oracles.topr, one(-2.0, 0.5, 3.0)), [[1.0, 2.0]], atol=1e-7)
    whole = slope_of(oracles.topr, one(-2.0, 0.5, 0.5), level="sequence")
    assert_rows(whole, [[0.5, 0.5]], atol=1e-7)


LINEAR = (oracles.cispo, oracles.dppo_tv, oracles.vespo, oracles.topr)


@pytest.mark.parametrize("seed", range(12))
def test_the_slopes_found_by_hand_are_those_of_the_differences(seed: int):
    batch = random_case(np.random.default_rng(seed))
    weight = [np.random.default_rng(9).random(len(s["mask"])) for s in batch]
    wide = {"clip_low": 0.1, "clip_high": 0.1}
    cases = [
        (oracles.ppo_clip, {"dual_clip": 1.2}, oracles.ppo_clip_slope(batch, dual_clip=1.2)),
        (oracles.sapo, {}, oracles.sapo_slope(batch)),
    ]
    for loss, settings, slope in cases:
        expected = sums.product(slope, weight)
        assert_rows(slope_of(loss, batch, weight, **settings), expected, atol=1e-6)
    by_hand = oracles.gspo_gradient(batch, weight, **wide)
    assert_rows(slope_of(oracles.gspo, batch, weight, **wide), by_hand, atol=1e-6)
    for loss in LINEAR:  # linear in log π, so that the slope is the loss at log π = 1
        units = loss(batch, [np.ones(len(s["mask"])) for s in batch])
        assert_rows(slope_of(loss, batch), units, atol=1e-6)


ALL = (oracles.ppo_clip, oracles.gspo, oracles.gspo_token, oracles.sapo, *LINEAR)


@pytest.mark.parametrize("loss", ALL)
def test_every_loss_stays_finite_and_is_0_where_masked_or_without_advantage(loss):
    for seed in range(40):
        batch = random_case(np.random.default_rng(seed), extreme=True)
        for sequence, row in zip(batch, loss(batch), strict=True):
            assert np.isfinite(row).all()
            assert not row[sequence["mask"] == 0].any()
            assert sequence["advantage"] != 0 or not row.any()


def test_the_clamp_stops_the_value_and_the_gradient_at_a_ratio_of_e_to_the_20():
    far = one(-1.0, 1, logprobs=np.array([-0.1]), proximal=np.array([-24.0]))
    assert_rows(oracles.ppo_clip(far), [[math.exp(20)]], rtol=1e-12)
    assert_rows(slope_of(oracles.ppo_clip, far), [[0.0]])


# --- corrections --------------------------------------------------------------------------------


def test_token_tis_caps():
    assert_rows(corrections.tis(drifted(-LOG2, 0.0, 2 * LOG2))[1], [[0.5, 1.0, 2.0]])


def test_sequence_tis_multiplies_the_unmasked_ratios():
    batch = drifted(LOG2, LOG2, 3.0)
    batch[0]["mask"] = np.array([1.0, 1.0, 0.0])
    assert_rows(corrections.tis_sequence(batch)[1], [[4, 4, 0]])
    assert_rows(corrections.tis_sequence(batch, cap=3.0)[1], [[3, 3, 0]])


def test_icepop_drops_outside_of_the_band_and_weighs_within():
    keep, weight = corrections.icepop(drifted(-1.0, 0.0, LOG2, 2.0))
    assert_rows(keep, [[0, 1, 1, 0]])
    assert_rows(weight, [[0, 1, 2, 0]])


def test_the_geometric_mask_looks_at_the_mean_and_takes_all_or_nothing():
    assert_rows(corrections.geometric_mask(drifted(1.0, -1.0))[1], [[1, 1]])
    assert_rows(corrections.geometric_mask(drifted(0.03, 0.0))[0], [[0, 0]])


def test_opsm_vetoes_only_bad_sequences_that_the_learner_has_moved_away_from():
    assert_rows(corrections.opsm(drifted(-1e-3, 0.0, advantage=-1.0))[0], [[0, 0]])
    assert_rows(corrections.opsm(drifted(1e-3, 0.0, advantage=-1.0))[0], [[1, 1]])
    assert_rows(corrections.opsm(drifted(-1.0, advantage=1.0))[0], [[1]])


def test_m2po_drops_the_largest_of_the_clippable_tokens_until_their_mean_fits():
    good, bad = drifted(0.1, 0.3, 0.5, -0.9), drifted(-0.2, 0.9, -0.6, advantage=-1.0)
    batch = good + bad
    # T: .01 .09 .25 | .04 .36, mean .15; without .36 .0975; without .25 .0467; without .09 .025
    assert_rows(corrections.m2po(batch)[0], [[1, 0, 0, 1], [1, 1, 0]])
    assert_rows(corrections.m2po(batch, threshold=0.15)[0], [[1, 1, 1, 1], [1, 1, 1]])
    assert_rows(corrections.m2po(batch, threshold=0.1)[0], [[1, 1, 1, 1], [1, 1, 0]])


def test_the_loglinear_proximal_policy_nears_the_present_one_with_staleness():
    lags = {"behavior": np.zeros(4), "staleness": np.array([0, 1, 3, 7])}
    batch = one(1.0, 1, 1, 1, 1, logprobs=np.full(4, -8.0), **lags)
    assert_rows(corrections.loglinear_proximal(batch), [[0, -4, -6, -7]])


# --- KL, aggregation, diagnostics ---------------------------------------------------------------


def test_kl_estimators_at_half_a_nat():
    batch = one(1.0, math.exp(-0.5))
    expected = {"k1": -0.5, "k2": 0.125, "k3": 0.1487212707, "abs": 0.5}
    for kind, value in expected.items():
        assert_rows(oracles.kl(batch, kind), [[value]], rtol=1e-9)
    slope = gradient(
        lambda rows: sums.token_sum(batch, oracles.kl(batch, "k3", rows)), [batch[0]["logprobs"]]
    )
    assert_rows(slope, [[1 - math.exp(0.5)]], atol=1e-8)


def test_the_aggregations_of_two_sequences_of_different_length():
    batch = one(1.0, 1, 1, 1) + one(1.0, 1, 1, mask=np.array([1.0, 0.0]))
    batch += one(1.0, 1, mask=np.zeros(1))
    values = [np.array([1.0, 2.0, 3.0]), np.array([10.0, 99.0]), np.array([99.0])]
    assert sums.token_mean(batch, values) == pytest.approx(16 / 4)
    assert sums.sequence_mean(batch, values) == pytest.approx((2 + 10 + 0) / 3)
    assert sums.dr_grpo(batch, values, 8) == pytest.approx(16 / 24)
    assert sums.bnpo(batch, values) == pytest.approx(4)
    assert sums.bnpo(batch, values, [[0], [1, 2]]) == pytest.approx((2 + 10) / 2)


def test_the_weights_of_1_and_3_have_an_effective_share_of_four_fifths():
    batch = drifted(0.0, math.log(3))
    assert sums.ess(batch) == pytest.approx(16 / 20)
    assert sums.chi2(batch) == pytest.approx(4)


def test_drift_is_split_by_staleness():
    batch = drifted(0.0, LOG2, LOG2)
    batch[0]["staleness"] = np.array([0, 2, 2])
    found = sums.drift_by_staleness(batch)
    assert found[0] == (0.0, 0.0, 1)
    assert found[2] == (pytest.approx(-LOG2), pytest.approx(1 - LOG2), 2)


def test_what_was_removed_is_reported_by_length():
    batch = one(1.0, 1) + one(1.0, 1, 1) + one(1.0, 1, 1) + one(1.0, 1, 1, 1, 1)
    batch += one(1.0, 1, mask=np.zeros(1))
    keep = [np.array(row, dtype=float) for row in ([1], [0, 0], [1, 0], [0, 0, 0, 1], [0])]
    assert sums.removed_by_decile(batch, keep) == {0: (0, 0), 2: (0.5, 0.75), 7: (0, 0.75)}


# --- advantages ---------------------------------------------------------------------------------

REWARDS = [0.5, 0.9, 0.6, 0.4]


def test_group_advantages_of_four_rewards():
    std = math.sqrt(0.14 / 3)
    expected = [-0.1, 0.3, 0.0, -0.2]
    assert advantages.dr_grpo(REWARDS) == pytest.approx(expected)
    assert advantages.grpo(REWARDS) == pytest.approx([x / (std + 1e-4) for x in expected])
    assert advantages.rloo(REWARDS) == pytest.approx([4 / 3 * x for x in expected])
    assert advantages.opo(REWARDS, [1, 2, 3, 4]) == pytest.approx([-0.07, 0.33, 0.03, -0.17])


def test_equal_rewards_give_exactly_0():
    equal = [0.1, 0.1, 0.1]
    assert sum(equal) / 3 != 0.1
    for compute in (advantages.grpo, advantages.dr_grpo, advantages.rloo):
        assert compute(equal) == [0.0, 0.0, 0.0]
        assert compute([0.7]) == [0.0]
    assert advantages.opo(equal, [3, 1, 7]) == [0.0, 0.0, 0.0]
    assert advantages.batch_std([equal, [0.0, 1.0]])[0] == [0.0, 0.0, 0.0]


def test_the_batch_std_is_that_of_the_raw_rewards():
    std = math.sqrt(8 / 3)  # of 0 2 4 2, a sample around 2
    expected = [[-1 / (std + 1e-4), 1 / (std + 1e-4)], [1 / (std + 1e-4), -1 / (std + 1e-4)]]
    found = advantages.batch_std([[0.0, 2.0], [4.0, 2.0]])
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("right", range(7))
def test_pass_at_k_is_the_mean_over_all_groups_of_k(k: int, right: int):
    """By enumeration: each group's reward is normalised over all groups, and a sample gets the
    mean over the groups that it is in."""
    correct = [i < right for i in range(6)]
    groups = list(combinations(range(6), k))
    rewards = [float(any(correct[i] for i in group)) for group in groups]
    middle = sum(rewards) / len(rewards)
    sigma = math.sqrt(sum((r - middle) ** 2 for r in rewards) / len(rewards))
    expected = []
    for i in range(6):
        own = [r for r, group in zip(rewards, groups, strict=True) if i in group]
        expected.append((sum(own) / len(own) - middle) / sigma if len(set(rewards)) > 1 else 0.0)
    assert advantages.pass_at_k(correct, k) == pytest.approx(expected, abs=1e-12)


# --- the cases ----------------------------------------------------------------------------------


def test_random_cases_reach_the_corners():
    batches = [random_case(np.random.default_rng(s), extreme=True) for s in range(60)]
    sequences = [sequence for batch in batches for sequence in batch]
    gaps = np.concatenate([s["logprobs"] - s["behavior"] for s in sequences])
    assert {len(batch) for batch in batches} == {1, 2, 3, 4, 5, 6}
    assert any(len(s["mask"]) == 1 for s in sequences)
    assert any(len(s["mask"]) > 1 and not s["mask"].any() for s in sequences)
    assert any(s["advantage"] == 0 for s in sequences)
    assert gaps.min() < -20 < 20 < gaps.max()
    assert all(s[name].max() < 0 for s in sequences for name in ("logprobs", "behavior", "ref"))
    first, again = (random_case(np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first[0]["logprobs"], again[0]["logprobs"])
