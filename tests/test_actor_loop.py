"""The actor loop against a fake engine, buffer and learner: versions, back-pressure, failures."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from fakes import make_lease

from asyncgrpo.actor.concurrency import EngineLoad
from asyncgrpo.actor.judge import InlineJudge
from asyncgrpo.actor.loop import ActorLoop
from asyncgrpo.config import from_mapping
from asyncgrpo.errors import DataError, PeerTimeout, RewardError
from asyncgrpo.observe.metrics import METRICS
from asyncgrpo.settings.reward import RewardSettings
from asyncgrpo.types import Completion, Sampled
from asyncgrpo.weights.proof import NUM_CANARIES
from asyncgrpo.wire.codec import Packet, groups_from, pack_lease


class FakeEngine:
    """Finishes every request after `steps` steps; each token carries the version of its step."""

    def __init__(self, steps: int = 3) -> None:
        self.version, self._steps = -1, steps
        self.requests: dict[str, tuple[list[int], int, list[int]]] = {}
        self.is_asleep = False

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(kv_share=0.5, preempted=0)

    def add(self, request_id, prompt_token_ids, sampling, num_completions, seed):
        self.requests[request_id] = (list(prompt_token_ids), num_completions, [])

    def step(self):
        assert not self.is_asleep
        finished = []
        for name, (prompt, count, versions) in list(self.requests.items()):
            versions.append(self.version)
            if len(versions) == (1 if name.startswith("canary") else self._steps):
                del self.requests[name]
                completion = Completion(
                    token_ids=np.arange(len(versions), dtype=np.int32),
                    behavior_logprobs=np.full(len(versions), -0.5, dtype=np.float32),
                    versions=np.array(versions, dtype=np.int32),
                    finish_reason="stop",
                )
                finished.append(
                    Sampled(
                        lease_id=name,
                        prompt_token_ids=np.array(prompt, dtype=np.int32),
                        completions=(completion,) * count,
                    )
                )
        return finished

    def load_weights(self, version, tensors):
        assert not self.is_asleep
        self.version = version

    def sleep(self):
        self.is_asleep = True

    def wake(self):
        self.is_asleep = False


class FakeTokenizer:
    def apply_chat_template(self, messages, **options):
        return [1] * len(messages[0]["content"])

    def batch_decode(self, ids, **options):
        return ["seven" for _ in ids]


class FakeClient:
    """Keeps what the actor sends; the test puts what the buffer would answer into `inbox`."""

    def __init__(self) -> None:
        self.sent: list[Packet] = []
        self.inbox: deque[Packet] = deque()

    def post(self, packet):
        self.sent.append(packet)
        return len(self.sent)

    def poll(self, timeout_seconds):
        arrived = list(self.inbox)
        self.inbox.clear()
        return arrived

    def call(self, packet, timeout_seconds):
        self.sent.append(packet)
        return Packet(kind="noted")

    def of(self, kind):
        return [packet for packet in self.sent if packet.kind == kind]

    def grant(self, *leases):
        fields = {"leases": [pack_lease(lease) for lease in leases]}
        self.inbox.append(Packet(kind="leases", fields=fields))


class FakeReceiver:
    def __init__(self) -> None:
        self.waiting: int | None = None
        self.proofs: list[tuple[int, int]] = []
        self.busy: list[bool] = []
        self.sleep = False
        self.heard_asleep = False

    def staged(self):
        return None if self.waiting is None else (self.waiting, [])

    def loaded(self, version, stall_seconds, canaries):
        self.proofs.append((version, len(canaries)))
        self.waiting = None

    def set_busy(self, busy):
        self.busy.append(busy)

    def wants_sleep(self, is_asleep):
        self.heard_asleep = is_asleep
        return self.sleep

    def check(self):
        pass


class Stage:
    """One actor loop with everything around it."""

    def __init__(self, use="reward_functions:vowels", steps=3, **rooms) -> None:
        config = from_mapping(
            {"actor": {"concurrency": 4}, "data": {"max_prompt_tokens": 40}, **rooms}
        )
        self.engine, self.client, self.receiver = FakeEngine(steps), FakeClient(), FakeReceiver()
        self.time = 0.0
        self.observed: dict[str, list[float]] = {}
        rewards = {"functions": [{"use": use}], **rooms.get("reward", {})}
        judge = InlineJudge({"": RewardSettings.model_validate(rewards)})
        self.loop = ActorLoop(
            "actor-0",
            config,
            engine=self.engine,
            tokenizer=FakeTokenizer(),
            vocab_size=100,
            client=self.client,
            receiver=self.receiver,
            judge=judge,
            clock=lambda: self.time,
            observe=lambda name, values: self.observed.setdefault(name, []).extend(values),
        )
        self.client.inbox.append(Packet(kind="welcome", fields={"credit": 2, "life": 1}))

    def tick(self, count=1):
        for _ in range(count):
            self.time += 0.1
            self.loop.tick(0.0)

    def with_version(self, version):
        self.receiver.waiting = version
        self.tick(2)
        return self


def test_nothing_is_asked_for_before_the_first_weights_are_live():
    stage = Stage()
    stage.tick(3)
    assert stage.client.of("lease") == []
    stage.with_version(0)
    assert [p.fields for p in stage.client.of("lease")] == [{"version": 0, "max": 4}]
    assert stage.receiver.proofs == [(0, NUM_CANARIES)]


def test_a_swap_between_two_steps_leaves_both_versions_in_one_completion():
    stage = Stage().with_version(0)
    stage.client.grant(make_lease(1))
    stage.tick()
    stage.receiver.waiting = 1
    stage.tick(2)
    (packet,) = stage.client.of("put")
    (group,) = groups_from(packet)
    assert [c.versions.tolist() for c in group.completions] == [[0, 1, 1]] * 2
    assert stage.receiver.proofs[-1] == (1, NUM_CANARIES)


def test_weights_of_the_same_version_are_loaded_and_proven_again_when_they_are_sent_again():
    stage = Stage().with_version(2)
    stage.receiver.waiting = 2  # the learner evicted this actor and does not know what it holds
    stage.tick(3)
    assert stage.receiver.proofs == [(2, NUM_CANARIES)] * 2


def test_histograms_see_each_trained_completion_and_swap_and_no_evaluation():
    stage = Stage(steps=3).with_version(0)
    stage.client.grant(make_lease(1), make_lease(2, purpose="eval"))
    stage.tick(5)
    trained = next(
        group
        for packet in stage.client.of("put")
        for group in groups_from(packet)
        if group.lease.purpose == "train"
    )
    lengths = [len(completion.token_ids) for completion in trained.completions]
    assert stage.observed["completion/tokens"] == lengths
    assert stage.observed["completion/reward"] == trained.rewards.tolist()
    assert stage.observed["group/generate_seconds"] == [pytest.approx(0.2)]
    assert len(stage.observed["group/judge_seconds"]) == 1
    assert sum(stage.observed["swap/stall_seconds"]) == stage.loop.counters["swap_seconds"]
    assert set(stage.observed) <= set(METRICS)


def test_one_swap_is_proven_before_the_next_begins():
    stage = Stage(steps=3).with_version(0)
    stage.engine.step = list  # the canaries stay in the engine
    stage.receiver.waiting = 1
    stage.tick(3)
    assert (stage.engine.version, len(stage.engine.requests)) == (1, NUM_CANARIES)


def test_free_places_are_asked_for_while_others_are_still_generating():
    stage = Stage(steps=10).with_version(0)
    stage.client.grant(make_lease(1), make_lease(2))
    stage.tick(2)
    assert [p.fields["max"] for p in stage.client.of("lease")] == [4, 2]


def test_unacknowledged_groups_never_exceed_the_credit():
    stage = Stage().with_version(0)
    stage.client.grant(*(make_lease(i) for i in range(4)))
    stage.tick(5)
    assert len(stage.client.of("put")) == 2
    first = stage.client.sent.index(stage.client.of("put")[0]) + 1
    stage.client.inbox.append(Packet(kind="stored", request_id=first))
    stage.tick()
    assert len(stage.client.of("put")) == 3


def test_no_new_work_is_taken_while_too_much_waits_for_credit():
    stage = Stage(actor={"concurrency": 12}).with_version(0)
    stage.client.grant(*(make_lease(i) for i in range(12)))
    stage.tick(5)
    asked = len(stage.client.of("lease"))
    stage.client.grant()
    stage.tick(3)
    assert len(stage.client.of("lease")) == asked


def test_an_overlong_prompt_fails_with_its_reason_and_is_not_retried():
    stage = Stage(data={"max_prompt_tokens": 5}).with_version(0)
    stage.client.grant(make_lease(1))
    stage.tick()
    (failed,) = stage.client.of("fail")
    assert failed.fields == {"lease_id": "t1", "reason": "prompt_too_long", "retry": False}


def test_an_overlong_prompt_may_lose_its_beginning_which_is_counted(caplog):
    data = {"max_prompt_tokens": 5, "overlong_prompt": "truncate_left"}
    stage = Stage(data=data).with_version(0)
    stage.client.grant(make_lease(1))
    stage.tick(5)
    (put,) = stage.client.of("put")
    (group,) = groups_from(put)
    assert len(group.prompt_token_ids) == 5
    assert stage.loop.counters["prompts_truncated"] == 1
    assert stage.client.of("fail") == []
    assert "prompt p1 is cut from 14 to its last 5 tokens" in caplog.text


def test_an_overlong_prompt_may_end_the_run_as_bad_input():
    stage = Stage(data={"max_prompt_tokens": 5, "overlong_prompt": "error"}).with_version(0)
    stage.client.grant(make_lease(1))
    with pytest.raises(DataError, match="prompt p1 has 14 tokens"):
        stage.tick()


def test_an_evaluation_waits_for_its_version_and_keeps_it_until_done():
    stage = Stage().with_version(0)
    lease = make_lease(5, group_size=1, purpose="eval")
    packed = pack_lease(replace(lease, version=1))
    pushed = Packet(kind="evaluate", fields={"version": 1, "leases": [packed]})
    stage.client.inbox.append(pushed)
    stage.tick()
    assert stage.client.of("accept") == []
    stage.receiver.waiting = 1
    stage.tick()
    assert stage.client.of("accept")[0].fields == {"lease_ids": ["e5"], "refused": []}
    stage.receiver.waiting = 2
    stage.tick()
    assert stage.engine.version == 1
    stage.tick(4)
    assert stage.receiver.busy == [True, False]
    (group,) = groups_from(stage.client.of("put")[0])
    assert {int(v) for c in group.completions for v in c.versions} == {1}
    assert stage.engine.version == 2


def test_an_evaluation_of_a_version_that_has_passed_is_refused():
    stage = Stage().with_version(3)
    lease = make_lease(5, group_size=1, purpose="eval")
    fields = {"version": 0, "leases": [pack_lease(lease)]}
    stage.client.inbox.append(Packet(kind="evaluate", fields=fields))
    stage.tick()
    assert stage.client.of("accept")[0].fields == {"lease_ids": ["e5"], "refused": ["e5"]}
    assert stage.receiver.busy == []


def test_a_reward_function_that_always_breaks_its_contract_ends_the_actor():
    stage = Stage("reward_functions:raises", actor={"concurrency": 20}).with_version(0)
    stage.client.grant(*(make_lease(i) for i in range(9)))
    with pytest.raises(RewardError, match=r"9 of the last 9 groups .* 'raises' raised KeyError"):
        stage.tick(5)
    assert len(stage.client.of("fail")) == 8
    assert stage.loop.counters["failed_groups"] == 8


def test_a_failed_reward_that_scores_zero_is_delivered_and_counted_as_an_error():
    stage = Stage("reward_functions:raises", reward={"on_error": "zero"}).with_version(0)
    stage.client.grant(make_lease(1))
    stage.tick(30)
    (group,) = groups_from(stage.client.of("put")[0])
    assert group.rewards.tolist() == [0.0, 0.0]
    status = stage.client.of("status")[-1].fields
    assert (status["judged_groups"], status["judge_errors"], status["failed_groups"]) == (1, 1, 0)
    assert status["judge_seconds"] > 0


def test_status_is_sent_once_a_second_with_what_was_generated():
    stage = Stage().with_version(0)
    stage.client.grant(make_lease(1))
    stage.tick(30)
    last = stage.client.of("status")[-1].fields
    assert last["tokens_generated"] == 6
    assert last["groups_generated"] == 1
    assert len(stage.client.of("status")) <= 4


def test_a_second_evaluation_does_not_displace_one_that_still_waits():
    stage = Stage().with_version(0)
    for number, version in ((5, 1), (6, 2)):
        lease = replace(make_lease(number, 1, "eval"), version=version)
        fields = {"version": version, "leases": [pack_lease(lease)]}
        stage.client.inbox.append(Packet(kind="evaluate", fields=fields))
    stage.tick()
    for version in (1, 2):
        stage.receiver.waiting = version
        stage.tick(8)
    answered = [groups_from(packet)[0] for packet in stage.client.of("put")]
    found = {g.lease.lease_id: int(g.completions[0].versions[0]) for g in answered}
    assert found == {"e5": 1, "e6": 2}


def introduce(stage, request, life=2):
    fields = {"life": life}
    stage.client.inbox.append(Packet(kind="introduce", request_id=request, fields=fields))
    stage.tick()


def test_a_restarted_buffer_is_told_what_the_actor_holds_once_and_asked_again():
    stage = Stage(steps=10).with_version(3)
    assert stage.client.of("hello")[0].fields == {"actor": "actor-0", "version": -1, "leases": []}
    stage.client.grant(*(make_lease(i) for i in (1, 2, 3)))
    stage.tick()
    asked = stage.loop._asked
    introduce(stage, 99)
    hello = stage.client.of("hello")[1]
    assert hello.fields == {"actor": "actor-0", "version": 3, "leases": ["t1", "t2", "t3"]}
    assert stage.loop._asked == asked  # it is repeated by the client and answered for itself
    introduce(stage, asked)
    assert len(stage.client.of("hello")) == 2
    assert stage.loop._asked not in (None, asked)
    introduce(stage, 99, life=3)
    assert len(stage.client.of("hello")) == 3


def test_groups_on_their_way_count_as_held_until_they_are_acknowledged():
    stage = Stage(steps=2).with_version(0)
    stage.client.grant(*(make_lease(i) for i in range(1, 5)))
    stage.tick(4)  # all are scored; the credit of 2 lets two go
    first = stage.client.sent.index(stage.client.of("put")[0]) + 1
    introduce(stage, 0)
    assert sorted(stage.client.of("hello")[-1].fields["leases"]) == ["t1", "t2", "t3", "t4"]
    stage.client.inbox.append(Packet(kind="stored", request_id=first))
    stage.loop._judge.done = list  # the next group stays with the judge
    stage.client.grant(make_lease(5))
    stage.tick(3)
    introduce(stage, 0, life=3)
    assert sorted(stage.client.of("hello")[-1].fields["leases"]) == ["t2", "t3", "t4", "t5"]


def test_an_actor_that_leaves_hands_back_what_it_samples_and_delivers_what_it_has():
    stage = Stage(steps=3).with_version(0)
    stage.client.grant(make_lease(1))
    stage.tick(3)
    stage.client.grant(make_lease(2), make_lease(3))
    stage.tick(1)
    stage.client.grant(make_lease(4))  # on its way when the actor decides to leave
    puts = len(stage.client.of("put"))
    stage.client.inbox += [Packet(kind="stored", request_id=i + 1) for i in range(40)]
    stage.loop.leave(5.0)
    assert puts == len(stage.client.of("put")) == 1
    handed_back = [dict(packet.fields) for packet in stage.client.of("fail")]
    assert handed_back == [
        {"lease_id": f"t{i}", "reason": "handed_back", "retry": True} for i in (2, 3, 4)
    ]
    assert stage.client.sent[-1].kind == "bye"


def test_an_actor_that_hears_nothing_for_long_says_so_and_ends():
    stage = Stage(buffer={"take_timeout_seconds": 20})
    stage.tick(150)
    stage.client.inbox.append(Packet(kind="noted"))  # a word in between counts
    stage.tick(190)
    with pytest.raises(PeerTimeout, match=r"buffer did not answer within 20 s"):
        stage.tick(30)


def test_an_actor_that_stood_still_asks_before_it_gives_up():
    stage = Stage(buffer={"take_timeout_seconds": 20})
    stage.tick()
    stage.time += 3600  # SIGSTOP, a laptop asleep
    stage.tick(100)


def test_an_actor_asleep_keeps_its_work_and_delivers_what_is_scored():
    stage = Stage(steps=3).with_version(0)
    stage.client.grant(make_lease(1), make_lease(2))
    stage.tick(2)
    stage.receiver.sleep = True
    stage.tick()
    asked = len(stage.client.of("lease"))
    before = {name: list(versions) for name, (_, _, versions) in stage.engine.requests.items()}
    stage.client.grant(make_lease(3))  # was on its way
    stage.tick(30)
    assert stage.engine.is_asleep
    assert stage.receiver.heard_asleep
    assert len(stage.client.of("lease")) == asked
    assert stage.engine.version == 0
    assert {n: r[2] for n, r in stage.engine.requests.items()} == {**before, "t3": []}
    assert len(stage.client.of("status")) >= 2
    stage.receiver.sleep, stage.receiver.waiting = False, 1
    stage.tick(5)
    assert not stage.engine.is_asleep
    groups = [group for packet in stage.client.of("put") for group in groups_from(packet)]
    assert {group.lease.lease_id for group in groups} == {"t1", "t2"}  # the credit
    assert {tuple(group.completions[0].versions) for group in groups} == {(0, 0, 1)}


def test_an_engine_sleeps_when_what_it_holds_is_proven():
    stage = Stage(steps=9).with_version(0)
    stage.client.grant(make_lease(1))
    stage.tick(2)
    stage.receiver.waiting, stage.receiver.sleep = 1, True
    stage.tick()
    assert stage.receiver.proofs[1:] == [(1, NUM_CANARIES)]
    stage.tick()
    assert stage.engine.is_asleep


def test_an_engine_that_slept_through_a_publish_proves_it_before_the_learner_trains_again():
    """The learner had it wake up and sleep again between two turns of the loop."""
    stage = Stage().with_version(0)
    stage.receiver.sleep = True
    stage.tick(2)
    assert stage.receiver.heard_asleep
    stage.receiver.waiting = 1
    stage.tick()
    assert not stage.receiver.heard_asleep
    stage.tick(3)
    assert stage.receiver.proofs[1:] == [(1, NUM_CANARIES)]
    assert stage.engine.is_asleep
    assert stage.receiver.heard_asleep


def test_an_evaluation_goes_on_with_its_version_after_a_sleep():
    stage = Stage(steps=4).with_version(0)
    lease = make_lease(1, purpose="eval")
    fields = {"leases": [pack_lease(lease)]}
    stage.client.inbox.append(Packet(kind="evaluate", fields=fields))
    stage.tick(2)
    stage.receiver.sleep, stage.receiver.waiting = True, 1
    stage.tick(5)
    assert stage.receiver.busy == [True]
    stage.receiver.sleep = False
    stage.tick(5)
    assert stage.receiver.busy == [True, False]
    (packet,) = stage.client.of("put")
    (group,) = groups_from(packet)
    assert set(group.completions[0].versions.tolist()) == {0}
    assert stage.engine.version == 1
