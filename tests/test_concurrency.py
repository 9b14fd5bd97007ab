"""How many groups an engine has in flight: as many as its KV cache carries, found by itself."""

from __future__ import annotations

import random

import pytest

from asyncgrpo.actor.concurrency import Concurrency, EngineLoad


def settle(concurrency: Concurrency, capacity: int, steps: int, seed: int = 0) -> list[int]:
    """Limits over time with an engine whose cache carries so many groups of varying length."""
    chance, limits = random.Random(seed), []
    for _ in range(steps):
        in_flight = concurrency.limit
        need = in_flight * chance.uniform(0.9, 1.0) / capacity
        preempted = max(0, round((need - 1) * capacity))
        concurrency.observe(EngineLoad(min(need, 1.0), preempted), in_flight)
        limits.append(concurrency.limit)
    return limits


@pytest.mark.parametrize("capacity", [3, 10, 40])
def test_it_settles_below_what_the_cache_carries_and_not_far_below(capacity: int) -> None:
    limits = settle(Concurrency(64, adaptive=True), capacity, 400)[100:]
    assert max(limits) <= capacity + 1
    assert min(limits) >= capacity * 0.6 - 1


def test_it_grows_to_the_most_when_there_is_room_for_all() -> None:
    assert settle(Concurrency(16, adaptive=True), 1000, 20)[-1] == 16


def test_it_does_not_grow_on_the_word_of_an_engine_that_is_half_idle() -> None:
    concurrency = Concurrency(64, adaptive=True)
    before = concurrency.limit
    for _ in range(50):
        concurrency.observe(EngineLoad(kv_share=0.1, preempted=0), in_flight=before // 2)
    assert concurrency.limit == before


def test_it_never_stops_work_altogether() -> None:
    concurrency = Concurrency(1, adaptive=True)
    for _ in range(20):
        concurrency.observe(EngineLoad(kv_share=1.0, preempted=5), in_flight=1)
    assert concurrency.limit == 1


def test_a_fixed_one_stays() -> None:
    assert set(settle(Concurrency(12, adaptive=False), 3, 50)) == {12}
