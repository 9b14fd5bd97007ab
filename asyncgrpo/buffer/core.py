"""The buffer's decisions as a state machine: packets and the time in, packets out.

    from actors                         answer
    hello    {actor, version, leases}   welcome {credit, life}; leases it does not hold expire
    bye      {actor}                    noted; what it still holds expires
    lease    {version, max}             leases [...]: at once, or when the gate opens
    accept   {lease_ids, refused}       noted: evaluation leases it will (not) answer
    put      one group                  stored {state}: the buffer is responsible from here on
    fail     {lease_id, reason}         noted
    held     {version}                  noted: the actor's weights changed
    status   {counters}                 noted
    (who has not said hello to this life of the buffer gets `introduce {life}`, and says it)

    from learner ranks
    begin    {step}                     noted: the first step of a learner's life; later ones that
                                        a former life made are given again, of the same groups
    take     {step, rank, world_size}   shard, exhausted or stopped: at once, or when it is decided
    stop     {}                         noted: no batch is formed from now on
    trained  {step, world_size, covered} noted {counters, actors, evaluations}; no learner will
                                        begin before step `covered` any more
    evaluate {version, blocks}          evaluating, once the actors hold back their weights
    results  {}                         all reports, once no evaluation is on its way
    summary  {}                         noted {counters, actors, evaluations}

No sockets, no clock, no files: `handle` and `tick` get the time and return what to send. What must
outlive the process is noted in a journal, which is to be committed before anything is sent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncgrpo.buffer.admission import (
    check_request,
    filter_reason,
    is_holder,
    newest_version,
    why_failed,
)
from asyncgrpo.buffer.evaluation import Evaluations
from asyncgrpo.buffer.gate import Gate
from asyncgrpo.buffer.journal import Journal
from asyncgrpo.buffer.leases import STATES, LeaseBook, OpenLease
from asyncgrpo.buffer.queue import PromptQueue
from asyncgrpo.buffer.replay import Replay, Seen, lags, part_metrics, trained
from asyncgrpo.config import Config
from asyncgrpo.errors import WireError
from asyncgrpo.types import EndedGroup, Group
from asyncgrpo.wire.codec import Packet, groups_from, shard_packet

if TYPE_CHECKING:
    from asyncgrpo.data.prompts import PromptSource

log = logging.getLogger(__name__)
Replies = list[tuple[str, Packet]]
Action = Callable[[str, Packet, float], Replies | None]  # None: it is noted
EVENTS = ("put", "trained", "held", "evaluate", "results")  # others may come from a run that hangs
Record = Callable[[int, Sequence[EndedGroup]], None]  # of the step at which they ended
MAX_REASON = 300  # characters
BARREN_BATCHES = 10  # so much that nothing can be learned from is worth a word


class BufferCore:
    """All state of the buffer process."""

    def __init__(
        self,
        config: Config,
        prompts: PromptSource,
        record: Record,
        journal: Journal | None = None,
        now: float = 0.0,
        rewind: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Goes on where the journal ends; without one nothing survives the process.

        rewind: takes back what was recorded of this step and later ones and is no longer true.
        """
        self._config, self._record, self._rewind = config, record, rewind
        self._journal = journal or Journal()
        self.replay, self._gate = Replay(config), Gate(config)
        self.leases = LeaseBook(config, self._journal)
        self.events = 0  # packets that brought the run on; see EVENTS
        self.step = 0  # the next step whose batch will be formed
        self._newest = 0  # version there can be; a learner that goes back leaves it as it is
        self._queue = PromptQueue(prompts)
        self._actors: dict[str, str] = {}  # actor name -> its present peer identity
        self._unreachable: set[str] = set()  # of these peers, until they are heard again
        self._status: dict[str, dict[str, Any]] = {}  # actor name -> its last counters
        self._held: dict[str, int] = {}  # peer -> policy version it holds
        self._waiting_actors: dict[str, Packet] = {}  # peer -> lease request that waits
        self._waiting_takes: dict[tuple[str, int], Packet] = {}
        self._evaluations = Evaluations(config, prompts.held_out, self.leases, self._journal)
        self._is_stopped = self._is_over = False  # over: a rank was told that it is exhausted
        self._covered = 0  # the learner's newest checkpoint is of this step
        self._sums = {"reward": 0.0, "tokens": 0.0, "groups": 0.0}  # of all that arrived
        self._of_batch: dict[str, float] = {}  # metrics of the newest
        self._num_barren = 0  # groups since one was good to train on
        self._warn_barren = BARREN_BATCHES * config.buffer.groups_per_step
        self.num_replayed = 0  # groups that were added to batches though trained before
        self.num_refused = 0  # messages, as the server counts them
        self._restore(now)

    def _restore(self, now: float) -> None:
        """Takes up what former lives left. Actors go on with their leases; peers ask again."""
        past = self._journal.remembered()
        self.step, self._newest = past.step, newest_version(past.last_step)
        self._sums.update(past.arrived)
        self._queue.restore(past)
        self.leases.restore(past, self._queue, now)
        self.replay.restore(past)
        self._evaluations.restore(past)
        self._rewind(self.step)
        self._check()

    def _check(self) -> None:
        self.leases.check(stored=len(self.replay), taken=self.replay.num_taken)

    def handle(self, peer: str, packet: Packet, now: float) -> Replies:
        """Takes one packet; returns everything that can be sent because of it."""
        return self.turn([(peer, packet)], now)

    def turn(self, requests: Sequence[tuple[str, Packet]], now: float) -> Replies:
        """Takes some packets; returns everything that can be sent because of them."""
        replies: Replies = []
        for peer, packet in requests:
            replies += self._take(peer, packet, now)
        return replies + self.tick(now)

    def _take(self, peer: str, packet: Packet, now: float) -> Replies:
        self._newest = max(self._newest, newest_version(self.step))
        try:
            check_request(packet, newest=self._newest, num_learners=self._config.launch.learners)
            if packet.kind in ("lease", "status") and peer not in self._actors.values():
                return [(peer, _answer(packet, "introduce", life=self._journal.life))]
            self._unreachable.discard(peer)
            self.events += packet.kind in EVENTS
            action: Action = getattr(self, f"_on_{packet.kind}")
            replies = action(peer, packet, now)
            return [(peer, _answer(packet, "noted"))] if replies is None else replies
        except (KeyError, TypeError, ValueError, WireError) as error:
            reason = str(error) if isinstance(error, WireError) else f"{packet.kind}: {error!r}"
            return [(peer, _answer(packet, "refused", reason=reason[:MAX_REASON]))]

    def tick(self, now: float) -> Replies:
        """Ends what is overdue and answers requests that waited for something."""
        for lease in self.leases.overdue(now):
            self._end_unfinished(lease.lease.lease_id, "expired", "deadline")
        return self._serve_actors(now) + self._serve_takes(now) + self._evaluations.replies(now)

    def lost(self, peer: str, now: float) -> Replies:
        """A peer's connection is gone: its leases end now instead of at their deadlines."""
        self._unreachable.add(peer)
        return [*self._forget_peer(peer, "unreachable", now), *self.tick(now)]

    def waits(self) -> Iterator[tuple[str, str]]:
        """(who, for what) of everyone who waits for somebody else now."""
        for (_, rank), request in self._waiting_takes.items():
            yield f"learner-{rank}", f"the batch of step {request.fields['step']}"
        for step in self.replay.batches:
            yield "the buffer", f"the learner to train step {step}"
        names = {peer: name for name, peer in self._actors.items()}
        for peer in self._waiting_actors:
            yield names.get(peer, peer), f"work, holding version {self._held[peer]}"
        for name, peer in self._actors.items():
            if self.leases.held_by(peer):
                yield "the buffer", f"{name} to answer its leases"
        if not self._actors:
            yield "the buffer", "an actor"

    def metrics(self) -> dict[str, float]:
        """Counters and sizes by metric name."""
        counts, reasons = self.leases.counts, self.leases.reasons
        return {
            "leases": counts.total(),
            **{f"leases_{state}": counts[state] for state in STATES},
            **{f"groups_{name.replace('/', '_')}": count for name, count in reasons.items()},
            "buffer_groups": len(self.replay),
            "buffer_tokens": self.replay.num_tokens,
            "groups_arrived": self._sums["groups"],
            "tokens_arrived": self._sums["tokens"],
            "reward_arrived_sum": self._sums["reward"],
            "refused_messages": self.num_refused,
            **({"groups_replayed": self.num_replayed} if self.num_replayed else {}),
            **self._of_batch,
            "gate_open": self._startable(max(self._held.values(), default=0)),
            "actors_waiting": len(self._waiting_actors),
        }

    # -- actors ---------------------------------------------------------------------------

    def _on_hello(self, peer: str, packet: Packet, now: float) -> Replies:
        actor, fields = packet.fields["actor"], packet.fields
        formers = (self.leases.peers_of(actor) | {self._actors.get(actor, peer)}) - {peer}
        self._actors[actor] = peer
        self._held[peer] = fields.get("version", -1)
        self._expire(peer, "undelivered", besides=fields.get("leases", ()))
        welcome = {"credit": self._config.buffer.credit, "life": self._journal.life}
        replies = [(peer, _answer(packet, "welcome", **welcome))]
        for former in formers:
            replies += self._forget_peer(former, "actor_restarted", now)
        return replies + self._evaluations.open(self._reachable(), now)

    def _on_bye(self, peer: str, packet: Packet, now: float) -> Replies:
        if self._actors.get(packet.fields["actor"]) == peer:
            del self._actors[packet.fields["actor"]]
        noted = (peer, _answer(packet, "noted"))
        return [noted, *self._forget_peer(peer, "actor_left", now)]

    def _reachable(self) -> list[str]:
        return sorted(set(self._actors.values()) - self._unreachable)

    def _forget_peer(self, peer: str, reason: str, now: float) -> Replies:
        """Its leases end; what it was to evaluate, others do."""
        self._waiting_actors.pop(peer, None)
        self._held.pop(peer, None)
        asked = [held.lease for held in self.leases.held_by(peer) if held.lease.purpose == "eval"]
        self._expire(peer, reason)
        return self._evaluations.deal_again(asked, self._reachable(), now)

    def _expire(self, peer: str, reason: str, besides: Sequence[str] = ()) -> None:
        for held in self.leases.held_by(peer):
            if held.lease.lease_id not in besides:
                self._end_unfinished(held.lease.lease_id, "expired", reason)

    def _on_held(self, peer: str, packet: Packet, now: float) -> None:
        self._held[peer] = packet.fields["version"]

    def _on_lease(self, peer: str, packet: Packet, now: float) -> Replies:
        self._waiting_actors[peer] = packet
        self._held[peer] = max(self._held.get(peer, -1), packet.fields["version"])
        return []

    def _on_accept(self, peer: str, packet: Packet, now: float) -> None:
        self._evaluations.accept(packet.fields["lease_ids"])
        for lease_id in packet.fields["refused"]:
            opened = self.leases.get(lease_id)
            if opened is not None and opened.lease.purpose == "eval":
                self._end_unfinished(lease_id, "failed", "version_passed")

    def _on_put(self, peer: str, packet: Packet, now: float) -> Replies:
        (group,) = groups_from(packet, self.leases.read)
        lease_id = group.lease.lease_id
        opened = self.leases.get(lease_id)
        if opened is None or not is_holder(peer, opened):
            state = "unknown"  # a repeat, or its prompt is out again; or it is somebody else's
            if opened is None:
                self._journal.arrived(group, keep=False)
            self.leases.reasons[f"ignored/{'other_actor' if opened else 'late'}"] += 1
        elif reason := why_failed(group, opened.lease, self._newest):
            self._end_unfinished(lease_id, "failed", reason, again=False)
            state = "failed"
        elif group.lease.purpose == "eval":
            self.leases.close(lease_id, "stored")
            self._evaluations.answer(group)
            state = "stored"
        else:
            state = self._store(group, opened, now)
        return [(peer, _answer(packet, "stored", lease_id=lease_id, state=state))]

    def _store(self, group: Group, opened: OpenLease, now: float) -> str:
        self._sums["groups"] += 1
        self._sums["tokens"] += group.num_tokens
        self._sums["reward"] += group.mean_reward
        reason = filter_reason(group, self._config)
        self._journal.arrived(group, keep=not reason)
        if reason:
            self.leases.close(group.lease.lease_id, "filtered", reason)
            self._record(self.step, [EndedGroup(group=group, status="filtered", reason=reason)])
            self._warn_of_barren(reason)
            return "filtered"
        self._num_barren = 0
        ended = self.leases.close(group.lease.lease_id, "stored")
        seen = None if opened.step is None else Seen(opened.step, self.step, now)
        self.replay.add(ended.ticket, group, seen)
        if group.completions.version_span[0] < self.step - self._config.buffer.max_staleness:
            self._evict()
        return "stored"

    def _warn_of_barren(self, reason: str) -> None:
        """Without this a run whose groups are all filtered would stand still without a word."""
        self._num_barren += 1
        if self._num_barren == self._warn_barren:
            self._warn_barren *= 2
            remedy = (
                f"reward.correct_above={self._config.reward.correct_above:g} decides what is "
                "correct; change it, the reward, the prompts or sampling.temperature, or set "
                "algo.drop_uniform_groups=false"
            )
            if reason == "empty_completion":
                remedy = "the engine returned nothing; see logs/ of the actors"
            note = "%d groups in a row teach nothing, the last one was %s: %s"
            log.warning(note, self._num_barren, reason, remedy)

    def _on_fail(self, peer: str, packet: Packet, now: float) -> None:
        lease_id, reason = packet.fields["lease_id"], packet.fields["reason"]
        if self.leases.get(lease_id) is not None:
            retry = bool(packet.fields.get("retry"))
            self._end_unfinished(lease_id, "failed", reason, again=retry)

    def _on_status(self, peer: str, packet: Packet, now: float) -> None:
        self._status[packet.fields["actor"]] = dict(packet.fields)

    def _end_unfinished(
        self, lease_id: str, state: str, reason: str, *, again: bool = True
    ) -> None:
        """Ends a lease that brought no group; its prompt is handed out again."""
        ended = self.leases.close(lease_id, state, reason, again=again)
        if ended.turn is None:
            self._evaluations.drop(lease_id)
        elif again:
            self._queue.put_back(ended.turn)

    def _startable(self, version: int) -> int:
        num_formed = self.step + len(self.replay.batches)
        return self._gate.open_for(version, self.leases.counts, self.replay, num_formed)

    def _serve_actors(self, now: float) -> Replies:
        replies: Replies = []
        for peer, request in list(self._waiting_actors.items()):
            version = self._held[peer]
            count = min(request.fields["max"], self._startable(version)) * (not self._is_stopped)
            leases: list[bytes] = []
            while len(leases) < count and (turn := self._queue.next()) is not None:
                opened = self.leases.issue(
                    turn.prompt, peer=peer, version=version, now=now, turn=turn, step=self.step
                )
                leases.append(opened.packed)
            if leases:
                del self._waiting_actors[peer]
                replies.append((peer, _answer(request, "leases", leases=leases)))
        return replies

    # -- learner --------------------------------------------------------------------------

    def _on_begin(self, peer: str, packet: Packet, now: float) -> None:
        step = packet.fields["step"]
        if step > self.step:
            raise ValueError(
                f"the learner begins at step {step}, but the buffer knows of {self.step} trained "
                "steps: ledger.sqlite is missing or older than the checkpoint; put it back, or "
                "start another run with model.path set to the last model"
            )
        again = self._journal.batches(step, self.step - 1)
        gone = [former for former in range(step, self.step) if former not in again]
        if gone:
            raise ValueError(
                f"the learner begins at step {step}, but the groups of step {gone[0]} are gone: a "
                f"newer checkpoint covered them; put it back, or start another run"
            )
        # torchrun asks the ranks to stop when one of them has died
        self._is_stopped = self._is_over = False
        self._journal.began(step)
        self._evaluations.forget(step)
        for former, batch in again.items():
            self.replay.hold(former, batch)
            self._take_out(former, "trained")
        if again:
            self.step = step
            self._rewind(step)
            self._check()

    def _take_out(self, step: int, before: str) -> None:
        batch = self.replay.batches[step]
        self.leases.move(batch.new, before, "taken", step=step)
        self._journal.formed(step, batch)

    def _on_stop(self, peer: str, packet: Packet, now: float) -> None:
        self._is_stopped = not self._is_over  # all ranks end in the same way

    def _on_take(self, peer: str, packet: Packet, now: float) -> Replies:
        if packet.fields["step"] < self.step:
            raise ValueError(f"step {packet.fields['step']} is trained; the next is {self.step}")
        self._waiting_takes[peer, packet.fields["rank"]] = packet
        return []

    def _serve_takes(self, now: float) -> Replies:
        replies: Replies = []
        for (peer, rank), request in list(self._waiting_takes.items()):
            step, world_size = request.fields["step"], request.fields["world_size"]
            if step == self.step and step not in self.replay.batches and not self._is_stopped:
                self._form_batch(now)
            if step in self.replay.batches:
                answer = shard_packet(self.replay.shard(step, rank, world_size))
            elif self._is_stopped:
                answer = Packet(kind="stopped")
            elif step == self.step and self._exhausted():
                answer, self._is_over = Packet(kind="exhausted"), True
            else:
                continue
            del self._waiting_takes[peer, rank]
            replies.append((peer, replace(answer, request_id=request.request_id)))
        return replies

    def _form_batch(self, now: float) -> None:
        self._evict()
        new = self.replay.form(self.step, self.leases.being_made(), is_last=self._exhausted())
        if new:
            self._take_out(self.step, "stored")
            self._of_batch = lags(new, self.step, now) | part_metrics(new)
            self.num_replayed += len(self.replay.batches[self.step].groups) - len(new)

    def _evict(self) -> None:
        for old in self.replay.evict(self.step):
            self.leases.move([old.ticket], "stored", "evicted", "stale")
            self._record(self.step, [EndedGroup(group=old.group, status="evicted", reason="stale")])

    def _exhausted(self) -> bool:
        """No prompt is left and nothing is on the way that could fill another batch."""
        return not self.leases.counts["open"] and not self._queue

    def _on_trained(self, peer: str, packet: Packet, now: float) -> Replies:
        step, world_size, covered = (packet.fields[n] for n in ("step", "world_size", "covered"))
        batch = self.replay.batches.get(step)
        if batch is not None and step == self.step:
            advantages = np.frombuffer(packet.fields["advantages"], np.float32)
            ended = trained(batch, world_size, advantages)
            self.replay.done(step)
            self.leases.move(batch.new, "taken", "trained", step=step)
            self._record(step, ended)
            self.step = step + 1
            self._evict()
            if covered > self._covered:
                self._covered = covered
                buffer = self._config.buffer
                self._journal.covered(covered - buffer.max_staleness * bool(buffer.replay_ratio))
            self._check()
        return self._on_summary(peer, packet, now)

    def _on_summary(self, peer: str, packet: Packet, now: float) -> Replies:
        fields = {"metrics": self.metrics(), "actors": self._status}
        return [(peer, _answer(packet, "noted", evaluations=self._evaluations.news(), **fields))]

    # -- evaluation -----------------------------------------------------------------------

    def _on_evaluate(self, peer: str, packet: Packet, now: float) -> Replies:
        return self._evaluations.ask(peer, packet, self._reachable(), now)

    def _on_results(self, peer: str, packet: Packet, now: float) -> Replies:
        self._evaluations.wait(peer, packet)
        return []


def _answer(request: Packet, kind: str, **fields: Any) -> Packet:
    return Packet(kind=kind, request_id=request.request_id, fields=fields)
