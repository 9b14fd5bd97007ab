"""The store of finished groups: which ones make up the next batch, and how ranks share them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import accumulate
from typing import Literal

import numpy as np

from asyncgrpo.buffer.journal import Batches, Remembered
from asyncgrpo.staleness import StalenessAction, past_bound
from asyncgrpo.types import EndedGroup, Float32, Group, Shard

Order = Literal["arrival", "ticket", "window"]


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
    """Groups wait here between arrival and the batch that takes them."""

    def __init__(self, order: Order, window: int = 0) -> None:
        """window: how many tickets a group may be ahead of open work, in the order "window"."""
        self._order, self._window = order, window
        self._stored: dict[int, Stored] = {}  # by ticket
        self.batches: dict[int, list[Stored]] = {}  # step -> what was taken, kept until trained
        self.again: dict[int, list[Stored]] = {}  # step -> what was trained before and is added
        self._trained: dict[int, Stored] = {}  # by ticket: what may be trained again
        self._uses: Counter[int] = Counter()  # how often each of these was
        self.groups_arrived = self.tokens_arrived = 0  # in all
        self.num_tokens = 0  # completion tokens waiting

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def num_taken(self) -> int:
        """Groups in batches that are not trained yet."""
        return sum(len(batch) for batch in self.batches.values())

    def restore(self, past: Remembered) -> None:
        """Takes up the groups and batches that a former life of the buffer left."""
        for ticket, group in past.stored:
            self.add(ticket, group)
        for step, batch in past.batches.items():
            self.hold(step, batch)
        self.hold_again(past.replays)
        self._uses.update(past.uses)
        self.groups_arrived, self.tokens_arrived = past.groups_stored, past.tokens_stored

    def hold(self, step: int, batch: Iterable[tuple[int, Group]]) -> None:
        """Keeps a batch of tickets and groups that was formed before."""
        self.batches[step] = [_stored(ticket, 0, group) for ticket, group in batch]
        for stored in self.batches[step]:
            self._trained.pop(stored.ticket, None)

    def hold_again(self, replays: Batches) -> None:
        """Keeps what was added to batches that were formed before."""
        for step, groups in replays.items():
            self.again[step] = [_stored(ticket, 0, group) for ticket, group in groups]

    def add_again(self, step: int, count: int, most: int, max_staleness: int) -> None:
        """Adds to a batch up to `count` groups that were trained before: the least used, then the
        oldest, each at most `most` times and none past the bound.
        """
        self._trained = {
            ticket: stored
            for ticket, stored in self._trained.items()
            if stored.oldest_version >= step - max_staleness and self._uses[ticket] < most
        }
        fit = sorted(
            self._trained.values(), key=lambda s: (self._uses[s.ticket], s.oldest_version, s.ticket)
        )
        self.again[step] = sorted(fit[:count], key=lambda s: s.ticket)  # as a ledger keeps them
        self._uses.update(tickets(self.again[step]))

    def whole(self, step: int) -> list[Group]:
        """All groups of a batch: the new ones, then those that were trained before."""
        return [stored.group for stored in (*self.batches[step], *self.again.get(step, ()))]

    def done(self, step: int, *, keep: bool) -> list[Stored]:
        """Removes a trained batch and returns its new groups; keep: they may be trained again."""
        batch = self.batches.pop(step)
        self.again.pop(step, None)
        if keep:
            self._trained.update((stored.ticket, stored) for stored in batch)
        return batch

    def shard(self, step: int, rank: int, world_size: int) -> Shard:
        """One rank's part of a batch, with the counts of the whole."""
        groups = self.whole(step)
        return Shard(
            step=step,
            groups=deal(groups, world_size)[rank],
            num_loss_tokens_global=sum(group.num_tokens for group in groups),
            num_completions_global=sum(len(group.completions) for group in groups),
        )

    def add(self, ticket: int, group: Group, seen: Seen | None = None) -> None:
        """Stores a group under its ticket."""
        self.groups_arrived += 1
        self.tokens_arrived += group.num_tokens
        self.num_tokens += group.num_tokens
        self._stored[ticket] = _stored(ticket, self.groups_arrived, group, seen)

    def evict(self, step: int, max_staleness: int, action: StalenessAction) -> list[Stored]:
        """Removes and returns what can no longer be trained at `step`."""
        old = [
            stored
            for stored in self._stored.values()
            if stored.oldest_version < step - max_staleness  # then only the rule needs its tokens
            and past_bound(stored.group, step, max_staleness, action)
        ]
        return self._remove(old)

    def ready(self, count: int, oldest_open: int | None) -> bool:
        """Whether `take(count, oldest_open)` finds enough."""
        return len(self) >= count and len(self._next(oldest_open)) >= count

    def count_for(self, num_tokens: int, min_groups: int, oldest_open: int | None = None) -> int:
        """The fewest next groups, min_groups or more, that hold so many tokens.

        One more than there are, when all together do not.
        """
        sums = accumulate(stored.group.num_tokens for stored in self._next(oldest_open))
        enough = (n for n, total in enumerate(sums, 1) if total >= num_tokens and n >= min_groups)
        return next(enough, len(self) + 1)

    def take(self, count: int, oldest_open: int | None = None) -> list[Stored]:
        """Removes and returns the next `count` groups; oldest_open: earliest ticket being made."""
        return self._remove(self._next(oldest_open)[:count])

    def versions_left(self, count: int, oldest_open: int | None) -> list[int]:
        """The oldest version of each group that `take` would leave."""
        chosen = {stored.ticket for stored in self._next(oldest_open)[:count]}
        return [s.oldest_version for s in self._stored.values() if s.ticket not in chosen]

    def _remove(self, chosen: list[Stored]) -> list[Stored]:
        for stored in chosen:
            del self._stored[stored.ticket]
            self.num_tokens -= stored.group.num_tokens
        return chosen

    def _next(self, oldest_open: int | None) -> list[Stored]:
        """What may be taken, in the store's order.

        arrival: all, the oldest version first. window: the same, but nothing that is further ahead
        of work that is still being made, so that long completions are not left behind for ever.
        ticket: in the order in which work was handed out, nothing ahead of earlier work.
        """
        stored: Iterable[Stored] = self._stored.values()
        if self._order != "arrival" and oldest_open is not None:
            ahead = self._window if self._order == "window" else 0
            stored = [each for each in stored if each.ticket < oldest_open + ahead]
        if self._order == "ticket":
            return sorted(stored, key=lambda each: each.ticket)
        return sorted(stored, key=lambda each: (each.oldest_version, each.arrival))


def _stored(ticket: int, arrival: int, group: Group, seen: Seen | None = None) -> Stored:
    oldest, _ = group.completions.version_span
    return Stored(ticket=ticket, arrival=arrival, group=group, oldest_version=oldest, seen=seen)


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


def tickets(batch: Iterable[Stored]) -> list[int]:
    """The leases of some groups."""
    return [stored.ticket for stored in batch]


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


def trained(
    groups: Sequence[Group], num_new: int, world_size: int, advantages: Float32
) -> list[EndedGroup]:
    """A batch at its end; its first num_new groups were not trained before.

    advantages: [C] of its completions, rank by rank as they were dealt.
    ValueError when these are not as many as the batch has completions.
    """
    dealt = [group.lease.lease_id for hand in deal(groups, world_size) for group in hand]
    sizes = {group.lease.lease_id: len(group.completions) for group in groups}
    if advantages.shape != (sum(sizes.values()),):
        raise ValueError(f"advantages {advantages.shape} of {sum(sizes.values())} completions")
    pieces = np.split(advantages, np.cumsum([sizes[lease_id] for lease_id in dealt])[:-1])
    values = dict(zip(dealt, pieces, strict=True))
    return [
        EndedGroup(
            group=group,
            status="trained" if number < num_new else "replayed",
            advantages=values[group.lease.lease_id],
        )
        for number, group in enumerate(groups)
    ]
