"""The actor loop: leases in, groups out, weights swapped in between; it never waits for a batch.

Consumes: leases and evaluations (buffer), staged weights (receiver), verdicts (judge).
Produces: groups (buffer), proofs of loaded weights (receiver), counters (buffer).
Waits for: nothing while it has sequences in flight; otherwise a few milliseconds at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from asyncgrpo.actor.concurrency import Concurrency
from asyncgrpo.actor.judge import Job, Judge, Verdict
from asyncgrpo.config import Config
from asyncgrpo.data.templates import fit, tokenise
from asyncgrpo.errors import EngineError, PeerTimeout, WireError
from asyncgrpo.protocols import Client, Engine, WeightReceiver
from asyncgrpo.rewards.registry import RewardHealth
from asyncgrpo.types import Completions, Group, Lease, Sampled
from asyncgrpo.weights.proof import CANARY_SAMPLING, NUM_CANARIES, canary_prompts
from asyncgrpo.wire.codec import Packet, group_packet, lease_from

log = logging.getLogger(__name__)
STATUS_SECONDS = 1.0
IDLE_SECONDS = 0.005
FAREWELL_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """A group that the judge has."""

    lease: Lease
    sampled: Sampled
    generate_seconds: float


class ActorLoop:
    """Drives one engine. `tick` does one turn."""

    def __init__(
        self,
        name: str,
        config: Config,
        *,
        engine: Engine,
        tokenizer: Any,
        vocab_size: int,
        client: Client,
        receiver: WeightReceiver,
        judge: Judge,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[str, Sequence[float]], None] = lambda name, values: None,
    ) -> None:
        """observe: gets the values that histograms of observe/metrics.py count."""
        self._name, self._config, self._clock = name, config, clock
        self._observe = observe
        self._engine, self._tokenizer = engine, tokenizer
        self._client, self._receiver, self._judge = client, receiver, judge
        self._canary_prompts = canary_prompts(vocab_size)
        self._canaries: dict[str, tuple[int, float]] = {}
        self._proving = False  # the canaries of the last swap are under way
        self._swap_seconds = 0.0
        self._asleep = False
        self._sampling: dict[str, tuple[Lease, float]] = {}  # in the engine, since when
        self._scoring: dict[str, Scoring] = {}
        self._outbox: list[Group] = []  # scored, waiting for credit
        self._unacked: dict[int, str] = {}  # put requests without an answer -> lease
        self._asked: int | None = None  # the lease request under way
        self._next_eval: list[Lease] = []  # for versions that are not live yet
        self._eval_open: set[str] = set()
        self._credit = 1
        actor = config.actor
        self._concurrency = Concurrency(actor.concurrency, adaptive=actor.adaptive_concurrency)
        self._health = RewardHealth(config.reward)
        self._last_status = 0.0
        self._unheard = 0  # statuses since the buffer's last word
        self.counters = {
            "tokens_generated": 0.0,
            "groups_generated": 0.0,
            "idle_seconds": 0.0,
            "generate_seconds": 0.0,
            "swap_seconds": 0.0,
            "swaps": 0.0,
            "failed_groups": 0.0,
            **self._health.counters,
            "prompts_truncated": 0.0,
        }
        self._life = 0  # of the buffer that knows this actor
        self._hello()

    def tick(self, idle_seconds: float) -> None:
        """One turn; waits up to idle_seconds for packets when there is nothing to compute."""
        asleep = self._sleeps()
        working = self._engine.num_requests > 0 and not asleep
        start = self._clock()
        packets = self._client.poll(0.0 if working else idle_seconds)
        if not working and not packets:
            self.counters["idle_seconds"] += self._clock() - start
        if packets:
            self._unheard = 0
        for packet in packets:
            self._receive(packet)
        if not asleep:
            self._swap()
            self._ask()
            self._generate()
        for verdict in self._judge.done():
            self._judged(verdict)
        self._deliver()
        self._report()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is sampled, scored, sent or proven."""
        held = (self._sampling, self._scoring, self._outbox, self._unacked, self._next_eval)
        return not any(held) and not self._proving

    def leave(self, seconds: float) -> None:
        """Hands back leases whose completions are not sampled, delivers the others, says goodbye.

        Takes at most `seconds`; what is not through by then, the buffer takes back by itself.
        """
        end = self._clock() + seconds
        self._hand_back(self._sampling)
        while (self._scoring or self._outbox or self._unacked) and self._clock() < end:
            for packet in self._client.poll(IDLE_SECONDS):
                if packet.kind == "leases":
                    self._hand_back([lease_from(each).lease_id for each in packet.fields["leases"]])
                elif packet.kind == "stored":
                    self._unacked.pop(packet.request_id, None)
            for verdict in self._judge.done():
                self._judged(verdict)
            self._deliver()
        try:
            self._client.call(Packet(kind="bye", fields={"actor": self._name}), FAREWELL_SECONDS)
        except (PeerTimeout, WireError) as error:
            log.warning("left without goodbye: %s", error)

    def _hand_back(self, lease_ids: Iterable[str]) -> None:
        for lease_id in list(lease_ids):
            self._sampling.pop(lease_id, None)
            self._fail(lease_id, "handed_back", retry=True)

    # -- buffer -------------------------------------------------------------------------------

    def _hello(self) -> None:
        """Tells the buffer what this actor has and is at work on."""
        fields = {"actor": self._name, "version": self._engine.version, "leases": self._leases()}
        self._client.post(Packet(kind="hello", fields=fields))

    def _leases(self) -> list[str]:
        scored = [group.lease.lease_id for group in self._outbox]
        return [*self._sampling, *self._scoring, *scored, *self._unacked.values()]

    def _receive(self, packet: Packet) -> None:
        if packet.kind == "welcome":
            self._credit, self._life = packet.fields["credit"], packet.fields["life"]
        elif packet.kind == "introduce":
            self._introduce(packet)
        elif packet.kind == "leases":
            self._asked = None
            for packed in packet.fields["leases"]:
                self._start(lease_from(packed))
        elif packet.kind == "evaluate":
            self._next_eval += map(lease_from, packet.fields["leases"])
            self._start_evaluation()
        elif packet.kind == "stored":
            self._unacked.pop(packet.request_id, None)
        elif packet.kind != "noted":
            raise WireError(f"{self._name}: unexpected packet {packet.kind!r}: {packet.fields}")

    def _introduce(self, packet: Packet) -> None:
        """The buffer was started again and ignored this request: says hello to it, once."""
        if packet.request_id == self._asked:
            self._asked = None
        if packet.fields["life"] != self._life:
            self._life = packet.fields["life"]
            self._hello()

    def _ask(self) -> None:
        """Asks for leases when there is room, unless too much scored work waits for credit."""
        room = self._concurrency.limit - len(self._sampling) + len(self._eval_open)
        backlog = len(self._outbox) + len(self._scoring)
        if self._engine.version < 0 or room <= 0 or self._asked or backlog > 4 * self._credit:
            return
        fields = {"version": self._engine.version, "max": room}
        self._asked = self._client.post(Packet(kind="lease", fields=fields))

    def _start(self, lease: Lease) -> None:
        token_ids = self._prompt_tokens(lease)
        if token_ids is None:
            self._fail(lease.lease_id, "prompt_too_long")
            return
        try:
            self._engine.add(
                lease.lease_id, token_ids, lease.sampling, lease.group_size, lease.seed
            )
        except EngineError as error:
            log.warning("%s", error)
            self._fail(lease.lease_id, "refused_by_engine")
            return
        self._sampling[lease.lease_id] = (lease, self._clock())

    def _prompt_tokens(self, lease: Lease) -> list[int] | None:
        """The prompt within its limit; None when it is to be dropped."""
        data, prompt = self._config.data, lease.prompt
        whole = tokenise(self._tokenizer, prompt.messages, data)
        token_ids = fit(whole, data, prompt.prompt_id)
        if token_ids is not None and len(token_ids) < len(whole):
            if not self.counters["prompts_truncated"]:
                log.warning(
                    "prompt %s is cut from %d to its last %d tokens, the head of the chat "
                    "template is lost; more such prompts are only counted (prompts_truncated)",
                    prompt.prompt_id,
                    len(whole),
                    len(token_ids),
                )
            self.counters["prompts_truncated"] += 1
        return token_ids

    def _fail(self, lease_id: str, reason: str, *, retry: bool = False) -> None:
        self.counters["failed_groups"] += 1
        self._eval_done(lease_id)
        fields = {"lease_id": lease_id, "reason": reason, "retry": retry}
        self._client.post(Packet(kind="fail", fields=fields))

    def _deliver(self) -> None:
        while self._outbox and len(self._unacked) < self._credit:
            group = self._outbox.pop(0)
            request = self._client.post(group_packet("put", [group]))
            self._unacked[request] = group.lease.lease_id

    def _report(self) -> None:
        now = self._clock()
        if now - self._last_status >= STATUS_SECONDS:
            self._last_status = now
            self._unheard += 1
            if self._unheard > self._config.buffer.take_timeout_seconds / STATUS_SECONDS:
                silence = self._config.buffer.take_timeout_seconds
                raise PeerTimeout("the buffer", "buffer.take_timeout_seconds", silence)
            fields = {"actor": self._name, "version": self._engine.version, **self.counters}
            self._client.post(Packet(kind="status", fields=fields))

    # -- weights ------------------------------------------------------------------------------

    def _sleeps(self) -> bool:
        """Gives the engine's memory away, once weights are proven, or takes it back.

        Weights that came while it slept came between two sleeps, the first of which was over
        unnoticed: they too are proven before the learner hears that it sleeps.
        """
        self._receiver.check()
        swaps = self._receiver.staged() is not None and not self._eval_open
        is_due = self._proving or swaps
        wanted = self._receiver.wants_sleep(self._asleep and not is_due) and not is_due
        if wanted != self._asleep:
            (self._engine.sleep if wanted else self._engine.wake)()
            self._asleep = wanted
        return self._asleep

    def _swap(self) -> None:
        """Replaces the weights between two steps; the proof follows with the canaries."""
        staged = self._receiver.staged()
        if staged is None or self._proving or self._eval_open:
            return
        version, tensors = staged
        start = time.perf_counter()
        self._engine.load_weights(version, tensors)
        self._swap_seconds = time.perf_counter() - start
        self.counters["swap_seconds"] += self._swap_seconds
        self.counters["swaps"] += 1
        self._observe("swap/stall_seconds", [self._swap_seconds])
        self._canaries, self._proving = {}, True
        for row, prompt in enumerate(self._canary_prompts):
            self._engine.add(f"canary-{version}-{row}", prompt, CANARY_SAMPLING, 1, seed=row)
        self._client.post(Packet(kind="held", fields={"version": version}))
        self._start_evaluation()

    def _canary(self, sampled: Sampled) -> None:
        (completion,) = sampled.completions
        token, logprob = int(completion.token_ids[0]), float(completion.behavior_logprobs[0])
        self._canaries[sampled.lease_id] = (token, logprob)
        if len(self._canaries) == NUM_CANARIES:
            version = int(completion.versions[0])
            proofs = [self._canaries[f"canary-{version}-{row}"] for row in range(NUM_CANARIES)]
            self._proving = False
            self._receiver.loaded(version, self._swap_seconds, proofs)

    # -- evaluation ---------------------------------------------------------------------------

    def _start_evaluation(self) -> None:
        """Starts held-out prompts whose version is live; refuses those whose version has passed."""
        live = self._engine.version
        due = [lease for lease in self._next_eval if lease.version <= live]
        if not due:
            return
        self._next_eval = [lease for lease in self._next_eval if lease.version > live]
        for lease in due:
            if lease.version == live:
                self._eval_open.add(lease.lease_id)
                self._receiver.set_busy(True)
                self._start(lease)
        passed = [lease.lease_id for lease in due if lease.version < live]
        fields = {"lease_ids": [lease.lease_id for lease in due], "refused": passed}
        self._client.post(Packet(kind="accept", fields=fields))

    def _eval_done(self, lease_id: str) -> None:
        if lease_id in self._eval_open:
            self._eval_open.discard(lease_id)
            if not self._eval_open:
                self._receiver.set_busy(False)

    # -- generation and scoring -----------------------------------------------------------------

    def _generate(self) -> None:
        if self._engine.num_requests == 0:
            return
        start, in_flight = self._clock(), len(self._sampling)
        finished = self._engine.step()
        for sampled in finished:
            if sampled.lease_id.startswith("canary-"):
                self._canary(sampled)
            else:
                self._sampled(sampled)
        if finished:
            self._concurrency.observe(self._engine.load, in_flight)
        self.counters["generate_seconds"] += self._clock() - start

    def _sampled(self, sampled: Sampled) -> None:
        lease, since = self._sampling.pop(sampled.lease_id)
        ids = [completion.token_ids.tolist() for completion in sampled.completions]
        texts: list[str] = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        completions = tuple(
            replace(completion, text=text)
            for completion, text in zip(sampled.completions, texts, strict=True)
        )
        self._eval_done(sampled.lease_id)
        if lease.purpose == "train":
            self.counters["groups_generated"] += 1
            self.counters["tokens_generated"] += sum(len(c.token_ids) for c in completions)
        self._scoring[lease.lease_id] = Scoring(
            lease=lease,
            sampled=replace(sampled, completions=completions),
            generate_seconds=self._clock() - since,
        )
        job = Job(
            lease_id=lease.lease_id, prompt=lease.prompt, texts=tuple(texts), block=lease.block
        )
        self._judge.submit(job)

    def _judged(self, verdict: Verdict) -> None:
        scoring = self._scoring.pop(verdict.lease_id)
        if verdict.error:
            log.warning("scoring group %s failed: %s", verdict.lease_id, verdict.error)
        self._health.note(verdict.error, verdict.seconds)
        self.counters.update(self._health.counters)
        if verdict.scores is None:
            self._fail(verdict.lease_id, "reward_contract" if verdict.contract else "reward_lost")
            return
        group = Group(
            lease=scoring.lease,
            prompt_token_ids=scoring.sampled.prompt_token_ids,
            completions=Completions.of(scoring.sampled.completions),
            rewards=verdict.scores.rewards,
            reward_parts=verdict.scores.parts,
            actor=self._name,
            timings={"generate": scoring.generate_seconds, "judge": verdict.seconds},
        )
        self._outbox.append(group)
        if group.lease.purpose == "train":
            self._observe("completion/tokens", group.completions.lengths)
            self._observe("completion/reward", group.rewards.tolist())
            self._observe("group/generate_seconds", [group.timings["generate"]])
            self._observe("group/judge_seconds", [group.timings["judge"]])
