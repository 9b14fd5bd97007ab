"""The wire format: what goes in comes out, and garbage is refused."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from fakes import make_group, make_lease
from hypothesis import given
from hypothesis import strategies as st

from asyncgrpo.errors import WireError
from asyncgrpo.types import Shard
from asyncgrpo.wire.codec import (
    SCHEMA,
    Packet,
    decode,
    encode,
    group_packet,
    groups_from,
    lease_fields,
    lease_from,
    shard_from,
    shard_packet,
)


def same_group(one, other):
    assert one.lease == other.lease
    assert one.actor == other.actor
    assert one.timings == other.timings
    assert np.array_equal(one.prompt_token_ids, other.prompt_token_ids)
    assert np.array_equal(one.rewards, other.rewards)
    assert {n: p.tolist() for n, p in one.reward_parts.items()} == {
        n: p.tolist() for n, p in other.reward_parts.items()
    }
    for mine, theirs in zip(one.completions, other.completions, strict=True):
        assert mine.finish_reason == theirs.finish_reason
        assert mine.text == theirs.text
        for name in ("token_ids", "behavior_logprobs", "versions"):
            assert getattr(mine, name).dtype == getattr(theirs, name).dtype
            assert np.array_equal(getattr(mine, name), getattr(theirs, name))


def test_a_lease_survives_the_wire():
    lease = make_lease(3)
    packet = decode(encode(Packet(kind="leases", fields={"leases": [lease_fields(lease)]})))
    assert lease_from(packet.fields["leases"][0]) == lease


@pytest.mark.parametrize("size", [1, 2, 8])
def test_groups_survive_the_wire_with_all_their_tokens(size):
    groups = [make_group(make_lease(i, size)) for i in range(3)]
    returned = groups_from(decode(encode(group_packet("put", groups))))
    assert len(returned) == 3
    for one, other in zip(groups, returned, strict=True):
        same_group(one, other)


def test_an_empty_completion_survives_the_wire():
    group = make_group(make_lease(1), versions=[[], [0, 0]])
    (returned,) = groups_from(decode(encode(group_packet("put", [group]))))
    same_group(group, returned)


def test_a_shard_survives_the_wire():
    shard = Shard(
        step=4,
        groups=(make_group(make_lease(1)),),
        num_loss_tokens_global=99,
        num_completions_global=12,
    )
    returned = shard_from(decode(encode(shard_packet(shard))))
    assert (returned.step, returned.num_loss_tokens_global) == (4, 99)
    same_group(shard.groups[0], returned.groups[0])


def test_nan_rewards_of_functions_that_do_not_apply_survive_the_wire():
    group = make_group(make_lease(1), scores=[1.0, float("nan")])
    (returned,) = groups_from(decode(encode(group_packet("put", [group]))))
    assert np.isnan(returned.rewards).tolist() == [False, True]


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"\xc1"],
        [msgpack.packb([SCHEMA + 1, "put", 0, {}, []])],
        [msgpack.packb([SCHEMA, "put", 0, {}])],
        [msgpack.packb([SCHEMA, 7, 0, {}, []])],
        [msgpack.packb([SCHEMA, "put", 0, {}, [["int32", [2]]]])],
        [msgpack.packb([SCHEMA, "put", 0, {}, [["int32", [2]]]]), b"123"],
        [msgpack.packb([SCHEMA, "put", 0, {}, [["object", [1]]]]), b"12345678"],
        [msgpack.packb([SCHEMA, "put", 0, {}, [["int32", [-1]]]]), b""],
        [msgpack.packb([SCHEMA, "put", 0, {}, [["int32", 5]]]), b""],
    ],
)
def test_malformed_frames_are_refused(frames):
    with pytest.raises(WireError):
        decode(frames)


def test_a_wrong_schema_number_is_named():
    with pytest.raises(WireError, match=f"schema {SCHEMA + 1} is not {SCHEMA}"):
        decode([msgpack.packb([SCHEMA + 1, "put", 0, {}, []])])


@given(st.data())
def test_mutated_frames_never_do_anything_but_raise_wire_errors(data):
    frames = [
        bytearray(frame) for frame in encode(group_packet("put", [make_group(make_lease(1))]))
    ]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = frames[data.draw(st.integers(0, len(frames) - 1))]
        if frame:
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        groups = groups_from(decode([bytes(frame) for frame in frames]))
    except WireError:
        return
    assert len(groups) == 1
    assert sum(len(c.token_ids) for c in groups[0].completions) == len(frames[3]) // 4


def test_what_msgpack_cannot_carry_is_refused_by_name():
    with pytest.raises(WireError, match="'put'"):
        encode(Packet(kind="put", fields={"x": object()}))
    with pytest.raises(WireError, match="complex128"):
        encode(Packet(kind="put", arrays=(np.zeros(1, dtype=np.complex128),)))
