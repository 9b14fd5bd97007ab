"""Open leases: who works on what, until when; and the count of every lease's present state."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from asyncgrpo.buffer.journal import Journal, Remembered
from asyncgrpo.buffer.queue import PromptQueue, Turn
from asyncgrpo.config import Config
from asyncgrpo.errors import LedgerError
from asyncgrpo.types import Lease, Prompt, Purpose, Sampling
from asyncgrpo.wire.codec import lease_from, pack_lease

# Every lease is in exactly one of these; `open` and `stored` and `taken` are on the way.
STATES = ("open", "stored", "taken", "trained", "filtered", "expired", "failed", "evicted")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLease:
    """A lease that an actor works on."""

    ticket: int
    lease: Lease
    packed: bytes  # the lease, as it was handed out
    peer: str
    expires_at: float  # on the caller's clock
    turn: Turn | None  # None: an evaluation
    step: int | None = None  # the next step when it was handed out; None: in a former life


def lease_seed(run_seed: int, lease_id: str) -> int:
    """A seed in [0, 2^31) that depends on the run's seed and the lease only."""
    digest = hashlib.blake2b(f"{run_seed}:{lease_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


class LeaseBook:
    """Issues leases and follows each to its end. Knows nothing of sockets.

    Evaluation leases are followed too, but neither counted nor noted in the journal.
    """

    def __init__(self, config: Config, journal: Journal) -> None:
        self._journal, self._run_seed = journal, config.run.seed
        drawn, seconds = config.sampling.model_dump(), config.buffer.lease_deadline_seconds
        # by block: completions, sampling, seconds until the deadline; "" is training
        self._terms = {"": (config.algo.group_size, Sampling(**drawn), seconds)}
        for block in config.evals:
            sampling = Sampling(**{**drawn, **block.sampling.model_dump(exclude_none=True)})
            self._terms[block.name] = (block.num_samples, sampling, block.timeout_seconds)
        self._open: dict[str, OpenLease] = {}
        self._by_bytes: dict[bytes, Lease] = {}  # of the open ones
        self._next_deadline = math.inf  # none is overdue before
        self.counts: Counter[str] = Counter()  # state -> leases in it now
        self.reasons: Counter[str] = Counter()  # "filtered/all_correct" -> how often
        self.last_number = 0  # of any lease

    def restore(self, past: Remembered, queue: PromptQueue, now: float) -> None:
        """Goes on where a former life of the buffer ended; open leases get a new deadline."""
        self.counts, self.reasons = past.counts.copy(), past.reasons.copy()
        for ticket, position, prompt_id, peer, version in past.held:
            turn = queue.at(position, prompt_id)
            self.issue(turn.prompt, peer=peer, version=version, now=now, turn=turn, ticket=ticket)
        self.last_number = past.last_number

    def issue(
        self,
        prompt: Prompt,
        *,
        peer: str,
        version: int,
        now: float,
        turn: Turn | None = None,
        step: int | None = None,
        ticket: int | None = None,
        block: str = "",
    ) -> OpenLease:
        """A lease for a prompt, with a new deadline, as the settings say.

        turn: of the prompt, if it is to train on. step: whose batch is the next to be formed.
        ticket: of a lease that a former life of the buffer handed out. block: of an evaluation.
        """
        number = self.last_number + 1 if ticket is None else ticket
        self.last_number = max(self.last_number, number)
        purpose: Purpose = "eval" if block else "train"
        group_size, sampling, seconds = self._terms[block]
        lease_id = f"{purpose[0]}{number}"
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
        opened = OpenLease(
            ticket=number,
            lease=lease,
            packed=pack_lease(lease),
            peer=peer,
            expires_at=now + seconds,
            turn=turn,
            step=step,
        )
        self._by_bytes[opened.packed] = lease
        self._open[lease_id] = opened
        self._next_deadline = min(self._next_deadline, opened.expires_at)
        if purpose == "train" and ticket is None:
            self.counts["open"] += 1
            self._journal.leased(opened)
        return opened

    def read(self, packed: bytes) -> Lease:
        """The lease of these bytes: that which is open, not a copy; WireError as `lease_from`."""
        return self._by_bytes.get(packed) or lease_from(packed)

    def get(self, lease_id: str) -> OpenLease | None:
        """The open lease of that id; None when it has ended or never was."""
        return self._open.get(lease_id)

    def close(self, lease_id: str, state: str, reason: str = "", again: bool = False) -> OpenLease:
        """Ends a lease's open time: its group arrived (stored, filtered) or will not (failed,
        expired); again: then its prompt is handed out once more.
        """
        ended = self._open.pop(lease_id)
        del self._by_bytes[ended.packed]
        if ended.turn is not None:
            self.move([ended.ticket], "open", state, reason, again=again)
        return ended

    def move(
        self,
        tickets: Sequence[int],
        before: str,
        after: str,
        reason: str = "",
        step: int | None = None,
        again: bool = False,
    ) -> None:
        """Takes leases from one state into another: every change of every lease comes by here."""
        assert {before, after} <= set(STATES), f"{before} -> {after} is no state"
        self.counts[before] -= len(tickets)
        self.counts[after] += len(tickets)
        if reason:
            self.reasons[f"{after}/{reason}"] += len(tickets)
        self._journal.moved(tickets, after, reason, step, again)

    def check(self, *, stored: int, taken: int) -> None:
        """LedgerError unless every lease on the way is where its state says, and so noted.

        What is open, stored and taken is looked up where it really is.
        """
        there = {"open": len(self.being_made()), "stored": stored, "taken": taken}
        noted = self._journal.counts()
        if {state: self.counts[state] for state in there} != there or noted not in (None, there):
            states = " + ".join(f"{self.counts[state]} {state}" for state in STATES)
            raise LedgerError(
                f"leases do not balance: {self.counts.total()} leased = {states}, but there are "
                f"{there}, and the ledger notes {noted}. This is a fault of the buffer: please "
                "report it with ledger.sqlite and logs/buffer.log"
            )

    def being_made(self) -> list[OpenLease]:
        """The open training leases."""
        return [o for o in self._open.values() if o.turn is not None]

    def overdue(self, now: float) -> list[OpenLease]:
        """Open leases past their deadline."""
        if now < self._next_deadline:
            return []
        late = [o for o in self._open.values() if o.expires_at <= now]
        others = (o.expires_at for o in self._open.values() if o.expires_at > now)
        self._next_deadline = min(others, default=math.inf)
        return late

    def held_by(self, peer: str) -> list[OpenLease]:
        """Open leases of one peer."""
        return [o for o in self._open.values() if o.peer == peer]

    def peers_of(self, actor: str) -> set[str]:
        """Everyone of that name who holds an open lease: "actor-0.17" is called actor-0."""
        peers = {o.peer for o in self._open.values()}
        return {peer for peer in peers if peer.rpartition(".")[0] == actor}
