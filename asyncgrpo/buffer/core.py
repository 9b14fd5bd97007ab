"""The buffer's decisions as a state machine: packets and the time in, packets out.

    from actors                         answer
    hello    {actor}                    welcome {credit}; leases of its former life expire
    bye      {actor}                    noted; what it still holds expires
    lease    {version, max}             leases [...]: at once, or when the gate opens
    accept   {lease_ids, refused}       noted: evaluation leases it will (not) answer
    put      one group                  stored {state}: the buffer is responsible from here on
    fail     {lease_id, reason}         noted
    held     {version}                  noted: the actor's weights changed
    status   {counters}                 noted

    from learner ranks
    begin    {step}                     noted: the first step of a learner's life
    take     {step, rank, world_size}   shard, exhausted or stopped: at once, or when it is decided
    stop     {}                         noted: no batch is formed from now on
    trained  {step, world_size}         noted {counters, actors, evaluations}
    evaluate {version, blocks}          evaluating, once the actors hold back their weights
    results  {}                         all reports, once no evaluation is on its way
    summary  {}                         noted {counters, actors, evaluations}

No sockets, no clock, no files: `handle` and `tick` get the time and return what to send.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncgrpo.buffer.evaluation import Evaluations
from asyncgrpo.buffer.gate import make_gate
from asyncgrpo.buffer.leases import STATES, LeaseBook
from asyncgrpo.buffer.replay import Replay, deal, trained
from asyncgrpo.config import Config
from asyncgrpo.errors import WireError
from asyncgrpo.evaluate import is_correct
from asyncgrpo.types import EndedGroup, Group, Prompt, Sampling, Shard
from asyncgrpo.wire.codec import Packet, groups_from, lease_fields, shard_packet

if TYPE_CHECKING:
    from asyncgrpo.data.prompts import PromptSource

Replies = list[tuple[str, Packet]]
Action = Callable[[str, Packet, float], Replies]
Record = Callable[[int, Sequence[EndedGroup]], None]  # of the step at which they ended


class BufferCore:
    """All state of the buffer process."""

    def __init__(self, config: Config, prompts: PromptSource, record: Record) -> None:
        self._config, self._prompts, self._record = config, prompts, record
        buffer = config.buffer
        self.replay = Replay(buffer.order)
        self.gate = make_gate(config, self.replay)
        self.leases = LeaseBook(
            run_seed=config.run.seed, deadline_seconds=buffer.lease_deadline_seconds
        )
        self.step = 0  # the next step whose batch will be formed
        self._position = 0  # in the prompt source
        self._again: list[Prompt] = []  # prompts whose lease ended without a group
        self._batches: dict[int, list[Group]] = {}  # step -> its groups, kept until trained
        self._actors: dict[str, str] = {}  # actor name -> its present peer identity
        self._status: dict[str, dict[str, Any]] = {}  # actor name -> its last counters
        self._held: dict[str, int] = {}  # peer -> policy version it holds
        self._waiting_actors: dict[str, Packet] = {}  # peer -> lease request that waits
        self._waiting_takes: dict[tuple[str, int], Packet] = {}
        self._evaluations = Evaluations(config, prompts.held_out, self.leases)
        self._is_stopped = False
        self._sums = {"reward": 0.0, "tokens": 0.0, "groups": 0.0}  # of all that arrived

    def handle(self, peer: str, packet: Packet, now: float) -> Replies:
        """Takes one packet; returns everything that can be sent because of it."""
        action: Action | None = getattr(self, f"_on_{packet.kind}", None)
        if action is None:
            return [(peer, _answer(packet, "refused", reason=f"unknown kind {packet.kind!r}"))]
        try:
            return action(peer, packet, now) + self.tick(now)
        except (KeyError, TypeError, ValueError, WireError) as error:
            return [(peer, _answer(packet, "refused", reason=f"{packet.kind}: {error!r}"))]

    def tick(self, now: float) -> Replies:
        """Ends what is overdue and answers requests that waited for something."""
        for lease in self.leases.overdue(now):
            self._end_unfinished(lease.lease.lease_id, "expired", "deadline")
        return self._serve_actors(now) + self._serve_takes() + self._evaluations.replies(now)

    def lost(self, peer: str, now: float) -> Replies:
        """A peer's connection is gone: its leases end now instead of at their deadlines."""
        self._forget_peer(peer, "unreachable")
        return self.tick(now)

    def metrics(self) -> dict[str, float]:
        """Counters and sizes by metric name."""
        counts, reasons = self.leases.counts, self.leases.reasons
        return {
            "leases": self.leases.num_training_leases(),
            **{f"leases_{state}": counts[state] for state in STATES},
            **{f"groups_{name.replace('/', '_')}": count for name, count in reasons.items()},
            "buffer_groups": len(self.replay),
            "buffer_tokens": self.replay.num_tokens,
            "groups_arrived": self._sums["groups"],
            "tokens_arrived": self._sums["tokens"],
            "reward_arrived_sum": self._sums["reward"],
        }

    # -- actors ---------------------------------------------------------------------------

    def _on_hello(self, peer: str, packet: Packet, now: float) -> Replies:
        actor = packet.fields["actor"]
        former = self._actors.get(actor)
        if former is not None and former != peer:
            self._forget_peer(former, "actor_restarted")
        self._actors[actor] = peer
        return [(peer, _answer(packet, "welcome", credit=self._config.buffer.credit))]

    def _on_bye(self, peer: str, packet: Packet, now: float) -> Replies:
        if self._actors.get(packet.fields["actor"]) == peer:
            del self._actors[packet.fields["actor"]]
        self._forget_peer(peer, "actor_left")
        return [(peer, _answer(packet, "noted"))]

    def _forget_peer(self, peer: str, reason: str) -> None:
        self._waiting_actors.pop(peer, None)
        self._held.pop(peer, None)
        for lease in self.leases.held_by(peer):
            self._end_unfinished(lease.lease.lease_id, "expired", reason)

    def _on_held(self, peer: str, packet: Packet, now: float) -> Replies:
        self._held[peer] = packet.fields["version"]
        return [(peer, _answer(packet, "noted"))]

    def _on_lease(self, peer: str, packet: Packet, now: float) -> Replies:
        self._waiting_actors[peer] = packet
        self._held[peer] = packet.fields["version"]
        return []

    def _on_accept(self, peer: str, packet: Packet, now: float) -> Replies:
        self._evaluations.accept(packet.fields["lease_ids"])
        for lease_id in packet.fields["refused"]:
            if self.leases.get(lease_id) is not None:
                self._end_unfinished(lease_id, "failed", "version_passed")
        return [(peer, _answer(packet, "noted"))]

    def _on_put(self, peer: str, packet: Packet, now: float) -> Replies:
        (group,) = groups_from(packet)
        lease_id = group.lease.lease_id
        if self.leases.get(lease_id) is None:
            state = "unknown"  # a repeat, or it expired meanwhile: its prompt is out again
        elif group.lease.purpose == "eval":
            self.leases.close(lease_id, "stored")
            self._evaluations.answer(group)
            state = "stored"
        else:
            state = self._store(group)
        return [(peer, _answer(packet, "stored", lease_id=lease_id, state=state))]

    def _store(self, group: Group) -> str:
        self._sums["groups"] += 1
        self._sums["tokens"] += group.num_tokens
        self._sums["reward"] += float(np.mean(group.rewards))
        reason = self._filter_reason(group)
        if reason:
            self.leases.close(group.lease.lease_id, "filtered", reason)
            self.gate.give_back()
            self._record(self.step, [EndedGroup(group=group, status="filtered", reason=reason)])
            return "filtered"
        ended = self.leases.close(group.lease.lease_id, "stored")
        self.replay.add(ended.ticket, group)
        self._evict()
        return "stored"

    def _filter_reason(self, group: Group) -> str:
        if not all(len(completion.token_ids) for completion in group.completions):
            return "empty_completion"
        if not self._config.algo.drop_uniform_groups:
            return ""
        scores = [float(score) for score in next(iter(group.reward_parts.values()))]
        right = is_correct(scores, self._config.reward.correct_above)
        if all(right):
            return "all_correct"
        return "" if any(right) else "all_wrong"

    def _on_fail(self, peer: str, packet: Packet, now: float) -> Replies:
        lease_id, reason = packet.fields["lease_id"], packet.fields["reason"]
        if self.leases.get(lease_id) is not None:
            retry = bool(packet.fields.get("retry"))
            self._end_unfinished(lease_id, "failed", reason, again=retry)
        return [(peer, _answer(packet, "noted"))]

    def _on_status(self, peer: str, packet: Packet, now: float) -> Replies:
        self._status[packet.fields["actor"]] = dict(packet.fields)
        return [(peer, _answer(packet, "noted"))]

    def _end_unfinished(
        self, lease_id: str, state: str, reason: str, *, again: bool = True
    ) -> None:
        """Ends a lease that brought no group; its prompt is handed out again."""
        ended = self.leases.close(lease_id, state, reason)
        if ended.lease.purpose == "eval":
            self._evaluations.drop(lease_id)
            return
        self.gate.give_back()
        if again:
            self._again.append(ended.lease.prompt)

    def _serve_actors(self, now: float) -> Replies:
        replies: Replies = []
        for peer, request in list(self._waiting_actors.items()):
            version = self._held[peer]
            count = min(request.fields["max"], self.gate.open_for(version)) * (not self._is_stopped)
            leases: list[dict[str, Any]] = []
            while len(leases) < count and (prompt := self._next_prompt()) is not None:
                self.gate.issue(version)
                leases.append(self._issue(prompt, peer, version, now))
            if leases:
                del self._waiting_actors[peer]
                replies.append((peer, _answer(request, "leases", leases=leases)))
        return replies

    def _issue(self, prompt: Prompt, peer: str, version: int, now: float) -> dict[str, Any]:
        sampling = Sampling(**self._config.sampling.model_dump())
        size = self._config.algo.group_size
        lease = self.leases.issue(
            prompt, peer=peer, version=version, group_size=size, sampling=sampling, now=now
        )
        return lease_fields(lease)

    def _next_prompt(self) -> Prompt | None:
        if self._again:
            return self._again.pop(0)
        prompt = self._prompts.get(self._position)
        self._position += prompt is not None
        return prompt

    # -- learner --------------------------------------------------------------------------

    def _on_begin(self, peer: str, packet: Packet, now: float) -> Replies:
        if not self.gate.issued:  # a fresh buffer; until there is a ledger it starts where
            self.step = packet.fields["step"]  # the learner does, with other prompts
            self._position = self.gate.issued = self.step * self._config.buffer.groups_per_step
        if packet.fields["step"] != self.step:
            raise ValueError(f"the learner begins at step {packet.fields['step']}, not {self.step}")
        return [(peer, _answer(packet, "noted"))]

    def _on_stop(self, peer: str, packet: Packet, now: float) -> Replies:
        self._is_stopped = True
        return [(peer, _answer(packet, "noted"))]

    def _on_take(self, peer: str, packet: Packet, now: float) -> Replies:
        if packet.fields["step"] < self.step:
            raise ValueError(f"step {packet.fields['step']} is trained; the next is {self.step}")
        self._waiting_takes[peer, packet.fields["rank"]] = packet
        return []

    def _serve_takes(self) -> Replies:
        replies: Replies = []
        for (peer, rank), request in list(self._waiting_takes.items()):
            step, world_size = request.fields["step"], request.fields["world_size"]
            if step == self.step and step not in self._batches and not self._is_stopped:
                self._form_batch()
            if step in self._batches:
                shard = self._shard(step, rank, world_size)
                answer = shard_packet(shard)
            elif self._is_stopped:
                answer = Packet(kind="stopped")
            elif self._exhausted():
                answer = Packet(kind="exhausted")
            else:
                continue
            del self._waiting_takes[peer, rank]
            replies.append((peer, _with_id(answer, request)))
        return replies

    def _form_batch(self) -> None:
        self._evict()
        buffer = self._config.buffer
        count = buffer.groups_per_step
        if buffer.tokens_per_step:
            count = self.replay.count_for(buffer.tokens_per_step, self._config.min_groups)
        if self._exhausted() and len(self.replay) >= self._config.launch.learners:
            count = min(count, len(self.replay))  # the last, smaller batch
        if not self.replay.ready(count, self.leases.open_tickets()):
            return
        self._batches[self.step] = [stored.group for stored in self.replay.take(count)]
        self.gate.formed(count)
        self.leases.move("stored", "taken", count=count)

    def _evict(self) -> None:
        buffer = self._config.buffer
        for old in self.replay.evict(self.step, buffer.max_staleness, buffer.staleness_action):
            self.leases.move("stored", "evicted", "stale")
            self.gate.give_back()
            self._record(self.step, [EndedGroup(group=old.group, status="evicted", reason="stale")])

    def _shard(self, step: int, rank: int, world_size: int) -> Shard:
        groups = self._batches[step]
        return Shard(
            step=step,
            groups=deal(groups, world_size)[rank],
            num_loss_tokens_global=sum(group.num_tokens for group in groups),
            num_completions_global=sum(len(group.completions) for group in groups),
        )

    def _exhausted(self) -> bool:
        """No prompt is left and nothing is on the way that could fill another batch."""
        return (
            not self._again
            and self._prompts.get(self._position) is None
            and not self.leases.open_tickets()
        )

    def _on_trained(self, peer: str, packet: Packet, now: float) -> Replies:
        step, world_size = packet.fields["step"], packet.fields["world_size"]
        groups = self._batches.pop(step, None)
        if groups is not None:
            self.leases.move("taken", "trained", count=len(groups))
            self._record(step, trained(groups, world_size, packet.arrays[0]))
            self.step = step + 1
            self._evict()
        return [(peer, _answer(packet, "noted", **self._summary()))]

    def _on_summary(self, peer: str, packet: Packet, now: float) -> Replies:
        return [(peer, _answer(packet, "noted", **self._summary()))]

    def _summary(self) -> dict[str, Any]:
        reports = self._evaluations.news()
        return {"metrics": self.metrics(), "actors": self._status, "evaluations": reports}

    # -- evaluation -----------------------------------------------------------------------

    def _on_evaluate(self, peer: str, packet: Packet, now: float) -> Replies:
        return self._evaluations.open(peer, packet, sorted(self._actors.values()), now)

    def _on_results(self, peer: str, packet: Packet, now: float) -> Replies:
        self._evaluations.wait(peer, packet)
        return []


def _answer(request: Packet, kind: str, **fields: Any) -> Packet:
    return Packet(kind=kind, request_id=request.request_id, fields=fields)


def _with_id(packet: Packet, request: Packet) -> Packet:
    return Packet(
        kind=packet.kind,
        request_id=request.request_id,
        fields=packet.fields,
        arrays=packet.arrays,
    )
