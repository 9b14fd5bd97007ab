"""Evaluations on their way: which held-out prompts are still out, what came back, who waits for it.

An evaluation is one block of the settings at one policy version. Blocks that are due at the same
version are asked for together: their prompts are dealt over the same actors in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from asyncgrpo.buffer.journal import Journal, Remembered
from asyncgrpo.buffer.leases import LeaseBook
from asyncgrpo.config import Config
from asyncgrpo.evaluate import summarise
from asyncgrpo.types import Group, Lease, Prompt
from asyncgrpo.wire.codec import Packet

HeldOut = Callable[[int, str], Sequence[Prompt]]  # how many, of which block
ACCEPT_SECONDS = 15.0  # how long the learner waits for actors to start an evaluation


@dataclass(slots=True, kw_only=True)
class _Job:
    """One evaluation: its prompts are first accepted by actors, then answered by them."""

    num_prompts: int
    since: float
    is_accepted: dict[str, bool] = field(default_factory=dict)  # by lease that is not answered
    groups: list[Group] = field(default_factory=list)


class Evaluations:
    """All evaluations of a run."""

    def __init__(
        self, config: Config, held_out: HeldOut, leases: LeaseBook, journal: Journal
    ) -> None:
        self._config, self._held_out = config, held_out
        self._leases, self._journal = leases, journal
        self._wanted: set[tuple[int, str]] = set()  # asked for, once there is an actor
        self._blocks = {block.name: block for block in config.evals}
        self._jobs: dict[tuple[int, str], _Job] = {}  # by version and name
        self._reports: dict[tuple[int, str], dict[str, Any]] = {}
        self._untold: list[dict[str, Any]] = []
        self._waiting: list[tuple[str, Packet]] = []

    def restore(self, past: Remembered) -> None:
        """Takes up what former lives left; what is not finished begins anew."""
        for key, report in past.reports.items():
            if report is not None:
                self._reports[key] = dict(report)
                self._untold.append(self._reports[key])
            elif key[1] in self._blocks:
                self._wanted.add(key)

    def ask(
        self, peer: str, request: Packet, actors: Sequence[str], now: float
    ) -> list[tuple[str, Packet]]:
        """Opens the blocks asked for, unless that was done."""
        wanted = {(request.fields["version"], name) for name in request.fields["blocks"]}
        if unknown := {name for _, name in wanted} - set(self._blocks):
            raise ValueError(f"no evaluation block is called {', '.join(sorted(unknown))}")
        self._wanted |= wanted - set(self._jobs) - set(self._reports)
        self.wait(peer, request)
        return self.open(actors, now)

    def open(self, actors: Sequence[str], now: float) -> list[tuple[str, Packet]]:
        """Leases for the actors, if there are any: all prompts of the blocks that are wanted."""
        if not actors:
            return []
        pushes: list[tuple[str, Packet]] = []
        for version in sorted({version for version, _ in self._wanted}):
            hands: dict[str, list[bytes]] = {actor: [] for actor in actors}
            turns = itertools.cycle(hands.items())
            for name, block in self._blocks.items():
                if (version, name) not in self._wanted:
                    continue
                prompts = self._held_out(block.num_prompts, name)
                job = self._jobs[version, name] = _Job(num_prompts=len(prompts), since=now)
                for prompt, (actor, hand) in zip(prompts, turns, strict=False):
                    hand.append(self._issue(job, prompt, actor, version, name, now))
                self._journal.evaluating(version, name, self._leases.last_number)
            pushes += [_hand(actor, version, dealt) for actor, dealt in hands.items() if dealt]
        self._wanted.clear()
        return pushes

    def _issue(
        self, job: _Job, prompt: Prompt, actor: str, version: int, name: str, now: float
    ) -> bytes:
        opened = self._leases.issue(prompt, peer=actor, version=version, now=now, block=name)
        job.is_accepted[opened.lease.lease_id] = False
        return opened.packed

    def deal_again(
        self, lost: Sequence[Lease], actors: Sequence[str], now: float
    ) -> list[tuple[str, Packet]]:
        """Prompts whose actor is gone go to others; with nobody there they stay unanswered."""
        hands: dict[tuple[str, int], list[bytes]] = {}
        for lease, actor in zip(lost, itertools.cycle(actors), strict=False):
            if (job := self._jobs.get((lease.version, lease.block))) is None:
                continue
            packed = self._issue(job, lease.prompt, actor, lease.version, lease.block, now)
            self._journal.evaluating(lease.version, lease.block, self._leases.last_number)
            hands.setdefault((actor, lease.version), []).append(packed)
        return [_hand(actor, version, dealt) for (actor, version), dealt in hands.items()]

    def forget(self, version: int) -> None:
        """A learner begins at this version: newer ones will be other policies."""
        for key in [key for key in self._jobs if key[0] > version]:
            for lease_id in self._jobs.pop(key).is_accepted:
                self._leases.close(lease_id, "expired")
        self._reports = {key: r for key, r in self._reports.items() if key[0] <= version}
        self._untold = [report for report in self._untold if report["version"] <= version]
        self._wanted = {key for key in self._wanted if key[0] <= version}

    def wait(self, peer: str, request: Packet) -> None:
        """Keeps a request until `replies` has its answer."""
        self._waiting.append((peer, request))

    def accept(self, lease_ids: Sequence[str]) -> None:
        """Actors hold these leases and keep their weights until they have answered them."""
        for job in self._jobs.values():
            job.is_accepted.update(dict.fromkeys(job.is_accepted.keys() & lease_ids, True))

    def drop(self, lease_id: str) -> None:
        """A lease that nobody will answer (any more)."""
        for job in self._jobs.values():
            job.is_accepted.pop(lease_id, None)

    def answer(self, group: Group) -> None:
        """One prompt answered."""
        self.drop(group.lease.lease_id)
        self._jobs[group.lease.version, group.lease.block].groups.append(group)

    def news(self) -> list[dict[str, Any]]:
        """Reports since the last call."""
        untold, self._untold = self._untold, []
        return untold

    def replies(self, now: float) -> list[tuple[str, Packet]]:
        """Closes what is complete; answers the requests that waited for it."""
        for (version, name), job in list(self._jobs.items()):
            if not job.is_accepted:
                self._reports[version, name] = summarise(
                    job.groups,
                    self._blocks[name],
                    version=version,
                    num_prompts=job.num_prompts,
                    correct_above=self._config.rewards[name].correct_above,
                    seconds=now - job.since,
                )
                self._untold.append(self._reports[version, name])
                self._journal.evaluated(self._untold[-1])
                del self._jobs[version, name]
        found = [(peer, request, self._answer(request, now)) for peer, request in self._waiting]
        self._waiting = [(peer, request) for peer, request, answer in found if answer is None]
        return [(peer, answer) for peer, _, answer in found if answer is not None]

    def _answer(self, request: Packet, now: float) -> Packet | None:
        if request.kind == "evaluate":
            version = request.fields["version"]
            jobs = [job for (of, _), job in self._jobs.items() if of == version]
            is_awaited = any(of == version for of, _ in self._wanted) or any(
                not all(job.is_accepted.values()) and now <= job.since + ACCEPT_SECONDS
                for job in jobs
            )
            answer = Packet(kind="evaluating", request_id=request.request_id)
        else:
            is_awaited = bool(self._jobs or self._wanted)
            fields = {"reports": sorted(self._reports.values(), key=lambda r: r["version"])}
            answer = Packet(kind="reports", request_id=request.request_id, fields=fields)
        return None if is_awaited else answer


def _hand(actor: str, version: int, leases: Sequence[bytes]) -> tuple[str, Packet]:
    """What an actor is told to evaluate."""
    return actor, Packet(kind="evaluate", fields={"version": version, "leases": leases})
