"""The loss of a batch: aggregation, KL, entropy, and that the split never matters."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle_corrections
import oracle_sums
import oracles
import pytest
import torch
from oracles import Batch, Rows, random_case
from packed_case import as_inputs, as_rows, assert_rows_equal, totals

from asyncgrpo.algorithms import catalogue
from asyncgrpo.errors import AlgorithmError, ConfigError
from asyncgrpo.learner.corrections import Correction
from asyncgrpo.learner.inputs import Totals
from asyncgrpo.learner.losses import TokenLoss
from asyncgrpo.learner.objective import objective, probe
from asyncgrpo.learner.prepare import decile_edges
from asyncgrpo.settings.algo import AlgoSettings

AGGREGATIONS: dict[str, Any] = {
    "token_mean": oracle_sums.token_mean,
    "sequence_mean": oracle_sums.sequence_mean,
    "bnpo": oracle_sums.bnpo,
    "dr_grpo": lambda batch, values: oracle_sums.dr_grpo(batch, values, 20),
}


def run(
    batch: Batch, kl_coef: float = 0.0, whole: Totals | None = None, **settings: Any
) -> tuple[float, Rows]:
    """Loss and gradient of one micro-batch, float64."""
    algo = AlgoSettings(**settings)
    inputs = as_inputs(batch, algo, whole)
    found = objective(inputs, algo, kl_coef)
    found.loss.backward()
    return found.loss.item(), as_rows(batch, inputs.logprobs.grad)


def expected_loss(batch: Batch, rows: Rows, aggregation: str) -> float:
    """Decoupled ppo_clip at the log-probs `rows`."""
    token = oracles.ppo_clip(batch, rows)
    _, weight = oracle_corrections.tis(batch)
    return AGGREGATIONS[aggregation](batch, oracle_sums.product(weight, token))


def cases(count: int = 12) -> list[Batch]:
    return [random_case(np.random.default_rng(seed)) for seed in range(count)]


def test_every_aggregation_and_estimator_is_tested_here() -> None:
    assert set(AGGREGATIONS) == set(catalogue("aggregation"))
    assert {"k1", "k2", "k3", "abs"} == set(catalogue("kl"))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_loss_and_its_gradient_follow_the_formula(aggregation: str) -> None:
    for batch in cases():
        loss, gradient = run(batch, aggregation=aggregation)
        now = [seq["logprobs"] for seq in batch]
        assert loss == pytest.approx(expected_loss(batch, now, aggregation), rel=1e-9, abs=1e-12)
        slopes = oracles.gradient(lambda rows: expected_loss(batch, rows, aggregation), now)  # noqa: B023
        assert_rows_equal(gradient, slopes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["k2", "k3", "abs"])
@pytest.mark.parametrize(
    ("correction", "weigh"),
    [
        ("decoupled", lambda b: oracle_corrections.tis(b)[1]),
        ("none", lambda b: [seq["mask"] for seq in b]),
        (
            "bypass",
            lambda b: [
                np.minimum(np.exp(np.clip(s["logprobs"] - s["behavior"], -20, 20)), 2.0) * s["mask"]
                for s in b
            ],
        ),
    ],
)
def test_kl_in_the_loss_carries_the_weight_of_the_data(
    name: str, correction: str, weigh: Any
) -> None:
    for batch in cases(6):
        plain, _ = run(batch, correction=correction, kl=name)
        loss, gradient = run(batch, kl_coef=0.3, correction=correction, kl=name)
        weight = weigh(batch)

        def kl_term(rows: Rows, batch: Batch = batch, weight: Rows = weight) -> float:
            values = oracle_sums.product(weight, oracles.kl(batch, name, rows))
            return 0.3 * oracle_sums.token_mean(batch, values)

        now = [seq["logprobs"] for seq in batch]
        assert loss - plain == pytest.approx(kl_term(now), rel=1e-6, abs=1e-9)
        _, policy_gradient = run(batch, correction=correction, kl=name)
        slopes = oracles.gradient(kl_term, now)
        both = [a + b for a, b in zip(policy_gradient, slopes, strict=True)]
        assert_rows_equal(gradient, both, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"), [("k1", -0.5), ("k2", 0.125), ("k3", 0.1487), ("abs", 0.5)]
)
def test_the_kl_estimators_at_half_a_nat(name: str, value: float) -> None:
    from asyncgrpo.algorithms import find

    assert find("kl", name)(torch.tensor([0.5])).item() == pytest.approx(value, abs=1e-4)


def test_the_entropy_bonus_lowers_the_loss_by_the_mean_entropy() -> None:
    for batch in cases():
        plain, _ = run(batch)
        loss, _ = run(batch, entropy_coef=0.2)
        mean = oracle_sums.token_mean(batch, [seq["entropy"] * seq["mask"] for seq in batch])
        assert loss == pytest.approx(plain - 0.2 * mean, rel=1e-9, abs=1e-12)


COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"aggregation": "sequence_mean"},
    {"aggregation": "dr_grpo", "correction": "tis_sequence"},
    {"correction": ["m2po", "geometric_mask", "opsm", "icepop", "decoupled"]},
    {"loss": "gspo", "correction": "bypass", "aggregation": "sequence_mean"},
    {"loss": "vespo", "correction": "bypass"},
    {"loss": "topr", "correction": "bypass"},
]


@pytest.mark.parametrize("settings", COMBINATIONS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_loss_and_gradient_do_not_depend_on_the_split(settings: dict[str, Any], seed: int) -> None:
    """Micro-batches of any number of whole sequences, in any order: what rows and ranks do too."""
    random = np.random.default_rng(seed)
    batch = [seq for _ in range(4) for seq in random_case(random)]
    whole = totals(batch, second_moment_cut=0.05)
    options = {**settings, "kl_coef": 0.1}
    kl_coef = options.pop("kl_coef")
    loss, gradient = run(batch, kl_coef, whole, **options)
    order = random.permutation(len(batch))
    cuts = np.sort(random.choice(np.arange(1, len(batch)), size=3, replace=False))
    pieces, slopes = [], {}
    for part in np.split(order, cuts):
        piece, rows = run([batch[i] for i in part], kl_coef, whole, **options)
        pieces.append(piece)
        slopes.update(zip(part.tolist(), rows, strict=True))
    assert sum(pieces) == pytest.approx(loss, rel=1e-9, abs=1e-12)
    assert_rows_equal([slopes[i] for i in range(len(batch))], gradient, rtol=1e-9, atol=1e-12)


def test_bnpo_depends_on_the_split_as_its_definition_says() -> None:
    batch = [seq for seed in (1, 2, 3) for seq in random_case(np.random.default_rng(seed))]
    half = len(batch) // 2
    parts = [list(range(half)), list(range(half, len(batch)))]
    whole = totals(batch, num_microbatches=2)
    found = sum(run([batch[i] for i in p], 0.0, whole, aggregation="bnpo")[0] for p in parts)
    now = [seq["logprobs"] for seq in batch]
    _, weight = oracle_corrections.tis(batch)
    values = oracle_sums.product(weight, oracles.ppo_clip(batch, now))
    assert found == pytest.approx(oracle_sums.bnpo(batch, values, parts), rel=1e-9)


@pytest.mark.parametrize("settings", COMBINATIONS, ids=str)
def test_masked_tokens_have_no_gradient_and_change_nothing(settings: dict[str, Any]) -> None:
    algo = AlgoSettings(**settings)
    batch = random_case(np.random.default_rng(5))
    inputs = as_inputs(batch, algo)
    loss = objective(inputs, algo, 0.1).loss
    loss.backward()
    mask = inputs.mask.bool()
    assert not inputs.logprobs.grad[~mask].any()
    with torch.no_grad():
        inputs.logprobs[~mask] = -7.0
    assert objective(inputs, algo, 0.1).loss.item() == loss.item()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_empty_mask_gives_zero_loss_and_gradient(aggregation: str) -> None:
    batch = random_case(np.random.default_rng(0))
    for seq in batch:
        seq["mask"] = np.zeros(len(seq["mask"]))
    loss, gradient = run(batch, aggregation=aggregation, correction=["icepop", "tis_sequence"])
    assert loss == 0.0
    assert not any(row.any() for row in gradient)


def test_with_one_update_per_batch_decoupled_is_truncated_importance_sampling() -> None:
    for batch in cases():
        for seq in batch:
            seq["proximal"] = seq["logprobs"]
        _, gradient = run(batch)
        _, weight = oracle_corrections.tis(batch)
        count = max(sum(oracles.length(seq) for seq in batch), 1)
        plain = [-w * seq["advantage"] / count for w, seq in zip(weight, batch, strict=True)]
        assert_rows_equal(gradient, plain)


@pytest.mark.parametrize(
    ("counts", "edges"),
    [
        ([0, 10], [1] * 9),
        ([0] + [1] * 10, list(range(1, 10))),
        ([7, 5, 0, 5], [1] * 5 + [3] * 4),  # what is not trained does not count
        ([3], [0] * 9),
    ],
)
def test_decile_edges_are_the_lengths_up_to_which_each_tenth_lies(
    counts: list[int], edges: list[int]
) -> None:
    lengths = torch.tensor(np.repeat(np.arange(len(counts)), counts))
    assert decile_edges(lengths).tolist() == edges


def own_loss(inputs: Any, algo: Any) -> torch.Tensor:
    return -inputs.ratio * inputs.advantages


def short_loss(inputs: Any, algo: Any) -> torch.Tensor:
    return own_loss(inputs, algo)[:-1]


def no_loss(inputs: Any, algo: Any) -> None:
    return None


def broken_loss(inputs: Any, algo: Any) -> torch.Tensor:
    raise ZeroDivisionError("gone")


def leaving_loss(inputs: Any, algo: Any) -> torch.Tensor:
    raise SystemExit(0)


def infinite_loss(inputs: Any, algo: Any) -> torch.Tensor:
    return own_loss(inputs, algo) * float("inf")


def short_parts(inputs: Any, algo: Any) -> TokenLoss:
    nowhere = torch.zeros_like(inputs.mask, dtype=torch.bool)
    return TokenLoss(
        loss=own_loss(inputs, algo), is_clipped_low=nowhere[:1], is_clipped_high=nowhere
    )


def short_correction(inputs: Any, algo: Any) -> Correction:
    return Correction(weight=inputs.mask[:-1])


def detached_loss(inputs: Any, algo: Any) -> torch.Tensor:
    return own_loss(inputs, algo).detach()


def steep_loss(inputs: Any, algo: Any) -> torch.Tensor:
    return (inputs.logprobs - inputs.logprobs).sqrt()


def not_numbers(group: Any, algo: Any) -> list[str]:
    return ["high"] * len(group.rewards)


def broken_advantage(group: Any, algo: Any) -> None:
    raise KeyError("gone")


def half(inputs: Any, algo: Any) -> torch.Tensor:
    return torch.full_like(inputs.mask, 0.5)


def test_a_users_own_loss_and_weight_are_used() -> None:
    batch = random_case(np.random.default_rng(1))
    one, _ = run(batch, loss="test_objective:own_loss", correction="none", passes=2)
    two, _ = run(batch, loss="test_objective:own_loss", correction="test_objective:half", passes=2)
    now = [-np.exp(seq["logprobs"] - seq["proximal"]) * seq["advantage"] for seq in batch]
    values = [row * seq["mask"] for row, seq in zip(now, batch, strict=True)]
    assert one == pytest.approx(oracle_sums.token_mean(batch, values), rel=1e-9)
    assert two == pytest.approx(one / 2, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short_loss", r"'test_objective:short_loss' returned shape \(3,\).*shape \(4,\)"),
        ("no_loss", "returned NoneType"),
        ("broken_loss", "ZeroDivisionError: gone at .*test_objective.py"),
        ("leaving_loss", "SystemExit: 0 at .*test_objective.py"),
        ("infinite_loss", "gave a loss of (nan|inf|-inf).*must be finite"),
        ("short_parts", r"TokenLoss.is_clipped_low of shape \(1,\).*shape \(4,\)"),
        ("detached_loss", "'test_objective:detached_loss' returned a loss without gradient"),
        ("steep_loss", r"gave a gradient of \[nan|gave a gradient of \[inf"),
    ],
)
def test_a_broken_loss_is_refused_before_anything_starts(name: str, message: str) -> None:
    with pytest.raises(AlgorithmError, match=message):
        probe(AlgoSettings(loss=f"test_objective:{name}"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("correction:short_correction", r"short_correction' returned Correction.weight of .*3,"),
        ("advantage:not_numbers", r"not_numbers' returned \['high'.*one finite number"),
        ("advantage:broken_advantage", "broken_advantage' raised KeyError: 'gone' at .*repair"),
    ],
)
def test_any_other_broken_function_is_refused_too(setting: str, message: str) -> None:
    kind, name = setting.split(":")
    with pytest.raises(AlgorithmError, match=message):
        probe(AlgoSettings(**{kind: f"test_objective:{name}"}))


def test_a_loss_that_cannot_be_found_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"algo.loss 'test_objective:own_los'.*'own_loss'"):
        probe(AlgoSettings(loss="test_objective:own_los"))
