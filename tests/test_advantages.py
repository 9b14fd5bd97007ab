"""Advantages against slow loops, penalties and combinations of rewards, exact zeros."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracle_advantages as oracle
import pytest
from fakes import completion_of, group_of

from asyncgrpo.algorithms import catalogue
from asyncgrpo.config import Config, from_mapping
from asyncgrpo.errors import AlgorithmError
from asyncgrpo.learner.advantages import GroupRewards
from asyncgrpo.learner.shaping import advantages, penalties, reward_to_go
from asyncgrpo.types import Group


def rewarded(
    rewards: list[float], lengths: list[int] | None = None, parts: dict[str, Any] | None = None
) -> Group:
    completions = [completion_of([0] * n) for n in lengths or [3] * len(rewards)]
    group = group_of(1, [1], completions, rewards)
    named = {name: np.array(part, np.float32) for name, part in (parts or {}).items()}
    return replace(group, reward_parts=named or group.reward_parts)


def settings(**algo: Any) -> Config:
    return from_mapping({"algo": {"group_size": 8, **algo}})


def found(rewards: list[float], lengths: list[int] | None = None, **algo: Any) -> np.ndarray:
    group = rewarded(rewards, lengths)
    return advantages(group, settings(**algo), np.zeros(len(rewards)))


def random_rewards(seed: int) -> list[float]:
    random = np.random.default_rng(seed)
    size = int(random.integers(2, 65))
    return (random.normal(size=size) * 10.0 ** random.integers(-3, 4)).astype(np.float32).tolist()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("seed", range(20))
def test_estimators_follow_their_formula(name: str, seed: int) -> None:
    rewards = random_rewards(seed)
    values = found(rewards, advantage=name)
    assert values.dtype == np.float32
    scale = max(abs(r) for r in rewards)
    np.testing.assert_allclose(values, getattr(oracle, name)(rewards), rtol=1e-5, atol=1e-6 * scale)
    assert values.sum() == pytest.approx(0.0, abs=1e-3 * scale + 1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_opo_takes_the_length_weighted_mean_as_baseline(seed: int) -> None:
    rewards = random_rewards(seed)
    lengths = np.random.default_rng(seed).integers(0, 30, len(rewards)).tolist()
    expected = oracle.opo(rewards, lengths)
    scale = max(abs(r) for r in rewards)
    values = found(rewards, lengths, advantage="opo")
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("right", range(9))
def test_pass_at_k_looks_at_correctness_only(k: int, right: int) -> None:
    correct = [True] * right + [False] * (8 - right)
    rewards = [2.0 - 0.1 * i if ok else -0.1 * i for i, ok in enumerate(correct)]
    values = found(rewards, advantage="pass_at_k", pass_k=k)
    np.testing.assert_allclose(values, oracle.pass_at_k(correct, k), atol=1e-6)


def test_the_population_deviation_is_a_setting() -> None:
    rewards = [1.0, 0.0, 0.0, 0.0]  # mean 1/4; variance 3/16 of the population, 1/4 of a sample
    sample = found(rewards, advantage_eps=1e-12)
    population = found(rewards, advantage_eps=1e-12, advantage_ddof=0)
    np.testing.assert_allclose(sample, [1.5, -0.5, -0.5, -0.5], rtol=1e-6)
    np.testing.assert_allclose(
        population, np.array([0.75] + [-0.25] * 3) / np.sqrt(3 / 16), rtol=1e-6
    )


def test_the_numbers_of_the_guides_hold() -> None:
    np.testing.assert_allclose(
        found([0.5, 0.9, 0.6, 0.4], advantage="dr_grpo"), [-0.1, 0.3, 0, -0.2], atol=1e-6
    )


NAMES = sorted(catalogue("advantage"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reward", [0.0, 0.1, -1.0, 1 / 3, 1e-30, -7.3e6, 3e38])
def test_equal_rewards_give_exactly_zero_for_any_group_size(name: str, reward: float) -> None:
    for size in range(2, 65):
        config = settings(advantage=name, advantage_eps=1e-8)
        values = advantages(rewarded([reward] * size), config, np.zeros(size), batch_std=1.0)
        assert values.dtype == np.float32
        assert values.tolist() == [0.0] * size


def test_separately_normalised_rewards_are_summed_by_weight_without_those_that_do_not_apply() -> (
    None
):
    raw = {
        "reward": {"functions": [{"use": "task"}, {"use": "length_penalty", "weight": 0.5}]},
        "algo": {"reward_combination": "normalise_each"},
    }
    nan = float("nan")
    parts = {"task": [1.0, -1.0, -1.0, 1.0], "length_penalty": [-0.1, nan, -0.3, -0.4]}
    values = advantages(rewarded([0.0, 1.0, 2.0, 3.0], None, parts), from_mapping(raw), np.zeros(4))
    task = oracle.grpo(parts["task"])
    short = oracle.grpo([-0.1, -0.3, -0.4])
    expected = np.array(task) + 0.5 * np.array([short[0], 0.0, short[1], short[2]])
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_the_soft_length_penalty_grows_over_the_last_tokens_to_the_limit() -> None:
    config = from_mapping(
        {
            "sampling": {"max_completion_tokens": 20},
            "algo": {"overlong_buffer": 8, "overlong_penalty": 2.0},
        }
    )
    group = rewarded([1.0] * 5, [4, 12, 14, 16, 20])
    assert penalties(group, config).tolist() == pytest.approx([0, 0, -0.5, -1.0, -2.0])
    values = advantages(group, config, penalties(group, config))
    np.testing.assert_allclose(values, oracle.grpo([1.0, 1.0, 0.5, 0.0, -1.0]), rtol=1e-5)


def test_reward_to_go_sums_from_a_place_to_the_end_of_its_sequence() -> None:
    values = np.array([1.0, 2.0, 3.0, 10.0, 20.0])
    ends = np.array([0, 3, 5], np.int32)
    assert reward_to_go(values, ends).tolist() == [6.0, 5.0, 3.0, 30.0, 20.0]


def own(group: GroupRewards, algo: Any) -> list[float]:
    return [reward * 2 for reward in group.rewards]


def too_few(group: GroupRewards, algo: Any) -> list[float]:
    return [0.0]


def test_a_users_own_estimator_is_used_and_held_to_its_shape() -> None:
    assert found([1.0, 0.0], advantage="test_advantages:own").tolist() == [2.0, 0.0]
    with pytest.raises(AlgorithmError, match=r"too_few' returned \[0.0\] for rewards \[1.0, 0.0\]"):
        found([1.0, 0.0], advantage="test_advantages:too_few")
