"""Each token loss against its oracle: value and gradient, in and out of every clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from oracles import Rows, random_case
from packed_case import as_inputs, as_rows, assert_rows_equal

from asyncgrpo.algorithms import catalogue, find
from asyncgrpo.settings.algo import AlgoSettings

Oracle = Callable[..., Rows]
TWO = {"passes": 2}
BYPASS = {"correction": "bypass"}
CASES: dict[str, tuple[dict[str, Any], Oracle, dict[str, Any]]] = {
    "ppo_clip": ({}, oracles.ppo_clip, {}),
    "ppo_clip bypass": (BYPASS, oracles.ppo_clip, {"anchor": "behavior"}),
    "ppo_clip clips": (
        {"clip_low": 0.05, "clip_high": 0.4},
        oracles.ppo_clip,
        {"clip_low": 0.05, "clip_high": 0.4},
    ),
    "ppo_clip dual": ({**TWO, "dual_clip": 1.5}, oracles.ppo_clip, {"dual_clip": 1.5}),
    "cispo": ({"loss": "cispo", **BYPASS}, oracles.cispo, {}),
    "cispo floor": (
        {"loss": "cispo", **BYPASS, "cispo": {"cap": 1.2, "floor": 0.7}},
        oracles.cispo,
        {"clip_high": 1.2, "clip_low": 0.7},
    ),
    "gspo": ({"loss": "gspo", **TWO}, oracles.gspo, {}),
    "gspo bypass": (
        {"loss": "gspo", **BYPASS, "gspo": {"clip_low": 0.1, "clip_high": 0.2}},
        oracles.gspo,
        {"clip_low": 0.1, "clip_high": 0.2, "anchor": "behavior"},
    ),
    "gspo_token": (
        {"loss": "gspo_token", **TWO, "gspo": {"clip_low": 0.1, "clip_high": 0.2}},
        oracles.gspo_token,
        {"clip_low": 0.1, "clip_high": 0.2},
    ),
    "sapo": ({"loss": "sapo", **TWO}, oracles.sapo, {}),
    "sapo taus": (
        {"loss": "sapo", **BYPASS, "sapo": {"tau_positive": 2.0, "tau_negative": 3.0}},
        oracles.sapo,
        {"tau_positive": 2.0, "tau_negative": 3.0, "anchor": "behavior"},
    ),
    "dppo_tv": ({"loss": "dppo_tv", **BYPASS}, oracles.dppo_tv, {}),
    "dppo_tv tight": (
        {"loss": "dppo_tv", **BYPASS, "dppo_tv": {"delta": 0.02, "cap": 1.5}},
        oracles.dppo_tv,
        {"delta": 0.02, "cap": 1.5},
    ),
    "vespo": ({"loss": "vespo", **BYPASS}, oracles.vespo, {}),
    "vespo other": (
        {"loss": "vespo", **BYPASS, "vespo": {"positive": (1.0, 2.0), "negative": (1.5, 0.5)}},
        oracles.vespo,
        {"positive": (1.0, 2.0), "negative": (1.5, 0.5)},
    ),
    "topr": ({"loss": "topr", **BYPASS}, oracles.topr, {"level": "sequence"}),
    "topr token": (
        {"loss": "topr", **BYPASS, "topr": {"level": "token"}},
        oracles.topr,
        {"level": "token"},
    ),
}
LINEAR = ("cispo", "dppo_tv", "vespo", "topr")  # in log pi: the slope is the loss at log pi = 1


def computed(
    batch: oracles.Batch, settings: dict[str, Any], dtype: torch.dtype
) -> tuple[Any, Rows]:
    """The token losses and the gradient of their sum over the loss tokens."""
    algo = AlgoSettings(**settings)
    inputs = as_inputs(batch, algo, dtype=dtype)
    token = find("loss", algo.loss)(inputs, algo)
    (token.loss * inputs.mask).sum().backward()
    return token, as_rows(batch, inputs.logprobs.grad)


def slopes(batch: oracles.Batch, name: str, oracle: Oracle, settings: dict[str, Any]) -> Rows:
    """Exact where a formula for the slope was derived, else central differences."""
    now = [seq["logprobs"] for seq in batch]
    if name.startswith(LINEAR):
        return oracle(batch, [np.ones(len(row)) for row in now], now, **settings)
    exact = {"ppo_clip": oracles.ppo_clip_slope, "sapo": oracles.sapo_slope}
    if name.split()[0] in exact:
        return exact[name.split()[0]](batch, **settings)
    if name.startswith("gspo_token"):
        return oracles.gradient(lambda rows: total(oracle(batch, rows, now, **settings)), now)
    ones = [np.ones(len(row)) for row in now]
    return oracles.gspo_gradient(batch, ones, **settings)


def total(rows: Rows) -> float:
    return float(sum(row.sum() for row in rows))


def test_every_loss_of_the_catalogue_is_tested_here() -> None:
    assert {name.split()[0] for name in CASES} == set(catalogue("loss"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(25))
def test_value_and_gradient_follow_the_equation(name: str, seed: int) -> None:
    settings, oracle, options = CASES[name]
    batch = random_case(np.random.default_rng(seed))
    token, gradient = computed(batch, settings, torch.float64)
    assert_rows_equal(as_rows(batch, token.loss), oracle(batch, **options), rtol=1e-6, atol=1e-8)
    assert_rows_equal(gradient, slopes(batch, name, oracle, options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("gspo_token")])
@pytest.mark.parametrize("seed", range(100, 110))
def test_ratios_of_e_to_the_20_stay_finite_and_follow_the_equation(name: str, seed: int) -> None:
    settings, oracle, options = CASES[name]
    batch = random_case(np.random.default_rng(seed), extreme=True)
    token, gradient = computed(batch, settings, torch.float32)
    assert torch.isfinite(token.loss).all()
    assert_rows_equal(as_rows(batch, token.loss), oracle(batch, **options), rtol=2e-4, atol=1e-4)
    assert all(np.isfinite(row).all() for row in gradient)
    if name.startswith((*LINEAR, "ppo_clip")):
        expected = slopes(batch, name, oracle, options)
        assert_rows_equal(gradient, expected, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("ppo", "dppo", "gspo"))])
def test_clip_flags_mark_tokens_without_a_gradient(name: str) -> None:
    settings, _, _ = CASES[name]
    for seed in range(10):
        batch = random_case(np.random.default_rng(seed))
        token, gradient = computed(batch, settings, torch.float64)
        flags = as_rows(batch, token.is_clipped_low | token.is_clipped_high)
        for seq, flag, slope in zip(batch, flags, gradient, strict=True):
            assert not (slope[flag > 0]).any()
            moved = (seq["mask"] > 0) & (seq["advantage"] != 0) & (flag == 0)
            assert name.startswith("gspo") or slope[moved].all()


CLIPPED = [name for name in CASES if "dual" not in name]


@pytest.mark.parametrize("name", CLIPPED)
def test_with_equal_policies_every_loss_has_the_plain_policy_gradient(name: str) -> None:
    settings, _, _ = CASES[name]
    for seed in range(5):
        batch = random_case(np.random.default_rng(seed))
        for seq in batch:
            seq["logprobs"] = seq["proximal"] = seq["behavior"]
        _, gradient = computed(batch, settings, torch.float32)
        plain = [-seq["advantage"] * seq["mask"] for seq in batch]
        assert_rows_equal(gradient, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_swapping_two_sequences_swaps_their_gradients(name: str) -> None:
    settings, _, _ = CASES[name]
    batch = random_case(np.random.default_rng(3)) + random_case(np.random.default_rng(4))
    order = [1, 0, *range(2, len(batch))]
    _, one = computed(batch, settings, torch.float64)
    _, other = computed([batch[i] for i in order], settings, torch.float64)
    assert_rows_equal([one[i] for i in order], other, rtol=1e-12, atol=1e-12)
