"""Packets as frames: one msgpack header with a schema number, then one raw frame per array.

    frame 0   msgpack [SCHEMA, kind, request_id, fields, [[dtype, shape], ...]]
    frame i   the bytes of array i, C order, little endian

Sizes are checked against the header before anything is built from a frame. Nothing here can
execute code: no pickle, no object hooks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from asyncgrpo.errors import WireError
from asyncgrpo.types import Completion, Group, Lease, Prompt, Sampling, Shard

SCHEMA = 1
MAX_HEADER_BYTES = 64 << 20
MAX_ARRAYS = 1 << 16
DTYPES = {name: np.dtype(name) for name in ("int32", "int64", "float32", "float64", "bool")}
NAMES = {dtype: name for name, dtype in DTYPES.items()}  # a dtype's own name is slow to make
ARRAYS_PER_GROUP = 7

Frame = bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """One message. `fields` holds only what msgpack knows; `arrays` are numpy arrays."""

    kind: str
    request_id: int = 0  # answers carry the id of their request; 0 = pushed, not asked for
    fields: Mapping[str, Any] = field(default_factory=dict)
    arrays: tuple[np.ndarray[Any, Any], ...] = ()


def encode(packet: Packet) -> list[Frame]:
    """Frames of a packet; WireError when a field or dtype cannot travel."""
    specs = [[NAMES.get(array.dtype), list(array.shape)] for array in packet.arrays]
    for (name, _), array in zip(specs, packet.arrays, strict=True):
        if name is None:
            allowed = ", ".join(DTYPES)
            raise WireError(f"array of dtype {array.dtype} cannot be sent; allowed: {allowed}")
    header = [SCHEMA, packet.kind, packet.request_id, packet.fields, specs]
    try:
        first = msgpack.packb(header, use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(
            f"packet {packet.kind!r} holds a field that cannot be sent: {error}"
        ) from error
    return [first, *(np.ascontiguousarray(array).tobytes() for array in packet.arrays)]


def decode(frames: Sequence[Frame]) -> Packet:
    """The packet of some frames; WireError when they do not follow the schema."""
    if not frames or len(frames[0]) > MAX_HEADER_BYTES:
        raise WireError(f"{len(frames)} frames, header over {MAX_HEADER_BYTES} bytes or missing")
    try:
        header = msgpack.unpackb(frames[0], raw=False, strict_map_key=False)
    except Exception as error:  # msgpack raises many kinds on garbage
        raise WireError(f"header is not msgpack: {error}") from None
    if not isinstance(header, list) or len(header) != 5 or header[0] != SCHEMA:
        found = header[0] if isinstance(header, list) and header else header
        raise WireError(f"schema {found!r} is not {SCHEMA}; both sides need the same version")
    _, kind, request_id, fields, specs = header
    if not (isinstance(kind, str) and isinstance(request_id, int) and isinstance(fields, dict)):
        raise WireError("header fields have wrong types")
    return Packet(
        kind=kind, request_id=request_id, fields=fields, arrays=_arrays(specs, frames[1:])
    )


def _arrays(specs: Any, frames: Sequence[Frame]) -> tuple[np.ndarray[Any, Any], ...]:
    if not isinstance(specs, list) or len(specs) != len(frames) or len(specs) > MAX_ARRAYS:
        raise WireError(f"header announces other arrays than the {len(frames)} frames sent")
    return tuple(_array(spec, frame) for spec, frame in zip(specs, frames, strict=True))


def _array(spec: Any, frame: Frame) -> np.ndarray[Any, Any]:
    if not isinstance(spec, list) or len(spec) != 2 or spec[0] not in DTYPES:
        raise WireError(f"array spec {spec!r} is not [dtype, shape]")
    name, shape = spec
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise WireError(f"array shape {shape!r} is not a list of sizes")
    if math.prod(shape) * DTYPES[name].itemsize != len(frame):
        raise WireError(f"array {name} {shape} needs other than the {len(frame)} bytes sent")
    return np.frombuffer(frame, dtype=DTYPES[name]).reshape(shape)


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


def group_packet(kind: str, groups: Sequence[Group], **fields: Any) -> Packet:
    """A packet that carries whole groups beside its own fields."""
    return Packet(
        kind=kind,
        fields={**fields, "groups": [_group_fields(group) for group in groups]},
        arrays=tuple(array for group in groups for array in _group_arrays(group)),
    )


def groups_from(packet: Packet) -> tuple[Group, ...]:
    """The groups of a `group_packet`."""
    described = packet.fields.get("groups")
    if not isinstance(described, list) or len(packet.arrays) != ARRAYS_PER_GROUP * len(described):
        raise WireError(f"packet {packet.kind!r} does not hold {ARRAYS_PER_GROUP} arrays per group")
    return tuple(
        _group_from(fields, packet.arrays[i * ARRAYS_PER_GROUP : (i + 1) * ARRAYS_PER_GROUP])
        for i, fields in enumerate(described)
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


def _group_from(fields: Any, arrays: Sequence[np.ndarray[Any, Any]]) -> Group:
    prompt_ids, lengths, token_ids, logprobs, versions, rewards, parts = arrays
    try:
        size, names = len(lengths), fields["reward_parts"]
        if not (token_ids.shape == logprobs.shape == versions.shape == (int(lengths.sum()),)):
            raise WireError("a group's token arrays differ in length")
        if rewards.shape != (size,) or parts.shape != (len(names), size):
            raise WireError(f"a group of {size} completions has rewards {rewards.shape}")
        ends = np.cumsum(lengths)
        completions = tuple(
            Completion(
                token_ids=token_ids[end - length : end],
                behavior_logprobs=logprobs[end - length : end],
                versions=versions[end - length : end],
                finish_reason=reason,
                text=text,
            )
            for end, length, reason, text in zip(
                ends, lengths, fields["finish_reasons"], fields["texts"], strict=True
            )
        )
        return Group(
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
