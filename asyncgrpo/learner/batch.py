"""Packs the groups of a shard into micro-batches: one row of sequences end to end, no padding.

The only place where tokens are shifted: the input at a place predicts the target at that place.
A prompt of P and a completion of T tokens take P + T - 1 places, as the last token predicts
nothing. Example: prompt [7, 8, 9], completion [4, 5], staleness 2, advantage 0.7:

    input_ids          7    8    9    4
    target_ids         8    9    4    5
    position_ids       0    1    2    3
    loss_mask          -    -    x    x
    behavior_logprobs  0    0   -.1  -.3
    advantages         0    0    .7   .7
    staleness          0    0    2    2

The places of one sequence have its number in sequence_ids; completion_ids says which completion
of the batch, counted over its groups, that sequence is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from asyncgrpo.errors import StalenessError
from asyncgrpo.staleness import StalenessAction, bound_of
from asyncgrpo.types import Completion, Float32, Group, Int32, sequence_cost

Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch of N sequences on S places, everything aligned with target_ids.

    Where loss_mask is False, behavior_logprobs, advantages and staleness hold 0.
    """

    input_ids: Int64  # [S]
    target_ids: Int64  # [S] the token after the input, in prompts too
    position_ids: Int64  # [S] starts at 0 in every sequence
    loss_mask: Bool  # [S] True: the target is a completion token that is trained on
    behavior_logprobs: Float32  # [S] nats
    advantages: Float32  # [S] the completion's advantage at each of its tokens
    staleness: Int32  # [S] shard.step - version that sampled the target
    sequence_ids: Int32  # [S] 0..N-1
    completion_ids: Int32  # [N] group-major index among all completions that were packed
    cu_seqlens: Int32  # [N + 1] sequence i lies on places cu_seqlens[i] to cu_seqlens[i + 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """What entered the loss of one rank and what was masked, by reason."""

    num_loss_tokens: int
    num_masked_stale: int  # tokens past max_staleness
    num_masked_nonfinite: int  # tokens of the next
    num_nonfinite_sequences: int  # completions with a behaviour log-prob that is NaN or infinite
    num_truncated_sequences: int  # completions masked because they were cut at the limit
    num_counted_tokens: int  # what the loss divides by: all but truncated ones, masked or not
    num_counted_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """One completion with what the loss needs to know about each of its T tokens."""

    prompt_token_ids: Int32  # [P]
    completion: Completion
    completion_id: int
    staleness: NDArray[np.int64]  # [T]
    is_stale: Bool  # [T] past the bound
    is_finite: bool  # all behaviour log-probs are
    is_truncated: bool  # and therefore masked

    @property
    def loss_mask(self) -> Bool:
        return ~self.is_stale & (self.is_finite and not self.is_truncated)

    @property
    def num_places(self) -> int:
        return len(self.prompt_token_ids) + len(self.completion.token_ids) - 1

    @property
    def cost(self) -> float:
        return sequence_cost(self.num_places)


def pack(
    groups: Sequence[Group],
    step: int,
    *,
    max_tokens: int,
    max_staleness: int,
    staleness_action: StalenessAction,
    mask_truncated: bool = False,
    agree: Callable[[int], int] = lambda count: count,
) -> tuple[tuple[Batch, ...], PackReport]:
    """Micro-batches of at most max_tokens places each, and a report of what was masked.

    agree: makes the fewest micro-batches that this rank needs those that any rank needs, which is
    how many there will be. Their estimated FLOPs are close.

    Advantages are still 0: see `with_advantages`. Sequences are sorted by length, so that a
    micro-batch holds similar lengths; the order is a function of the groups alone. A single
    sequence longer than max_tokens is a micro-batch of its own. Completions with nothing in the
    loss take no places. Micro-batches that nothing is left for have one place outside the loss:
    every rank must join in every collective.

    Masking stale or non-finite tokens does not change the normaliser: the loss divides by all
    completion tokens of the whole batch on all ranks, so that neither the split into micro-batches
    nor another rank's masks change the weight of a token. Only truncated completions, when these
    are masked, leave the count too (the overlong filtering of DAPO, arXiv 2503.14476).

    Raises StalenessError when a token is past the bound and staleness_action is not "mask": the
    buffer's eviction should not have let it through.
    """
    scored: list[_Scored] = []
    for group in groups:
        first = len(scored)
        scored += _score(group, step, first, max_staleness, staleness_action, mask_truncated)
    trained = sorted(
        (item for item in scored if item.loss_mask.any()), key=lambda item: item.num_places
    )
    count = agree(max(len(_fill(trained, max_tokens)), 1))
    batches = [_join(items) for items in _balanced(trained, max_tokens, count)]
    return (*batches, *[_empty_batch()] * (count - len(batches))), _report(scored)


def with_advantages(
    batch: Batch,
    values: Float32,
    on_places: NDArray[np.float64] | float = 0.0,
    shares: NDArray[np.float64] | float = 1.0,
) -> Batch:
    """The batch with advantages: one float32 for each completion that was packed.

    on_places: float64 [S], added to them (rewards per token). shares: float64 [S], how much each
    token's advantage counts.
    """
    spread = (values[batch.completion_ids][batch.sequence_ids] + on_places) * shares
    return replace(batch, advantages=np.where(batch.loss_mask, spread, 0.0).astype(np.float32))


def _score(
    group: Group,
    step: int,
    first_id: int,
    max_staleness: int,
    action: StalenessAction,
    mask_truncated: bool,
) -> Iterator[_Scored]:
    """The group's completions, each with the staleness of its tokens."""
    assert len(group.prompt_token_ids) > 0, "nothing predicts the first token of an empty prompt"
    for index, completion in enumerate(group.completions):
        staleness = step - completion.versions.astype(np.int64)
        is_stale = staleness > bound_of(max_staleness, action)
        if action != "mask" and is_stale.any():
            _refuse(group, step, int(staleness.max()), max_staleness)
        yield _Scored(
            prompt_token_ids=group.prompt_token_ids,
            completion=completion,
            completion_id=first_id + index,
            staleness=staleness,
            is_stale=is_stale,
            # One NaN or infinite log-prob would make the loss and all gradients NaN.
            is_finite=bool(np.isfinite(completion.behavior_logprobs).all()),
            is_truncated=mask_truncated and completion.finish_reason == "length",
        )


def _refuse(group: Group, step: int, staleness: int, max_staleness: int) -> None:
    raise StalenessError(
        f"group {group.lease.lease_id} has a token of version {step - staleness} at step {step}: "
        f"{staleness} versions old, allowed are max_staleness={max_staleness}. The buffer should "
        "have evicted this group: please report it; buffer.staleness_action=mask only masks "
        "such tokens"
    )


def _report(scored: Sequence[_Scored]) -> PackReport:
    nonfinite = [item for item in scored if not item.is_finite]
    return PackReport(
        num_loss_tokens=sum(int(item.loss_mask.sum()) for item in scored),
        num_masked_stale=sum(int(item.is_stale.sum()) for item in scored if item.is_finite),
        num_masked_nonfinite=sum(len(item.completion.token_ids) for item in nonfinite),
        num_nonfinite_sequences=len(nonfinite),
        num_truncated_sequences=sum(item.is_truncated for item in scored),
        num_counted_tokens=sum(
            len(item.completion.token_ids) for item in scored if not item.is_truncated
        ),
        num_counted_sequences=sum(not item.is_truncated for item in scored),
    )


def _fill(
    items: Sequence[_Scored], max_tokens: int, max_cost: float = math.inf
) -> list[list[_Scored]]:
    """Cuts the items, in their order, into runs of at most max_tokens places and max_cost."""
    runs: list[list[_Scored]] = []
    places, cost = 0, math.inf
    for item in items:
        places, cost = places + item.num_places, cost + item.cost
        if places > max_tokens or cost > max_cost or not runs:
            runs.append([])
            places, cost = item.num_places, item.cost
        runs[-1].append(item)
    return runs


def _balanced(items: Sequence[_Scored], max_tokens: int, count: int) -> list[list[_Scored]]:
    """Cuts the items into at most `count` runs, the costliest of which is as cheap as can be."""
    low, high = 0.0, sum(item.cost for item in items)
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if len(_fill(items, max_tokens, middle)) <= count:
            high = middle
        else:
            low = middle
    return _fill(items, max_tokens, high)


def _join(items: Sequence[_Scored]) -> Batch:
    """Lays the items end to end."""
    lengths = np.array([item.num_places for item in items], np.int32)
    tokens = [np.concatenate([i.prompt_token_ids, i.completion.token_ids]) for i in items]
    return Batch(
        input_ids=np.concatenate([row[:-1] for row in tokens]).astype(np.int64),
        target_ids=np.concatenate([row[1:] for row in tokens]).astype(np.int64),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        loss_mask=_on_targets(items, lambda item: True, np.bool_),
        behavior_logprobs=_on_targets(
            items, lambda item: item.completion.behavior_logprobs, np.float32
        ),
        advantages=np.zeros(int(lengths.sum()), np.float32),
        staleness=_on_targets(items, lambda item: item.staleness, np.int32),
        sequence_ids=np.repeat(np.arange(len(items), dtype=np.int32), lengths),
        completion_ids=np.array([item.completion_id for item in items], np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
    )


def _on_targets(
    items: Sequence[_Scored], value: Callable[[_Scored], ArrayLike], dtype: type[Scalar]
) -> NDArray[Scalar]:
    """Each item's values (one, or one per completion token) on its target places; 0 if masked."""
    rows: list[NDArray[Scalar]] = []
    for item in items:
        rows.append(np.zeros(len(item.prompt_token_ids) - 1, dtype))
        rows.append(np.where(item.loss_mask, value(item), 0).astype(dtype))
    return np.concatenate(rows)


def _empty_batch() -> Batch:
    """One place outside the loss: a forward and backward pass that adds nothing."""
    return Batch(
        input_ids=np.zeros(1, np.int64),
        target_ids=np.zeros(1, np.int64),
        position_ids=np.zeros(1, np.int64),
        loss_mask=np.zeros(1, np.bool_),
        behavior_logprobs=np.zeros(1, np.float32),
        advantages=np.zeros(1, np.float32),
        staleness=np.zeros(1, np.int32),
        sequence_ids=np.zeros(1, np.int32),
        completion_ids=np.zeros(1, np.int32),
        cu_seqlens=np.array([0, 1], np.int32),
    )
