"""Mixing is exact, seeded and seekable; every prompt comes exactly as often as it should."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from fakes import make_prompt
from hypothesis import given
from hypothesis import strategies as st

from asyncgrpo.data.streams import EpochStream, MixedStream, resample

seeds = st.integers(0, 2**31 - 1)
weight_lists = st.lists(
    st.one_of(st.integers(1, 9), st.sampled_from([0.1, 0.25, 0.3, 0.7, 1.5, 12.34])),
    min_size=1,
    max_size=6,
)


def mix(
    sizes: list[int], seed: int, epochs: int | None, weights: list[float] | None = None
) -> MixedStream:
    """Of numbered prompts, each source with other ones."""
    streams = [
        EpochStream([make_prompt(100 * number + i) for i in range(size)], seed=f"{seed}:{number}")
        for number, size in enumerate(sizes)
    ]
    shares = weights[: len(sizes)] if weights else [None] * len(sizes)
    return MixedStream(streams, shares, seed=seed, epochs=epochs)


def ids(stream: MixedStream, num: int) -> list[str]:
    return [prompt.prompt_id for i in range(num) if (prompt := stream.get(i)) is not None]


def endless(weights: list[float], seed: int = 0) -> MixedStream:
    """Of one prompt each."""
    return mix([1] * len(weights), seed, None, weights)


def counts(stream: MixedStream, num: int) -> list[int]:
    """How often each source had its turn."""
    drawn = Counter(int(name.removeprefix("p")) // 100 for name in ids(stream, num))
    return [drawn[source] for source in range(6)]


@pytest.mark.parametrize(
    ("weights", "num", "expected"),
    [
        ([3, 1], 4, [3, 1]),
        ([3, 1], 1000, [750, 250]),
        ([0.75, 0.25], 1000, [750, 250]),
        ([1, 1, 1], 100, [34, 33, 33]),
        ([0.7, 0.2, 0.1], 10, [7, 2, 1]),
        ([0.7, 0.2, 0.1], 995, [696, 199, 100]),
        ([1, 10**6], 10**4, [0, 10**4]),
        ([2.5, 1], 7, [5, 2]),
    ],
)
def test_shares_are_those_of_the_largest_remainder(weights, num, expected):
    found = counts(endless(weights), num)[: len(weights)]
    if weights == [1, 1, 1]:
        found.sort(reverse=True)  # who of three equals goes first depends on the seed
    assert found == expected


@given(weight_lists, seeds, st.integers(0, 400))
def test_no_source_is_a_whole_turn_ahead_of_its_share_at_any_position(weights, seed, num):
    found = counts(endless(weights, seed), num)
    exact = [Fraction(str(weight)) for weight in weights]
    for count, weight in zip(found, exact, strict=False):
        assert count - num * weight / sum(exact) < 1


@given(weight_lists, seeds, st.lists(st.integers(0, 300), max_size=20))
def test_a_position_is_the_same_turn_in_whatever_order_it_is_asked(weights, seed, positions):
    stream = endless(weights, seed)
    for position in positions:
        assert stream.get(position) == endless(weights, seed).get(position)


def test_the_others_keep_their_shares_when_a_source_has_given_all_it_has():
    stream = mix([2, 100, 100], 0, 3, [6, 3, 1])
    assert counts(stream, 10)[:3] == [6, 3, 1]
    assert counts(stream, 10 + 300)[:3] == [6, 3 + 225, 1 + 75]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 5), seeds)
def test_without_weights_each_epoch_holds_every_prompt_once(sizes, epoch, seed):
    stream = mix(sizes, seed, None)
    everything = ids(stream, (epoch + 1) * sum(sizes))[epoch * sum(sizes) :]
    assert len(set(everything)) == len(everything) == sum(sizes)


def test_another_seed_gives_another_order_and_the_same_seed_the_same():
    def order(seed: int) -> list[str]:
        return ids(mix([9, 9], seed, 1), 18)

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(8)}) == 8


@pytest.mark.parametrize(
    ("count", "ratio", "kept"),
    [(10, 1, 10), (10, 0.5, 5), (10, 2, 20), (10, 1.3, 13), (3, 0.01, 1)],
)
def test_a_sample_ratio_keeps_so_many_prompts_as_evenly_as_can_be(count, ratio, kept):
    chosen = resample(count, ratio, 0, "a")
    assert len(chosen) == kept
    times = Counter(chosen)
    assert max(times.values()) - min(times[i] for i in range(count)) <= 1
    assert chosen == resample(count, ratio, 0, "a") == sorted(chosen)


def test_a_sample_depends_on_the_seed():
    assert len({tuple(resample(20, 0.5, seed, "a")) for seed in range(5)}) == 5


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.one_of(st.none(), st.lists(st.sampled_from([0.5, 1, 3]), min_size=4, max_size=4)),
    seeds,
    st.integers(1, 3),
)
def test_each_epoch_of_a_mix_holds_every_prompt_of_each_source_once(sizes, weights, seed, epochs):
    stream = mix(sizes, seed, epochs, weights)
    used = Counter((p.prompt_id, stream.epoch(i)) for i in range(99) if (p := stream.get(i)))
    every = [prompt.prompt_id for prompt in stream.prompts()]
    assert used == Counter((prompt, epoch) for prompt in every for epoch in range(epochs))
    assert len(every) == sum(sizes)
    assert stream.get(sum(sizes) * epochs) is stream.epoch(sum(sizes) * epochs) is None
