"""The loss, its gradient and its metrics against float64 loops written from the formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from asyncgrpo.config import AlgoSettings
from asyncgrpo.learner.batch import Batch
from asyncgrpo.learner.losses import (
    MAX_KEYS,
    SUM_KEYS,
    LossInputs,
    LossOutput,
    finish_metrics,
    loss_inputs,
    policy_loss,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Plain numbers of some tokens."""

    present: list[float]
    behavior: list[float]
    proximal: list[float]
    advantages: list[float]
    mask: list[float]
    staleness: list[float]
    entropy: list[float]


def random_tokens(seed: int, count: int = 40, spread: float = 0.4) -> Tokens:
    random = np.random.default_rng(seed)
    mask = (random.random(count) < 0.7).astype(np.float64)
    present = -2 * random.random(count)

    def shown(values: np.ndarray) -> list[float]:
        return [float(np.float32(v)) for v in values * mask]

    return Tokens(
        present=shown(present),
        behavior=shown(present + spread * random.normal(size=count)),
        proximal=shown(present + spread * random.normal(size=count)),
        advantages=shown(random.normal(size=count)),
        mask=mask.tolist(),
        staleness=shown(random.integers(0, 5, count)),
        entropy=shown(random.random(count)),
    )


def as_inputs(tokens: Tokens) -> LossInputs:
    def tensor(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32)

    return LossInputs(
        logprobs=tensor(tokens.present).requires_grad_(),
        behavior_logprobs=tensor(tokens.behavior),
        proximal_logprobs=tensor(tokens.proximal),
        advantages=tensor(tokens.advantages),
        mask=tensor(tokens.mask),
        staleness=tensor(tokens.staleness),
        entropy=tensor(tokens.entropy),
    )


def bounded(x: float) -> float:
    return min(max(x, -20.0), 20.0)


def slow_token(tokens: Tokens, t: int, algo: AlgoSettings) -> tuple[float, float]:
    """(loss, d loss / d log pi) of one token; d r / d log pi = r where the clip does not bind."""
    weight = 1.0
    if algo.correction == "decoupled":
        weight = math.exp(bounded(tokens.proximal[t] - tokens.behavior[t]))
        weight = min(weight, algo.correction_cap)
    ratio = math.exp(bounded(tokens.present[t] - tokens.proximal[t]))
    advantage = tokens.advantages[t]
    if advantage > 0 and ratio > 1 + algo.clip_high:
        return -weight * (1 + algo.clip_high) * advantage, 0.0
    if advantage < 0 and ratio < 1 - algo.clip_low:
        return -weight * (1 - algo.clip_low) * advantage, 0.0
    slope = 0.0 if abs(tokens.present[t] - tokens.proximal[t]) > 20 else ratio
    return -weight * ratio * advantage, -weight * slope * advantage


def slow_loss(tokens: Tokens, algo: AlgoSettings, count: int) -> tuple[float, list[float]]:
    loss, gradient = 0.0, []
    for t, mask in enumerate(tokens.mask):
        value, slope = slow_token(tokens, t, algo)
        loss += mask * value / count
        gradient.append(mask * slope / count)
    return loss, gradient


def slow_metrics(tokens: Tokens, algo: AlgoSettings) -> dict[str, float]:
    chosen = [t for t, mask in enumerate(tokens.mask) if mask]
    n = len(chosen)
    deltas = [tokens.proximal[t] - tokens.behavior[t] for t in chosen]
    weights = [math.exp(bounded(delta)) for delta in deltas]
    ratios = [math.exp(bounded(tokens.present[t] - tokens.proximal[t])) for t in chosen]
    signs = [tokens.advantages[t] for t in chosen]
    low = [r < 1 - algo.clip_low and a < 0 for r, a in zip(ratios, signs, strict=True)]
    high = [r > 1 + algo.clip_high and a > 0 for r, a in zip(ratios, signs, strict=True)]
    capped = algo.correction == "decoupled"
    return {
        "kl": sum(w - bounded(d) - 1 for w, d in zip(weights, deltas, strict=True)) / n,
        "kl_k1": -sum(deltas) / n,
        "ess": sum(weights) ** 2 / (n * sum(w * w for w in weights)),
        "clip_low_share": sum(low) / n,
        "clip_high_share": sum(high) / n,
        "cap_share": sum(capped and w > algo.correction_cap for w in weights) / n,
        "logprob_diff_mean": sum(abs(d) for d in deltas) / n,
        "logprob_diff_max": max(abs(d) for d in deltas),
        "staleness_mean": sum(tokens.staleness[t] for t in chosen) / n,
        "staleness_max": max(tokens.staleness[t] for t in chosen),
        "entropy": sum(tokens.entropy[t] for t in chosen) / n,
    }


def finished(*outputs: LossOutput) -> dict[str, float]:
    sums = torch.stack([output.sums for output in outputs]).sum(0)
    maxima = torch.stack([output.maxima for output in outputs]).amax(0)
    return finish_metrics(sums.tolist(), maxima.tolist())


@pytest.mark.parametrize("correction", ["decoupled", "none"])
@pytest.mark.parametrize("seed", range(10))
def test_loss_and_gradient_follow_the_equations(seed: int, correction: str) -> None:
    algo = AlgoSettings(correction=correction)
    tokens = random_tokens(seed)
    inputs = as_inputs(tokens)
    output = policy_loss(inputs, algo, 97)
    output.loss.backward()
    loss, gradient = slow_loss(tokens, algo, 97)
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(loss, abs=1e-6)
    np.testing.assert_allclose(inputs.logprobs.grad, gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_is_the_slope_of_the_loss(seed: int) -> None:
    algo, tokens = AlgoSettings(), random_tokens(seed, count=12)
    inputs = as_inputs(tokens)
    policy_loss(inputs, algo, 12).loss.backward()
    for t, present in enumerate(tokens.present):
        ends = []
        for shift in (1e-6, -1e-6):
            moved = [*tokens.present]
            moved[t] = present + shift
            ends.append(slow_loss(replace(tokens, present=moved), algo, 12)[0])
        assert inputs.logprobs.grad[t].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-5)


@pytest.mark.parametrize("correction", ["decoupled", "none"])
@pytest.mark.parametrize("seed", range(5))
def test_metrics_follow_their_definitions(seed: int, correction: str) -> None:
    algo = AlgoSettings(correction=correction)
    tokens = random_tokens(seed, spread=0.8)
    metrics = finished(policy_loss(as_inputs(tokens), algo, 50))
    expected = slow_metrics(tokens, algo)
    assert metrics.keys() == {"loss", *expected}
    assert metrics["loss"] == pytest.approx(slow_loss(tokens, algo, 50)[0], abs=1e-6)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    tokens, algo = random_tokens(1), AlgoSettings()
    whole = policy_loss(as_inputs(tokens), algo, 40)
    halves = []
    for part in (slice(0, 13), slice(13, 40)):
        fields = {name: getattr(tokens, name)[part] for name in Tokens.__slots__}
        halves.append(policy_loss(as_inputs(Tokens(**fields)), algo, 40))
    assert sum(half.loss.item() for half in halves) == pytest.approx(whole.loss.item(), abs=1e-6)
    one, other = finished(whole), finished(*halves)
    assert one == pytest.approx(other, rel=1e-6, abs=1e-7)


def test_with_one_update_per_batch_it_is_truncated_importance_sampling() -> None:
    tokens = random_tokens(2, spread=1.0)
    tokens = replace(tokens, proximal=tokens.present)
    inputs, algo = as_inputs(tokens), AlgoSettings(correction_cap=2.0)
    policy_loss(inputs, algo, 1).loss.backward()
    for t, mask in enumerate(tokens.mask):
        weight = min(math.exp(tokens.present[t] - tokens.behavior[t]), 2.0)
        expected = -mask * weight * tokens.advantages[t]
        assert inputs.logprobs.grad[t].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("gap", [20.0, -20.0, 60.0, -60.0, 1e4, -1e4])
def test_extreme_ratios_stay_finite_and_follow_the_equations(gap: float, advantage: float) -> None:
    for present, proximal, behavior in ((-1.0, -1.0, -1.0 - gap), (-1.0 + gap, -1.0, -1.0)):
        tokens = Tokens(
            present=[present],
            behavior=[behavior],
            proximal=[proximal],
            advantages=[advantage],
            mask=[1.0],
            staleness=[4.0],
            entropy=[0.5],
        )
        inputs, algo = as_inputs(tokens), AlgoSettings()
        output = policy_loss(inputs, algo, 1)
        output.loss.backward()
        loss, gradient = slow_loss(tokens, algo, 1)
        assert output.loss.item() == pytest.approx(loss, rel=1e-5)
        assert inputs.logprobs.grad.tolist() == pytest.approx(gradient, rel=1e-5)
        metrics = finished(output)
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["ess"] == pytest.approx(1.0)
        assert metrics["logprob_diff_max"] == pytest.approx(abs(proximal - behavior))


def test_an_empty_mask_gives_zero_loss_zero_gradient_and_zero_metrics() -> None:
    tokens = replace(random_tokens(0), mask=[0.0] * 40)
    inputs = as_inputs(tokens)
    output = policy_loss(inputs, AlgoSettings(), 0)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert not inputs.logprobs.grad.any()
    assert set(finished(output).values()) == {0.0}


def test_masked_tokens_change_nothing() -> None:
    tokens = random_tokens(5)
    noisy = [p if m else -7.0 for p, m in zip(tokens.present, tokens.mask, strict=True)]
    one = policy_loss(as_inputs(tokens), AlgoSettings(), 40)
    other = policy_loss(as_inputs(replace(tokens, present=noisy)), AlgoSettings(), 40)
    assert one.loss.item() == other.loss.item()
    assert torch.equal(one.sums, other.sums)
    assert torch.equal(one.maxima, other.maxima)


def test_sums_and_maxima_have_a_fixed_order_and_are_float64() -> None:
    output = policy_loss(as_inputs(random_tokens(0)), AlgoSettings(), 40)
    assert output.sums.shape == (len(SUM_KEYS),)
    assert output.maxima.shape == (len(MAX_KEYS),)
    assert output.sums.dtype == output.maxima.dtype == torch.float64
    assert output.sums[SUM_KEYS.index("tokens")] == sum(random_tokens(0).mask)


def test_inputs_of_a_batch_take_the_present_policy_as_proximal_without_its_gradient() -> None:
    batch = Batch(
        input_ids=np.array([1, 2], np.int64),
        target_ids=np.array([2, 3], np.int64),
        position_ids=np.array([0, 1], np.int64),
        loss_mask=np.array([False, True]),
        behavior_logprobs=np.array([0, -0.5], np.float32),
        advantages=np.array([0, 2], np.float32),
        staleness=np.array([0, 3], np.int32),
        sequence_ids=np.array([0, 0], np.int32),
        cu_seqlens=np.array([0, 2], np.int32),
    )
    logprobs = torch.tensor([0.0, -0.7], requires_grad=True)
    inputs = loss_inputs(batch, logprobs, torch.zeros(2))
    assert not inputs.proximal_logprobs.requires_grad
    assert torch.equal(inputs.proximal_logprobs, logprobs.detach())
    assert inputs.mask.tolist() == [0.0, 1.0]
    assert inputs.staleness.tolist() == [0.0, 3.0]
    policy_loss(inputs, AlgoSettings(), 1).loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, -2 * math.exp(-0.2)])
