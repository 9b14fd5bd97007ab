"""The buffer's promises: bounded staleness, every lease in one state, nothing trained twice."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from fakes import CountingPrompts, make_group, make_lease
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncgrpo.buffer.core import BufferCore
from asyncgrpo.buffer.gate import Gate
from asyncgrpo.buffer.journal import Journal
from asyncgrpo.buffer.leases import STATES, LeaseBook, lease_seed
from asyncgrpo.buffer.queue import PromptQueue
from asyncgrpo.buffer.replay import Replay, deal, part_metrics
from asyncgrpo.config import from_mapping
from asyncgrpo.observe.metrics import metric_of
from asyncgrpo.staleness import past_bound
from asyncgrpo.wire.codec import Packet, group_packet, groups_from, lease_from, shard_from


def config_of(**rooms):
    base = {
        "buffer": {"groups_per_step": 4, "max_staleness": 2},
        "algo": {"group_size": 2},
        "launch": {"learners": 2},
        "run": {"max_steps": 12},
        "eval": {"num_prompts": 5},
    }
    for room, values in rooms.items():
        base[room] = values if isinstance(values, list) else {**base.get(room, {}), **values}
    return from_mapping(base)


# -- gate ---------------------------------------------------------------------------------------


def open_for(version, trained=0, **rooms):
    """Of a gate for batches of 4 groups and a bound of 2, with so many groups trained."""
    config = config_of(**rooms)
    return Gate(config).open_for(version, Counter(trained=trained), Replay(config), 0)


def test_the_gate_lets_s_plus_one_steps_of_work_start_under_the_first_version():
    assert open_for(0) == (2 + 0 + 1) * 4


def test_each_new_version_opens_the_gate_for_one_more_step():
    assert open_for(0, trained=12) == 0
    assert open_for(1, trained=12) == 4


def test_no_group_may_start_for_steps_after_the_last():
    assert open_for(50, run={"max_steps": 1}) == 4


def group_of(ticket, tokens):
    return make_group(make_lease(ticket), versions=[[0] * (tokens - 1), [0]])


def store_of(tokens=None, **buffer):
    """A store that learners of one rank and two minibatches take from."""
    rooms = {"launch": {"learners": 1}, "algo": {"group_size": 2, "minibatches": 2}}
    return Replay(config_of(buffer={"tokens_per_step": tokens, **buffer}, **rooms))


@given(st.lists(st.sampled_from(["issue", "arrive", "lose", "form"]), max_size=60))
def test_a_gate_that_counts_tokens_is_the_gate_of_groups_when_all_are_alike(events):
    """Six groups of ten tokens are sixty tokens: both gates let the same number start."""
    replay = store_of(60, groups_per_step=6)
    plain = Gate(config_of(buffer={"groups_per_step": 6}))
    in_tokens = Gate(replay._config)
    counts = Counter()
    ticket = version = 0
    for event in events:
        if event == "issue" and plain.open_for(version, counts, replay, version):
            counts["open"] += 1
        elif event == "arrive" and counts["open"]:
            counts.update(open=-1, stored=1)
            ticket += 1
            replay.add(ticket, group_of(ticket, 10))
        elif event == "lose" and counts["open"]:
            counts["open"] -= 1
        elif event == "form" and (formed := replay.form(version, [])):
            assert len(formed) == 6
            version += 1
            counts.update(stored=-6, taken=6)
        for asked in range(version + 1):
            both = [gate.open_for(asked, counts, replay, version) for gate in (plain, in_tokens)]
            assert both[0] == both[1]


def test_a_gate_that_counts_tokens_learns_how_long_groups_are():
    replay = store_of(80, groups_per_step=8, max_staleness=0)
    gate = Gate(replay._config)
    assert gate.open_for(0, Counter(), replay, 0) == 8  # the guess
    for ticket in range(4):
        replay.add(ticket, group_of(ticket, 40))
    assert len(replay.form(0, [])) == 2
    assert gate.open_for(0, Counter(stored=2, taken=2), replay, 1) == 0
    assert len(replay.form(1, [])) == 2
    # ceil(80 / mean), mean (80 + 160) / (8 + 4) = 20
    assert gate.open_for(2, Counter(taken=4), replay, 2) == 4


# -- staleness ----------------------------------------------------------------------------------


def test_drop_looks_at_the_oldest_token_and_mask_at_the_newest():
    group = make_group(make_lease(), versions=[[1, 1, 5], [4, 4]])
    assert past_bound(group, step=4, max_staleness=2, action="drop")
    assert not past_bound(group, step=4, max_staleness=2, action="mask")
    assert not past_bound(group, step=3, max_staleness=2, action="drop")
    assert past_bound(group, step=8, max_staleness=2, action="mask")


# -- replay -------------------------------------------------------------------------------------


def being_made(*tickets):
    """Open leases of these tickets."""
    book = LeaseBook(config_of(), Journal())
    for ticket in tickets:
        turn = PromptQueue(CountingPrompts()).next()
        book.issue(turn.prompt, peer="a.1", version=0, now=0.0, turn=turn, ticket=ticket)
    return book.being_made()


def formed(replay, step=0, open_tickets=(), **more):
    return [each.ticket for each in replay.form(step, being_made(*open_tickets), **more)]


def test_arrival_order_takes_the_oldest_version_first():
    replay = store_of(groups_per_step=3)
    for ticket, version in ((1, 3), (2, 1), (3, 2), (4, 1)):
        replay.add(ticket, make_group(make_lease(ticket), versions=[[version], [version]]))
    assert formed(replay, 3, open_tickets=[9]) == [2, 4, 3]
    assert len(replay) == 1


def test_ticket_order_waits_for_earlier_open_work():
    replay = store_of(groups_per_step=2, order="ticket")
    for ticket in (2, 3, 5):
        replay.add(ticket, make_group(make_lease(ticket)))
    assert formed(replay, open_tickets=[7, 1]) == []
    assert formed(replay, open_tickets=[4]) == [2, 3]


def test_a_group_is_at_most_a_window_ahead_of_earlier_work():
    replay = store_of(groups_per_step=2, order="window", window=3)
    for ticket in (4, 5, 6):
        replay.add(ticket, group_of(ticket, 5))
    assert formed(replay, open_tickets=[2]) == []
    assert formed(replay, open_tickets=[3]) == [4, 5]
    replay.add(7, group_of(7, 5))
    assert formed(replay, 1) == [6, 7]


@pytest.mark.parametrize(
    ("tokens", "minibatches", "count"),
    [(11, 1, 2), (12, 1, 3), (4, 1, 1), (4, 2, 2), (61, 1, 3), (62, 1, 0), (1, 4, 0)],
)
def test_a_batch_has_the_fewest_groups_that_hold_so_many_tokens(tokens, minibatches, count):
    buffer = {"order": "ticket", "tokens_per_step": tokens}
    algo = {"group_size": 2, "minibatches": minibatches}
    replay = Replay(config_of(buffer=buffer, algo=algo, launch={"learners": 1}))
    for ticket, size in ((3, 50), (1, 4), (2, 7)):
        replay.add(ticket, group_of(ticket, size))
    assert formed(replay) == [1, 2, 3][:count]


def test_groups_that_are_trained_again_are_the_least_used_then_the_oldest():
    replay = store_of(groups_per_step=4, replay_ratio=1.0, max_staleness=4)
    for ticket, version in {14: 2, 11: 0, 12: 1, 13: 1}.items():
        replay.add(ticket, make_group(make_lease(ticket), versions=[[version]] * 2))
    batches = []
    for step in range(3):
        if step == 2:
            replay.add(20, make_group(make_lease(20)))
            replay.add(21, make_group(make_lease(21)))
        formed(replay, step)
        batches.append(replay.batches[step])
        replay.done(step)
    assert [list(batch.tickets) for batch in batches] == [
        [11, 12],
        [13, 14, 11, 12],
        [20, 21, 13, 14],
    ]
    assert [batch.num_new for batch in batches] == [2, 2, 2]
    assert [group.lease.lease_id for group in batches[2].groups] == ["t20", "t21", "t13", "t14"]


def test_scores_of_each_function_are_averaged_where_it_applied():
    store = store_of(groups_per_step=2)
    parts = [{"right": [1, 0], "tidy": [np.nan, 4]}, {"right": [1, 1], "tidy": [np.nan, np.nan]}]
    for ticket, scores in enumerate(parts):
        named = {name: np.array(part, np.float32) for name, part in scores.items()}
        store.add(ticket, replace(group_of(ticket, 3), reward_parts=named))
    found = part_metrics(store.form(0, []))
    assert found == {
        "rewards/right/mean": 0.75,
        "rewards/right/std": pytest.approx(3**0.5 / 4),
        "rewards/tidy/mean": 4.0,
        "rewards/tidy/std": 0.0,
    }
    metric, labels = metric_of("rewards/a/b/mean")
    assert (metric.prometheus_name, labels) == (
        "asyncgrpo_buffer_rewards_function_mean",
        {"function": "a/b"},
    )
    assert metric_of("rewards//std")[1] == {"function": ""}  # an actor may call it anything


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


def test_a_long_group_counts_for_more_than_its_tokens_when_dealing():
    lengths = [40_000, *[10_000] * 8]
    groups = [make_group(make_lease(i), versions=[[0] * n] * 2) for i, n in enumerate(lengths)]
    long, short = deal(groups, 2)
    assert [group.num_tokens for group in long] == [80_000]
    assert [group.num_tokens for group in short] == [20_000] * 8


def test_seeds_of_leases_differ_and_repeat():
    seeds = {lease_seed(1, f"t{i}") for i in range(1000)}
    assert len(seeds) == 1000
    assert lease_seed(1, "t5") == lease_seed(1, "t5") != lease_seed(2, "t5")


# -- the whole core -----------------------------------------------------------------------------


def number_of(group):
    return int(group.lease.lease_id[1:])


def trained_packet(step, groups, world_size=2, covered=0):
    """What rank 0 tells: advantages by which a group and its completions can be recognised."""
    values = [number_of(group) + sample for group in groups for sample in range(2)]
    fields = {"step": step, "world_size": world_size, "covered": covered}
    advantages = np.array(values, np.float32).tobytes()
    return Packet(kind="trained", fields={**fields, "advantages": advantages})


class Simulation:
    """Actors and two learner ranks against a real core, scheduled by a seeded random choice."""

    def __init__(self, seed, *, uniform_share=0.3, **rooms):
        self.random = random.Random(seed)
        self.config = config_of(**rooms)
        self.trained: dict[int, list] = {}
        self.dropped: list[tuple] = []
        self.replayed: list[tuple] = []
        self.core = self.new_core()
        self.now = 0.0
        self.ids = Counter()
        self.lives = {f"actor-{i}": 0 for i in range(3)}
        self.held = dict.fromkeys(self.lives, 0)
        self.work: dict[str, list] = {}
        self.asked: set[str] = set()
        self.published = 0
        self.covered = 0  # the learner's newest checkpoint
        self.shards: dict[int, dict[int, object]] = {}
        self.take_asked: set[tuple[int, int]] = set()
        self.uniform_share = uniform_share
        self.is_over = False
        for actor in self.lives:
            self.send(self.peer(actor), "hello", actor=actor)

    def new_core(self):
        return BufferCore(self.config, CountingPrompts(), self.record)

    def record(self, step, ended):
        assert step == self.core.step
        for each in ended:
            if each.status == "replayed":
                self.replayed.append((step, each.group))
            elif each.status == "trained":
                self.trained.setdefault(step, []).append(each.group)
                assert each.advantages.tolist() == [
                    number_of(each.group) + sample for sample in range(2)
                ]
            else:
                self.dropped.append((each.group, each.status, each.reason))

    def peer(self, actor):
        return f"{actor}.{self.lives[actor]}"

    def send(self, peer, kind, **fields):
        self.post(peer, Packet(kind=kind, fields=fields))

    def post(self, peer, packet):
        self.ids[peer] += 1
        numbered = replace(packet, request_id=self.ids[peer])
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
        assert counts["stored"] == len(self.core.replay)
        assert counts["open"] == len(self.core.leases.being_made())

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
        spans = [
            sorted(self.random.choices([lease.version, newest], k=self.random.randint(1, 9)))
            for _ in range(2)
        ]
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
            groups = shards[0].groups + shards[1].groups
            self.post("learner-0", trained_packet(step, groups, covered=self.covered))
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
    "downweight": {"buffer": {"staleness_action": "downweight", "max_staleness": 1}},
    "wait": {"buffer": {"staleness_action": "wait"}},
    "replay_all": {"buffer": {"replay_ratio": 1.0, "groups_per_step": 6}},
    "replay_some": {"buffer": {"replay_ratio": 0.4, "groups_per_step": 5, "max_staleness": 1}},
    "window": {"buffer": {"order": "window", "window": 5}},
    "narrow_window": {"buffer": {"order": "window", "window": 1, "staleness_action": "wait"}},
    "on_policy": {"buffer": {"max_staleness": 0}},
    "rare_publish": {"weights": {"publish_every": 3}},
    **{
        f"tokens_{name}": {"run": {"max_steps": 5}, "buffer": {"tokens_per_step": 45, **buffer}}
        for name, buffer in {
            "as_guessed": {},
            "more_than_guessed": {"groups_per_step": 2},
            "less_than_guessed": {"groups_per_step": 40},
            "on_policy": {"max_staleness": 0},
            "in_order": {"order": "ticket"},
        }.items()
    },
    "tokens_rare_publish": {
        "run": {"max_steps": 6},
        "buffer": {"tokens_per_step": 45},
        "weights": {"publish_every": 3},
    },
    "tokens_of_the_fewest_groups": {
        "run": {"max_steps": 5},
        "buffer": {"tokens_per_step": 1, "groups_per_step": 8, "max_staleness": 0},
        "algo": {"minibatches": 4},
    },
}


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=settings().max_examples // 4)
@given(seed=st.integers(0, 2**32))
def test_any_schedule_ends_with_every_bound_kept(name, seed):
    run = Simulation(seed, **SCHEDULES[name])
    run.run()
    bound, action = run.config.buffer.max_staleness, run.config.buffer.staleness_action
    used = Counter()
    for step, groups in run.trained.items():
        assert_batch_size(groups, run.config)
        for group in groups:
            used[group.lease.lease_id] += 1
            oldest = [step - int(c.versions.min()) for c in group.completions]
            newest = [step - int(c.versions.max()) for c in group.completions]
            age = min(newest) if action == "mask" else max(oldest)
            assert age <= (2 * bound if action == "downweight" else bound)
    again = Counter(group.lease.lease_id for _, group in run.replayed)
    assert max(again.values(), default=0) <= run.config.buffer.replay_ratio + 0.999
    assert bool(again) == bool(run.config.buffer.replay_ratio)
    trained_at = {g.lease.lease_id: step for step, groups in run.trained.items() for g in groups}
    for step, group in run.replayed:
        assert trained_at[group.lease.lease_id] < step <= group.completions.version_span[0] + bound
    left = run.core.replay
    assert left.num_tokens == sum(each.group.num_tokens for each in left._stored.values())
    used.update(group.lease.lease_id for group, _, _ in run.dropped)
    assert set(used.values()) == {1}
    reasons = run.core.leases.reasons
    expected = {r: n for r, n in reasons.items() if r.startswith(("filtered", "evicted"))}
    assert Counter(f"{status}/{reason}" for _, status, reason in run.dropped) == expected
    assert sorted(run.trained) == list(range(run.config.run.max_steps))


@settings(max_examples=settings().max_examples // 4)
@given(seed=st.integers(0, 2**32))
def test_a_buffer_that_waits_never_evicts(seed):
    run = Simulation(seed, buffer={"staleness_action": "wait"})
    run.run()
    assert run.core.leases.counts["evicted"] == 0


def assert_batch_size(groups, config):
    """So many groups; or the fewest, one for each rank and minibatch, that hold so many tokens."""
    tokens, fewest = config.buffer.tokens_per_step, config.min_groups
    if tokens is None:
        assert len(groups) == config.new_groups
        return
    assert sum(group.num_tokens for group in groups) >= tokens
    assert len(groups) >= fewest
    assert len(groups) == fewest or sum(group.num_tokens for group in groups[:-1]) < tokens


def test_ticket_order_never_evicts():
    run = Simulation(7, buffer={"order": "ticket"})
    run.run()
    assert run.core.leases.counts["evicted"] == 0


class Talk:
    """A core, and what its peers say to it and hear."""

    def __init__(self, prompts=None, **rooms):
        self.config, self.prompts = config_of(**rooms), prompts or CountingPrompts()
        self.core = BufferCore(self.config, self.prompts, lambda step, ended: None)

    def replies(self, peer, kind, now=0.0, **fields):
        return self.core.handle(peer, Packet(kind=kind, request_id=1, fields=fields), now)

    def tell(self, peer, packet, now=0.0):
        return [answer for to, answer in self.core.handle(peer, packet, now) if to == peer]

    def ask(self, peer, kind, now=0.0, **fields):
        return self.tell(peer, Packet(kind=kind, request_id=1, fields=fields), now)

    def hello(self, *peers):
        for peer in peers:
            self.ask(peer, "hello", actor=peer.partition(".")[0])
        return self

    def lease(self, peer, count, version=0):
        (granted,) = self.ask(peer, "lease", version=version, max=count)
        return [lease_from(packed) for packed in granted.fields["leases"]]

    def put(self, peer, group, now=0.0):
        (answer,) = self.tell(peer, group_packet("put", [group]), now)
        return answer.fields["state"]

    def take(self, step, rank=0, world_size=1):
        return self.ask(f"learner-{rank}", "take", step=step, rank=rank, world_size=world_size)


def test_groups_of_which_none_can_be_learned_from_are_warned_of_ever_more_rarely(caplog):
    alone = {"groups_per_step": 1, "max_staleness": 40}
    talk = Talk(buffer=alone, run={"max_steps": 99}, launch={"learners": 1}).hello("a.1")

    def put(count, scores, versions=((0,), (0,))):
        for lease in talk.lease("a.1", count):
            talk.put("a.1", make_group(lease, versions=versions, scores=scores))

    for count, warnings in ((9, 0), (1, 1), (9, 1), (1, 2)):
        put(count, [0.5, 0.6])
        assert len(caplog.messages) == warnings
    assert "20 groups in a row teach nothing, the last one was all_correct" in caplog.text
    assert "algo.drop_uniform_groups" in caplog.messages[-1]
    put(1, [0.5, -0.5])
    put(19, [-0.5, -0.6])
    assert len(caplog.messages) == 2
    put(21, [-0.5, 0.5], [[0], []])
    assert "empty_completion: the engine returned nothing" in caplog.messages[-1]


def prompts_of(leases):
    return [lease.prompt.prompt_id for lease in leases]


def test_a_prompt_whose_actor_died_is_handed_out_again():
    talk = Talk().hello("actor-0.1")
    lost = prompts_of(talk.lease("actor-0.1", 2))
    talk.hello("actor-0.2")
    assert prompts_of(talk.lease("actor-0.2", 3)) == [*lost, "p2"]
    assert talk.core.leases.reasons["expired/actor_restarted"] == 2


def test_an_actor_that_says_goodbye_leaves_nothing_open():
    talk = Talk().hello("actor-0.1")
    first, _ = talk.lease("actor-0.1", 2)
    talk.ask("actor-0.1", "fail", lease_id=first.lease_id, reason="handed_back", retry=True)
    assert talk.ask("actor-0.1", "bye", actor="actor-0") == [Packet(kind="noted", request_id=1)]
    assert talk.core.leases.counts["open"] == 0
    assert talk.core.leases.reasons == {"failed/handed_back": 1, "expired/actor_left": 1}
    talk.hello("actor-1.1")
    assert sorted(prompts_of(talk.lease("actor-1.1", 3))) == ["p0", "p1", "p2"]


def test_a_stopped_buffer_hands_out_what_is_decided_and_then_says_so_to_every_rank():
    talk = Talk().hello("actor-0.0")
    talk.ask("learner-0", "stop")
    assert [talk.take(0, rank, 2)[0].kind for rank in (0, 1)] == ["stopped", "stopped"]
    assert talk.ask("actor-0.0", "lease", version=0, max=4) == []
    answers = talk.replies("learner-0", "begin", step=0)  # a new life of the learner
    assert [answer.kind for _, answer in answers] == ["noted", "leases"]


def test_work_given_to_a_lost_peer_goes_to_the_next_who_asks():
    talk = Talk().hello("a.1", "b.1")
    assert len(talk.lease("a.1", 12)) == 12  # all that the gate lets start
    assert talk.ask("b.1", "lease", version=0, max=12) == []
    ((peer, granted),) = talk.core.lost("a.1", 1.0)
    assert (peer, granted.kind, len(granted.fields["leases"])) == ("b.1", "leases", 12)
    assert talk.core.leases.reasons["expired/unreachable"] == 12


def test_a_lease_past_its_deadline_expires_and_a_late_group_is_not_stored():
    talk = Talk().hello("a.1")
    (lease,) = talk.lease("a.1", 1)
    talk.core.tick(lease.deadline_seconds - 1)
    assert talk.core.leases.counts["expired"] == 0
    talk.core.tick(lease.deadline_seconds + 1)
    assert talk.core.leases.counts["expired"] == 1
    assert talk.put("a.1", make_group(lease), lease.deadline_seconds + 2) == "unknown"
    assert len(talk.core.replay) == 0


def test_each_lease_expires_at_its_own_deadline():
    talk = Talk(eval={"timeout_seconds": 50}, buffer={"lease_deadline_seconds": 100}).hello("a.1")
    (first,) = talk.lease("a.1", 1)
    talk.ask("learner-0", "evaluate", now=20.0, version=0, blocks=["held-out"])
    talk.ask("a.1", "lease", now=60.0, version=0, max=1)
    open_then = {}
    for now in (69.9, 70.0, 99.9, 100.0, 159.9, 160.0):
        talk.core.tick(now)
        open_then[now] = len(talk.core.leases.held_by("a.1"))
    assert list(open_then.values()) == [7, 2, 2, 1, 1, 0]
    assert talk.core.leases.get(first.lease_id) is None


def test_finite_prompts_end_with_a_smaller_batch_and_then_exhausted():
    talk = Talk(CountingPrompts(limit=6), launch={"learners": 1}).hello("a.1")
    for lease in talk.lease("a.1", 9):
        talk.put("a.1", make_group(lease))
    for step, size in enumerate((4, 2)):
        (answer,) = talk.take(step)
        assert len(groups_from(answer)) == size
        talk.tell("learner-0", trained_packet(step, groups_from(answer), world_size=1))
    assert talk.take(2)[0].kind == "exhausted"


def test_a_rank_that_asks_for_the_next_step_early_is_not_told_the_end_before_the_others():
    talk = Talk(CountingPrompts(limit=6)).hello("a.1")
    for lease in talk.lease("a.1", 9):
        talk.put("a.1", make_group(lease))
    shards = [talk.take(0, rank, 2)[0] for rank in (0, 1)]
    assert talk.take(1, 1, 2) == []  # rank 1 is ahead: rank 0 has not told of step 0 yet
    groups = [group for shard in shards for group in groups_from(shard)]
    told = talk.core.handle("learner-0", trained_packet(0, groups), 0.0)
    assert [(peer, answer.kind) for peer, answer in told] == [
        ("learner-0", "noted"),
        ("learner-1", "shard"),
    ]
    assert talk.take(1, 0, 2)[0].kind == "shard"


def test_a_stop_after_a_rank_was_told_the_end_splits_no_ranks():
    talk = Talk(CountingPrompts(limit=0))
    for rank in (0, 1):
        assert talk.take(0, rank, 2)[0].kind == "exhausted"
        talk.ask(f"learner-{rank}", "stop")


BLOCKS = [
    {"name": "greedy", "num_prompts": 3, "timeout_seconds": 50},
    {
        "name": "sampled",
        "num_prompts": 4,
        "num_samples": 2,
        "k": 2,
        "sampling": {"temperature": 0.6, "max_completion_tokens": 99},
        "reward": {"functions": [{"use": "exact"}], "correct_above": 0.5},
        "timeout_seconds": 200,
    },
]


class Exam(Talk):
    """A core with two evaluation blocks and two actors that know it."""

    def __init__(self, **rooms):
        super().__init__(**{"eval": BLOCKS, **rooms})
        self.ids, self.leases = Counter(), {}
        self.hello("actor-0.1", "actor-1.1")

    def tell(self, peer, packet, now=0.0):
        """What the learner hears; actors keep their leases."""
        self.ids[peer] += 1
        numbered = replace(packet, request_id=self.ids[peer])
        answers = []
        for receiver, answer in self.core.handle(peer, numbered, now):
            assert answer.kind != "refused", answer.fields
            if answer.kind == "evaluate":
                new = [lease_from(fields) for fields in answer.fields["leases"]]
                self.leases.setdefault(receiver, []).extend(new)
            elif receiver == "learner-0":
                answers.append(answer)
        return answers

    def of(self, block):
        found = [(peer, x) for peer, leases in self.leases.items() for x in leases]
        return [(peer, lease) for peer, lease in found if lease.block == block]

    def answer(self, block, scores, now=0.0):
        """Answers all prompts of a block with these scores."""
        answers = []
        for peer, lease in self.of(block):
            spans = [[lease.version]] * lease.group_size
            packet = group_packet("put", [make_group(lease, versions=spans, scores=scores)])
            answers += self.tell(peer, packet, now)
        return answers


def test_blocks_of_one_version_are_dealt_together_with_their_own_sampling():
    exam = Exam()
    assert exam.ask("learner-0", "evaluate", version=5, blocks=["greedy", "sampled"]) == []
    assert {peer: len(leases) for peer, leases in exam.leases.items()} == {
        "actor-0.1": 4,
        "actor-1.1": 3,
    }
    greedy, sampled = ([x for _, x in exam.of(name)] for name in ("greedy", "sampled"))
    assert {(x.group_size, x.sampling.temperature, x.version) for x in greedy} == {(1, 0.0, 5)}
    assert {x.sampling.max_completion_tokens for x in greedy} == {16}
    assert {(x.group_size, x.sampling.temperature) for x in sampled} == {(2, 0.6)}
    assert {x.sampling.max_completion_tokens for x in sampled} == {99}
    assert {x.purpose for x in (*greedy, *sampled)} == {"eval"}
    # asked for again, nothing is handed out twice
    exam.ask("learner-0", "evaluate", version=5, blocks=["greedy"])
    assert sum(map(len, exam.leases.values())) == 7


def test_each_block_is_reported_by_its_own_measure_and_results_wait_for_all():
    exam = Exam()
    exam.ask("learner-0", "evaluate", version=5, blocks=["greedy", "sampled"])
    assert exam.ask("learner-0", "results") == []
    assert exam.answer("greedy", [0.4], now=2.0) == []  # correct above 0, the run's own bound
    (noted,) = exam.ask("learner-0", "summary")
    assert [report["name"] for report in noted.fields["evaluations"]] == ["greedy"]
    answers = exam.answer("sampled", [0.4, 0.6], now=3.0)  # correct above 0.5
    assert [answer.kind for answer in answers] == ["evaluating", "reports"]
    greedy, sampled = answers[-1].fields["reports"]
    assert (greedy["accuracy"], greedy["pass_at_k"], greedy["seconds"]) == (1.0, {}, 2.0)
    assert (sampled["accuracy"], sampled["pass_at_k"]) == (0.5, {"2": 1.0})
    assert (sampled["num_prompts"], sampled["seconds"], sampled["version"]) == (4, 3.0, 5)
    (noted,) = exam.ask("learner-0", "summary")
    assert [report["name"] for report in noted.fields["evaluations"]] == ["sampled"]
    assert exam.core.leases.counts.total() == 0


def test_the_learner_goes_on_when_every_actor_has_accepted_or_is_late():
    exam = Exam()
    exam.ask("learner-0", "evaluate", version=5, blocks=["greedy", "sampled"])
    (first, one), (second, two) = exam.leases.items()
    accepted = {"lease_ids": [lease.lease_id for lease in one], "refused": []}
    assert exam.ask(first, "accept", **accepted) == []
    refused = [lease.lease_id for lease in two]
    (answer,) = exam.ask(second, "accept", lease_ids=refused, refused=refused)
    assert (answer.kind, answer.request_id) == ("evaluating", 1)
    exam.ask("learner-0", "evaluate", version=6, blocks=["greedy"])
    assert [answer.kind for _, answer in exam.core.tick(15.0)] == []
    assert [answer.kind for _, answer in exam.core.tick(15.1)] == ["evaluating"]


def test_a_block_that_nobody_answers_ends_at_its_own_timeout():
    exam = Exam()
    exam.ask("learner-0", "evaluate", version=5, blocks=["greedy", "sampled"])
    exam.core.tick(51.0)
    (noted,) = exam.ask("learner-0", "summary", now=52.0)
    (report,) = noted.fields["evaluations"]
    assert (report["name"], report["num_answered"], report["num_prompts"]) == ("greedy", 0, 3)
    exam.answer("sampled", [1.0, 1.0], now=199.0)
    (noted,) = exam.ask("learner-0", "summary", now=199.0)
    assert [r["num_answered"] for r in noted.fields["evaluations"]] == [4]


def test_results_without_any_evaluation_are_empty_at_once():
    (answer,) = Exam().ask("learner-0", "results")
    assert answer.fields["reports"] == []


def test_correct_answers_are_counted_prompt_by_prompt():
    exam = Exam(eval={"num_prompts": 5})
    exam.ask("learner-0", "evaluate", version=7, blocks=["held-out"])
    for peer, lease in exam.of("held-out"):
        score = 1.0 if lease.prompt.columns["number"] % 2 else -1.0
        group = make_group(lease, versions=[[7, 7]], scores=[score])
        exam.tell(peer, group_packet("put", [group]))
    (answer,) = exam.ask("learner-0", "results")
    (report,) = answer.fields["reports"]
    assert (report["accuracy"], report["num_answered"]) == (pytest.approx(2 / 5), 5)


def answers(talk, peer, packet):
    for lease in map(lease_from, packet.fields["leases"]):
        talk.put(peer, make_group(lease, versions=[[1, 1]], scores=[1.0]))


@pytest.mark.parametrize("heard_of", ["lost", "restarted"])
def test_what_an_actor_that_dies_was_to_evaluate_others_do(heard_of):
    talk = Talk().hello("a.1", "b.1")
    dealt = dict(talk.replies("learner-0", "evaluate", version=1, blocks=["held-out"]))
    if heard_of == "lost":
        again = [packet for peer, packet in talk.core.lost("b.1", 0.0) if peer == "a.1"]
    else:
        again = [packet for _, packet in talk.replies("b.2", "hello", actor="b")][1:]
    assert sum(len(packet.fields["leases"]) for packet in again) == len(
        dealt["b.1"].fields["leases"]
    )
    answers(talk, "a.1", dealt["a.1"])
    for packet in again:
        lease = lease_from(packet.fields["leases"][0])
        answers(talk, talk.core.leases.get(lease.lease_id).peer, packet)
    (answer,) = talk.ask("learner-0", "results")
    (report,) = answer.fields["reports"]
    assert (report["num_answered"], report["num_prompts"]) == (5, 5)


def test_nothing_is_dealt_to_an_actor_that_is_out_of_reach_until_it_is_heard_again():
    talk = Talk().hello("a.1", "b.1")
    talk.core.lost("b.1", 0.0)
    for heard in (False, True):
        if heard:
            talk.ask("b.1", "held", version=1)
        packets = talk.replies("learner-0", "evaluate", version=1 + heard, blocks=["held-out"])
        assert {peer for peer, _ in packets if peer != "learner-0"} == {"a.1", *["b.1"] * heard}


def test_advantages_that_do_not_fit_the_batch_change_nothing():
    run = Simulation(3)
    while len(run.shards.get(0, {})) < 2 and not run.trained:
        run.act()
        run.core.step or run.send("learner-0", "take", step=0, rank=0, world_size=2)
        run.core.step or run.send("learner-1", "take", step=0, rank=1, world_size=2)
    before = run.core.metrics()
    good = trained_packet(0, run.shards[0][0].groups + run.shards[0][1].groups)
    sent = good.fields["advantages"]
    for wrong in (b"", sent[:-4], sent[:-1], sent * 2):
        bad = Packet(kind="trained", request_id=9, fields={**good.fields, "advantages": wrong})
        (_, answer), *_ = run.core.handle("learner-0", bad, run.now)
        assert (answer.kind, "ValueError" in answer.fields["reason"]) == ("refused", True)
    assert (run.core.metrics(), run.core.step) == (before, 0)
    run.post("learner-0", good)
    assert (run.core.step, run.core.metrics()["leases_trained"]) == (1, 4)


def test_a_request_that_makes_no_sense_is_refused_with_its_reason():
    talk = Talk()
    for kind, fields, why in (
        ("evaluate", {"version": 0, "blocks": ["no"]}, "no evaluation block is called no"),
        ("dance", {}, "unknown kind 'dance'"),
        ("take", {}, "take: step: Field required"),
    ):
        (answer,) = talk.ask("x", kind, **fields)
        assert answer.kind == "refused"
        assert why in answer.fields["reason"]
