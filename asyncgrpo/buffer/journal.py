"""What the buffer notes down of every training lease, and gets back when it is started again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asyncgrpo.types import Group

if TYPE_CHECKING:
    from asyncgrpo.buffer.leases import OpenLease


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step trains: first groups that are new, then those that were trained before."""

    tickets: Sequence[int]  # of the groups' leases
    groups: Sequence[Group]
    num_new: int

    @property
    def new(self) -> Sequence[int]:
        """Tickets of the new groups."""
        return self.tickets[: self.num_new]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """Everything that outlives a buffer process; by default nothing has happened yet."""

    counts: Counter[str] = field(default_factory=Counter)  # state -> leases in it
    reasons: Counter[str] = field(default_factory=Counter)  # "filtered/all_wrong" -> leases
    arrived: Mapping[str, float] = field(default_factory=dict)  # sums of groups, tokens, reward
    last_number: int = 0  # of any lease
    position: int = 0  # of the next prompt in the stream
    step: int = 0  # the next step to be trained
    last_step: int = 0  # no smaller than `step` has ever been: learners go back
    groups_stored: int = 0  # ever, with their tokens
    tokens_stored: int = 0
    held: Sequence[tuple[int, int, str, str, int]] = ()  # ticket, position, prompt, peer, version
    again: Sequence[tuple[int, str]] = ()  # position, prompt: to be handed out again
    stored: Sequence[tuple[int, Group]] = ()  # ticket and group, in the order they came
    batches: Mapping[int, Batch] = field(default_factory=dict)  # by step: formed, not trained
    uses: Mapping[int, int] = field(default_factory=dict)  # ticket -> how often it was replayed
    # by version and block; None: not done
    reports: Mapping[tuple[int, str], Mapping[str, Any] | None] = field(default_factory=dict)


class Journal:
    """Takes notes, which count once they are committed. This one keeps nothing: see Ledger.

    Everything here may raise LedgerError.
    """

    life = 1  # how many times the run's buffer was started, this time included

    def remembered(self) -> Remembered:
        """What former lives noted and committed."""
        return Remembered()

    def leased(self, lease: OpenLease) -> None:
        """A training lease was handed out."""

    def arrived(self, group: Group, *, keep: bool) -> None:
        """A group came, perhaps too late; keep: it must survive a restart."""

    def moved(
        self, tickets: Sequence[int], state: str, reason: str, step: int | None, again: bool
    ) -> None:
        """Leases changed their state. step: of taken and trained; again: the prompt comes back."""

    def formed(self, step: int, batch: Batch) -> None:
        """A batch is there to be trained, for the first time or once more."""

    def covered(self, step: int) -> None:
        """Groups trained before this step will never be asked for again."""

    def batches(self, first: int, last: int) -> Mapping[int, Batch]:
        """The batches of these steps, `last` included, as far as their groups are kept."""
        return {}

    def began(self, step: int) -> None:
        """A learner begins at this step: what was made of it and later ones will be made again."""

    def evaluating(self, version: int, name: str, last_number: int) -> None:
        """An evaluation began; last_number: of the newest lease, those of evaluations included."""

    def evaluated(self, report: Mapping[str, Any]) -> None:
        """An evaluation is done."""

    def counts(self) -> Mapping[str, int] | None:
        """Leases noted as open, stored and taken, counted anew; None: nothing is kept."""
        return None

    def commit(self) -> None:
        """Makes everything noted since the last commit durable, or nothing of it."""
