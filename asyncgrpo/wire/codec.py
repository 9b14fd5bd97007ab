"""Packets as frames: one header with a schema number and a checksum, one frame per group.

    frame 0   b"AG", SCHEMA, CRC-32 of the rest of this frame, which is
              msgpack [kind, request_id, fields, [CRC-32 of frame 1, ...]]
    frame i   a group: P, G, T, R as uint32; numbers of 4 bytes: prompt ids [P], lengths [G], token
              ids, log-probs, versions [T], rewards [G], reward parts [R, G]; msgpack {the rest}

Little endian. Sizes and checksums are checked before anything is built from a frame: what was
damaged on its way is never taken for what was sent. A group that came goes on in the frame in which
it came. Nothing here can execute code: no pickle, no object hooks.
"""

from __future__ import annotations

import reprlib
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import msgpack
import numpy as np

from asyncgrpo.errors import SchemaMismatch, WireError
from asyncgrpo.types import Completions, Group, Lease, Prompt, Sampling, Shard
from asyncgrpo.wire.schema import GROUP, check_fields

MAGIC, SCHEMA = b"AG", 4
PREFIX, SIZES = struct.Struct("<2sBI"), struct.Struct("<4I")
# The largest request is one group: 512 completions of 32k tokens are 192 MiB. The largest answer is
# a rank's shard, a frame per group. No message is longer than two of the longest frames.
MAX_REQUEST_FRAME_BYTES, MAX_ANSWER_FRAME_BYTES, MAX_FULL_FRAMES = 256 << 20, 4 << 30, 2
MAX_FRAMES = 1 << 16
MAX_ITEMS = 1 << 18  # of one list or mapping in a header; msgpack itself nests 1024 deep at most
LEASE_FIELDS = [name for name in Lease.__slots__ if name not in ("prompt", "sampling")]
SHARD_FIELDS = [name for name in Shard.__slots__ if name != "groups"]
LEASE = attrgetter(*LEASE_FIELDS)
PROMPT, SAMPLING = attrgetter(*Prompt.__slots__), attrgetter(*Sampling.__slots__)
INT, FLOAT = np.dtype("<i4"), np.dtype("<f4")

Frame = bytes | memoryview
Sealed = tuple[Frame, int]  # a group's frame and its checksum


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """One message. `fields` holds only what msgpack knows; each frame is a group."""

    kind: str
    request_id: int = 0  # answers carry the id of their request; 0 = pushed, not asked for
    fields: Mapping[str, Any] = field(default_factory=dict)
    frames: tuple[Sealed, ...] = ()


def encode(packet: Packet, max_frame_bytes: int = MAX_ANSWER_FRAME_BYTES) -> list[Frame]:
    """Frames of a packet; WireError when a field or size cannot travel."""
    sums = [checksum for _, checksum in packet.frames]
    body = _packed([packet.kind, packet.request_id, packet.fields, sums])
    prefix = PREFIX.pack(MAGIC, SCHEMA, zlib.crc32(body))
    frames = [prefix + body, *(frame for frame, _ in packet.frames)]
    _check_sizes(frames, max_frame_bytes)
    return frames


def decode(frames: Sequence[Frame], max_frame_bytes: int = MAX_ANSWER_FRAME_BYTES) -> Packet:
    """The packet of some frames; WireError when they do not follow the schema."""
    _check_sizes(frames, max_frame_bytes)
    if not frames or len(frames[0]) < PREFIX.size:
        raise WireError("a message without a header")
    magic, schema, checksum = PREFIX.unpack_from(frames[0])
    if magic != MAGIC:
        raise WireError("not a message of asyncgrpo")
    if schema != SCHEMA:
        raise SchemaMismatch(f"schema {schema} is not {SCHEMA}; both sides need the same version")
    body = memoryview(frames[0])[PREFIX.size :]
    checked(body, checksum)
    header = _unpacked(body)
    if not isinstance(header, list) or len(header) != 4:
        raise WireError("header is not [kind, request id, fields, checksums]")
    kind, request_id, fields, sums = header
    if not (isinstance(kind, str) and type(request_id) is int and isinstance(fields, dict)):
        raise WireError("header fields have wrong types")
    if not isinstance(sums, list) or len(sums) != len(frames) - 1:
        raise WireError(f"header announces other frames than the {len(frames) - 1} sent")
    sealed = tuple(map(checked, frames[1:], sums))
    return Packet(kind=kind, request_id=request_id, fields=fields, frames=sealed)


def checked(frame: Frame, checksum: Any) -> Sealed:
    """A frame and its checksum; WireError when it is another frame's."""
    actual = zlib.crc32(frame)
    if actual != checksum:
        raise WireError("a message was damaged on its way (checksum)")
    return frame, actual


def _check_sizes(frames: Sequence[Frame], max_frame_bytes: int) -> None:
    sizes = [len(frame) for frame in frames]
    total, most = sum(sizes), MAX_FULL_FRAMES * max_frame_bytes
    largest = max(sizes, default=0)
    if largest > max_frame_bytes or total > most or len(sizes) > MAX_FRAMES:
        raise WireError(
            f"a message of {len(sizes)} frames, {total} bytes in all and {largest} in one, is over "
            f"the limit of {MAX_FRAMES} frames, {most} bytes in all and {max_frame_bytes} in one"
        )


def _packed(value: Any) -> bytes:
    try:
        return bytes(msgpack.packb(value))
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"{reprlib.repr(value)} cannot be sent: {error}") from error


def _unpacked(body: Frame) -> Any:
    items = min(MAX_ITEMS, len(body))  # msgpack makes room for as many as are announced
    try:
        return msgpack.unpackb(
            body, strict_map_key=False, max_array_len=items, max_map_len=items, max_ext_len=0
        )
    except Exception as error:  # msgpack raises many kinds on garbage
        raise WireError(f"not msgpack: {reprlib.repr(str(error))}") from None


def pack_lease(lease: Lease) -> bytes:
    """A lease for `Packet.fields`; the same lease is always the same bytes."""
    return _packed([LEASE(lease), PROMPT(lease.prompt), SAMPLING(lease.sampling)])


def lease_from(packed: bytes) -> Lease:
    """The lease of `pack_lease`; WireError when something is missing or superfluous."""
    try:
        rest, asked, drawn = _unpacked(packed)
        prompt = dict(zip(Prompt.__slots__, asked, strict=True))
        prompt["messages"] = tuple(prompt["messages"])
        sampling = Sampling(**dict(zip(Sampling.__slots__, drawn, strict=True)))
        fields = dict(zip(LEASE_FIELDS, rest, strict=True))
        if not isinstance(fields["lease_id"], str):
            raise ValueError("its lease_id is no text")
        return Lease(**fields, prompt=Prompt(**prompt), sampling=sampling)
    except (TypeError, ValueError) as error:
        raise WireError(f"not a lease: {error}") from None


def group_packet(kind: str, groups: Sequence[Group], **fields: Any) -> Packet:
    """A packet that carries whole groups beside its own fields."""
    return Packet(kind=kind, fields=fields, frames=tuple(map(pack_group, groups)))


def groups_from(
    packet: Packet, read_lease: Callable[[bytes], Lease] = lease_from
) -> tuple[Group, ...]:
    """The groups of a `group_packet`; WireError when one does not follow the schema."""
    return tuple(group_from(sealed, read_lease) for sealed in packet.frames)


def shard_packet(shard: Shard) -> Packet:
    """The answer to a learner rank that asked for its part of a step."""
    return group_packet("shard", shard.groups, **{n: getattr(shard, n) for n in SHARD_FIELDS})


def shard_from(packet: Packet) -> Shard:
    """The shard of a `shard_packet`."""
    try:
        return Shard(groups=groups_from(packet), **packet.fields)
    except TypeError as error:
        raise WireError(f"packet {packet.kind!r} is not a shard: {error}") from None


def pack_group(group: Group) -> Sealed:
    """The frame of a group, with its checksum; of one that came the same again."""
    if group.received:
        sealed: Sealed = group.received
        return sealed
    tokens, parts = group.completions, group.reward_parts
    head = {
        "lease": pack_lease(group.lease),
        "finish_reasons": tokens.finish_reasons,
        "texts": tokens.texts,
        "reward_parts": list(parts),
        "actor": group.actor,
        "timings": dict(group.timings),
    }
    numbers = (
        *((INT, group.prompt_token_ids), (INT, tokens.lengths), (INT, tokens.token_ids)),
        *((FLOAT, tokens.behavior_logprobs), (INT, tokens.versions), (FLOAT, group.rewards)),
        *((FLOAT, part) for part in parts.values()),
    )
    sizes = SIZES.pack(len(group.prompt_token_ids), len(tokens), group.num_tokens, len(parts))
    arrays = [np.ascontiguousarray(values, dtype).data for dtype, values in numbers]
    frame = b"".join((sizes, *arrays, _packed(head)))
    return frame, zlib.crc32(frame)


def group_from(sealed: Sealed, read_lease: Callable[[bytes], Lease] = lease_from) -> Group:
    """The group of `pack_group`, whose arrays are views of the frame."""
    frame, _ = sealed
    if len(frame) < SIZES.size:
        raise WireError(f"{len(frame)} bytes are not a group")
    num_prompt, size, total, num_parts = SIZES.unpack_from(frame)
    count = num_prompt + size + 3 * total + size + num_parts * size
    end = SIZES.size + INT.itemsize * count
    if end > len(frame) or not size:
        raise WireError(f"{len(frame)} bytes announce {size} completions and {count} numbers")
    head = _unpacked(memoryview(frame)[end:])
    check_fields("group", head, GROUP)
    numbers = np.frombuffer(frame, INT, count, SIZES.size)
    floats = numbers.view(FLOAT)
    first, last = num_prompt + size, num_prompt + size + 3 * total
    parts, names = floats[last + size :].reshape(num_parts, size), head["reward_parts"]
    try:
        group = Group(
            lease=read_lease(head["lease"]),
            prompt_token_ids=numbers[:num_prompt],
            completions=Completions(
                numbers[num_prompt:first].tolist(),
                numbers[first : first + total],
                floats[first + total : last - total],
                numbers[last - total : last],
                head["finish_reasons"],
                head["texts"],
            ),
            rewards=floats[last : last + size],
            reward_parts=dict(zip(names, parts, strict=True)),
            actor=head["actor"],
            timings=head["timings"],
        )
    except ValueError as error:
        raise WireError(f"not a group: {error}") from None
    if len(group.reward_parts) != num_parts:
        raise WireError("a group has two reward parts of one name")
    object.__setattr__(group, "received", sealed)
    return group
