"""A buffer that is killed at any moment loses nothing, and what goes wrong is noticed."""

from __future__ import annotations

import sqlite3
import tempfile
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import make_group, make_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_buffer import BLOCKS, SCHEDULES, Simulation, Talk, config_of, trained_packet

from asyncgrpo.buffer import ledger as ledger_module
from asyncgrpo.buffer.audit import audit
from asyncgrpo.buffer.core import BufferCore
from asyncgrpo.buffer.ledger import FILE, Ledger, LedgerReader
from asyncgrpo.buffer.server import send
from asyncgrpo.data.prompts import PromptSource
from asyncgrpo.data.streams import EpochStream
from asyncgrpo.errors import BadInput, LedgerError
from asyncgrpo.rundir import Endpoints, RunDir
from asyncgrpo.staleness import bound_of
from asyncgrpo.types import Completions
from asyncgrpo.wire.codec import Packet, group_packet, groups_from, lease_from, shard_from

SHARED_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
NUM_PROMPTS = 9
EPOCHS = {"data": {"train": "prompts.jsonl", "epochs": 2}, "run": {"max_steps": 1000}}


def same_groups(first, second):
    assert [g.lease.lease_id for g in first] == [g.lease.lease_id for g in second]
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a.completions, b.completions, strict=True):
            assert np.array_equal(x.token_ids, y.token_ids)
            assert np.array_equal(x.behavior_logprobs, y.behavior_logprobs)
            assert np.array_equal(x.versions, y.versions)
        assert np.array_equal(a.rewards, b.rewards)
        assert a.lease == b.lease


class Killed(Simulation):
    """The buffer is killed at random moments: before a commit, before sending, halfway through.

    The learner is killed, too, and begins at its newest checkpoint.
    Everybody repeats what is unanswered, as DealerClient does; actors say hello as ActorLoop does.
    """

    def __init__(self, seed, folder, *, kill_share=0.012, **rooms):
        self.folder, self.kill_share = Path(folder), kill_share
        self.ledger, self.num_kills, self.now = None, 0, 0.0
        self.unanswered: dict[str, dict[int, Packet]] = {}
        self.known_life: dict[str, int] = {}
        self.mail: deque = deque()
        self.acknowledged: dict[str, str] = {}  # lease -> what the buffer said
        self.seen: dict[tuple[int, int], object] = {}  # the first shard of each step and rank
        self.rewind = lambda step: None
        self.num_rollbacks = 0
        super().__init__(seed, **rooms)

    def new_core(self):
        if self.ledger is not None:
            self.ledger.close()  # what is not committed is lost
        self.ledger = Ledger(self.folder, lambda: self.now)
        numbered = [make_prompt(i) for i in range(NUM_PROMPTS)]
        stream = EpochStream(numbered, epochs=self.config.data.epochs, seed=3)
        prompts = PromptSource(stream, {})
        return BufferCore(
            self.config, prompts, self.record, self.ledger, self.now, lambda step: self.rewind(step)
        )

    def restart_learner(self, step):
        """Another life of both ranks, which begin at a step."""
        self.num_rollbacks += step < self.core.step
        for rank in (0, 1):
            self.unanswered.pop(f"learner-{rank}", None)
        self.shards, self.take_asked = {}, set()
        self.covered = self.published = step
        for rank in (0, 1):
            self.send(f"learner-{rank}", "begin", step=step)
        assert self.core.step == step

    def record(self, step, ended):
        """What was killed between its record and the commit comes again as it was."""
        groups = [each.group for each in ended if each.status == "trained"]
        if groups and step in self.trained:
            same_groups(self.trained[step], groups)
        if groups:
            self.trained[step] = groups

    def post(self, peer, packet):
        self.ids[peer] += 1
        numbered = replace(packet, request_id=self.ids[peer])
        self.unanswered.setdefault(peer, {})[self.ids[peer]] = numbered
        self.mail.append((peer, numbered))
        while self.mail:
            peer, numbered = self.mail.popleft()
            if numbered.request_id in self.unanswered.get(peer, {}):
                self.deliver(peer, numbered)
        self.check()

    def deliver(self, peer, packet):
        replies = self.core.handle(peer, packet, self.now)
        fate = self.random.random() / self.kill_share
        if fate < 1:
            return self.kill()
        self.ledger.commit()
        if fate < 2:
            return self.kill()
        for number, (receiver, answer) in enumerate(replies):
            if fate < 3 and number >= len(replies) // 2:
                return self.kill()
            assert answer.kind != "refused", answer.fields
            if self.unanswered.get(receiver, {}).pop(answer.request_id, None) is not None:
                self.arrive(receiver, answer)
        return None

    def kill(self):
        self.num_kills += 1
        self.core = self.new_core()
        self.mail.extend(
            (p, packet) for p, sent in self.unanswered.items() for packet in sent.values()
        )

    def arrive(self, peer, packet):
        if packet.kind == "introduce":
            self.asked.discard(peer)
            if self.known_life.get(peer) != packet.fields["life"]:
                self.known_life[peer] = packet.fields["life"]
                self.hello(peer)
        elif packet.kind == "stored":
            self.acknowledged.setdefault(packet.fields["lease_id"], packet.fields["state"])
        elif packet.kind == "shard":
            super().arrive(peer, packet)
            step, rank = packet.fields["step"], int(peer[-1])
            shard = self.shards[step][rank]
            same_groups(self.seen.setdefault((step, rank), shard).groups, shard.groups)
        else:
            super().arrive(peer, packet)

    def hello(self, peer):
        actor = peer.rpartition(".")[0]
        at_work = [lease.lease_id for lease in self.work.get(peer, ())]
        sent = [
            groups_from(packet)[0].lease.lease_id
            for packet in self.unanswered[peer].values()
            if packet.kind == "put"
        ]
        self.ids[peer] += 1
        fields = {"actor": actor, "version": self.held[actor], "leases": at_work + sent}
        packet = Packet(kind="hello", request_id=self.ids[peer], fields=fields)
        self.unanswered[peer][packet.request_id] = packet
        self.mail.append((peer, packet))

    def act(self):
        for peer in list(self.unanswered):
            if peer.startswith("actor") and peer != self.peer(peer.rpartition(".")[0]):
                del self.unanswered[peer]  # killed: it repeats nothing
        if self.random.random() < 3 * self.kill_share:
            self.restart_learner(self.random.randint(self.covered, self.core.step))
        elif self.random.random() < 0.05:
            self.covered = self.random.randint(self.covered, self.core.step)
        super().act()

    def audited(self):
        endpoints = Endpoints(buffer="", weights="", store=("", 0))
        return audit(RunDir(path=self.folder, config=self.config, endpoints=endpoints))


def check_killed_run(seed, rooms, folder):
    buffer = {"groups_per_step": 2, **rooms.get("buffer", {})}  # small: many in little time
    if "tokens_per_step" in buffer:
        buffer["tokens_per_step"] = min(20, buffer["tokens_per_step"])
    if "data" not in rooms:  # else until they are used up
        rooms = {**rooms, "run": {"max_steps": 4 if "weights" in rooms else 3}}
    rooms = {"observe": {"trajectories": False}, **rooms, "buffer": buffer}
    run = Killed(seed, folder, **rooms)
    run.run()
    bound, action = run.config.buffer.max_staleness, run.config.buffer.staleness_action
    used = Counter(g.lease.lease_id for groups in run.trained.values() for g in groups)
    assert set(used.values()) == {1}
    for step, groups in run.trained.items():
        oldest = [step - int(c.versions.min()) for g in groups for c in g.completions]
        newest = [step - int(c.versions.max()) for g in groups for c in g.completions]
        assert (min(newest) if action == "mask" else max(oldest)) <= bound_of(bound, action)
    assert sorted(run.trained) == list(range(run.core.step))
    found = run.audited()
    assert not any(found.wrong.values()), found.wrong
    assert len(found.rollbacks) == run.num_rollbacks
    reader = LedgerReader(run.folder)
    rows = reader.query("SELECT lease_id, state, epoch, prompt_id FROM leases")[1]
    kept = reader.query("SELECT DISTINCT state FROM payloads LEFT JOIN leases USING (ticket)")[1]
    assert {state for (state,) in kept} <= {"stored", "taken", "trained"}
    states = {lease_id: state for lease_id, state, *_ in rows}
    for lease_id, said in run.acknowledged.items():
        if said == "stored":
            assert states[lease_id] in ("stored", "taken", "trained", "evicted")
        elif said == "filtered":
            assert states[lease_id] == "filtered"
    assert {lease for lease, state in states.items() if state == "trained"} == set(used)
    if run.is_over:  # the data is used up: each prompt brought one group in each epoch
        ended = Counter(
            row[2:] for row in rows if row[1] in ("trained", "filtered", "evicted", "stored")
        )
        prompts = [f"p{i}" for i in range(NUM_PROMPTS)]
        assert ended == Counter((epoch, prompt) for epoch in (0, 1) for prompt in prompts)
    run.ledger.close()
    return run


@pytest.mark.parametrize("name", [*SCHEDULES, "two_epochs"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_buffer_killed_at_random_moments_loses_nothing_and_trains_nothing_twice(name, seed):
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder:
        check_killed_run(seed, SCHEDULES.get(name, EPOCHS), folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SCHEDULES, "two_epochs"])
def test_ten_thousand_schedules_with_kills(name):
    kills = rollbacks = 0
    for seed in range(10_000 // (len(SCHEDULES) + 1)):
        with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder:
            run = check_killed_run(seed, SCHEDULES.get(name, EPOCHS), folder)
        kills, rollbacks = kills + run.num_kills, rollbacks + run.num_rollbacks
    assert kills > 500
    assert rollbacks > 50


# -- restart ------------------------------------------------------------------------------------


class Peer(Talk):
    """Talk to a core whose ledger is committed after each packet."""

    def __init__(self, folder, **rooms):
        super().__init__(**rooms)
        self.folder, self.ledger = folder, None
        self.restart()

    def restart(self, now=0.0):
        if self.ledger is not None:
            self.ledger.close()
        self.ledger = Ledger(self.folder)
        record = lambda step, ended: None  # noqa: E731
        self.core = BufferCore(self.config, self.prompts, record, self.ledger, now)

    def tell(self, peer, packet, now=0.0):
        answers = super().tell(peer, packet, now)
        self.ledger.commit()
        return answers


@pytest.fixture
def peer(tmp_path):
    opened = Peer(tmp_path)
    opened.ask("actor-0.7", "hello", actor="actor-0")
    yield opened
    opened.ledger.close()


def states(peer):
    rows = LedgerReader(peer.folder).query("SELECT lease_id, state, reason FROM leases")[1]
    return {lease: (state, reason) if reason else state for lease, state, reason in rows}


def test_an_actor_unknown_to_this_life_is_asked_to_say_hello_and_keeps_what_it_holds(peer):
    first, second, third = peer.lease("actor-0.7", 3)
    peer.restart()
    (answer,) = peer.ask("actor-0.7", "lease", version=0, max=1)
    assert (answer.kind, answer.fields) == ("introduce", {"life": 2})
    holds = [first.lease_id, second.lease_id]  # the third was lost on the way
    (welcome,) = peer.ask("actor-0.7", "hello", actor="actor-0", version=0, leases=holds)
    assert welcome.fields == {"credit": 8, "life": 2}
    assert states(peer) == {"t1": "open", "t2": "open", "t3": ("expired", "undelivered")}
    before = peer.core.metrics()
    peer.restart()
    assert peer.core.metrics() == before
    assert before["groups_expired_undelivered"] == 1
    peer.ask("actor-0.7", "hello", actor="actor-0", version=0, leases=holds)
    (again,) = peer.lease("actor-0.7", 1)
    assert (again.lease_id, again.prompt) == ("t4", third.prompt)
    (stored,) = peer.tell("actor-0.7", group_packet("put", [make_group(first)]))
    assert stored.fields["state"] == "stored"


def test_leases_of_an_actor_that_was_restarted_meanwhile_go_to_its_next_life(peer):
    leases = peer.lease("actor-0.7", 2)
    peer.restart()
    peer.ask("actor-0.8", "hello", actor="actor-0", version=-1, leases=[])
    assert set(states(peer).values()) == {("expired", "actor_restarted")}
    again = peer.lease("actor-0.8", 2)
    assert [lease.prompt for lease in again] == [lease.prompt for lease in leases]


def test_a_lease_request_of_before_the_restart_is_served_for_the_version_held_now(peer):
    assert len(peer.lease("actor-0.7", 12)) == 12  # all that the gate lets start under version 0
    peer.restart()
    held = [f"t{i + 1}" for i in range(12)]
    peer.ask("actor-0.7", "hello", actor="actor-0", version=1, leases=held)
    (late,) = peer.ask("actor-0.7", "lease", version=0, max=9)
    assert [lease_from(packed).version for packed in late.fields["leases"]] == [1] * 4


def test_open_leases_get_a_new_deadline_and_a_late_group_is_measured(peer):
    (lease,) = peer.lease("actor-0.7", 1)
    peer.restart(now=1e6)
    peer.core.tick(1e6 + lease.deadline_seconds - 1)
    assert peer.core.leases.counts["open"] == 1
    peer.core.tick(1e6 + lease.deadline_seconds)
    (late,) = peer.tell("actor-0.7", group_packet("put", [make_group(lease)]), 2e6)
    assert late.fields["state"] == "unknown"
    peer.tell("actor-0.7", group_packet("put", [make_group(lease, versions=[[0], [0]])]), 2e6)
    sql = "SELECT state, num_completions, num_tokens FROM leases"
    assert LedgerReader(peer.folder).query(sql)[1] == [("expired", 2, 5)]
    peer.restart()
    assert peer.core.metrics()["tokens_arrived"] == 0


def test_waiting_groups_keep_the_order_in_which_they_came(peer):
    leases = peer.lease("actor-0.7", 6)
    for number in (5, 2, 4, 0, 3, 1):
        peer.tell("actor-0.7", group_packet("put", [make_group(leases[number])]))
    peer.restart()
    (answer,) = peer.ask("learner-0", "take", step=0, rank=0, world_size=1)
    taken = [group.lease.lease_id for group in shard_from(answer).groups]
    assert taken == [leases[number].lease_id for number in (5, 2, 4, 0)]


def train(peer, step, covered=0):
    """One step in which the buffer is killed between the batch and its end."""
    for lease in peer.lease("actor-0.7", 4):
        peer.tell("actor-0.7", group_packet("put", [make_group(lease)]))
    take = {"step": step, "rank": 0, "world_size": 1}
    (answer,) = peer.ask("learner-0", "take", **take)
    peer.restart()
    peer.ask("actor-0.7", "hello", actor="actor-0", version=step, leases=[])
    (again,) = peer.ask("learner-0", "take", **take)
    same_groups(shard_from(answer).groups, shard_from(again).groups)
    told = trained_packet(step, shard_from(again).groups, world_size=1, covered=covered)
    first, second = (peer.tell("learner-0", replace(told, request_id=1))[0] for _ in range(2))
    assert first.fields["metrics"] == second.fields["metrics"]
    peer.ask("actor-0.7", "held", version=step + 1)
    return first.fields["metrics"]


def test_batches_counters_and_numbers_go_on_and_covered_groups_are_let_go(peer):
    peer.config = config_of()
    for step in range(8):
        metrics = train(peer, step, covered=4 if step > 5 else 0)
        assert metrics["leases"] == metrics["leases_trained"] == 4 * (step + 1)
        assert metrics["groups_arrived"] == 4 * (step + 1)
        assert metrics["tokens_arrived"] == 20 * (step + 1)
    reader = LedgerReader(peer.folder)
    kept = reader.query("SELECT DISTINCT step FROM payloads JOIN leases USING (ticket)")[1]
    assert [step for (step,) in kept] == list(range(4, 8))
    lives = reader.query("SELECT life, count(*) FROM leases GROUP BY life")[1]
    assert lives == [(life, 4) for life in range(1, 9)]


def leases(peer) -> dict[str, float]:
    """Counts that a restart does not change; what actors hold is known when they say hello."""
    return {n: v for n, v in peer.core.metrics().items() if n.startswith(("leases", "groups"))}


def test_a_learner_that_begins_at_its_checkpoint_gets_the_same_batches_again(peer):
    for step in range(5):
        train(peer, step, covered=2 * (step == 4))
    before = leases(peer)
    taken = {}
    (noted,) = peer.ask("learner-0", "begin", step=2)
    assert noted.kind == "noted"
    after = peer.core.metrics()
    assert (after["leases_trained"], after["leases_taken"], after["leases"]) == (8, 12, 20)
    ended = "SELECT count(*) FROM leases WHERE ended_at IS NOT NULL"
    assert LedgerReader(peer.folder).query(ended)[1] == [(8,)]
    for step in (2, 3, 4):
        peer.restart()
        (answer,) = peer.ask("learner-0", "take", step=step, rank=0, world_size=1)
        taken[step] = shard_from(answer).groups
        early = trained_packet(4, taken[step], world_size=1)
        if step < 4:  # of a learner that is gone
            peer.tell("learner-0", early)
        assert peer.core.step == step
        peer.tell("learner-0", trained_packet(step, taken[step], world_size=1, covered=2))
    sql = "SELECT step, lease_id FROM leases ORDER BY ticket"
    rows = LedgerReader(peer.folder).query(sql)[1]
    assert [(step, g.lease.lease_id) for step in taken for g in taken[step]] == rows[8:]
    assert leases(peer) == before
    noted = "SELECT step, count(*) FROM changes WHERE state = 'returned' GROUP BY step"
    assert LedgerReader(peer.folder).query(noted)[1] == [(2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (1, "begins at step 1, but the groups of step 1 are gone: a newer checkpoint covered them"),
        (4, "begins at step 4, but the buffer knows of 3 trained steps: ledger.sqlite is missing"),
        (-1, "begin: step: Input should be greater than or equal to 0, not -1"),
    ],
)
def test_a_learner_that_begins_where_it_cannot_is_told_so_and_nothing_changes(step, why, peer):
    for each in range(3):
        train(peer, each, covered=2 * (each == 2))
    before = peer.core.metrics()
    (answer,) = peer.ask("learner-0", "begin", step=step)
    assert answer.kind == "refused"
    assert why in answer.fields["reason"]
    assert (peer.core.metrics(), peer.core.step) == (before, 3)


def test_evaluations_of_policies_that_were_rolled_back_are_made_again(peer):
    def evaluate(version):
        fields = {"version": version, "blocks": ["held-out"]}
        packet = Packet(kind="evaluate", request_id=2, fields=fields)
        return [p for to, p in peer.core.handle("learner-0", packet, 0.0) if to == "actor-0.7"]

    def answer(push, score):
        for lease in map(lease_from, push.fields["leases"]):
            group = make_group(lease, versions=[[lease.version]], scores=[score])
            peer.tell("actor-0.7", group_packet("put", [group]))

    def results():
        (found,) = peer.ask("learner-0", "results")
        return {r["version"]: r["accuracy"] for r in found.fields["reports"]}

    answer(*evaluate(0), 1.0)
    train(peer, 0)
    answer(*evaluate(1), 1.0)
    (unanswered,) = evaluate(2)
    assert peer.ask("learner-0", "begin", step=0)[0].kind == "noted"
    assert results() == {0: 1.0}
    answer(unanswered, 1.0)  # comes too late
    peer.restart()
    peer.ask("actor-0.7", "hello", actor="actor-0")
    assert evaluate(0) == []
    (push,) = evaluate(1)
    again = {lease_from(packed).lease_id for packed in push.fields["leases"]}
    assert not again & {f"e{i}" for i in range(20)}
    answer(push, -1.0)
    assert results() == {0: 1.0, 1: 0.0}


def test_a_finished_block_is_remembered_and_an_unfinished_one_begins_anew(tmp_path):
    peer = Peer(tmp_path, eval=BLOCKS)

    def evaluate(version):
        fields = {"version": version, "blocks": ["greedy", "sampled"]}
        packet = Packet(kind="evaluate", request_id=2, fields=fields)
        ((_, pushed),) = peer.core.handle("learner-0", packet, 0.0)
        return pushed

    def answer(pushed, *blocks):
        for lease in map(lease_from, pushed.fields["leases"]):
            if lease.block in blocks:
                spans = [[lease.version]] * lease.group_size
                group = make_group(lease, versions=spans, scores=[1.0] * lease.group_size)
                peer.tell("actor-0.7", group_packet("put", [group]))

    peer.ask("actor-0.7", "hello", actor="actor-0")
    answer(evaluate(0), "greedy", "sampled")
    answer(evaluate(1), "greedy")
    peer.ledger.commit()
    peer.restart()
    assert peer.ask("learner-0", "results") == []
    welcome, pushed = peer.ask("actor-0.7", "hello", actor="actor-0", version=1)
    assert (welcome.kind, pushed.kind) == ("welcome", "evaluate")
    leases = [lease_from(fields) for fields in pushed.fields["leases"]]
    assert {(lease.block, lease.version) for lease in leases} == {("sampled", 1)}
    assert not {lease.lease_id for lease in leases} & {f"e{i}" for i in range(15)}
    answer(pushed, "sampled")
    (answered,) = peer.ask("learner-0", "results")
    found = [(r["version"], r["name"], r["num_answered"]) for r in answered.fields["reports"]]
    every = [(0, "greedy", 3), (0, "sampled", 4), (1, "greedy", 3), (1, "sampled", 4)]
    assert sorted(found) == every
    (noted,) = peer.ask("learner-0", "summary")
    told = [(r["version"], r["name"], r["num_answered"]) for r in noted.fields["evaluations"]]
    assert sorted(told) == every
    peer.ledger.close()


def test_an_evaluation_waits_for_the_first_actor(tmp_path):
    peer = Peer(tmp_path)
    assert peer.ask("learner-0", "evaluate", version=0, blocks=["held-out"]) == []
    assert peer.ask("learner-0", "results") == []
    assert peer.ask("actor-0.1", "hello", actor="actor-0")[1].kind == "evaluate"
    peer.ledger.close()


def test_nothing_is_sent_before_it_is_committed():
    events = []

    class Recording:
        def commit(self):
            events.append("commit")

        def answer(self, peer, packet):
            events.append(packet.kind)
            return peer != "gone.1"

        push = answer

        def lost(self, peer, now):
            return [("there.1", Packet(kind="leases", request_id=3))]

    recording = Recording()
    replies = [("gone.1", Packet(kind="noted", request_id=1)), ("b.1", Packet(kind="evaluate"))]
    send(recording, recording, recording, replies)
    assert events == ["commit", "noted", "commit", "leases", "evaluate"]


# -- what can go wrong --------------------------------------------------------------------------


def test_books_that_do_not_balance_stop_the_buffer_with_both_sides(peer):
    peer.core.leases.check(stored=0, taken=0)
    peer.lease("actor-0.7", 3)
    with pytest.raises(LedgerError, match=r"3 leased = 3 open \+ 0 stored .*'stored': 1"):
        peer.core.leases.check(stored=1, taken=0)
    peer.ledger._db.execute("UPDATE leases SET state = 'failed' WHERE ticket = 1")
    with pytest.raises(LedgerError, match=r"ledger notes \{'open': 2, 'stored': 0, 'taken': 0"):
        peer.core.leases.check(stored=0, taken=0)


def test_a_group_that_vanished_is_noticed_at_the_next_step(peer):
    for lease in peer.lease("actor-0.7", 5):
        peer.tell("actor-0.7", group_packet("put", [make_group(lease)]))
    (answer,) = peer.ask("learner-0", "take", step=0, rank=0, world_size=1)
    peer.core.replay._stored.popitem()
    with pytest.raises(LedgerError, match=r"5 leased = 0 open \+ 1 stored .*'stored': 0"):
        peer.tell("learner-0", trained_packet(0, shard_from(answer).groups, world_size=1))


def test_a_full_disk_stops_the_buffer_and_what_was_committed_is_there_afterwards(peer):
    leases = peer.lease("actor-0.7", 3)
    peer.tell("actor-0.7", group_packet("put", [make_group(leases[0])]))
    pages = peer.ledger._db.execute("PRAGMA page_count").fetchone()[0]
    peer.ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    group = make_group(leases[1])
    talkative = Completions.of([replace(c, text="7" * 90_000) for c in group.completions])
    with pytest.raises(LedgerError, match=r"ledger.sqlite: database or disk is full; free space"):
        peer.tell("actor-0.7", group_packet("put", [replace(group, completions=talkative)]))
    peer.restart()
    assert states(peer) == {"t1": "stored", "t2": "open", "t3": "open"}
    assert len(peer.core.replay) == 1


def test_a_second_writer_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "BUSY_SECONDS", 0.05)
    first = Ledger(tmp_path)
    with pytest.raises(LedgerError, match=r"database is locked; another process writes it"):
        Ledger(tmp_path)
    first.close()


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    (tmp_path / FILE).write_bytes(b"garbage " * 1000)
    with pytest.raises(LedgerError, match=r"ledger.sqlite: file is not a database; it is damaged"):
        Ledger(tmp_path)


def test_a_ledger_of_another_release_is_bad_input_with_which_nothing_is_started_again(tmp_path):
    Ledger(tmp_path).close()
    database = sqlite3.connect(tmp_path / FILE)
    database.execute("PRAGMA user_version = 99")
    database.close()
    for open_ledger in (Ledger, LedgerReader):
        with pytest.raises(BadInput, match=r"tables of version 99, not 4"):
            open_ledger(tmp_path)


def test_data_that_changed_under_a_run_is_noticed_when_the_buffer_restarts(peer):
    peer.lease("actor-0.7", 2)
    peer.prompts = PromptSource(EpochStream([make_prompt(i) for i in range(50, 60)]), {})
    with pytest.raises(LedgerError, match=r"position 0 of data.train was prompt 'p0' and is 'p5"):
        peer.restart()
