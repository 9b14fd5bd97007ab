"""The learning rate at its corners and against the formula."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from asyncgrpo.learner.schedule import SCHEDULES, learning_rate
from asyncgrpo.settings.learner import LearnerSettings


def settings(schedule: str, *, warmup: int = 5, floor: float = 0.1) -> LearnerSettings:
    return LearnerSettings(lr=2e-3, warmup_steps=warmup, schedule=schedule, min_lr_ratio=floor)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_warm_up_rises_by_equal_steps_to_the_full_rate(schedule: str) -> None:
    rates = [learning_rate(step, settings(schedule), 100) for step in range(6)]
    assert rates[:5] == pytest.approx([4e-4, 8e-4, 1.2e-3, 1.6e-3, 2e-3])
    assert rates[5] == pytest.approx(2e-3)


def test_a_constant_rate_stays_at_the_top() -> None:
    rates = {learning_rate(step, settings("constant"), 100) for step in range(5, 150)}
    assert rates == {2e-3}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decaying_rate_reaches_its_floor_at_the_last_step_and_stays_there(schedule: str) -> None:
    rates = [learning_rate(step, settings(schedule), 100) for step in range(5, 120)]
    assert rates[0] == pytest.approx(2e-3)
    assert rates[95:] == pytest.approx([2e-4] * 20)
    assert all(later < earlier for earlier, later in pairwise(rates[:96]))


def test_half_way_both_decays_are_in_the_middle_and_cosine_is_flat_at_first() -> None:
    linear = [learning_rate(step, settings("linear", warmup=0), 80) for step in (20, 40)]
    cosine = [learning_rate(step, settings("cosine", warmup=0), 80) for step in (20, 40)]
    assert linear == pytest.approx([2e-3 * (0.1 + 0.9 * 0.75), 2e-3 * 0.55])
    assert cosine == pytest.approx([2e-3 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2), 2e-3 * 0.55])


def test_a_warm_up_longer_than_the_run_still_gives_a_rate() -> None:
    rates = [learning_rate(step, settings("cosine", warmup=50), 10) for step in range(10)]
    assert rates == pytest.approx([2e-3 * (step + 1) / 50 for step in range(10)])
