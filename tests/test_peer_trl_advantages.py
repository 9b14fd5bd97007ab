"""Our advantages against the released code of trl, on the same rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import make_completion, make_group, make_lease
from peer_cases import SEEDS, TOLERANCE
from trl_standin import their_advantages

from asyncgrpo.config import Config
from asyncgrpo.learner.prepare import Preparer
from asyncgrpo.learner.shaping import advantages
from asyncgrpo.types import Completions, Group

pytestmark = pytest.mark.peer

WEIGHTS = {"right": 1.0, "form": 0.25}


def random_parts(seed: int, size: int) -> np.ndarray:
    """float32 [3 * size, 2] rewards: one of two values, and any number."""
    random = np.random.default_rng(seed)
    right = random.integers(0, 2, 3 * size)
    right[::size], right[1::size] = 0, 1  # no group is uniform
    return np.stack([right, random.normal(size=3 * size)], 1).astype(np.float32)


def our_advantages(parts: np.ndarray, size: int, **algo: Any) -> np.ndarray:
    """float32 [N] by our shaping, the batch's spread by our preparer."""
    functions = [{"use": "task", "name": k, "weight": w} for k, w in WEIGHTS.items()]
    config = Config.model_validate(
        {"algo": {**algo, "group_size": size}, "reward": {"functions": functions}}
    )
    groups = [_group(chunk) for chunk in np.split(parts, len(parts) // size)]
    batch = SimpleNamespace(groups=groups, extras=[np.zeros(size)] * len(groups))
    spread = Preparer(config, None, None, "cpu")._batch_std([batch])
    return np.concatenate([advantages(g, config, np.zeros(size), spread) for g in groups])


def _group(parts: np.ndarray) -> Group:
    named = {name: parts[:, k] for k, name in enumerate(WEIGHTS)}
    total = np.nansum(parts * np.array(list(WEIGHTS.values()), np.float32), 1)
    return replace(
        make_group(make_lease(group_size=len(parts))),
        completions=Completions.of([make_completion([0, 0]) for _ in parts]),
        rewards=total.astype(np.float32),
        reward_parts=named,
    )


def theirs_of(parts: np.ndarray, size: int, **settings: Any) -> np.ndarray:
    return their_advantages(torch.tensor(parts), list(WEIGHTS.values()), size, **settings).numpy()


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(
    ("name", "scale_rewards"), [("grpo", "group"), ("batch_std", "batch"), ("dr_grpo", "none")]
)
def test_advantages_are_those_of_trl(name: str, scale_rewards: str, size: int) -> None:
    for seed in SEEDS:
        parts = random_parts(seed, size)
        ours = our_advantages(parts, size, advantage=name)
        theirs = theirs_of(parts, size, scale_rewards=scale_rewards)
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
        assert np.abs(ours).max() > 0.1


@pytest.mark.parametrize("applies", ["to all", "to some", "to one of a group", "to none"])
def test_normalise_each_is_normalize_then_sum_of_trl_before_its_batch_whitening(
    applies: str,
) -> None:
    """trl subtracts the batch's mean of the sums and divides by their deviation; we leave them."""
    size = 4
    for seed in SEEDS:
        parts = random_parts(seed, size)
        parts[slice(*_unscored(applies, size)), 1] = np.nan
        ours = our_advantages(parts, size, reward_combination="normalise_each")
        theirs = theirs_of(parts, size, multi_objective_aggregation="normalize_then_sum")
        whitened = (ours - ours.mean()) / (ours.std(ddof=1) + 1e-4)
        np.testing.assert_allclose(whitened, theirs, atol=TOLERANCE, rtol=TOLERANCE)
        assert np.abs(ours - theirs).max() > 1e-3


def _unscored(applies: str, size: int) -> Sequence[int]:
    """Rows for which the second function has no score."""
    spans = {"to all": (0, 0), "to some": (1, 3), "to one of a group": (1, size)}
    return spans.get(applies, (0, 3 * size))


def test_equal_rewards_give_exactly_zero_here_and_rounding_over_eps_in_trl() -> None:
    largest = 0.0
    for size in (7, 11, 13):
        for reward in (0.3, 0.7, 0.9):
            parts = np.full((2 * size, 2), [reward, 0.0], np.float32)
            assert our_advantages(parts, size, advantage="grpo").tolist() == [0.0] * len(parts)
            largest = max(largest, float(np.abs(theirs_of(parts, size)).max()))
    assert 0.0 < largest < 5e-3
