"""Corrections against their oracles, alone and composed: masks first, then one weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle_corrections as oracle
import pytest
import torch
from oracles import Batch, Rows, random_case
from packed_case import as_inputs, as_rows, assert_rows_equal, totals

from asyncgrpo.algorithms import catalogue
from asyncgrpo.learner.objective import Corrected, correct
from asyncgrpo.learner.prepare import second_moment_cut
from asyncgrpo.settings.algo import AlgoSettings

SIMPLE: dict[str, Any] = {
    "decoupled": oracle.tis,
    "tis": oracle.tis,
    "tis_sequence": oracle.tis_sequence,
    "icepop": oracle.icepop,
    "geometric_mask": oracle.geometric_mask,
}
WIDE = {"geometric_mask": {"low": 0.8, "high": 1.2}}


def cut_of(batch: Batch, threshold: float) -> float:
    squares = [
        (seq["proximal"][t] - seq["behavior"][t]) ** 2
        for seq in batch
        for t in range(len(seq["mask"]))
        if seq["mask"][t] and (seq["proximal"][t] - seq["behavior"][t]) * seq["advantage"] > 0
    ]
    return second_moment_cut(torch.tensor(squares, dtype=torch.float64), threshold)


def corrected(batch: Batch, dtype: torch.dtype = torch.float64, **settings: Any) -> Corrected:
    algo = AlgoSettings(**settings)
    whole = totals(batch, second_moment_cut=cut_of(batch, algo.m2po.threshold))
    return correct(as_inputs(batch, algo, whole, dtype), algo)


def weight(batch: Batch, **settings: Any) -> Rows:
    return as_rows(batch, corrected(batch, **settings).weight)


def cases(extreme: bool = False) -> list[Batch]:
    return [random_case(np.random.default_rng(seed), extreme) for seed in range(30)]


def test_every_correction_of_the_catalogue_is_tested_here() -> None:
    tested = {*SIMPLE, "opsm", "m2po", "none", "bypass"}
    assert tested == set(catalogue("correction"))


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize("extreme", [False, True])
def test_weights_and_masks_follow_the_formula(name: str, extreme: bool) -> None:
    for batch in cases(extreme):
        _, expected = SIMPLE[name](batch)
        assert_rows_equal(weight(batch, correction=name), expected)


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("decoupled", {"correction_cap": 1.1}, {"cap": 1.1}),
        ("tis_sequence", {"tis_sequence": {"cap": 1.5}}, {"cap": 1.5}),
        ("icepop", {"icepop": {"low": 0.9, "high": 1.1}}, {"low": 0.9, "high": 1.1}),
        ("geometric_mask", WIDE, {"low": 0.8, "high": 1.2}),
    ],
)
def test_their_settings_are_used(name: str, settings: Any, options: dict[str, float]) -> None:
    for batch in cases():
        _, expected = SIMPLE[name](batch, **options)
        assert_rows_equal(weight(batch, correction=name, **settings), expected)


@pytest.mark.parametrize("threshold", [0.0, 1e-4, 0.05])
def test_opsm_drops_bad_sequences_that_the_present_policy_has_left(threshold: float) -> None:
    for batch in cases():
        _, expected = oracle.opsm(batch, threshold)
        found = weight(batch, correction="opsm", opsm={"threshold": threshold})
        assert_rows_equal(found, expected)


@pytest.mark.parametrize("threshold", [1e-6, 0.01, 0.04, 0.5])
@pytest.mark.parametrize("extreme", [False, True])
def test_m2po_masks_the_largest_until_the_mean_is_small_enough(
    threshold: float, extreme: bool
) -> None:
    masked = 0
    for batch in cases(extreme):
        _, expected = oracle.m2po(batch, threshold)
        found = weight(batch, correction="m2po", m2po={"threshold": threshold})
        assert_rows_equal(found, expected)
        masked += sum(int((row == 0).sum()) for row in found)
    assert masked > 0


@pytest.mark.parametrize(
    ("squares", "threshold", "cut"),
    [
        ([], 0.1, float("inf")),
        ([0.5], 0.1, -1.0),
        ([0.01, 0.02, 9.0], 0.1, 0.02),
        ([0.01, 0.2, 0.2], 0.11, 0.01),  # one of two equal values would fit: both go
        ([0.1, 0.1], 0.1, 0.1),
    ],
)
def test_the_cut_keeps_equal_values_together(
    squares: list[float], threshold: float, cut: float
) -> None:
    found = second_moment_cut(torch.tensor(squares, dtype=torch.float64), threshold)
    assert found == pytest.approx(cut)


def test_none_and_bypass_weigh_nothing() -> None:
    for name in ("none", "bypass"):
        for batch in cases():
            expected = [seq["mask"] for seq in batch]
            assert_rows_equal(weight(batch, correction=name), expected)


@pytest.mark.parametrize("mask", ["icepop", "geometric_mask", "opsm", "m2po"])
@pytest.mark.parametrize("cap", ["decoupled", "tis", "tis_sequence"])
def test_a_mask_and_a_weight_compose_in_any_order(mask: str, cap: str) -> None:
    for batch in cases():
        keep = {
            "icepop": lambda b: oracle.icepop(b)[0],
            "geometric_mask": lambda b: oracle.geometric_mask(b, 0.8, 1.2)[0],
            "opsm": lambda b: oracle.opsm(b)[0],
            "m2po": lambda b: oracle.m2po(b)[0],
        }[mask](batch)
        _, weights = SIMPLE[cap](batch)
        expected = [k * w for k, w in zip(keep, weights, strict=True)]
        room = WIDE if mask == "geometric_mask" else {}
        for order in ((mask, cap), (cap, mask)):
            assert_rows_equal(weight(batch, correction=order, **room), expected)


def test_icepop_weighs_by_w_alone_but_only_masks_beside_a_cap_or_with_bypass() -> None:
    for batch in cases():
        keep, weights = oracle.icepop(batch)
        assert_rows_equal(weight(batch, correction="icepop"), weights)
        assert_rows_equal(weight(batch, correction=["bypass", "icepop"]), keep)


def test_what_is_capped_and_what_each_rule_removes_is_reported() -> None:
    batch = cases()[4]
    found = corrected(batch, correction=["opsm", "icepop", "decoupled"], correction_cap=1.05)
    raw = [np.exp(seq["proximal"] - seq["behavior"]) for seq in batch]
    expected = [(w > 1.05) * (seq["mask"] > 0) for w, seq in zip(raw, batch, strict=True)]
    assert_rows_equal(as_rows(batch, found.is_capped), expected)
    assert set(found.removed) == {"opsm", "icepop"}
    keep = oracle.icepop(batch)[0]
    gone = [(seq["mask"] > 0) * (k == 0) for k, seq in zip(keep, batch, strict=True)]
    assert_rows_equal(as_rows(batch, found.removed["icepop"]), gone)


def test_no_gradient_flows_through_a_correction() -> None:
    algo = AlgoSettings(correction=["opsm", "geometric_mask", "icepop", "decoupled"])
    inputs = as_inputs(cases()[0], algo)
    assert not correct(inputs, algo).weight.requires_grad
