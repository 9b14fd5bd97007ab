"""The buffer's promises: bounded staleness, every lease in one state, nothing trained twice."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from fakes import CountingPrompts, make_group, make_lease
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncgrpo.buffer.core import BufferCore
from asyncgrpo.buffer.gate import Gate
from asyncgrpo.buffer.leases import STATES, lease_seed
from asyncgrpo.buffer.replay import Replay, deal
from asyncgrpo.buffer.staleness import past_bound
from asyncgrpo.config import from_mapping
from asyncgrpo.errors import ConfigError
from asyncgrpo.wire.codec import Packet, group_packet, groups_from, lease_from, shard_from


def gate(**changes):
    values = {"groups_per_step": 4, "max_staleness": 2, "max_steps": 100, "publish_every": 1}
    return Gate(**{**values, **changes})


def config_of(**rooms):
    base = {
        "buffer": {"groups_per_step": 4, "max_staleness": 2},
        "algo": {"group_size": 2},
        "launch": {"learners": 2},
        "run": {"max_steps": 12},
        "eval": {"num_prompts": 5},
    }
    for room, values in rooms.items():
        base[room] = {**base.get(room, {}), **values}
    return from_mapping(base)


# -- gate ---------------------------------------------------------------------------------------


def test_the_gate_lets_s_plus_one_steps_of_work_start_under_the_first_version():
    assert gate().open_for(0) == (2 + 0 + 1) * 4


def test_each_new_version_opens_the_gate_for_one_more_step():
    passed = gate()
    for _ in range(12):
        passed.issue(0)
    assert passed.open_for(0) == 0
    assert passed.open_for(1) == 4


def test_a_returned_ticket_can_be_given_again():
    full = gate(max_staleness=0)
    for _ in range(4):
        full.issue(0)
    full.give_back()
    assert full.open_for(0) == 1


def test_no_ticket_is_given_for_steps_after_the_last():
    assert gate(max_steps=1).open_for(50) == 4


def test_a_publish_interval_that_would_deadlock_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="publish_every=4 must be <= max_staleness"):
        gate(publish_every=4)


# -- staleness ----------------------------------------------------------------------------------


def test_drop_looks_at_the_oldest_token_and_mask_at_the_newest():
    group = make_group(make_lease(), versions=[[1, 1, 5], [4, 4]])
    assert past_bound(group, step=4, max_staleness=2, action="drop")
    assert not past_bound(group, step=4, max_staleness=2, action="mask")
    assert not past_bound(group, step=3, max_staleness=2, action="drop")
    assert past_bound(group, step=8, max_staleness=2, action="mask")


# -- replay -------------------------------------------------------------------------------------


def test_arrival_order_takes_the_oldest_version_first():
    replay = Replay("arrival")
    for ticket, version in ((1, 3), (2, 1), (3, 2), (4, 1)):
        replay.add(ticket, make_group(make_lease(ticket), versions=[[version], [version]]))
    assert [stored.ticket for stored in replay.take(3)] == [2, 4, 3]
    assert len(replay) == 1


def test_ticket_order_waits_for_earlier_open_work():
    replay = Replay("ticket")
    for ticket in (2, 3, 5):
        replay.add(ticket, make_group(make_lease(ticket)))
    assert not replay.ready(2, open_tickets=[1, 4])
    assert replay.ready(2, open_tickets=[4])
    assert [stored.ticket for stored in replay.take(2)] == [2, 3]


@given(st.lists(st.integers(1, 30), min_size=4, max_size=24), st.integers(1, 4))
def test_dealing_loses_nothing_and_balances_tokens(lengths, world_size):
    groups = [make_group(make_lease(i), versions=[[0] * n, [0] * n]) for i, n in enumerate(lengths)]
    hands = deal(groups, world_size)
    assert sorted(g.lease.lease_id for hand in hands for g in hand) == sorted(
        g.lease.lease_id for g in groups
    )
    assert all(hands)
    loads = [sum(g.num_tokens + 8 for g in hand) for hand in hands]
    assert max(loads) - min(loads) <= 2 * max(lengths) + 8


def test_seeds_of_leases_differ_and_repeat():
    seeds = {lease_seed(1, f"t{i}") for i in range(1000)}
    assert len(seeds) == 1000
    assert lease_seed(1, "t5") == lease_seed(1, "t5") != lease_seed(2, "t5")


# -- the whole core -----------------------------------------------------------------------------


class Simulation:
    """Actors and two learner ranks against a real core, scheduled by a seeded random choice."""

    def __init__(self, seed, *, uniform_share=0.3, **rooms):
        self.random = random.Random(seed)
        self.config = config_of(**rooms)
        self.trained: dict[int, list] = {}
        self.core = self.new_core()
        self.now = 0.0
        self.ids = Counter()
        self.lives = {f"actor-{i}": 0 for i in range(3)}
        self.held = dict.fromkeys(self.lives, 0)
        self.work: dict[str, list] = {}
        self.asked: set[str] = set()
        self.published = 0
        self.shards: dict[int, dict[int, object]] = {}
        self.take_asked: set[tuple[int, int]] = set()
        self.uniform_share = uniform_share
        self.is_over = False
        for actor in self.lives:
            self.send(self.peer(actor), "hello", actor=actor)

    def new_core(self):
        return BufferCore(self.config, CountingPrompts(), self.record)

    def record(self, step, groups):
        assert step not in self.trained, "a step was recorded twice"
        self.trained[step] = list(groups)

    def peer(self, actor):
        return f"{actor}.{self.lives[actor]}"

    def send(self, peer, kind, **fields):
        self.post(peer, Packet(kind=kind, fields=fields))

    def post(self, peer, packet):
        self.ids[peer] += 1
        numbered = Packet(
            kind=packet.kind,
            request_id=self.ids[peer],
            fields=packet.fields,
            arrays=packet.arrays,
        )
        for receiver, answer in self.core.handle(peer, numbered, self.now):
            assert answer.kind != "refused", answer.fields
            self.arrive(receiver, answer)
        self.check()

    def arrive(self, peer, packet):
        if packet.kind == "leases":
            self.asked.discard(peer)
            self.work.setdefault(peer, []).extend(lease_from(f) for f in packet.fields["leases"])
        elif packet.kind == "shard":
            rank = int(peer[-1])
            shard = shard_from(packet)
            self.shards.setdefault(shard.step, {})[rank] = shard

        elif packet.kind == "exhausted":
            self.is_over = True

    def check(self):
        counts = self.core.leases.counts
        assert all(counts[state] >= 0 for state in STATES)
        live = counts["open"] + counts["stored"] + counts["taken"] + counts["trained"]
        assert self.core.gate.issued == live
        assert counts["stored"] == len(self.core.replay)
        assert counts["open"] == len(self.core.leases.open_tickets())

    def act(self):
        self.now += self.random.random()
        choice = self.random.random()
        actor = self.random.choice(sorted(self.lives))
        peer = self.peer(actor)
        if choice < 0.02:
            self.lives[actor] += 1  # kill -9 and restart
            self.held[actor] = self.published
            self.send(self.peer(actor), "hello", actor=actor)
        elif choice < 0.10:
            self.held[actor] = self.published
            self.send(peer, "held", version=self.published)
        elif choice < 0.45 and peer not in self.asked:
            self.asked.add(peer)
            self.send(peer, "lease", version=self.held[actor], max=self.random.randint(1, 6))
        elif choice < 0.85 and self.work.get(peer):
            self.finish(actor, peer)
        else:
            self.learn()

    def finish(self, actor, peer):
        lease = self.work[peer].pop(self.random.randrange(len(self.work[peer])))
        if self.random.random() < 0.05:
            self.send(peer, "fail", lease_id=lease.lease_id, reason="reward_lost", retry=True)
            return
        newest = max(lease.version, self.held[actor])
        spans = [sorted(self.random.choices([lease.version, newest], k=3)) for _ in range(2)]
        uniform = self.random.random() < self.uniform_share
        scores = [1.0, 1.0] if uniform else [1.0, -1.0]
        group = make_group(lease, versions=spans, scores=scores, actor=actor)
        self.post(peer, group_packet("put", [group]))
        if self.random.random() < 0.2:
            self.post(peer, group_packet("put", [group]))  # the answer was lost

    def learn(self):
        step = self.core.step
        for rank in (0, 1):
            if (step, rank) not in self.take_asked:
                self.take_asked.add((step, rank))
                self.send(f"learner-{rank}", "take", step=step, rank=rank, world_size=2)
        shards = self.shards.get(step, {})
        if len(shards) == 2:
            before = [g.lease.lease_id for g in shards[0].groups]
            self.send("learner-0", "take", step=step, rank=0, world_size=2)
            assert [g.lease.lease_id for g in self.shards[step][0].groups] == before
            self.send("learner-0", "trained", step=step)
            if (step + 1) % self.config.weights.publish_every == 0:
                self.published = step + 1

    def run(self, max_actions=40_000):
        for _ in range(max_actions):
            if self.is_over or self.core.step >= self.config.run.max_steps:
                return
            self.act()
        raise AssertionError(f"stuck at step {self.core.step}: {self.core.metrics()}")


SCHEDULES = {
    "arrival": {},
    "ticket": {"buffer": {"order": "ticket"}},
    "mask": {"buffer": {"staleness_action": "mask"}},
    "on_policy": {"buffer": {"max_staleness": 0}},
    "rare_publish": {"weights": {"publish_every": 3}},
}


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_schedule_ends_with_every_bound_kept(name, seed):
    run = Simulation(seed, **SCHEDULES[name])
    run.run()
    bound, action = run.config.buffer.max_staleness, run.config.buffer.staleness_action
    used = Counter()
    for step, groups in run.trained.items():
        assert len(groups) == run.config.buffer.groups_per_step
        for group in groups:
            used[group.lease.lease_id] += 1
            oldest = [step - int(c.versions.min()) for c in group.completions]
            newest = [step - int(c.versions.max()) for c in group.completions]
            assert (max(oldest) if action == "drop" else min(newest)) <= bound
    assert set(used.values()) == {1}
    assert sorted(run.trained) == list(range(run.config.run.max_steps))


def test_ticket_order_never_evicts():
    run = Simulation(7, buffer={"order": "ticket"})
    run.run()
    assert run.core.leases.counts["evicted"] == 0


def test_a_prompt_whose_actor_died_is_handed_out_again():
    core = BufferCore(config_of(), CountingPrompts(), lambda step, groups: None)

    def ask(peer, kind, **fields):
        return core.handle(peer, Packet(kind=kind, request_id=1, fields=fields), 0.0)

    ask("actor-0.1", "hello", actor="actor-0")
    (_, granted), *_ = ask("actor-0.1", "lease", version=0, max=2)
    lost = [lease_from(fields).prompt.prompt_id for fields in granted.fields["leases"]]
    ask("actor-0.2", "hello", actor="actor-0")
    (_, again), *_ = ask("actor-0.2", "lease", version=0, max=3)
    ids = [lease_from(fields).prompt.prompt_id for fields in again.fields["leases"]]
    assert ids == [*lost, "p2"]
    assert core.leases.reasons["expired/actor_restarted"] == 2


def test_work_given_to_a_lost_peer_goes_to_the_next_who_asks():
    core = BufferCore(config_of(), CountingPrompts(), lambda step, groups: None)
    for peer in ("a.1", "b.1"):
        core.handle(peer, Packet(kind="hello", fields={"actor": peer[0]}), 0.0)
        fields = {"version": 0, "max": 12}
        replies = core.handle(peer, Packet(kind="lease", request_id=1, fields=fields), 0.0)
    assert replies == []  # the first took all that the gate lets start
    ((peer, granted),) = core.lost("a.1", 1.0)
    assert (peer, granted.kind, len(granted.fields["leases"])) == ("b.1", "leases", 12)
    assert core.leases.reasons["expired/unreachable"] == 12


def test_a_lease_past_its_deadline_expires_and_a_late_group_is_not_stored():
    core = BufferCore(config_of(), CountingPrompts(), lambda step, groups: None)
    core.handle("a.1", Packet(kind="hello", request_id=1, fields={"actor": "a"}), 0.0)
    request = Packet(kind="lease", request_id=2, fields={"version": 0, "max": 1})
    (_, granted), *_ = core.handle("a.1", request, 0.0)
    lease = lease_from(granted.fields["leases"][0])
    core.tick(lease.deadline_seconds + 1)
    assert core.leases.counts["expired"] == 1
    packet = group_packet("put", [make_group(lease)])
    (_, answer), *_ = core.handle("a.1", packet, lease.deadline_seconds + 2)
    assert answer.fields["state"] == "unknown"
    assert len(core.replay) == 0


def test_finite_prompts_end_with_a_smaller_batch_and_then_exhausted():
    config = config_of(run={"max_steps": 50}, launch={"learners": 1})
    core = BufferCore(config, CountingPrompts(limit=6), lambda step, groups: None)

    def ask(peer, packet):
        return [answer for _, answer in core.handle(peer, packet, 0.0)]

    ask("a.1", Packet(kind="hello", request_id=1, fields={"actor": "a"}))
    (granted,) = ask("a.1", Packet(kind="lease", request_id=2, fields={"version": 0, "max": 9}))
    for i, fields in enumerate(granted.fields["leases"]):
        ask("a.1", group_packet("put", [make_group(lease_from(fields))], request=i))
    sizes = []
    for step in range(3):
        fields = {"step": step, "rank": 0, "world_size": 1}
        (answer,) = ask("learner-0", Packet(kind="take", request_id=9 + step, fields=fields))
        sizes.append(len(groups_from(answer)) if answer.kind == "shard" else answer.kind)
        if answer.kind == "shard":
            ask("learner-0", Packet(kind="trained", request_id=50, fields={"step": step}))
    assert sizes == [4, 2, "exhausted"]


def test_held_out_prompts_are_shared_among_actors_and_reported_once_answered():
    core = BufferCore(config_of(), CountingPrompts(), lambda step, groups: None)
    for i in (0, 1):
        fields = {"actor": f"actor-{i}"}
        core.handle(f"actor-{i}.1", Packet(kind="hello", request_id=1, fields=fields), 0.0)
    request = Packet(kind="evaluate", request_id=3, fields={"version": 7})
    pushed = core.handle("learner-0", request, 0.0)
    assert [peer for peer, _ in pushed] == ["actor-0.1", "actor-1.1"]
    replies = []
    for peer, packet in pushed:
        leases = [lease_from(fields) for fields in packet.fields["leases"]]
        assert all(lease.sampling.temperature == 0 and lease.version == 7 for lease in leases)
        accepted = {"lease_ids": [lease.lease_id for lease in leases], "refused": []}
        replies += core.handle(peer, Packet(kind="accept", request_id=5, fields=accepted), 0.0)
        for lease in leases:
            score = 1.0 if lease.prompt.columns["number"] % 2 else -1.0
            group = make_group(lease, versions=[[7, 7]], scores=[score])
            replies += core.handle(peer, group_packet("put", [group]), 0.0)
    assert [answer.kind for peer, answer in replies if peer == "learner-0"] == ["evaluating"]
    wanted = Packet(kind="results", request_id=9, fields={"version": 7})
    (_, report), *_ = core.handle("learner-0", wanted, 0.0)
    assert report.fields["accuracy"] == pytest.approx(2 / 5)
    assert report.fields["num_answered"] == 5
    assert core.leases.num_training_leases() == 0


def test_an_evaluation_whose_actor_dies_is_reported_with_what_was_answered():
    core = BufferCore(config_of(), CountingPrompts(), lambda step, groups: None)
    hello = {"actor": "actor-0"}
    core.handle("actor-0.1", Packet(kind="hello", request_id=1, fields=hello), 0.0)
    core.handle("learner-0", Packet(kind="evaluate", request_id=2, fields={"version": 1}), 0.0)
    core.handle("actor-0.2", Packet(kind="hello", request_id=1, fields=hello), 0.0)
    wanted = Packet(kind="results", request_id=3, fields={"version": 1})
    (_, report), *_ = core.handle("learner-0", wanted, 0.0)
    assert report.fields["num_answered"] == 0
    assert report.fields["num_prompts"] == 5


def test_a_request_that_makes_no_sense_is_refused_with_its_reason():
    core = BufferCore(config_of(), CountingPrompts(), lambda step, groups: None)
    (_, answer) = core.handle("x", Packet(kind="dance", request_id=1), 0.0)[0]
    assert (answer.kind, answer.fields["reason"]) == ("refused", "unknown kind 'dance'")
    (_, answer) = core.handle("x", Packet(kind="take", request_id=2), 0.0)[0]
    assert answer.kind == "refused"
    assert "step" in answer.fields["reason"]
