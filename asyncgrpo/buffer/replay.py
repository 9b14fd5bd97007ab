"""The store of finished groups: which ones make up the next batch, and how ranks share them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import accumulate

import numpy as np

from asyncgrpo.buffer.journal import Batch, Remembered
from asyncgrpo.buffer.leases import OpenLease
from asyncgrpo.config import Config
from asyncgrpo.staleness import past_bound
from asyncgrpo.types import EndedGroup, Float32, Group, Shard


@dataclass(frozen=True, slots=True)
class Seen:
    """The step that was next when a group's lease was handed out, and when it came."""

    leased_step: int
    arrived_step: int
    arrived_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A group and when it came."""

    ticket: int  # lease number: the order in which work was handed out
    arrival: int
    group: Group
    oldest_version: int  # of its tokens; kept, for it is asked for often
    seen: Seen | None = None  # None: it came in a former life of the buffer


class Replay:
    """Groups wait here between arrival and the batch that takes them, and until that is trained."""

    def __init__(self, config: Config) -> None:
        self._config, self._buffer = config, config.buffer
        self._new_groups = config.new_groups
        self._stored: dict[int, Stored] = {}  # by ticket
        self.batches: dict[int, Batch] = {}  # by step: formed and not trained
        self._trained: dict[int, Group] = {}  # by ticket: what may be trained again
        self._uses: Counter[int] = Counter()  # how often each of these was
        self.groups_arrived = self.tokens_arrived = 0  # in all
        self.num_tokens = 0  # completion tokens waiting

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def num_taken(self) -> int:
        """New groups in batches that are not trained yet."""
        return sum(batch.num_new for batch in self.batches.values())

    def restore(self, past: Remembered) -> None:
        """Takes up the groups and batches that a former life of the buffer left."""
        for ticket, group in past.stored:
            self.add(ticket, group)
        self.batches.update(past.batches)
        self._uses.update(past.uses)
        self.groups_arrived, self.tokens_arrived = past.groups_stored, past.tokens_stored

    def add(self, ticket: int, group: Group, seen: Seen | None = None) -> None:
        """Stores a group under its ticket."""
        self.groups_arrived += 1
        self.tokens_arrived += group.num_tokens
        self.num_tokens += group.num_tokens
        self._stored[ticket] = Stored(
            ticket=ticket,
            arrival=self.groups_arrived,
            group=group,
            oldest_version=group.completions.version_span[0],
            seen=seen,
        )

    def evict(self, step: int) -> list[Stored]:
        """Removes and returns what can no longer be trained at `step`."""
        bound, action = self._buffer.max_staleness, self._buffer.staleness_action
        old = [
            stored
            for stored in self._stored.values()
            if stored.oldest_version < step - bound  # then only the rule needs its tokens
            and past_bound(stored.group, step, bound, action)
        ]
        self._remove(old)
        return old

    def form(
        self, step: int, being_made: Collection[OpenLease], *, is_last: bool = False
    ) -> list[Stored]:
        """Makes a step's batch and returns its new groups; none while there are not enough.

        is_last: nothing will come any more, so a batch of one group per rank will do.
        """
        if len(self) < self._new_groups and not (is_last or self._buffer.tokens_per_step):
            return []
        able = self._able(being_made)
        count = self._count(able)
        if is_last and len(able) >= self._config.launch.learners:
            count = min(count, len(able))
        chosen = able[:count]
        if len(able) < count or self._must_wait(step, being_made, chosen):
            return []
        self._remove(chosen)
        again = self._to_repeat(step, self._buffer.groups_per_step - count)
        self._uses.update(list(again))
        self.batches[step] = Batch(
            tickets=[*(stored.ticket for stored in chosen), *again],
            groups=[*(stored.group for stored in chosen), *again.values()],
            num_new=count,
        )
        return chosen

    def hold(self, step: int, batch: Batch) -> None:
        """Keeps a batch that was trained before and will be once more."""
        self.batches[step] = batch
        for ticket in batch.new:
            self._trained.pop(ticket, None)

    def done(self, step: int) -> None:
        """Removes a trained batch; its new groups may be trained again, if that is asked for."""
        batch = self.batches.pop(step)
        if self._buffer.replay_ratio:
            self._trained.update(zip(batch.new, batch.groups, strict=False))

    def shard(self, step: int, rank: int, world_size: int) -> Shard:
        """One rank's part of a batch, with the counts of the whole."""
        groups = self.batches[step].groups
        return Shard(
            step=step,
            groups=deal(groups, world_size)[rank],
            num_loss_tokens_global=sum(group.num_tokens for group in groups),
            num_completions_global=sum(len(group.completions) for group in groups),
        )

    def _able(self, being_made: Collection[OpenLease]) -> list[Stored]:
        """What may be taken, in the store's order.

        arrival: all, the oldest version first. window: the same, but nothing that is further ahead
        of work that is still being made, so that long completions are not left behind for ever.
        ticket: in the order in which work was handed out, nothing ahead of earlier work.
        """
        order = self._buffer.order
        stored: Iterable[Stored] = self._stored.values()
        if order != "arrival" and being_made:
            end = min(lease.ticket for lease in being_made)
            end += self._buffer.window if order == "window" else 0
            stored = [each for each in stored if each.ticket < end]
        if order == "ticket":
            return sorted(stored, key=lambda each: each.ticket)
        return sorted(stored, key=lambda each: (each.oldest_version, each.arrival))

    def _count(self, able: Sequence[Stored]) -> int:
        """How many new groups make a batch; more than there are, when these are not enough."""
        if not (num_tokens := self._buffer.tokens_per_step):
            return self._new_groups
        fewest = self._config.min_groups
        sums = enumerate(accumulate(stored.group.num_tokens for stored in able), 1)
        enough = (n for n, total in sums if total >= num_tokens and n >= fewest)
        return next(enough, len(able) + 1)

    def _must_wait(
        self, step: int, being_made: Collection[OpenLease], chosen: Sequence[Stored]
    ) -> bool:
        """Whether, with this batch now, work that is being made would get too old.

        What has version v must be in the batch of step v + max_staleness at the latest, and no step
        takes more than one batch: the rule of deadline scheduling for what is left over.
        """
        if self._buffer.staleness_action != "wait" or not being_made:
            return False
        coming = [lease.lease.version for lease in being_made]
        taken = {stored.ticket for stored in chosen}
        left = [s.oldest_version for s in self._stored.values() if s.ticket not in taken]
        return any(
            number > len(chosen) * (version + self._buffer.max_staleness - step)
            for number, version in enumerate(sorted([*coming, *left]), 1)
            if version >= min(coming)  # else waiting would not help
        )

    def _to_repeat(self, step: int, count: int) -> dict[int, Group]:
        """Up to `count` groups that were trained before, by ticket: the least used, then the
        oldest, none more often than replay_ratio says or past the bound.
        """
        most, oldest = math.ceil(self._buffer.replay_ratio), step - self._buffer.max_staleness
        self._trained = {
            ticket: group
            for ticket, group in self._trained.items()
            if group.completions.version_span[0] >= oldest and self._uses[ticket] < most
        }
        fit = sorted(
            (self._uses[ticket], group.completions.version_span[0], ticket)
            for ticket, group in self._trained.items()
        )
        return {ticket: self._trained[ticket] for *_, ticket in fit[:count]}

    def _remove(self, chosen: Iterable[Stored]) -> None:
        for stored in chosen:
            del self._stored[stored.ticket]
            self.num_tokens -= stored.group.num_tokens


def lags(batch: Iterable[Stored], step: int, now: float) -> dict[str, float]:
    """Means over a batch's groups: where the age of their oldest tokens comes from, in versions.

    publish: the actor held an older version than the newest when it got the work. generation:
    versions that came while the group was made. queue: while it waited here; also in seconds.
    """
    known = [(stored.seen, stored.group.lease.version) for stored in batch if stored.seen]
    if not known:
        return {}
    parts: dict[str, list[float]] = {
        "staleness/publish": [seen.leased_step - version for seen, version in known],
        "staleness/generation": [seen.arrived_step - seen.leased_step for seen, _ in known],
        "staleness/queue": [step - seen.arrived_step for seen, _ in known],
        "queue_age_seconds": [now - seen.arrived_at for seen, _ in known],
    }
    return {name: float(np.mean(values)) for name, values in parts.items()}


def part_metrics(batch: Iterable[Stored]) -> dict[str, float]:
    """Mean and deviation of each reward function's scores over a batch's completions.

    Where a function did not apply (NaN) it does not count; the deviation is that of all (ddof 0).
    """
    scores: dict[str, list[Float32]] = {}
    for stored in batch:
        for name, part in stored.group.reward_parts.items():
            scores.setdefault(name, []).append(part)
    found: dict[str, float] = {}
    for name, parts in scores.items():
        whole = np.concatenate(parts)
        if len(known := whole[~np.isnan(whole)].astype(np.float64)):
            found |= {f"rewards/{name}/mean": known.mean(), f"rewards/{name}/std": known.std()}
    return {name: float(value) for name, value in found.items()}


def deal(groups: Sequence[Group], world_size: int) -> list[tuple[Group, ...]]:
    """Splits a batch over ranks so that their estimated FLOPs are close: largest group first.

    Deterministic in the order of `groups`; each rank gets at least one group if there are enough.
    """
    sizes = [group.cost for group in groups]
    hands: list[list[int]] = [[] for _ in range(world_size)]
    load = [(0.0, 0, rank) for rank in range(world_size)]  # a heap: FLOPs, groups
    for index in sorted(range(len(groups)), key=lambda i: (-sizes[i], i)):
        total, count, rank = load[0]
        heapreplace(load, (total + sizes[index], count + 1, rank))
        hands[rank].append(index)
    return [tuple(groups[i] for i in sorted(hand)) for hand in hands]


def trained(batch: Batch, world_size: int, advantages: Float32) -> list[EndedGroup]:
    """The groups of a batch at its end.

    advantages: [C] of its completions, rank by rank as they were dealt.
    ValueError when these are not as many as the batch has completions.
    """
    dealt = [group for hand in deal(batch.groups, world_size) for group in hand]
    ends = np.cumsum([len(group.completions) for group in dealt])
    if advantages.shape != (ends[-1],):
        raise ValueError(f"advantages {advantages.shape} of {ends[-1]} completions")
    pieces = np.split(advantages, ends[:-1])
    values = {group.lease.lease_id: piece for group, piece in zip(dealt, pieces, strict=True)}
    return [
        EndedGroup(
            group=group,
            status="trained" if number < batch.num_new else "replayed",
            advantages=values[group.lease.lease_id],
        )
        for number, group in enumerate(batch.groups)
    ]
