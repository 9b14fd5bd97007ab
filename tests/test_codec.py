"""The wire format: what goes in comes out, and garbage is refused."""

from __future__ import annotations

import tracemalloc
import zlib
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from fakes import make_group, make_lease

from asyncgrpo.errors import SchemaMismatch, WireError
from asyncgrpo.types import Shard
from asyncgrpo.wire.codec import (
    MAGIC,
    MAX_ARRAYS,
    MAX_FULL_FRAMES,
    PREFIX,
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


def sealed(header, *frames):
    """Frames with a right prefix around whatever header."""
    if not isinstance(header, bytes):
        *rest, specs = header
        sums = [zlib.crc32(frame) for frame in frames] or [0] * 9
        if isinstance(specs, list):
            specs = [[*spec, checksum] for spec, checksum in zip(specs, sums, strict=False)]
        header = msgpack.packb([*rest, specs])
    return [PREFIX.pack(MAGIC, SCHEMA, zlib.crc32(header)) + header, *frames]


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
        [b"AG"],
        [b"\xc1 is no msgpack and has no prefix"],
        sealed(b"\xc1"),
        sealed(["put", 0, {}]),
        sealed([7, 0, {}, []]),
        sealed(["put", True, {}, []]),
        sealed(["put", 0, [], []]),
        sealed(["put", 0, {}, [["int32", [2]]]]),
        sealed(["put", 0, {}, [["int32", [2]]]], b"123"),
        sealed(["put", 0, {}, [["object", [1]]]], b"12345678"),
        sealed(["put", 0, {}, [[["int32"], [1]]]], b"1234"),
        sealed(["put", 0, {}, [["int32", [-1]]]], b""),
        sealed(["put", 0, {}, [["int32", 5]]], b""),
        sealed(["put", 0, {}, [["int32", [True]]]], b"1234"),
        sealed(["put", 0, {}, [["bool", [0, 1 << 30, 1 << 30, 1 << 30]]]], b""),
        sealed(["put", 0, {}, [["bool", [1 << 31, 0]]]], b""),
        sealed(["put", 0, {}, [["bool", [1] * 5]]], b"1"),
        sealed(["put", 0, {}, [["bool", [1 << 62] * 100_000]]], b"1"),
        sealed(msgpack.packb(msgpack.ExtType(5, b"code"))),
    ],
)
def test_malformed_frames_are_refused(frames):
    with pytest.raises(WireError):
        decode(frames)


def test_a_wrong_schema_number_is_named():
    (header,) = encode(Packet(kind="put"))
    other = header[:2] + bytes([SCHEMA + 1]) + header[3:]
    with pytest.raises(SchemaMismatch, match=f"schema {SCHEMA + 1} is not {SCHEMA}"):
        decode([other])


@pytest.mark.parametrize(
    "announced",
    [
        b"\xdd\xff\xff\xff\xff",  # a list of 2^32 - 1 items
        b"\xdf\xff\xff\xff\xff",  # a mapping
        b"\xdb\xff\xff\xff\xff",  # a text
        b"\xc6\xff\xff\xff\xff",  # bytes
        b"\xc9\xff\xff\xff\xff\x01",  # an extension
        b"\xdc\xff\xff" * 300,  # lists of 65535 lists of 65535 ...
        b"\x91" * 100_000,  # lists in lists in lists
    ],
)
def test_sizes_that_are_only_announced_allocate_nothing(announced):
    tracemalloc.start()
    with pytest.raises(WireError) as caught:
        decode(sealed(announced))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 << 20
    assert len(str(caught.value)) < 200


def test_what_is_too_large_is_refused_by_both_sides():
    packet = Packet(kind="put", arrays=(np.zeros(100, dtype=np.int32),) * 3)
    for limit in (399, 1200 // MAX_FULL_FRAMES):
        with pytest.raises(WireError, match="over the limit"):
            encode(packet, limit)
        with pytest.raises(WireError, match="over the limit"):
            decode(encode(packet), limit)
    assert len(decode(encode(packet, 400), 400).arrays) == 3
    with pytest.raises(
        WireError, match=rf"{MAX_ARRAYS + 2} frames, .* over the limit of {MAX_ARRAYS + 1}"
    ):
        decode([*encode(Packet(kind="x")), *[b""] * (MAX_ARRAYS + 1)])


def test_a_group_with_arrays_of_other_types_or_fields_is_refused():
    packet = group_packet("put", [make_group(make_lease(1))])
    for place, array in enumerate(packet.arrays):
        for wrong in (array.astype(np.float64), array[None]):
            arrays = (*packet.arrays[:place], wrong, *packet.arrays[place + 1 :])
            with pytest.raises(WireError, match="other dtypes or dimensions"):
                groups_from(Packet(kind="put", fields=packet.fields, arrays=arrays))
    (fields,) = packet.fields["groups"]
    for key in fields:
        for junk in (None, 7, [None], {"x": []}):
            changed = {"groups": [{**fields, key: junk}]}
            with pytest.raises(WireError):
                groups_from(Packet(kind="put", fields=changed, arrays=packet.arrays))


def test_what_msgpack_cannot_carry_is_refused_by_name():
    with pytest.raises(WireError, match="'put'"):
        encode(Packet(kind="put", fields={"x": object()}))
    with pytest.raises(WireError, match="complex128"):
        encode(Packet(kind="put", arrays=(np.zeros(1, dtype=np.complex128),)))


def test_a_group_that_came_goes_on_with_the_frames_and_fields_it_came_with():
    came = encode(group_packet("put", [make_group(make_lease(1))]))
    (described,) = decode(came).fields["groups"]
    packet = decode(came)
    packet = replace(packet, fields={"groups": [{**described, "unknown": "field"}]})
    (group,) = groups_from(packet)
    sent = encode(group_packet("shard", [group]))
    assert all(one is other for one, other in zip(sent[1:], came[1:], strict=True))
    assert decode(sent).fields["groups"] == [described]
    (other,) = groups_from(decode(encode(group_packet("shard", [replace(group, actor="other")]))))
    assert other.actor == "other"


def test_each_damaged_bit_of_any_frame_is_seen():
    frames = encode(group_packet("put", [make_group(make_lease(1))]))
    for place, frame in enumerate(frames):
        for bit in (0, 8 * len(frame) // 2, 8 * len(frame) - 1):
            damaged = bytearray(frame)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(WireError):
                decode([*frames[:place], bytes(damaged), *frames[place + 1 :]])
