"""Advantages against slow loops, and exact zeros for groups that teach nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from asyncgrpo.learner.advantages import ADVANTAGES, group_advantages

EPS = 1e-4


def slow_grpo(rewards: list[float], eps: float) -> list[float]:
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)
    return [(reward - mean) / (math.sqrt(variance) + eps) for reward in rewards]


def slow_dr_grpo(rewards: list[float]) -> list[float]:
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def random_rewards(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    size = int(random.integers(2, 65))
    return (random.normal(size=size) * 10.0 ** random.integers(-3, 4)).astype(np.float32)


@pytest.mark.parametrize("seed", range(20))
def test_grpo_is_the_distance_from_the_group_mean_in_standard_deviations(seed: int) -> None:
    rewards = random_rewards(seed)
    advantages = group_advantages("grpo", rewards, EPS)
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, slow_grpo(rewards.tolist(), EPS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_dr_grpo_is_the_distance_from_the_group_mean(seed: int) -> None:
    rewards = random_rewards(seed)
    advantages = group_advantages("dr_grpo", rewards, EPS)
    scale = float(np.abs(rewards).max())
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, slow_dr_grpo(rewards.tolist()), atol=1e-6 * scale)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
@pytest.mark.parametrize("reward", [0.0, 0.1, -1.0, 1 / 3, 1e-30, -7.3e6, 3e38])
def test_equal_rewards_give_exactly_zero_for_any_group_size(name: str, reward: float) -> None:
    for size in range(1, 65):
        advantages = group_advantages(name, np.full(size, reward, np.float32), 1e-8)
        assert advantages.tolist() == [0.0] * size


def test_one_right_answer_of_four_has_the_advantages_of_the_hand_calculation() -> None:
    rewards = np.array([1, 0, 0, 0], np.float32)  # mean 1/4, variance (9 + 1 + 1 + 1) / 16 / 3
    expected = [0.75 / 0.5, -0.25 / 0.5, -0.25 / 0.5, -0.25 / 0.5]
    np.testing.assert_allclose(group_advantages("grpo", rewards, 1e-12), expected, rtol=1e-6)
