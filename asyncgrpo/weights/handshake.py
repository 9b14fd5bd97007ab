"""The bookkeeping of publishes: who holds what, who is asked, who is too late. Pure.

    join ──▶ member, holds nothing proven
    publish ──▶ there is a newer version, to be read until hold
    offer(round) ──▶ each free member that is behind      answers: ready | later (busy)
    go(round, rank) ──▶ those that were ready             answers: loaded(version, proof)

A member that misses a deadline is evicted: the run goes on without it, and it may join again.
Whatever was announced but not proven counts as not applied.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Member:
    """One actor as the learner sees it."""

    name: str
    peer: str  # its socket identity; another life of the actor has another one
    ranks: int = 1  # processes that take part in a broadcast
    held: int = -1  # newest version it proved; -1 = none
    busy: bool = False  # it asked to keep its weights (an evaluation runs)
    pending: int | None = None  # version sent, not yet proven
    deadline: float = 0.0  # for the proof of `pending`


@dataclass(slots=True, kw_only=True)
class Round:
    """One offer and the answers to it."""

    number: int
    version: int
    deadline: float  # for the answers
    asked: set[str] = field(default_factory=set)  # names that have not answered
    ready: set[str] = field(default_factory=set)


class Handshake:
    """State of all members and of the round under way, if any."""

    def __init__(self, *, ready_timeout_seconds: float, loaded_timeout_seconds: float) -> None:
        self._ready_timeout = ready_timeout_seconds
        self._loaded_timeout = loaded_timeout_seconds
        self.members: dict[str, Member] = {}
        self.newest = -1  # version that members should hold
        self._is_readable = False
        self._has_failed = False
        self.round: Round | None = None
        self._rounds = 0

    def publish(self, version: int) -> None:
        """There is something newer to hold, and it can be read until `hold`."""
        self.newest = version
        self._is_readable, self._has_failed = True, False

    def hold(self) -> None:
        """The newest weights are about to change: no round until the next publish."""
        assert self.round is None, "a round is open"
        self._is_readable = False

    def at_rest(self) -> bool:
        """Whether nobody has to wait for the newest weights any more: `hold` does no harm.

        After a failed broadcast nobody is waited for: who missed it gets the next version.
        """
        waits_for_nobody = self._has_failed or not self._is_readable or not self.behind()
        return self.round is None and waits_for_nobody

    def join(self, name: str, peer: str, ranks: int = 1) -> None:
        """A new actor, or a new life of one; it holds nothing until it proves it."""
        self.evict(name)
        self.members[name] = Member(name=name, peer=peer, ranks=ranks)

    def evict(self, name: str) -> Member | None:
        """Forgets a member; None when it was not one."""
        if self.round is not None:
            self.round.asked.discard(name)
            self.round.ready.discard(name)
        return self.members.pop(name, None)

    def behind(self) -> list[Member]:
        """Members that could take the newest version now."""
        return [
            m
            for m in self.members.values()
            if m.held < self.newest and m.pending is None and not m.busy
        ]

    def open_round(self, now: float) -> Round | None:
        """Starts a round with everyone who is behind; None when nobody is, or one is open.

        None too while the newest weights cannot be read.
        """
        candidates = self.behind()
        if self.round is not None or not candidates or not self._is_readable:
            return None
        self._rounds += 1
        self.round = Round(
            number=self._rounds,
            version=self.newest,
            deadline=now + self._ready_timeout,
            asked={member.name for member in candidates},
        )
        return self.round

    def answer(self, name: str, number: int, *, ready: bool) -> bool:
        """A member's answer to an offer; False when it is not (or no longer) asked."""
        if self.round is None or self.round.number != number or name not in self.round.asked:
            return False
        self.round.asked.discard(name)
        if ready:
            self.round.ready.add(name)
        else:
            self.members[name].busy = True
        return True

    def free(self, name: str) -> None:
        """A busy member can take weights again."""
        if name in self.members:
            self.members[name].busy = False

    def decided(self) -> bool:
        """Whether everyone asked has answered."""
        return self.round is not None and not self.round.asked

    def close_round(self, now: float, *, sent: bool) -> list[str]:
        """Ends the round; those that were ready now owe a proof (if it was really sent)."""
        assert self.round is not None, "no round is open"
        receivers = sorted(self.round.ready)
        self._has_failed |= bool(receivers) and not sent
        if sent:
            for name in receivers:
                self.members[name].pending = self.round.version
                self.members[name].deadline = now + self._loaded_timeout
        self.round = None
        return receivers

    def loaded(self, name: str, version: int) -> bool:
        """A member proved a version; False when it owed no such proof."""
        member = self.members.get(name)
        if member is None or member.pending != version:
            return False
        member.held, member.pending = version, None
        return True

    def overdue(self, now: float) -> list[str]:
        """Members past a deadline: for their answer to the offer, or for their proof."""
        late = [m.name for m in self.members.values() if m.pending is not None and now > m.deadline]
        if self.round is not None and now > self.round.deadline:
            late += sorted(self.round.asked)
        return late

    def settled(self) -> bool:
        """Whether every member that is not busy proved the newest version."""
        return self.round is None and all(
            m.busy or (m.held == self.newest and m.pending is None) for m in self.members.values()
        )
