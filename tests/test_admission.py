"""What the buffer lets in: requests that make sense, groups that fit the lease they claim."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fakes import make_group, make_lease
from test_buffer import Talk

from asyncgrpo.buffer.admission import check_request, is_holder, why_failed
from asyncgrpo.buffer.core import BufferCore
from asyncgrpo.buffer.leases import OpenLease
from asyncgrpo.errors import WireError
from asyncgrpo.observe.metrics import METRICS
from asyncgrpo.types import Completions
from asyncgrpo.weights.sender import CollectiveSender
from asyncgrpo.wire.codec import Packet, decode, encode, group_packet, groups_from
from asyncgrpo.wire.schema import BUFFER_REQUESTS, WEIGHTS_REQUESTS

NEWEST = 5
LEASE = make_lease(1)


def group(**changes):
    made = make_group(LEASE, versions=[[3, 4, 5], [4, 4]])
    (arrived,) = groups_from(decode(encode(group_packet("put", [replace(made, **changes)]))))
    return arrived


def with_completion(**changes):
    first, *others = group().completions
    return group(completions=Completions.of([replace(first, **changes), *others]))


def int32(*values):
    return np.array(values, dtype=np.int32)


def test_a_group_that_fits_its_lease_is_let_in():
    assert why_failed(group(), LEASE, NEWEST) is None
    tuples = replace(LEASE, prompt=replace(LEASE.prompt, columns={"xs": (1, (2, 3))}))
    assert why_failed(group(lease=tuples), tuples, NEWEST) is None  # lists on the wire


WRONG = {
    "other_prompt": (group(lease=replace(LEASE, prompt=make_lease(2).prompt)), "other_lease"),
    "other_answer": (
        group(lease=replace(LEASE, prompt=replace(LEASE.prompt, answer="9"))),
        "other_lease",
    ),
    "other_purpose": (group(lease=replace(LEASE, purpose="eval")), "other_lease"),
    "other_version": (group(lease=replace(LEASE, version=1)), "other_lease"),
    "fewer_completions": (make_group(replace(LEASE, group_size=1)), "other_lease"),
    "one_too_many": (make_group(LEASE, versions=[[3]] * 3, scores=[1.0, 0.0, 0.0]), "group_size"),
    "nan_reward": (group(rewards=np.float32([1, np.nan])), "rewards"),
    "infinite_reward": (group(rewards=np.float32([1, np.inf])), "rewards"),
    "no_reward_parts": (group(reward_parts={}), "rewards"),
    "negative_token": (with_completion(token_ids=int32(3, -1, 3)), "tokens"),
    "negative_prompt_token": (group(prompt_token_ids=int32(-5)), "tokens"),
    "too_long": (make_group(LEASE, versions=[[4] * 17, [4]]), "tokens"),
    "from_the_future": (with_completion(versions=int32(4, 5, NEWEST + 1)), "versions"),
    "negative_version": (with_completion(versions=int32(-1, 4, 5)), "versions"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_group_that_does_not_fit_fails_with_its_reason(name):
    wrong, reason = WRONG[name]
    assert why_failed(wrong, LEASE, NEWEST) == reason
    assert f"groups_failed_{reason}" in METRICS


def test_versions_may_fall_and_completions_may_be_empty():
    for spans in ([[5, 5], [3, 4]], [[4, 5, 2], [4]], [[], [4]], [[4], []], [[], []]):
        assert why_failed(make_group(LEASE, versions=spans), LEASE, NEWEST) is None
    assert why_failed(make_group(LEASE, versions=[[], [5, 6]]), LEASE, NEWEST) == "versions"


def test_log_probs_that_are_not_finite_are_left_to_the_learner():
    broken = np.float32([-0.1, np.nan, -np.inf])
    assert why_failed(with_completion(behavior_logprobs=broken), LEASE, NEWEST) is None


def test_an_evaluation_answers_with_its_own_version_only():
    lease = replace(make_lease(3, 1, "eval"), version=2)
    assert why_failed(make_group(lease, versions=[[2, 2]]), lease, NEWEST) is None
    assert why_failed(make_group(lease, versions=[[2, 3]]), lease, NEWEST) == "versions"


def test_a_lease_is_held_by_the_actor_of_that_name():
    held = {"ticket": 1, "lease": LEASE, "packed": b"", "expires_at": 1.0, "turn": None}
    opened = OpenLease(peer="actor-1.17", **held)
    assert is_holder("actor-1.17", opened)
    assert not is_holder("actor-10.17", opened)
    assert not is_holder("actor-0.17", opened)


SENSELESS = {
    "dance": ({}, "unknown kind 'dance'"),
    "hello": ({"actor": ["a"]}, r"hello: actor: Input should be a valid string, not \['a'\]"),
    "hello_of_the_future": (
        {"actor": "a", "version": NEWEST + 1},
        f"hello: version={NEWEST + 1} is not <= {NEWEST}",
    ),
    "hello_with_half_a_list": ({"actor": "a", "leases": ["t1", 2]}, r"hello: leases\.1: Input "),
    "lease": ({"version": 0}, "lease: max: Field required"),
    "held": ({"version": NEWEST + 1}, f"held: version={NEWEST + 1} is not <= {NEWEST}"),
    "accept": ({"lease_ids": "t1", "refused": []}, "accept: lease_ids: Input should be a valid li"),
    "take": ({"step": 0, "rank": 2, "world_size": 2}, "take: rank=2 of 2 is no rank of 2"),
    "trained": ({"step": True}, "trained: step: Input should be a valid integer, not True"),
    "fail": ({"lease_id": "t1", "reason": "bad\nluck"}, r"reason='bad\\nluck' is no reason"),
    "status": ({"actor": "a", "swaps": float("nan")}, "swaps: Input should be a finite number"),
    "begin": ({"step": -1}, "begin: step: Input should be greater than or equal to 0"),
    "bye": ({"actor": None}, "bye: actor: Input should be a valid string, not None"),
    "evaluate": ({"version": 1 << 40}, "evaluate: version: Input should be less than 2147483648"),
}


@pytest.mark.parametrize("name", SENSELESS)
def test_a_request_that_makes_no_sense_is_refused_with_the_field(name):
    fields, message = SENSELESS[name]
    kind = name.partition("_")[0]
    with pytest.raises(WireError, match=message):
        check_request(Packet(kind=kind, fields=fields), newest=NEWEST, num_learners=2)


@pytest.mark.parametrize("world_size", [0, 3, 1 << 30])
def test_a_batch_cannot_be_trained_by_more_ranks_than_there_are(world_size):
    fields = {"step": 0, "world_size": world_size, "covered": 0, "advantages": b""}
    told = Packet(kind="trained", fields=fields)
    with pytest.raises(WireError, match=f"rank=0 of {world_size} is no rank of 2"):
        check_request(told, newest=NEWEST, num_learners=2)


def test_every_request_that_is_acted_upon_has_its_fields_checked():
    for owner, table in ((BufferCore, BUFFER_REQUESTS), (CollectiveSender, WEIGHTS_REQUESTS)):
        actions = {name.removeprefix("_on_") for name in dir(owner) if name.startswith("_on_")}
        assert actions == set(table)


# -- in the buffer --------------------------------------------------------------------------------


@pytest.fixture
def talk() -> Talk:
    """With a buffer that knows actor-0.1."""
    return Talk(buffer={"groups_per_step": 2}).hello("actor-0.1")


def test_a_changed_prompt_is_never_stored_and_its_lease_fails(talk):
    lease, other = talk.lease("actor-0.1", 2)
    changed = replace(lease, prompt=replace(lease.prompt, answer="anything"))
    assert talk.put("actor-0.1", make_group(changed)) == "failed"
    assert talk.put("actor-0.1", make_group(other)) == "stored"
    metrics = talk.core.metrics()
    assert (metrics["groups_failed_other_lease"], metrics["leases_failed"]) == (1, 1)
    assert metrics["buffer_groups"] == 1


def test_groups_of_others_and_groups_that_come_twice_change_nothing(talk):
    lease, _ = talk.lease("actor-0.1", 2)
    assert talk.put("actor-1.1", make_group(lease)) == "unknown"
    assert talk.core.metrics()["leases_open"] == 2
    assert talk.put("actor-0.1", make_group(lease)) == "stored"
    assert talk.put("actor-0.1", make_group(lease)) == "unknown"
    metrics = talk.core.metrics()
    assert metrics["groups_ignored_other_actor"] == metrics["groups_ignored_late"] == 1
    assert metrics["groups_arrived"] == metrics["buffer_groups"] == 1


def test_a_group_of_an_earlier_life_of_the_actor_is_ignored(talk):
    lease, _ = talk.lease("actor-0.1", 2)
    talk.hello("actor-0.2")
    assert talk.put("actor-0.1", make_group(lease)) == "unknown"
    assert talk.core.metrics()["leases_expired"] == 2
    assert talk.core.metrics()["buffer_groups"] == 0


def test_work_of_a_learner_that_went_back_to_a_checkpoint_is_let_in(talk):
    talk.core.step = 6
    sampled_before, sampled_across = talk.lease(
        "actor-0.1", 2
    )  # under way while version 7 is the newest
    talk.core.step = 2
    assert talk.put("actor-0.1", make_group(sampled_before, versions=[[6, 7], [7]])) == "stored"
    assert talk.put("actor-0.1", make_group(sampled_across, versions=[[7, 7, 2], [2]])) == "stored"
    lease, *_ = talk.lease("actor-0.1", 2, version=7)  # it has not got the older weights yet
    assert (
        talk.put("actor-0.1", make_group(lease, versions=[[8], [8]])) == "failed"
    )  # there never was any


@pytest.mark.parametrize("kind", sorted(set(BUFFER_REQUESTS) - {"results", "stop", "summary"}))
def test_half_a_request_leaves_no_trace(talk, kind):
    before = talk.core.metrics()
    answers = talk.replies("actor-0.1", kind)
    assert [(peer, answer.kind) for peer, answer in answers] == [("actor-0.1", "refused")]
    assert talk.core.tick(1.0) == []
    assert talk.core.metrics() == before


def test_a_refusal_is_short_however_long_the_request(talk):
    for kind, fields in (("z" * 10_000, {}), ("hello", {"actor": "y" * 10_000})):
        (answer,) = talk.ask("x", kind, **fields)
        assert len(answer.fields["reason"]) <= 300
