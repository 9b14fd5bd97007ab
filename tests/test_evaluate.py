"""Reports of evaluations: the estimator, and the arithmetic from hand-made groups."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from fakes import make_group, make_lease, make_prompt
from hypothesis import given
from hypothesis import strategies as st

from asyncgrpo.evaluate import pass_at_k, summarise
from asyncgrpo.settings.reward import EvalSettings
from asyncgrpo.types import Completions


@given(st.data())
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_correct_sample(data):
    n = data.draw(st.integers(1, 9))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_is_exact_where_factorials_overflow():
    assert pass_at_k(100_000, 1, 1_000) == 0.01
    assert pass_at_k(20_000, 10_000, 1) == 0.5
    assert pass_at_k(5_000, 0, 2_500) == 0.0
    assert pass_at_k(5_000, 2_501, 2_500) == 1.0


def group(number: int, scores: list[float], lengths: list[int], reason="stop", source="task/add"):
    lease = replace(
        make_lease(number, len(scores), "eval"), prompt=make_prompt(number, data_source=source)
    )
    made = make_group(lease, versions=[[3] * length for length in lengths], scores=scores)
    *others, last = made.completions
    completions = Completions.of([*others, replace(last, finish_reason=reason)])
    rewards = made.rewards - np.float32(0.5)
    return replace(made, rewards=rewards, completions=completions)


def test_a_report_averages_completions_and_estimates_pass_at_k_per_prompt():
    block = EvalSettings.model_validate(
        {"name": "b", "num_samples": 2, "k": [1, 2], "sampling": {"temperature": 0.7}}
    )
    groups = [
        group(1, [1.0, 0.4], [2, 4], reason="length"),
        group(2, [0.0, 0.3], [3, 3]),
        group(3, [1.0, 0.9], [1, 5], source="task/sort"),
    ]
    values = {"version": 3, "num_prompts": 4, "correct_above": 0.5, "seconds": 2.5}
    assert summarise(groups, block, **values) == {
        "name": "b",
        "version": 3,
        "num_prompts": 4,
        "num_answered": 3,
        "num_samples": 2,
        "temperature": 0.7,
        "accuracy": 0.5,
        "pass_at_k": {"1": 0.5, "2": pytest.approx(2 / 3)},
        "reward_mean": pytest.approx(0.1),
        "mean_tokens": 3.0,
        "truncated_share": pytest.approx(1 / 6),
        "accuracy_by_source": {"task/add": 0.25, "task/sort": 1.0},
        "seconds": 2.5,
    }


def test_a_report_does_not_depend_on_the_order_of_the_answers():
    block, random = EvalSettings(), np.random.default_rng(0)
    scores = random.normal(size=50) * 10.0 ** random.integers(-15, 15, 50)
    groups = [group(i, [float(score)], [2]) for i, score in enumerate(scores)]
    values = {"version": 0, "num_prompts": 50, "correct_above": 0.0, "seconds": 0.0}
    shuffled = [groups[i] for i in random.permutation(50)]
    assert summarise(groups, block, **values) == summarise(shuffled, block, **values)


def test_a_score_that_does_not_apply_is_not_correct_and_nothing_answered_is_zero():
    block = EvalSettings()
    values = {"version": 0, "num_prompts": 1, "correct_above": -1.0, "seconds": 0.0}
    assert summarise([group(1, [float("nan")], [2])], block, **values)["accuracy"] == 0.0
    empty = summarise([], block, **values)
    assert (empty["num_answered"], empty["accuracy"], empty["accuracy_by_source"]) == (0, 0.0, {})
