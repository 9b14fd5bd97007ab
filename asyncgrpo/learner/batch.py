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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncgrpo.config import Config
from asyncgrpo.errors import StalenessError
from asyncgrpo.staleness import bound_of
from asyncgrpo.types import Float32, Group, Int32, sequence_cost

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


@dataclass(slots=True, kw_only=True)
class PackReport:
    """What entered the loss of one rank and what was masked, by reason."""

    num_loss_tokens: int = 0
    num_masked_tokens: int = 0  # past max_staleness, or of the next
    num_nonfinite_sequences: int = 0  # with a behaviour log-prob that is NaN or infinite
    num_counted_tokens: int = 0  # what the loss divides by: all but truncated ones, masked or not
    num_counted_sequences: int = 0


class _Row(NamedTuple):
    """One completion of T tokens behind its prompt of P."""

    tokens: Int32  # [P + T]
    loss_mask: Bool  # [T] what is trained on
    behavior_logprobs: Float32  # [T]
    staleness: Int32  # [T]
    completion_id: int

    @property
    def num_places(self) -> int:
        return len(self.tokens) - 1

    @property
    def cost(self) -> float:
        return sequence_cost(self.num_places)


_ZERO = np.zeros(1, np.int32)
# One place outside the loss: a forward and backward pass that adds nothing.
NOTHING = _Row(np.zeros(2, np.int32), _ZERO > 0, _ZERO.astype(np.float32), _ZERO, 0)


def pack(
    groups: Sequence[Group],
    step: int,
    config: Config,
    agree: Callable[[int], int] = lambda count: count,
) -> tuple[tuple[Batch, ...], PackReport]:
    """Micro-batches of at most learner.max_tokens_per_microbatch places, and what was masked.

    agree: makes the fewest micro-batches that this rank needs those that any rank needs, which is
    how many there will be. Their estimated FLOPs are close.

    Advantages are still 0: see `with_advantages`. Sequences are sorted by length, so that a
    micro-batch holds similar lengths; the order is a function of the groups alone. A single
    sequence that is longer is a micro-batch of its own. Completions with nothing in the
    loss take no places. Micro-batches that nothing is left for have one place outside the loss:
    every rank must join in every collective.

    Masking stale or non-finite tokens does not change the normaliser: the loss divides by all
    completion tokens of the whole batch on all ranks, so that neither the split into micro-batches
    nor another rank's masks change the weight of a token. Only truncated completions, when these
    are masked, leave the count too (the overlong filtering of DAPO, arXiv 2503.14476).

    Raises StalenessError when a token is past the bound and buffer.staleness_action is not "mask":
    the buffer's eviction should not have let it through.
    """
    max_tokens, buffer = config.learner.max_tokens_per_microbatch, config.buffer
    bound = bound_of(buffer.max_staleness, buffer.staleness_action)
    rows, report = [], PackReport()
    every = ((group, completion) for group in groups for completion in group.completions)
    for number, (group, completion) in enumerate(every):
        staleness = step - completion.versions
        is_stale = staleness > bound
        if buffer.staleness_action != "mask" and is_stale.any():
            raise _too_old(group.lease.lease_id, step, int(staleness.max()), buffer.max_staleness)
        # One NaN or infinite log-prob would make the loss and all gradients NaN.
        is_finite = bool(np.isfinite(completion.behavior_logprobs).all())
        is_masked = is_stale | (not is_finite)
        is_counted = not (config.algo.mask_truncated and completion.finish_reason == "length")
        loss_mask = ~is_masked & is_counted
        report.num_loss_tokens += int(loss_mask.sum())
        report.num_masked_tokens += int(is_masked.sum())
        report.num_nonfinite_sequences += not is_finite
        report.num_counted_tokens += len(completion.token_ids) * is_counted
        report.num_counted_sequences += is_counted
        if loss_mask.any():
            assert len(group.prompt_token_ids) > 0, "the first token has no input"
            tokens = np.concatenate([group.prompt_token_ids, completion.token_ids])
            behavior = completion.behavior_logprobs
            rows.append(_Row(tokens, loss_mask, behavior, staleness, number))
    rows.sort(key=lambda row: row.num_places)
    count = agree(max(len(_fill(rows, max_tokens)), 1))
    batches = [_join(part) for part in _balanced(rows, max_tokens, count)]
    return (*batches, *[_join([NOTHING])] * (count - len(batches))), report


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


def _too_old(lease_id: str, step: int, oldest: int, max_staleness: int) -> StalenessError:
    return StalenessError(
        f"group {lease_id} has a token of version {step - oldest} at step {step}: {oldest} "
        f"versions old, allowed are max_staleness={max_staleness}. The buffer should have evicted "
        "this group: please report it; buffer.staleness_action=mask only masks such tokens"
    )


def _fill(rows: Sequence[_Row], max_tokens: int, max_cost: float = math.inf) -> list[list[_Row]]:
    """Cuts the rows, in their order, into runs of at most max_tokens places and max_cost."""
    runs: list[list[_Row]] = []
    places, cost = 0, math.inf
    for row in rows:
        places, cost = places + row.num_places, cost + row.cost
        if places > max_tokens or cost > max_cost or not runs:
            runs.append([])
            places, cost = row.num_places, row.cost
        runs[-1].append(row)
    return runs


def _balanced(rows: Sequence[_Row], max_tokens: int, count: int) -> list[list[_Row]]:
    """Cuts the rows into at most `count` runs, the costliest of which is as cheap as can be."""
    low, high = 0.0, sum(row.cost for row in rows)
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if len(_fill(rows, max_tokens, middle)) <= count:
            high = middle
        else:
            low = middle
    return _fill(rows, max_tokens, high)


def _join(rows: Sequence[_Row]) -> Batch:
    """Lays the rows end to end."""
    lengths = np.array([row.num_places for row in rows], np.int32)
    masks = [np.pad(row.loss_mask, (row.num_places - len(row.loss_mask), 0)) for row in rows]
    mask = np.concatenate(masks)
    behavior, staleness = np.zeros(len(mask), np.float32), np.zeros(len(mask), np.int32)
    behavior[mask] = np.concatenate([row.behavior_logprobs[row.loss_mask] for row in rows])
    staleness[mask] = np.concatenate([row.staleness[row.loss_mask] for row in rows])
    return Batch(
        input_ids=np.concatenate([row.tokens[:-1] for row in rows]).astype(np.int64),
        target_ids=np.concatenate([row.tokens[1:] for row in rows]).astype(np.int64),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        loss_mask=mask,
        behavior_logprobs=behavior,
        advantages=np.zeros(len(mask), np.float32),
        staleness=staleness,
        sequence_ids=np.repeat(np.arange(len(rows), dtype=np.int32), lengths),
        completion_ids=np.array([row.completion_id for row in rows], np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
    )
