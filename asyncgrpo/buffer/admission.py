"""What is let into the buffer: requests that make sense, and groups that fit their lease. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from asyncgrpo.buffer.leases import OpenLease
from asyncgrpo.errors import WireError
from asyncgrpo.observe.metrics import METRICS
from asyncgrpo.types import Completion, Group, Lease
from asyncgrpo.wire.codec import Packet, same_lease
from asyncgrpo.wire.schema import BUFFER_REQUESTS, check_fields

Fault = Literal["other_lease", "group_size", "rewards", "tokens", "versions"]


def check_request(packet: Packet, *, step: int, num_learners: int) -> None:
    """WireError when a request is incomplete or asks for what cannot be; changes nothing."""
    kind, fields = packet.kind, packet.fields
    check_fields(kind, fields, BUFFER_REQUESTS)
    if kind in ("lease", "held") and fields["version"] > newest_version(step):
        raise WireError(f"{kind}: version={fields['version']} is not <= {newest_version(step)}")
    if kind == "take" and not fields["rank"] < fields["world_size"] <= num_learners:
        raise WireError(
            f"take: rank={fields['rank']} of {fields['world_size']} is no rank of {num_learners}"
        )
    if kind == "fail" and f"groups_failed_{fields['reason']}" not in METRICS:
        raise WireError(f"fail: reason={fields['reason']!r} is no reason that is counted")


def newest_version(step: int) -> int:
    """The newest there can be while `step` is trained: it is published before that is told."""
    return step + 1


def is_holder(peer: str, opened: OpenLease) -> bool:
    """Whether a socket identity ("actor-0.17") is of the actor that the lease was given to."""
    return peer.partition(".")[0] == opened.peer.partition(".")[0]


def why_failed(group: Group, lease: Lease, step: int) -> Fault | None:
    """Why a group must never be trained, and its lease fails; None when nothing is wrong.

    Log-probs that are not finite pass: the learner drops these completions one by one.
    """
    newest = lease.version if lease.purpose == "eval" else newest_version(step)
    if not same_lease(group.lease, lease):
        return "other_lease"
    if len(group.completions) != lease.group_size:
        return "group_size"
    if not group.reward_parts or not np.isfinite(group.rewards).all():
        return "rewards"
    longest = max(len(completion.token_ids) for completion in group.completions)
    token_ids = [group.prompt_token_ids, *(c.token_ids for c in group.completions)]
    if longest > lease.sampling.max_completion_tokens or (np.concatenate(token_ids) < 0).any():
        return "tokens"
    return None if _versions_fit(group.completions, newest) else "versions"


def _versions_fit(completions: Sequence[Completion], newest: int) -> bool:
    """Never negative, never falling inside a completion, never from the future."""
    rows = [c.versions for c in completions if len(c.versions)]
    if not rows:
        return True
    flat = np.concatenate(rows)
    changes = np.diff(flat)
    changes[np.cumsum([len(row) for row in rows[:-1]], dtype=np.int64) - 1] = 0  # of two rows
    return bool(flat.min() >= 0 and flat.max() <= newest and (changes >= 0).all())
