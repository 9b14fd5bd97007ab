"""The store of finished groups: which ones make up the next batch, and how ranks share them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

from asyncgrpo.buffer.staleness import StalenessAction, past_bound
from asyncgrpo.types import EndedGroup, Float32, Group

Order = Literal["arrival", "ticket"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A group and when it came."""

    ticket: int  # lease number: the order in which work was handed out
    arrival: int
    group: Group


class Replay:
    """Groups wait here between arrival and the batch that takes them."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._stored: dict[int, Stored] = {}  # by ticket
        self.groups_arrived = self.tokens_arrived = 0  # in all
        self.num_tokens = 0  # completion tokens waiting

    def __len__(self) -> int:
        return len(self._stored)

    def add(self, ticket: int, group: Group) -> None:
        """Stores a group under its ticket."""
        self.groups_arrived += 1
        self.tokens_arrived += group.num_tokens
        self.num_tokens += group.num_tokens
        self._stored[ticket] = Stored(ticket=ticket, arrival=self.groups_arrived, group=group)

    def evict(self, step: int, max_staleness: int, action: StalenessAction) -> list[Stored]:
        """Removes and returns what can no longer be trained at `step`."""
        old = [
            stored
            for stored in self._stored.values()
            if past_bound(stored.group, step, max_staleness, action)
        ]
        return self._remove(old)

    def ready(self, count: int, open_tickets: Iterable[int]) -> bool:
        """Whether `take(count)` may be called; in ticket order earlier open work is waited for."""
        if len(self._stored) < count:
            return False
        if self._order == "arrival" or count == 0:
            return True
        last = sorted(self._stored)[count - 1]
        return all(ticket > last for ticket in open_tickets)

    def count_for(self, num_tokens: int, min_groups: int) -> int:
        """The fewest next groups, min_groups or more, that hold so many tokens.

        One more than there are, when all together do not.
        """
        sums = accumulate(stored.group.num_tokens for stored in self._in_order())
        enough = (n for n, total in enumerate(sums, 1) if total >= num_tokens and n >= min_groups)
        return next(enough, len(self) + 1)

    def take(self, count: int) -> list[Stored]:
        """Removes and returns the next `count` groups in the store's order."""
        return self._remove(self._in_order()[:count])

    def _remove(self, chosen: list[Stored]) -> list[Stored]:
        for stored in chosen:
            del self._stored[stored.ticket]
            self.num_tokens -= stored.group.num_tokens
        return chosen

    def _in_order(self) -> list[Stored]:
        if self._order == "ticket":
            return sorted(self._stored.values(), key=lambda stored: stored.ticket)
        return sorted(
            self._stored.values(), key=lambda stored: (stored.group.oldest_version, stored.arrival)
        )


def deal(groups: Sequence[Group], world_size: int) -> list[tuple[Group, ...]]:
    """Splits a batch over ranks so that their estimated FLOPs are close: largest group first.

    Deterministic in the order of `groups`; each rank gets at least one group if there are enough.
    """
    sizes = [group.cost for group in groups]
    load = [0.0] * world_size
    hands: list[list[int]] = [[] for _ in range(world_size)]
    for index in sorted(range(len(groups)), key=lambda i: (-sizes[i], i)):
        rank = min(range(world_size), key=lambda r: (load[r], len(hands[r]), r))
        load[rank] += sizes[index]
        hands[rank].append(index)
    return [tuple(groups[i] for i in sorted(hand)) for hand in hands]


def trained(groups: Sequence[Group], world_size: int, advantages: Float32) -> list[EndedGroup]:
    """A batch at its end. advantages: [C] of its completions, rank by rank as they were dealt."""
    dealt = [group.lease.lease_id for hand in deal(groups, world_size) for group in hand]
    sizes = {group.lease.lease_id: len(group.completions) for group in groups}
    pieces = np.split(advantages, np.cumsum([sizes[lease_id] for lease_id in dealt])[:-1])
    values = dict(zip(dealt, pieces, strict=True))
    return [
        EndedGroup(group=group, status="trained", advantages=values[group.lease.lease_id])
        for group in groups
    ]
