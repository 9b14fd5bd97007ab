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

import numpy as np
from numpy.typing import NDArray

from asyncgrpo.errors import StalenessError
from asyncgrpo.staleness import StalenessAction, bound_of
from asyncgrpo.types import Completion, Float32, Group, Int32, sequence_cost

Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


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
    num_masked_tokens: int  # past max_staleness, or of the next
    num_nonfinite_sequences: int  # completions with a behaviour log-prob that is NaN or infinite
    num_counted_tokens: int  # what the loss divides by: all but truncated ones, masked or not
    num_counted_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """One completion with what the loss needs to know about each of its T tokens."""

    prompt_token_ids: Int32  # [P]
    completion: Completion
    completion_id: int
    staleness: Int64  # [T]
    is_masked: Bool  # [T] past the bound, or in a completion whose log-probs are not all finite
    is_finite: bool  # all behaviour log-probs are
    is_truncated: bool  # and therefore masked
    loss_mask: Bool  # [T]

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
    scored = list(_score(groups, step, max_staleness, staleness_action, mask_truncated))
    trained = sorted(
        (item for item in scored if item.loss_mask.any()), key=lambda item: item.num_places
    )
    count = agree(max(len(_fill(trained, max_tokens)), 1))
    batches = [_join(items) for items in _balanced(trained, max_tokens, count)]
    counted = [item for item in scored if not item.is_truncated]
    report = PackReport(
        num_loss_tokens=sum(int(item.loss_mask.sum()) for item in scored),
        num_masked_tokens=sum(int(item.is_masked.sum()) for item in scored),
        num_nonfinite_sequences=sum(not item.is_finite for item in scored),
        num_counted_tokens=sum(len(item.completion.token_ids) for item in counted),
        num_counted_sequences=len(counted),
    )
    return (*batches, *[_empty_batch()] * (count - len(batches))), report


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
    groups: Sequence[Group],
    step: int,
    max_staleness: int,
    action: StalenessAction,
    mask_truncated: bool,
) -> Iterator[_Scored]:
    """Every completion, with the staleness of its tokens and whether they are trained on."""
    every = ((group, completion) for group in groups for completion in group.completions)
    for number, (group, completion) in enumerate(every):
        assert len(group.prompt_token_ids) > 0, "the first token of an empty prompt has no input"
        staleness = step - completion.versions.astype(np.int64)
        is_stale = staleness > bound_of(max_staleness, action)
        if action != "mask" and is_stale.any():
            oldest = int(staleness.max())
            raise StalenessError(
                f"group {group.lease.lease_id} has a token of version {step - oldest} at step "
                f"{step}: {oldest} versions old, allowed are max_staleness={max_staleness}. The "
                "buffer should have evicted this group: please report it; "
                "buffer.staleness_action=mask only masks such tokens"
            )
        # One NaN or infinite log-prob would make the loss and all gradients NaN.
        is_finite = bool(np.isfinite(completion.behavior_logprobs).all())
        is_truncated = mask_truncated and completion.finish_reason == "length"
        is_masked = is_stale | (not is_finite)
        yield _Scored(
            prompt_token_ids=group.prompt_token_ids,
            completion=completion,
            completion_id=number,
            staleness=staleness,
            is_masked=is_masked,
            is_finite=is_finite,
            is_truncated=is_truncated,
            loss_mask=~(is_masked | is_truncated),
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
    mask = np.concatenate([np.pad(i.loss_mask, (len(i.prompt_token_ids) - 1, 0)) for i in items])
    behavior, staleness = np.zeros(len(mask), np.float32), np.zeros(len(mask), np.int32)
    behavior[mask] = np.concatenate([i.completion.behavior_logprobs[i.loss_mask] for i in items])
    staleness[mask] = np.concatenate([i.staleness[i.loss_mask] for i in items])
    return Batch(
        input_ids=np.concatenate([row[:-1] for row in tokens]).astype(np.int64),
        target_ids=np.concatenate([row[1:] for row in tokens]).astype(np.int64),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        loss_mask=mask,
        behavior_logprobs=behavior,
        advantages=np.zeros(len(mask), np.float32),
        staleness=staleness,
        sequence_ids=np.repeat(np.arange(len(items), dtype=np.int32), lengths),
        completion_ids=np.array([item.completion_id for item in items], np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
    )


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
