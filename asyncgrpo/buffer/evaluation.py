"""Evaluations on their way: which held-out prompts are still out, and what came back."""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncgrpo.evaluate import EvalReport, summarise
from asyncgrpo.types import Group


@dataclass(slots=True, kw_only=True)
class EvalJob:
    """Held-out prompts at one version: first accepted by actors, then answered by them."""

    version: int
    deadline: float
    unaccepted: set[str] = field(default_factory=set)  # lease ids
    unanswered: set[str] = field(default_factory=set)
    num_prompts: int = 0
    groups: list[Group] = field(default_factory=list)

    def drop(self, lease_id: str) -> None:
        """A lease that nobody will answer."""
        self.unaccepted.discard(lease_id)
        self.unanswered.discard(lease_id)

    def answer(self, group: Group) -> None:
        """One prompt answered."""
        self.drop(group.lease.lease_id)
        self.groups.append(group)

    def report(self, correct_above: float) -> EvalReport:
        """The result, ordered by lease so that it does not depend on who was faster."""
        groups = sorted(self.groups, key=lambda g: int(g.lease.lease_id[1:]))
        return summarise(
            groups,
            version=self.version,
            num_prompts=self.num_prompts,
            correct_above=correct_above,
        )
