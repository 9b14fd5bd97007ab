"""Open leases: who works on what, until when; and the count of every lease's present state."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from asyncgrpo.types import Lease, Prompt, Purpose, Sampling

# Every lease is in exactly one of these; `open` and `stored` and `taken` are on the way.
STATES = ("open", "stored", "taken", "trained", "filtered", "expired", "failed", "evicted")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLease:
    """A lease that an actor works on."""

    ticket: int
    lease: Lease
    peer: str
    expires_at: float  # on the caller's clock


def lease_seed(run_seed: int, lease_id: str) -> int:
    """A seed in [0, 2^31) that depends on the run's seed and the lease only."""
    digest = hashlib.blake2b(f"{run_seed}:{lease_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


class LeaseBook:
    """Issues leases and follows each to its end. Knows nothing of groups or sockets."""

    def __init__(self, *, run_seed: int, deadline_seconds: float) -> None:
        self._run_seed, self._deadline_seconds = run_seed, deadline_seconds
        self._open: dict[str, OpenLease] = {}
        self.counts: Counter[str] = Counter()  # state -> leases in it now
        self.reasons: Counter[str] = Counter()  # "filtered/all_correct" -> how often
        self.num_leased = 0

    def issue(
        self,
        prompt: Prompt,
        *,
        peer: str,
        version: int,
        group_size: int,
        sampling: Sampling,
        now: float,
        block: str = "",
        deadline_seconds: float | None = None,
    ) -> Lease:
        """A new lease for a prompt; those of an evaluation block are followed but not counted."""
        self.num_leased += 1
        ticket = self.num_leased
        purpose: Purpose = "eval" if block else "train"
        seconds = deadline_seconds or self._deadline_seconds
        lease_id = f"{purpose[0]}{ticket}"
        lease = Lease(
            lease_id=lease_id,
            prompt=prompt,
            group_size=group_size,
            sampling=sampling,
            seed=lease_seed(self._run_seed, lease_id),
            purpose=purpose,
            version=version,
            deadline_seconds=seconds,
            block=block,
        )
        self._open[lease_id] = OpenLease(
            ticket=ticket, lease=lease, peer=peer, expires_at=now + seconds
        )
        if purpose == "train":
            self.counts["open"] += 1
        return lease

    def get(self, lease_id: str) -> OpenLease | None:
        """The open lease of that id; None when it has ended or never was."""
        return self._open.get(lease_id)

    def close(self, lease_id: str, state: str, reason: str = "") -> OpenLease:
        """Ends a lease's open time: it arrived (stored, filtered) or will not (failed, expired)."""
        ended = self._open.pop(lease_id)
        if ended.lease.purpose == "train":
            self.move("open", state, reason)
        return ended

    def move(self, before: str, after: str, reason: str = "", count: int = 1) -> None:
        """Counts `count` leases from one state into another."""
        assert {before, after} <= set(STATES), f"{before} -> {after} is no state"
        self.counts[before] -= count
        self.counts[after] += count
        if reason:
            self.reasons[f"{after}/{reason}"] += count

    def open_tickets(self) -> list[int]:
        """Tickets of the open training leases."""
        return [o.ticket for o in self._open.values() if o.lease.purpose == "train"]

    def overdue(self, now: float) -> list[OpenLease]:
        """Open leases past their deadline."""
        return self._where(lambda o: o.expires_at <= now)

    def held_by(self, peer: str) -> list[OpenLease]:
        """Open leases of one peer."""
        return self._where(lambda o: o.peer == peer)

    def num_training_leases(self) -> int:
        """All training leases ever issued: the left side of the conservation law."""
        return sum(self.counts[state] for state in STATES)

    def _where(self, keep: Callable[[OpenLease], bool]) -> list[OpenLease]:
        return [o for o in self._open.values() if keep(o)]
