"""Packing: every completion token stands once, on its target, with its own numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import completion_of, group_of, shard_of

from asyncgrpo.config import Config, from_mapping
from asyncgrpo.errors import StalenessError
from asyncgrpo.learner.batch import Batch, PackReport, pack, with_advantages
from asyncgrpo.staleness import share_of
from asyncgrpo.types import Completion, Group, Shard, sequence_cost

STEP = 9


def completion(
    tokens: list[int], versions: list[int] | int = STEP, logprobs: list[float] | None = None
) -> Completion:
    return completion_of(tokens, versions, logprobs)


def shard(*groups: Group) -> Shard:
    return shard_of(groups, STEP)


def settings(max_tokens: int = 1000, mask_truncated: bool = False, **buffer: Any) -> Config:
    return from_mapping(
        {
            "data": {"max_prompt_tokens": 4},
            "sampling": {"max_completion_tokens": 4},
            "algo": {"mask_truncated": mask_truncated},
            "learner": {"max_tokens_per_microbatch": max_tokens},
            "buffer": {"max_staleness": 4, **buffer},
        }
    )


def packed(
    batch_of: Shard, agree: Callable[[int], int] = lambda count: count, **changes: Any
) -> tuple[tuple[Batch, ...], PackReport]:
    """Packed with the advantages of dr_grpo."""
    batches, report = pack(batch_of.groups, batch_of.step, settings(**changes), agree)
    rewards = [g.rewards - g.rewards.mean() for g in batch_of.groups]
    flat = np.concatenate(rewards) if rewards else np.zeros(1, np.float32)
    return tuple(with_advantages(batch, flat) for batch in batches), report


def random_shard(seed: int, longest: int = 12) -> Shard:
    """Token ids are unique over the whole shard, so that each can be looked up by itself."""
    random = np.random.default_rng(seed)
    next_token = 1

    def tokens(count: int) -> list[int]:
        nonlocal next_token
        next_token += count
        return list(range(next_token - count, next_token))

    groups = []
    for number in range(int(random.integers(1, 6))):
        prompt = tokens(int(random.integers(1, 6)))
        completions = []
        for _ in range(4):
            length = int(random.integers(0, longest + 1))
            versions = np.sort(random.integers(STEP - 4, STEP + 1, length)).tolist()
            completions.append(
                completion(tokens(length), versions, (-random.random(length)).tolist())
            )
        groups.append(group_of(number, prompt, completions, random.normal(size=4).tolist()))
    return shard(*groups)


def expected_tokens(batch_of: Shard) -> dict[int, tuple[int, int, float, float, int]]:
    """token -> (token before it, position of that one, log-prob, advantage, staleness)."""
    table = {}
    for one in batch_of.groups:
        mean = sum(one.rewards.tolist()) / len(one.rewards)
        for made, reward in zip(one.completions, one.rewards.tolist(), strict=True):
            line = [*one.prompt_token_ids.tolist(), *made.token_ids.tolist()]
            for t, token in enumerate(made.token_ids.tolist()):
                place = len(one.prompt_token_ids) + t
                age = batch_of.step - int(made.versions[t])
                logprob = float(made.behavior_logprobs[t])
                table[token] = (line[place - 1], place - 1, logprob, reward - mean, age)
    return table


def test_the_example_of_the_docstring_holds() -> None:
    one = completion([4, 5], STEP - 2, [-0.1, -0.3])
    other = completion([6], STEP)
    (batch,), report = packed(shard(group_of(1, [7, 8, 9], [one, other], [1.4, 0.0])))
    assert batch.cu_seqlens.tolist() == [0, 3, 7]
    assert batch.sequence_ids.tolist() == [0] * 3 + [1] * 4
    assert batch.input_ids[3:].tolist() == [7, 8, 9, 4]
    assert batch.target_ids[3:].tolist() == [8, 9, 4, 5]
    assert batch.position_ids[3:].tolist() == [0, 1, 2, 3]
    assert batch.loss_mask[3:].tolist() == [False, False, True, True]
    assert batch.behavior_logprobs[3:] == pytest.approx([0, 0, -0.1, -0.3])
    assert batch.advantages == pytest.approx([0, 0, -0.7, 0, 0, 0.7, 0.7])
    assert batch.staleness.tolist() == [0, 0, 0, 0, 0, 2, 2]
    assert report.num_loss_tokens == 3


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("max_tokens", [17, 40, 1000])
def test_every_completion_token_is_scored_once_with_its_own_numbers(
    seed: int, max_tokens: int
) -> None:
    batch_of = random_shard(seed)
    batches, report = packed(batch_of, max_tokens=max_tokens)
    found: dict[int, tuple[int, int, float, float, int]] = {}
    for batch in batches:
        for s in np.flatnonzero(batch.loss_mask):
            token = int(batch.target_ids[s])
            assert token not in found
            found[token] = (
                int(batch.input_ids[s]),
                int(batch.position_ids[s]),
                float(batch.behavior_logprobs[s]),
                float(batch.advantages[s]),
                int(batch.staleness[s]),
            )
    expected = expected_tokens(batch_of)
    assert found.keys() == expected.keys()
    for token, values in expected.items():
        assert found[token] == pytest.approx(values, abs=1e-6)
    assert report.num_loss_tokens == batch_of.num_loss_tokens_global


@pytest.mark.parametrize("seed", range(10))
def test_micro_batches_are_sorted_and_consistent(seed: int) -> None:
    batches, _ = packed(random_shard(seed), max_tokens=30)
    lengths = [length for batch in batches for length in np.diff(batch.cu_seqlens).tolist()]
    assert lengths == sorted(lengths)
    for batch in batches:
        assert len(batch.input_ids) <= 30
        for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            assert batch.position_ids[start:end].tolist() == list(range(end - start))
            assert batch.target_ids[start : end - 1].tolist() == (
                batch.input_ids[start + 1 : end].tolist()
            )
        for name in ("behavior_logprobs", "advantages", "staleness"):
            assert not getattr(batch, name)[~batch.loss_mask].any()
        wide = {batch.input_ids.dtype, batch.target_ids.dtype, batch.position_ids.dtype}
        assert wide == {np.dtype(np.int64)}
        assert {batch.behavior_logprobs.dtype, batch.advantages.dtype} == {np.dtype(np.float32)}
        assert {batch.staleness.dtype, batch.cu_seqlens.dtype} == {np.dtype(np.int32)}


def fewest(lengths: list[int], max_tokens: int) -> int:
    """Runs that hold neighbours of up to max_tokens in all, filled one after the other."""
    count, used = 0, max_tokens
    for length in lengths:
        used += length
        if used > max_tokens:
            count, used = count + 1, length
    return max(count, 1)


def cheapest(lengths: list[int], max_tokens: int, count: int) -> float:
    """The cost of the costliest run, over all ways to cut into at most `count` runs."""
    if not lengths:
        return 0.0
    found = math.inf
    for end in range(1, len(lengths) + 1) if count else ():
        if end == 1 or sum(lengths[:end]) <= max_tokens:
            rest = cheapest(lengths[end:], max_tokens, count - 1)
            found = min(found, max(sum(map(sequence_cost, lengths[:end])), rest))
    return found


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("more", [0, 1, 3])
def test_there_are_as_many_micro_batches_as_ranks_agree_on_and_none_is_much_dearer(
    seed: int, more: int
) -> None:
    batch_of = random_shard(seed, longest=9)
    batches, _ = packed(batch_of, max_tokens=40, agree=lambda count: count + more)
    told = [np.diff(b.cu_seqlens).tolist() for b in batches if b.loss_mask.any()]
    lengths = [length for run in told for length in run]
    assert len(batches) == fewest(lengths, 40) + more
    assert sum(int(b.loss_mask.sum()) for b in batches) == batch_of.num_loss_tokens_global
    costs = [sum(map(sequence_cost, run)) for run in told]
    best = cheapest(lengths, 40, len(batches))
    assert max(costs, default=0.0) <= best * 1.002


def test_long_sequences_cost_more_than_their_tokens() -> None:
    """A causal block of width w = 16384 / 12: 24 w^2 FLOPs of matrices, 2 w L of attention."""
    width = 16_384 / 12
    for length in (1, 100, 16_384, 100_000):
        flops = length * (24 * width**2 + 2 * width * length)
        assert sequence_cost(length) == pytest.approx(flops / (24 * width**2))


def test_packing_twice_gives_the_same() -> None:
    one, _ = packed(random_shard(3), max_tokens=30)
    other, _ = packed(random_shard(3), max_tokens=30)
    for mine, yours in zip(one, other, strict=True):
        for name in Batch.__slots__:
            np.testing.assert_array_equal(getattr(mine, name), getattr(yours, name))


def test_a_token_past_the_bound_is_refused_with_group_version_step_and_bound() -> None:
    old = group_of(17, [7], [completion([4, 5], [STEP - 5, STEP]), completion([6])], [1.0, 0.0])
    with pytest.raises(StalenessError, match=r"group t17 .* version 4 at step 9.*max_staleness=4"):
        packed(shard(old))


def test_a_token_at_the_bound_is_trained() -> None:
    old = group_of(17, [7], [completion([4, 5], [STEP - 4, STEP]), completion([6])], [1.0, 0.0])
    (batch,), _ = packed(shard(old))
    assert int(batch.staleness.max()) == 4


def test_masking_takes_out_only_the_tokens_past_the_bound_and_counts_them() -> None:
    versions = [STEP - 6, STEP - 5, STEP - 4, STEP]
    old = group_of(1, [7], [completion([1, 2, 3, 4], versions), completion([6])], [1.0, 0.0])
    (batch,), report = packed(shard(old), staleness_action="mask")
    assert batch.target_ids[batch.loss_mask].tolist() == [6, 3, 4]
    assert batch.staleness.tolist() == [0, 0, 0, 4, 0]
    assert report == PackReport(
        num_loss_tokens=3,
        num_masked_tokens=2,
        num_counted_tokens=5,
        num_counted_sequences=2,
    )


def test_tokens_past_the_bound_count_half_for_each_version_when_they_are_weighed_down() -> None:
    versions = [STEP - 8, STEP - 6, STEP - 5, STEP - 4, STEP]
    old = group_of(1, [7], [completion([1, 2, 3, 4, 5], versions), completion([6])], [1.0, 0.0])
    config = settings(staleness_action="downweight")
    (batch,), report = pack((old,), STEP, config)
    assert report.num_loss_tokens == 6
    values = np.array([0.5, -0.5], np.float32)
    shares = share_of(batch.staleness, 4, "downweight")
    weighed = with_advantages(batch, values, shares=shares)
    found = dict(zip(batch.target_ids.tolist(), weighed.advantages.tolist(), strict=True))
    assert found == {1: 0.5 / 16, 2: 0.5 / 4, 3: 0.5 / 2, 4: 0.5, 5: 0.5, 6: -0.5}
    assert (share_of(batch.staleness, 4, "mask") == 1).all()
    older = group_of(1, [7], [completion([1], [STEP - 9]), completion([6])], [1.0, 0.0])
    with pytest.raises(StalenessError):
        pack((older,), STEP, config)


def test_masking_truncated_completions_takes_them_out_of_the_loss_and_of_the_count() -> None:
    cut = replace(completion([1, 2, 3]), finish_reason="length")
    one = group_of(1, [7], [cut, completion([6])], [1.0, 0.0])
    (batch,), report = packed(shard(one), mask_truncated=True)
    assert batch.target_ids[batch.loss_mask].tolist() == [6]
    assert (report.num_counted_tokens, report.num_counted_sequences) == (1, 1)
    (batch,), report = packed(shard(one))
    assert sorted(batch.target_ids[batch.loss_mask].tolist()) == [1, 2, 3, 6]
    assert (report.num_counted_tokens, report.num_counted_sequences) == (4, 2)


def test_completion_ids_name_the_sequences_by_their_place_in_the_batch() -> None:
    groups = [
        group_of(1, [7], [completion([1, 2, 3]), completion([])], [1.0, 0.0]),
        group_of(2, [8], [completion([4]), completion([5, 6])], [1.0, 0.0]),
    ]
    (batch,), _ = packed(shard(*groups))
    assert batch.completion_ids.tolist() == [2, 3, 0]  # by length; the empty one takes no place


def test_advantages_per_place_are_added_inside_the_loss_only() -> None:
    (batch,), _ = packed(shard(group_of(1, [7, 8], [completion([4, 5]), completion([6])], [1, 0])))
    moved = with_advantages(batch, np.zeros(2, np.float32), np.arange(5.0))
    assert moved.advantages.tolist() == [0, 1, 0, 3, 4]


@pytest.mark.parametrize("poison", [float("nan"), float("-inf"), float("inf")])
def test_a_completion_with_a_nonfinite_logprob_leaves_the_loss_whole(poison: float) -> None:
    bad = completion([1, 2, 3], STEP, [-0.1, poison, -0.1])
    (batch,), report = packed(shard(group_of(1, [7], [bad, completion([6])], [1.0, 0.0])))
    assert batch.target_ids[batch.loss_mask].tolist() == [6]
    assert np.isfinite(batch.behavior_logprobs).all()
    assert report == PackReport(
        num_loss_tokens=1,
        num_masked_tokens=3,
        num_nonfinite_sequences=1,
        num_counted_tokens=4,
        num_counted_sequences=2,
    )


def test_the_reward_of_an_empty_completion_still_counts_in_the_group_mean() -> None:
    (batch,), _ = packed(shard(group_of(1, [7, 8], [completion([]), completion([6])], [1.0, 0.0])))
    assert batch.target_ids.tolist() == [8, 6]
    assert batch.advantages == pytest.approx([0.0, -0.5])


@pytest.mark.parametrize(
    "groups", [(), (group_of(1, [7], [completion([]), completion([])], [1, 0]),)]
)
def test_a_shard_without_tokens_gives_one_micro_batch_with_an_empty_mask(
    groups: tuple[Group, ...],
) -> None:
    (batch,), report = packed(shard(*groups))
    assert len(batch.input_ids) == 1
    assert not batch.loss_mask.any()
    assert report.num_loss_tokens == 0


def test_a_sequence_longer_than_a_micro_batch_gets_one_of_its_own() -> None:
    long = completion(list(range(1, 41)))
    batches, _ = packed(shard(group_of(1, [7], [long, completion([6])], [1.0, 0.0])), max_tokens=16)
    assert [len(batch.input_ids) for batch in batches] == [1, 40]
