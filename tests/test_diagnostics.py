"""What a step reports, against the definitions, however its batch was split."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle_corrections
import oracle_sums
import pytest
import torch
from oracles import Batch, random_case
from packed_case import as_inputs, totals

from asyncgrpo.learner.diagnostics import finish, measure
from asyncgrpo.learner.objective import objective
from asyncgrpo.learner.prepare import decile_edges
from asyncgrpo.observe.metrics import LAG_BINS, METRICS
from asyncgrpo.settings.algo import AlgoSettings

RULES = ["geometric_mask", "opsm", "icepop", "tis_sequence"]


def reported(parts: list[Batch], **settings: Any) -> dict[str, float]:
    algo = AlgoSettings(**settings)
    batch = [seq for part in parts for seq in part]
    lengths = torch.tensor([float(seq["mask"].sum()) for seq in batch])
    whole = totals(batch, decile_edges=decile_edges(lengths))
    sums: dict[str, torch.Tensor] = {}
    maxima: dict[str, torch.Tensor] = {}
    for part in parts:
        inputs = as_inputs(part, algo, whole)
        found = objective(inputs, algo, 0.0)
        one, top = measure(inputs, found, algo)
        sums = {n: sums.get(n, 0.0) + v for n, v in one.items()}
        maxima = {n: torch.maximum(maxima.get(n, v), v) for n, v in top.items()}
    return finish(sums, maxima)


def batch_of(seed: int) -> Batch:
    random = np.random.default_rng(seed)
    return [seq for _ in range(8) for seq in random_case(random)]


def mean_over_tokens(batch: Batch, value: Any) -> float:
    rows = [value(seq) * seq["mask"] for seq in batch]
    return oracle_sums.token_mean(batch, rows)


@pytest.mark.parametrize("seed", range(6))
def test_metrics_follow_their_definitions(seed: int) -> None:
    batch = batch_of(seed)
    found = reported([batch])
    gap = {id(s): s["proximal"] - s["behavior"] for s in batch}
    ratio = {id(s): np.exp(s["logprobs"] - s["proximal"]) for s in batch}
    expected = {
        "ess": oracle_sums.ess(batch),
        "chi2": oracle_sums.chi2(batch),
        "objective/kl": mean_over_tokens(batch, lambda s: np.exp(gap[id(s)]) - gap[id(s)] - 1),
        "objective/kl_k1": mean_over_tokens(batch, lambda s: -gap[id(s)]),
        "objective/entropy": mean_over_tokens(batch, lambda s: s["entropy"]),
        "clip_low_share": mean_over_tokens(
            batch, lambda s: (ratio[id(s)] < 0.8) & (s["advantage"] < 0)
        ),
        "clip_high_share": mean_over_tokens(
            batch, lambda s: (ratio[id(s)] > 1.28) & (s["advantage"] > 0)
        ),
        "cap_share": mean_over_tokens(batch, lambda s: np.exp(gap[id(s)]) > 2.0),
        "masked_share": 0.0,
        "logprob_diff_mean": mean_over_tokens(batch, lambda s: abs(gap[id(s)])),
        "logprob_diff_max": max((abs(gap[id(s)]) * s["mask"]).max() for s in batch),
        "staleness/mean": mean_over_tokens(batch, lambda s: s["staleness"]),
        "staleness/max": max((s["staleness"] * s["mask"]).max() for s in batch),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("seed", range(6))
def test_divergences_are_split_by_staleness(seed: int) -> None:
    batch = batch_of(seed)
    found = reported([batch])
    split = oracle_sums.drift_by_staleness(batch)
    assert {n for n in found if n.endswith("/tokens")} == {f"lag_{lag}/tokens" for lag in split}
    for lag, (k1, k3, count) in split.items():
        assert found[f"lag_{lag}/tokens"] == count
        assert found[f"lag_{lag}/kl_k1"] == pytest.approx(k1, rel=1e-6, abs=1e-9)
        assert found[f"lag_{lag}/kl"] == pytest.approx(k3, rel=1e-6, abs=1e-9)


def test_long_lags_share_bins_with_a_stated_end() -> None:
    batch = random_case(np.random.default_rng(1))
    for seq in batch:
        seq["mask"] = np.ones(len(seq["mask"]))
    lags = [4, 5, 8, 9, 16, 17, 400]
    batch = [{**batch[0], "staleness": np.full(len(batch[0]["mask"]), lag)} for lag in lags]
    count = len(batch[0]["mask"])
    found = reported([batch])
    tokens = {label: found.get(f"lag_{label}/tokens", 0) / count for label, _ in LAG_BINS}
    assert tokens == {"0": 0, "1": 0, "2": 0, "3": 0, "4": 1, "5_to_8": 2, "9_to_16": 2, "17_up": 2}


@pytest.mark.parametrize("seed", range(6))
def test_what_sequence_rules_remove_is_reported_by_length_decile(seed: int) -> None:
    batch = batch_of(seed)
    found = reported([batch], correction=RULES, geometric_mask={"low": 0.95, "high": 1.05})
    keeps = {
        "geometric_mask": oracle_corrections.geometric_mask(batch, 0.95, 1.05)[0],
        "opsm": oracle_corrections.opsm(batch)[0],
    }
    for rule, keep in keeps.items():
        expected = oracle_sums.removed_by_decile(batch, keep)
        shares = {
            int(n.rsplit("_", 1)[1]): v for n, v in found.items() if n.startswith(f"masked/{rule}/")
        }
        assert shares.keys() == expected.keys()
        for decile, (share, _) in expected.items():
            assert shares[decile] == pytest.approx(share), (rule, decile)
        gone = [seq["mask"] * (row == 0) for seq, row in zip(batch, keep, strict=True)]
        assert found[f"masked/{rule}"] == pytest.approx(oracle_sums.token_mean(batch, gone))
    assert any(n.startswith("masked/tis_sequence/decile_") for n in found)


@pytest.mark.parametrize("seed", range(4))
def test_the_report_does_not_depend_on_the_split(seed: int) -> None:
    batch = batch_of(seed)
    one = reported([batch], correction=RULES)
    other = reported([batch[:3], batch[3:4], batch[4:]], correction=RULES)
    assert one == pytest.approx(other, rel=1e-9, abs=1e-12)


def test_extreme_ratios_stay_finite() -> None:
    for seed in range(20):
        batch = random_case(np.random.default_rng(seed), extreme=True)
        assert all(np.isfinite(value) for value in reported([batch], correction=RULES).values())


def test_an_empty_step_reports_zeros() -> None:
    batch = random_case(np.random.default_rng(0))
    for seq in batch:
        seq["mask"] = np.zeros(len(seq["mask"]))
    assert set(reported([batch]).values()) == {0.0}


def test_every_name_is_in_the_table() -> None:
    assert set(reported([batch_of(0)], correction=RULES)) <= set(METRICS)
