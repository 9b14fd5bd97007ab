"""The store of finished groups: which ones make up the next batch, and how ranks share them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from asyncgrpo.buffer.journal import Remembered
from asyncgrpo.buffer.staleness import StalenessAction, past_bound
from asyncgrpo.types import Group, Shard

Order = Literal["arrival", "ticket"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A group and when it came."""

    ticket: int  # lease number: the order in which work was handed out
    arrival: int
    group: Group
    oldest_version: int  # of its tokens; kept, for it is asked for often


class Replay:
    """Groups wait here between arrival and the batch that takes them."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._stored: dict[int, Stored] = {}  # by ticket
        self._arrivals = 0
        self.batches: dict[int, list[Stored]] = {}  # step -> what was taken, kept until trained

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def num_tokens(self) -> int:
        """Completion tokens waiting."""
        return sum(stored.group.num_tokens for stored in self._stored.values())

    @property
    def num_taken(self) -> int:
        """Groups in batches that are not trained yet."""
        return sum(len(batch) for batch in self.batches.values())

    def restore(self, past: Remembered) -> None:
        """Takes up the groups and batches that a former life of the buffer left."""
        for ticket, group in past.stored:
            self.add(ticket, group)
        for step, batch in past.batches.items():
            for ticket, group in batch:
                self.add(ticket, group)
            self.batches[step] = [self._stored.pop(ticket) for ticket, _ in batch]

    def shard(self, step: int, rank: int, world_size: int) -> Shard:
        """One rank's part of a batch, with the counts of the whole."""
        groups = [stored.group for stored in self.batches[step]]
        return Shard(
            step=step,
            groups=deal(groups, world_size)[rank],
            num_loss_tokens_global=sum(group.num_tokens for group in groups),
            num_completions_global=sum(len(group.completions) for group in groups),
        )

    def add(self, ticket: int, group: Group) -> None:
        """Stores a group under its ticket."""
        self._arrivals += 1
        self._stored[ticket] = Stored(
            ticket=ticket,
            arrival=self._arrivals,
            group=group,
            oldest_version=group.oldest_version,
        )

    def evict(self, step: int, max_staleness: int, action: StalenessAction) -> list[Stored]:
        """Removes and returns what can no longer be trained at `step`."""
        old = [
            stored
            for stored in self._stored.values()
            if stored.oldest_version < step - max_staleness  # then only the rule needs its tokens
            and past_bound(stored.group, step, max_staleness, action)
        ]
        for stored in old:
            del self._stored[stored.ticket]
        return old

    def ready(self, count: int, open_tickets: Iterable[int]) -> bool:
        """Whether `take(count)` may be called; in ticket order earlier open work is waited for."""
        if len(self._stored) < count:
            return False
        if self._order == "arrival" or count == 0:
            return True
        last = sorted(self._stored)[count - 1]
        return all(ticket > last for ticket in open_tickets)

    def take(self, count: int) -> list[Stored]:
        """Removes and returns the next `count` groups in the store's order."""
        if self._order == "ticket":
            chosen = sorted(self._stored.values(), key=lambda stored: stored.ticket)
        else:
            chosen = sorted(
                self._stored.values(),
                key=lambda stored: (stored.oldest_version, stored.arrival),
            )
        for stored in chosen[:count]:
            del self._stored[stored.ticket]
        return chosen[:count]


def tickets(batch: Iterable[Stored]) -> list[int]:
    """The leases of some groups."""
    return [stored.ticket for stored in batch]


def deal(groups: Sequence[Group], world_size: int) -> list[tuple[Group, ...]]:
    """Splits a batch over ranks so that their token counts are close: largest group first.

    Deterministic in the order of `groups`; each rank gets at least one group if there are enough.
    """
    sizes = [
        group.num_tokens + len(group.prompt_token_ids) * len(group.completions) for group in groups
    ]
    load = [0] * world_size
    hands: list[list[int]] = [[] for _ in range(world_size)]
    for index in sorted(range(len(groups)), key=lambda i: (-sizes[i], i)):
        rank = min(range(world_size), key=lambda r: (load[r], len(hands[r]), r))
        load[rank] += sizes[index]
        hands[rank].append(index)
    return [tuple(groups[i] for i in sorted(hand)) for hand in hands]
