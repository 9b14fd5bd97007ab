"""Packets as frames: one header with a schema number and a checksum, one raw frame per array.

    frame 0   b"AG", SCHEMA, CRC-32 of the rest of this frame, which is
              msgpack [kind, request_id, fields, [[dtype, shape, CRC-32 of the frame], ...]]
    frame i   the bytes of array i, C order, little endian

Sizes and checksums are checked before anything is built from a frame: what was damaged on its way
is never taken for what was sent. A group that came keeps its frames and their checksums, and goes
on as it came. Nothing here can execute code: no pickle, no object hooks.
"""

from __future__ import annotations

import math
import reprlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import msgpack
import numpy as np

from asyncgrpo.errors import SchemaMismatch, WireError
from asyncgrpo.types import Completion, Group, Lease, Prompt, Sampling, Shard
from asyncgrpo.wire.schema import GROUP, check_fields

MAGIC, SCHEMA = b"AG", 2
PREFIX = struct.Struct("<2sBI")
# The largest request is one group: 512 completions of 32k tokens are 64 MiB per array. The largest
# answer is a rank's shard, whose header holds all its texts. No message has over 8 full frames.
MAX_REQUEST_FRAME_BYTES, MAX_ANSWER_FRAME_BYTES, MAX_FULL_FRAMES = 64 << 20, 1 << 30, 8
MAX_ARRAYS, MAX_DIMENSIONS, MAX_SIZE = 1 << 16, 4, 1 << 31
MAX_ITEMS = 1 << 18  # of one list or mapping in a header; msgpack itself nests 1024 deep at most
DTYPES = {name: np.dtype(name) for name in ("int32", "int64", "float32", "float64", "bool")}
KNOWN_NAMES = tuple(DTYPES)  # a list can be looked up in it
NAMES = {dtype: name for name, dtype in DTYPES.items()}  # a dtype's own name is slow to make
# prompt ids, lengths, token ids, log-probs, versions, rewards, reward parts: dtype, dimensions
INT, FLOAT = DTYPES["int32"], DTYPES["float32"]
GROUP_ARRAYS = ((INT, 1), (INT, 1), (INT, 1), (FLOAT, 1), (INT, 1), (FLOAT, 1), (FLOAT, 2))
ARRAYS_PER_GROUP = len(GROUP_ARRAYS)

Frame = bytes | memoryview
Sealed = tuple[Frame, int]  # an array's frame and its checksum
# of one group: fields, arrays, and these as frames
Part = tuple[dict[str, Any], tuple[np.ndarray[Any, Any], ...], tuple[Sealed, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """One message. `fields` holds only what msgpack knows; `arrays` are numpy arrays."""

    kind: str
    request_id: int = 0  # answers carry the id of their request; 0 = pushed, not asked for
    fields: Mapping[str, Any] = field(default_factory=dict)
    arrays: tuple[np.ndarray[Any, Any], ...] = ()
    sealed: tuple[Sealed, ...] = ()  # the arrays as they came; empty: they are made here


def encode(packet: Packet, max_frame_bytes: int = MAX_ANSWER_FRAME_BYTES) -> list[Frame]:
    """Frames of a packet; WireError when a field, dtype or size cannot travel."""
    sealed = packet.sealed or tuple(map(_seal, packet.arrays))
    specs = [
        [NAMES[array.dtype], array.shape, checksum]
        for array, (_, checksum) in zip(packet.arrays, sealed, strict=True)
    ]
    header = [packet.kind, packet.request_id, packet.fields, specs]
    try:
        body = msgpack.packb(header, use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(
            f"packet {packet.kind!r} holds a field that cannot be sent: {error}"
        ) from error
    prefix = PREFIX.pack(MAGIC, SCHEMA, zlib.crc32(body))
    frames = [prefix + body, *(frame for frame, _ in sealed)]
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
    _check_sum(body, checksum)
    return _packet(body, frames[1:])


def _seal(array: np.ndarray[Any, Any]) -> Sealed:
    if array.dtype not in NAMES:
        allowed = ", ".join(DTYPES)
        raise WireError(f"array of dtype {array.dtype} cannot be sent; allowed: {allowed}")
    frame = np.ascontiguousarray(array).tobytes()
    return frame, zlib.crc32(frame)


def _check_sum(frame: Frame, checksum: int) -> None:
    if zlib.crc32(frame) != checksum:
        raise WireError("a message was damaged on its way (checksum)")


def _check_sizes(frames: Sequence[Frame], max_frame_bytes: int) -> None:
    largest, total = max(map(len, frames), default=0), sum(map(len, frames))
    limits = (max_frame_bytes, MAX_FULL_FRAMES * max_frame_bytes, MAX_ARRAYS + 1)
    if any(size > limit for size, limit in zip((largest, total, len(frames)), limits, strict=True)):
        raise WireError(
            f"a message of {len(frames)} frames, {total} bytes in all and {largest} in one, is "
            f"over the limit of {limits[2]} frames, {limits[1]} bytes in all and {limits[0]} in one"
        )


def _packet(body: Frame, frames: Sequence[Frame]) -> Packet:
    items = min(MAX_ITEMS, len(body))  # msgpack makes room for as many as are announced
    limits = {"max_array_len": items, "max_map_len": items, "max_ext_len": 0}
    try:
        header = msgpack.unpackb(body, raw=False, strict_map_key=False, **limits)
    except Exception as error:  # msgpack raises many kinds on garbage
        raise WireError(f"header is not msgpack: {reprlib.repr(str(error))}") from None
    if not isinstance(header, list) or len(header) != 4:
        raise WireError("header is not [kind, request id, fields, arrays]")
    kind, request_id, fields, specs = header
    if not (isinstance(kind, str) and type(request_id) is int and isinstance(fields, dict)):
        raise WireError("header fields have wrong types")
    if not isinstance(specs, list) or len(specs) != len(frames):
        raise WireError(f"header announces other arrays than the {len(frames)} frames sent")
    arrays = tuple(map(_array, specs, frames))
    sealed = tuple((frame, int(spec[2])) for frame, spec in zip(frames, specs, strict=True))
    return Packet(kind=kind, request_id=request_id, fields=fields, arrays=arrays, sealed=sealed)


def _array(spec: Any, frame: Frame) -> np.ndarray[Any, Any]:
    if not isinstance(spec, list) or len(spec) != 3 or spec[0] not in KNOWN_NAMES:
        raise WireError(f"array spec {reprlib.repr(spec)} is not [dtype, shape, checksum]")
    name, shape, checksum = spec
    _check_sum(frame, checksum)
    if not (
        isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size < MAX_SIZE for size in shape)
    ):
        raise WireError(f"array shape {reprlib.repr(shape)} is not a list of sizes")
    dtype = DTYPES[name]
    if math.prod(shape) * dtype.itemsize != len(frame):
        raise WireError(f"array {name} {shape} needs other than the {len(frame)} bytes sent")
    try:
        return np.ndarray(shape, dtype, frame)
    except ValueError as error:  # such as [0, 2^30, 2^30, 2^30]: empty, but too large for numpy
        raise WireError(f"array {name} {shape}: {error}") from None


def to_bytes(packet: Packet) -> bytes:
    """A packet as one piece, for a file."""
    return bytes(msgpack.packb(encode(packet)))


def from_bytes(data: bytes) -> Packet:
    """The packet of `to_bytes`; WireError when the bytes are damaged."""
    try:
        return decode(msgpack.unpackb(data))
    except Exception as error:  # msgpack raises many kinds on garbage
        raise WireError(f"{len(data)} stored bytes are not a packet: {error}") from None


def lease_fields(lease: Lease) -> dict[str, Any]:
    """A lease as plain values for `Packet.fields`."""
    fields = {name: getattr(lease, name) for name in Lease.__slots__}
    fields["sampling"] = {name: getattr(lease.sampling, name) for name in Sampling.__slots__}
    fields["prompt"] = {name: getattr(lease.prompt, name) for name in Prompt.__slots__}
    return fields


def lease_from(fields: Mapping[str, Any]) -> Lease:
    """The lease of `lease_fields`; WireError when something is missing or superfluous."""
    try:
        prompt = dict(fields["prompt"])
        prompt["messages"] = tuple(prompt["messages"])
        sampling = Sampling(**fields["sampling"])
        return Lease(**{**fields, "prompt": Prompt(**prompt), "sampling": sampling})
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"not a lease: {error}") from None


def same_lease(one: Lease, other: Lease) -> bool:
    """Whether two leases are the same on the wire, where a tuple and a list are."""
    return bool(msgpack.packb(lease_fields(one)) == msgpack.packb(lease_fields(other)))


def group_packet(kind: str, groups: Sequence[Group], **fields: Any) -> Packet:
    """A packet that carries whole groups beside its own fields; what came is not encoded anew."""
    parts: list[Part] = [group.received or _part(group) for group in groups]
    return Packet(
        kind=kind,
        fields={**fields, "groups": [part[0] for part in parts]},
        arrays=tuple(array for part in parts for array in part[1]),
        sealed=tuple(sealed for part in parts for sealed in part[2]),
    )


def groups_from(packet: Packet) -> tuple[Group, ...]:
    """The groups of a `group_packet`."""
    described = packet.fields.get("groups")
    if not isinstance(described, list) or len(packet.arrays) != ARRAYS_PER_GROUP * len(described):
        raise WireError(f"packet {packet.kind!r} does not hold {ARRAYS_PER_GROUP} arrays per group")
    spans = [slice(i, i + ARRAYS_PER_GROUP) for i in range(0, len(packet.arrays), ARRAYS_PER_GROUP)]
    return tuple(
        _group_from(fields, packet.arrays[span], packet.sealed[span])
        for fields, span in zip(described, spans, strict=True)
    )


def shard_packet(shard: Shard) -> Packet:
    """The answer to a learner rank that asked for its part of a step."""
    return group_packet(
        "shard",
        shard.groups,
        step=shard.step,
        num_loss_tokens_global=shard.num_loss_tokens_global,
        num_completions_global=shard.num_completions_global,
    )


def shard_from(packet: Packet) -> Shard:
    """The shard of a `shard_packet`."""
    try:
        return Shard(
            step=packet.fields["step"],
            groups=groups_from(packet),
            num_loss_tokens_global=packet.fields["num_loss_tokens_global"],
            num_completions_global=packet.fields["num_completions_global"],
        )
    except KeyError as error:
        raise WireError(f"packet {packet.kind!r} is not a shard: {error} is missing") from None


def _part(group: Group) -> Part:
    arrays = _group_arrays(group)
    return _group_fields(group), arrays, tuple(map(_seal, arrays))


def _group_fields(group: Group) -> dict[str, Any]:
    return {
        "lease": lease_fields(group.lease),
        "finish_reasons": [completion.finish_reason for completion in group.completions],
        "texts": [completion.text for completion in group.completions],
        "reward_parts": list(group.reward_parts),
        "actor": group.actor,
        "timings": dict(group.timings),
    }


def _group_arrays(group: Group) -> tuple[np.ndarray[Any, Any], ...]:
    completions = group.completions
    parts = [group.reward_parts[name] for name in group.reward_parts]
    return (
        group.prompt_token_ids.astype(np.int32, copy=False),
        np.array([len(c.token_ids) for c in completions], dtype=np.int32),
        np.concatenate([c.token_ids for c in completions]).astype(np.int32, copy=False),
        np.concatenate([c.behavior_logprobs for c in completions]).astype(np.float32, copy=False),
        np.concatenate([c.versions for c in completions]).astype(np.int32, copy=False),
        group.rewards.astype(np.float32, copy=False),
        np.array(parts, dtype=np.float32).reshape(len(parts), len(completions)),
    )


def _group_from(
    fields: Any, arrays: tuple[np.ndarray[Any, Any], ...], sealed: tuple[Sealed, ...]
) -> Group:
    check_fields("group", fields, {"group": GROUP})
    if tuple((array.dtype, array.ndim) for array in arrays) != GROUP_ARRAYS:
        raise WireError("a group's arrays have other dtypes or dimensions")
    prompt_ids, lengths, token_ids, logprobs, versions, rewards, parts = arrays
    try:
        size, names = len(lengths), fields["reward_parts"]
        sizes = lengths.tolist()
        ends = list(accumulate(sizes, initial=0))
        if min(sizes, default=0) < 0 or len(set(names)) != len(names):
            raise WireError("a group has a negative length or two reward parts of one name")
        if not (token_ids.shape == logprobs.shape == versions.shape == (ends[-1],)):
            raise WireError("a group's token arrays differ in length")
        if rewards.shape != (size,) or parts.shape != (len(names), size):
            raise WireError(f"a group of {size} completions has rewards {rewards.shape}")
        completions = tuple(
            Completion(
                token_ids=token_ids[start:end],
                behavior_logprobs=logprobs[start:end],
                versions=versions[start:end],
                finish_reason=reason,
                text=text,
            )
            for start, end, reason, text in zip(
                ends[:-1], ends[1:], fields["finish_reasons"], fields["texts"], strict=True
            )
        )
        group = Group(
            lease=lease_from(fields["lease"]),
            prompt_token_ids=prompt_ids,
            completions=completions,
            rewards=rewards,
            reward_parts=dict(zip(names, parts, strict=True)),
            actor=fields["actor"],
            timings=fields["timings"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WireError(f"not a group: {error}") from None
    if sealed:
        known = {name: fields[name] for name in GROUP.model_fields}
        object.__setattr__(group, "received", (known, arrays, sealed))
    return group
