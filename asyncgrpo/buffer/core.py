"""The buffer's decisions as a state machine: packets and the time in, packets out.

    from actors                         answer
    hello    {actor, version, leases}   welcome {credit, life}; leases it does not hold expire
    lease    {version, max}             leases [...]: at once, or when the gate opens
    accept   {lease_ids, refused}       noted: evaluation leases it will (not) answer
    put      one group                  stored {state}: the buffer is responsible from here on
    fail     {lease_id, reason}         noted
    held     {version}                  noted: the actor's weights changed
    status   {counters}                 noted
    (who has not said hello to this life of the buffer gets `introduce {life}`, and says it)

    from learner ranks
    take     {step, rank, world_size}   shard, or exhausted: at once, or when the batch is full
    trained  {step}                     noted {counters, actors, evaluations}
    evaluate {version}                  evaluating, once the actors hold back their weights
    results  {version}                  report, once all held-out prompts are answered

No sockets, no clock, no files: `handle` and `tick` get the time and return what to send. What must
outlive the process is noted in a journal, which is to be committed before anything is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncgrpo.buffer.evaluation import EvalJob
from asyncgrpo.buffer.filters import filter_reason
from asyncgrpo.buffer.gate import Gate
from asyncgrpo.buffer.journal import Journal, NoJournal
from asyncgrpo.buffer.leases import LeaseBook
from asyncgrpo.buffer.queue import PromptQueue
from asyncgrpo.buffer.replay import Replay, tickets
from asyncgrpo.config import Config
from asyncgrpo.errors import WireError
from asyncgrpo.evaluate import EvalReport
from asyncgrpo.types import Group, Sampling
from asyncgrpo.wire.codec import Packet, groups_from, lease_fields, shard_packet

if TYPE_CHECKING:
    from asyncgrpo.data.prompts import PromptSource

Replies = list[tuple[str, Packet]]
Action = Callable[[str, Packet, float], Replies]
RecordStep = Callable[[int, Sequence[Group]], None]
KEPT_STEPS = 4  # trained steps whose groups stay in the journal until a checkpoint covers them
ACCEPT_SECONDS = 15.0  # how long the learner waits for actors to start an evaluation


class BufferCore:
    """All state of the buffer process."""

    def __init__(
        self,
        config: Config,
        prompts: PromptSource,
        record_step: RecordStep,
        journal: Journal | None = None,
        now: float = 0.0,
    ) -> None:
        """Goes on where the journal ends; without one nothing survives the process."""
        self._config, self._prompts, self._record_step = config, prompts, record_step
        self._journal = journal or NoJournal()
        buffer = config.buffer
        self.gate = Gate(
            groups_per_step=buffer.groups_per_step,
            max_staleness=buffer.max_staleness,
            max_steps=config.run.max_steps,
            publish_every=config.weights.publish_every,
        )
        self.replay = Replay(buffer.order)
        self.leases = LeaseBook(config, self._journal)
        self.step = 0  # the next step whose batch will be formed
        self._queue = PromptQueue(prompts)
        self._actors: dict[str, str] = {}  # actor name -> its present peer identity
        self._status: dict[str, dict[str, Any]] = {}  # actor name -> its last counters
        self._held: dict[str, int] = {}  # peer -> policy version it holds
        self._waiting_actors: dict[str, Packet] = {}  # peer -> lease request that waits
        self._waiting_takes: dict[tuple[str, int], Packet] = {}
        self._jobs: dict[int, EvalJob] = {}
        self._wanted: set[int] = set()  # versions to evaluate, once there is an actor
        self._reports: dict[int, EvalReport] = {}
        self._untold: list[dict[str, Any]] = []  # reports that rank 0 has not got with a step
        self._waiting_evals: list[tuple[str, Packet]] = []
        self._sums = {"reward": 0.0, "tokens": 0.0, "groups": 0.0}  # of all that arrived
        self._restore(now)

    def _restore(self, now: float) -> None:
        """Takes up what former lives left. Actors go on with their leases; peers ask again."""
        past = self._journal.remembered()
        self.step = past.step
        self._sums.update(past.arrived)
        self._queue.restore(past)
        self.leases.restore(past, self._queue, now)
        self.replay.restore(past)
        self.gate.issued = self.leases.num_live
        for version, report in past.reports.items():
            if report is None:
                self._wanted.add(version)  # its actors may be gone: it begins anew
            else:
                self._reports[version] = EvalReport(**report)
                self._untold.append(dict(report))
        self.leases.check(stored=len(self.replay), taken=self.replay.num_taken)

    def handle(self, peer: str, packet: Packet, now: float) -> Replies:
        """Takes one packet; returns everything that can be sent because of it."""
        action: Action | None = getattr(self, f"_on_{packet.kind}", None)
        if action is None:
            return [(peer, _answer(packet, "refused", reason=f"unknown kind {packet.kind!r}"))]
        if packet.kind in ("lease", "status") and peer not in self._actors.values():
            return [(peer, _answer(packet, "introduce", life=self._journal.life))]
        try:
            return action(peer, packet, now) + self.tick(now)
        except (KeyError, TypeError, ValueError, WireError) as error:
            return [(peer, _answer(packet, "refused", reason=f"{packet.kind}: {error!r}"))]

    def tick(self, now: float) -> Replies:
        """Ends what is overdue and answers requests that waited for something."""
        for lease in self.leases.overdue(now):
            self._end_unfinished(lease.lease.lease_id, "expired", "deadline")
        return self._serve_actors(now) + self._serve_takes() + self._serve_evals(now)

    def lost(self, peer: str, now: float) -> Replies:
        """A peer's connection is gone: its leases end now instead of at their deadlines."""
        self._forget_peer(peer, "unreachable")
        return self.tick(now)

    def metrics(self) -> dict[str, float]:
        """Counters and sizes by metric name."""
        counts, reasons = self.leases.counts, self.leases.reasons
        return {
            "leases": self.leases.num_training_leases(),
            **{f"leases_{state}": counts[state] for state in counts},
            **{f"groups_{name.replace('/', '_')}": count for name, count in reasons.items()},
            "buffer_groups": len(self.replay),
            "buffer_tokens": self.replay.num_tokens,
            "groups_arrived": self._sums["groups"],
            "tokens_arrived": self._sums["tokens"],
            "reward_arrived_sum": self._sums["reward"],
        }

    # -- actors ---------------------------------------------------------------------------

    def _on_hello(self, peer: str, packet: Packet, now: float) -> Replies:
        actor, fields = packet.fields["actor"], packet.fields
        for former in (self.leases.peers_of(actor) | {self._actors.get(actor, peer)}) - {peer}:
            self._forget_peer(former, "actor_restarted")
        self._actors[actor] = peer
        self._held[peer] = fields.get("version", -1)
        self._expire(peer, "undelivered", besides=fields.get("leases", ()))
        welcome = {"credit": self._config.buffer.credit, "life": self._journal.life}
        return [(peer, _answer(packet, "welcome", **welcome)), *self._open_jobs(now)]

    def _forget_peer(self, peer: str, reason: str) -> None:
        self._waiting_actors.pop(peer, None)
        self._held.pop(peer, None)
        self._expire(peer, reason)

    def _expire(self, peer: str, reason: str, besides: Sequence[str] = ()) -> None:
        for held in self.leases.held_by(peer):
            if held.lease.lease_id not in besides:
                self._end_unfinished(held.lease.lease_id, "expired", reason)

    def _on_held(self, peer: str, packet: Packet, now: float) -> Replies:
        self._held[peer] = packet.fields["version"]
        return [(peer, _answer(packet, "noted"))]

    def _on_lease(self, peer: str, packet: Packet, now: float) -> Replies:
        self._waiting_actors[peer] = packet
        self._held[peer] = max(self._held.get(peer, -1), packet.fields["version"])
        return []

    def _on_accept(self, peer: str, packet: Packet, now: float) -> Replies:
        for job in self._jobs.values():
            job.unaccepted -= set(packet.fields["lease_ids"])
        for lease_id in packet.fields["refused"]:
            if self.leases.get(lease_id) is not None:
                self._end_unfinished(lease_id, "failed", "version_passed")
        return [(peer, _answer(packet, "noted"))]

    def _on_put(self, peer: str, packet: Packet, now: float) -> Replies:
        (group,) = groups_from(packet)
        lease_id = group.lease.lease_id
        if self.leases.get(lease_id) is None:
            state = "unknown"  # a repeat, or it expired meanwhile: its prompt is out again
            self._journal.arrived(group, keep=False)
        elif group.lease.purpose == "eval":
            self.leases.close(lease_id, "stored")
            self._jobs[group.lease.version].answer(group)
            state = "stored"
        else:
            state = self._store(group)
        return [(peer, _answer(packet, "stored", lease_id=lease_id, state=state))]

    def _store(self, group: Group) -> str:
        self._sums["groups"] += 1
        self._sums["tokens"] += group.num_tokens
        self._sums["reward"] += float(np.mean(group.rewards))
        reason = filter_reason(group, self._config)
        self._journal.arrived(group, keep=not reason)
        if reason:
            self.leases.close(group.lease.lease_id, "filtered", reason)
            self.gate.give_back()
            return "filtered"
        ended = self.leases.close(group.lease.lease_id, "stored")
        self.replay.add(ended.ticket, group)
        self._evict()
        return "stored"

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
        ended = self.leases.close(lease_id, state, reason, again=again)
        if ended.turn is None:
            for job in self._jobs.values():
                job.drop(lease_id)
            return
        self.gate.give_back()
        if again:
            self._queue.put_back(ended.turn, ended.ticket)

    def _serve_actors(self, now: float) -> Replies:
        replies: Replies = []
        for peer, request in list(self._waiting_actors.items()):
            version = self._held[peer]
            count = min(request.fields["max"], self.gate.open_for(version))
            leases: list[dict[str, Any]] = []
            while len(leases) < count and (turn := self._queue.next()) is not None:
                self.gate.issue(version)
                lease = self.leases.hand_out(turn, peer=peer, version=version, now=now)
                leases.append(lease_fields(lease))
            if leases:
                del self._waiting_actors[peer]
                replies.append((peer, _answer(request, "leases", leases=leases)))
        return replies

    # -- learner --------------------------------------------------------------------------

    def _on_take(self, peer: str, packet: Packet, now: float) -> Replies:
        if packet.fields["step"] < self.step:
            raise ValueError(f"step {packet.fields['step']} is trained; the next is {self.step}")
        self._waiting_takes[peer, packet.fields["rank"]] = packet
        return []

    def _serve_takes(self) -> Replies:
        replies: Replies = []
        for (peer, rank), request in list(self._waiting_takes.items()):
            step, world_size = request.fields["step"], request.fields["world_size"]
            if step == self.step and step not in self.replay.batches:
                self._form_batch()
            if step in self.replay.batches:
                answer = shard_packet(self.replay.shard(step, rank, world_size))
            elif self._exhausted():
                answer = Packet(kind="exhausted")
            else:
                continue
            del self._waiting_takes[peer, rank]
            replies.append((peer, replace(answer, request_id=request.request_id)))
        return replies

    def _form_batch(self) -> None:
        count = self._config.buffer.groups_per_step
        if self._exhausted() and len(self.replay) >= self._config.launch.learners:
            count = min(count, len(self.replay))  # the last, smaller batch
        if not self.replay.ready(count, self.leases.open_tickets()):
            return
        batch = self.replay.batches[self.step] = self.replay.take(count)
        self.leases.move(tickets(batch), "stored", "taken", step=self.step)

    def _evict(self) -> None:
        buffer = self._config.buffer
        for old in self.replay.evict(self.step, buffer.max_staleness, buffer.staleness_action):
            self.leases.move([old.ticket], "stored", "evicted", "stale")
            self.gate.give_back()

    def _exhausted(self) -> bool:
        """No prompt is left and nothing is on the way that could fill another batch."""
        return not self.leases.counts["open"] and not self._queue

    def _on_trained(self, peer: str, packet: Packet, now: float) -> Replies:
        step = packet.fields["step"]
        batch = self.replay.batches.pop(step, None)
        if batch is not None:
            self.leases.move(tickets(batch), "taken", "trained", step=step)
            self.step = step + 1
            self._evict()
            self._record_step(step, [stored.group for stored in batch])
            self._journal.covered(step - KEPT_STEPS)
            self.leases.check(stored=len(self.replay), taken=self.replay.num_taken)
        return [(peer, _answer(packet, "noted", **self._summary()))]

    def _summary(self) -> dict[str, Any]:
        reports, self._untold = self._untold, []
        return {"metrics": self.metrics(), "actors": self._status, "evaluations": reports}

    # -- evaluation -----------------------------------------------------------------------

    def _on_evaluate(self, peer: str, packet: Packet, now: float) -> Replies:
        version = packet.fields["version"]
        if version not in self._jobs and version not in self._reports:
            self._wanted.add(version)
        self._waiting_evals.append((peer, packet))
        return self._open_jobs(now)

    def _open_jobs(self, now: float) -> Replies:
        """Begins the evaluations that are wanted, once there is an actor to answer."""
        versions = sorted(self._wanted) if self._actors else ()
        self._wanted.difference_update(versions)
        return [push for version in versions for push in self._open_job(version, now)]

    def _open_job(self, version: int, now: float) -> Replies:
        """Splits the held-out prompts over the actors that are known."""
        held_out = self._prompts.held_out(self._config.eval.num_prompts)
        peers = sorted(self._actors.values())
        job = EvalJob(version=version, deadline=now + self._config.eval.timeout_seconds)
        self._jobs[version] = job
        greedy = {
            **self._config.sampling.model_dump(),
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 0,
        }
        hands: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
        for i, prompt in enumerate(held_out if peers else ()):
            lease = self.leases.issue(
                prompt,
                peer=peers[i % len(peers)],
                version=version,
                group_size=1,
                sampling=Sampling(**greedy),
                now=now,
                purpose="eval",
            )
            hands[peers[i % len(peers)]].append(lease_fields(lease))
            job.unaccepted.add(lease.lease_id)
        job.num_prompts = len(held_out)
        job.unanswered = set(job.unaccepted)
        self._journal.evaluating(version, self.leases.last_number)
        return [
            (peer, Packet(kind="evaluate", fields={"version": version, "leases": leases}))
            for peer, leases in hands.items()
            if leases
        ]

    def _on_results(self, peer: str, packet: Packet, now: float) -> Replies:
        self._waiting_evals.append((peer, packet))
        return []

    def _serve_evals(self, now: float) -> Replies:
        for version, job in list(self._jobs.items()):
            if now > job.deadline:
                for lease_id in list(job.unanswered):
                    self._end_unfinished(lease_id, "expired", "eval_deadline")
            if not job.unanswered:
                self._reports[version] = job.report(self._config.reward.correct_above)
                self._untold.append(self._reports[version].as_fields())
                self._journal.evaluated(version, self._untold[-1])
                del self._jobs[version]
        answered = [
            (peer, reply) for peer, p in self._waiting_evals if (reply := self._eval_reply(p, now))
        ]
        done = {(peer, reply.request_id) for peer, reply in answered}
        self._waiting_evals = [
            w for w in self._waiting_evals if (w[0], w[1].request_id) not in done
        ]
        return answered

    def _eval_reply(self, request: Packet, now: float) -> Packet | None:
        version = request.fields["version"]
        report, job = self._reports.get(version), self._jobs.get(version)
        if request.kind == "results":
            return _answer(request, "report", **report.as_fields()) if report else None
        waited_long = job is not None and (
            now > job.deadline - self._config.eval.timeout_seconds + ACCEPT_SECONDS
        )
        if report or waited_long or (job is not None and not job.unaccepted):
            return _answer(request, "evaluating", version=version)
        return None


def _answer(request: Packet, kind: str, **fields: Any) -> Packet:
    return Packet(kind=kind, request_id=request.request_id, fields=fields)
