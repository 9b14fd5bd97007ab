"""The wire format: what goes in comes out, and garbage is refused."""

from __future__ import annotations

import struct
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
    MAX_FRAMES,
    MAX_FULL_FRAMES,
    PREFIX,
    SCHEMA,
    SIZES,
    Packet,
    checked,
    decode,
    encode,
    group_from,
    group_packet,
    groups_from,
    lease_from,
    pack_group,
    pack_lease,
    shard_from,
    shard_packet,
)


def framed(header, *frames, sums=None):
    """Frames with a right prefix and right checksums around whatever header."""
    if not isinstance(header, bytes):
        *rest, last = header
        sums = list(map(zlib.crc32, frames)) if sums is None else sums
        header = msgpack.packb([*rest, last and sums])
    return [PREFIX.pack(MAGIC, SCHEMA, zlib.crc32(header)) + header, *frames]


def group_frame(sizes=(4, 2, 5, 1), numbers=None, cut=None, **changes):
    """The frame of a group of completions of 2 and 3 tokens, perhaps a wrong one."""
    frame, _ = pack_group(make_group(make_lease(1)))
    start = SIZES.size + 4 * (4 + 2 * 2 + 3 * 5 + 2)
    head = {**msgpack.unpackb(frame[start:]), **changes}
    body = bytearray(frame[SIZES.size : start])
    for place, value in (numbers or {}).items():
        struct.pack_into("<i", body, 4 * place, value)
    whole = SIZES.pack(*sizes) + body + msgpack.packb(head)
    return whole[:cut], zlib.crc32(whole[:cut])


EMPTY = {
    "lease": pack_lease(make_lease(1)),
    **{"finish_reasons": [], "texts": [], "reward_parts": [], "actor": "a", "timings": {}},
}


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
    packet = decode(encode(Packet(kind="leases", fields={"leases": [pack_lease(lease)]})))
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
        framed(b"\xc1"),
        framed(["put", 0, {}]),
        framed([7, 0, {}, [0]]),
        framed(["put", True, {}, [0]]),
        framed(["put", 0, [], [0]]),
        framed(["put", 0, {}, [0]], sums=[5]),
        framed(["put", 0, {}, [0]], b"123", sums=[]),
        framed(["put", 0, {}, [0]], b"123", sums=7),
        framed(["put", 0, {}, [0]], b"123", sums=[None]),
        framed(["put", 0, {}, [0]], b"123", sums=[zlib.crc32(b"12")]),
        framed(msgpack.packb(msgpack.ExtType(5, b"code"))),
    ],
)
def test_malformed_frames_are_refused(frames):
    with pytest.raises(WireError):
        decode(frames)


def test_the_frame_that_malformed_groups_are_made_of_is_right():
    assert [len(each.token_ids) for each in group_from(group_frame()).completions] == [2, 3]


@pytest.mark.parametrize(
    "sealed",
    [
        (b"", 0),
        (SIZES.pack(4, 2, 5, 1), 0),  # nothing but sizes
        (SIZES.pack(0, 0, 0, 0) + msgpack.packb(EMPTY), 0),  # no completion
        group_frame(sizes=(4, 2, 6, 1)),
        group_frame(sizes=(4, 2, 4, 1)),
        group_frame(sizes=(2, 3, 5, 1)),  # as many numbers, other completions
        group_frame(sizes=(4, 2, 5, (1 << 32) - 1)),
        group_frame(sizes=((1 << 32) - 1,) * 4),
        group_frame(numbers={4: 1}),  # lengths of 1 and 3, of 5 tokens
        group_frame(numbers={4: -1, 5: 6}),
        group_frame(cut=-1),
        group_frame(finish_reasons=["stop"]),
        group_frame(finish_reasons=["stop", "tired"]),
        group_frame(texts=["7"] * 3),
        group_frame(reward_parts=[]),
        group_frame(reward_parts=["task", "task"]),
        group_frame(sizes=(2, 2, 5, 2), reward_parts=["task", "task"]),
        group_frame(lease=b""),
        group_frame(lease=msgpack.packb({})),
        group_frame(lease=pack_lease(replace(make_lease(1), lease_id=1 << 63))),
        group_frame(lease=msgpack.packb([])),
        group_frame(unknown="field"),
        *(
            group_frame(**{key: junk})
            for key in ("lease", "finish_reasons", "texts", "reward_parts", "actor", "timings")
            for junk in (None, 7, [None], {"x": []})
        ),
    ],
)
def test_a_frame_that_is_no_group_is_refused(sealed):
    with pytest.raises(WireError):
        group_from(sealed)


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
        decode(framed(announced))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 << 20
    assert len(str(caught.value)) < 200


def test_what_is_too_large_is_refused_by_both_sides():
    packet = Packet(kind="put", frames=(checked(bytes(400), zlib.crc32(bytes(400))),) * 3)
    for limit in (399, 1200 // MAX_FULL_FRAMES):
        with pytest.raises(WireError, match="over the limit"):
            encode(packet, limit)
        with pytest.raises(WireError, match="over the limit"):
            decode(encode(packet), limit)
    assert len(decode(encode(packet, 700), 700).frames) == 3
    with pytest.raises(
        WireError, match=rf"{MAX_FRAMES + 1} frames, .* over the limit of {MAX_FRAMES}"
    ):
        decode([*encode(Packet(kind="x")), *[b""] * MAX_FRAMES])


def test_what_msgpack_cannot_carry_is_refused_by_name():
    with pytest.raises(WireError, match=r"'put'.* cannot be sent: can not serialize 'object'"):
        encode(Packet(kind="put", fields={"x": object()}))


def test_a_group_that_came_goes_on_in_the_frame_it_came_in():
    came = encode(group_packet("put", [make_group(make_lease(1))]))
    (group,) = groups_from(decode(came))
    sent = encode(group_packet("shard", [group]))
    assert sent[1] is came[1]
    (other,) = groups_from(decode(encode(group_packet("shard", [replace(group, actor="other")]))))
    assert other.actor == "other"


def test_the_same_lease_is_always_the_same_bytes_and_may_be_looked_up_by_them():
    group = make_group(make_lease(1))
    packet = decode(encode(group_packet("put", [group])))
    known = {pack_lease(make_lease(number)): make_lease(number) for number in range(3)}
    (read,) = groups_from(packet, known.__getitem__)
    assert read.lease is known[pack_lease(group.lease)]
    assert pack_lease(lease_from(pack_lease(group.lease))) == pack_lease(group.lease)


def test_each_damaged_bit_of_any_frame_is_seen():
    frames = encode(group_packet("put", [make_group(make_lease(1))]))
    for place, frame in enumerate(frames):
        for bit in (0, 8 * len(frame) // 2, 8 * len(frame) - 1):
            damaged = bytearray(frame)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(WireError):
                decode([*frames[:place], bytes(damaged), *frames[place + 1 :]])
