"""What is let into the buffer: requests that make sense, groups that fit their lease and teach."""

from __future__ import annotations

import math
from typing import Literal

from asyncgrpo.buffer.leases import OpenLease
from asyncgrpo.config import Config
from asyncgrpo.errors import WireError
from asyncgrpo.evaluate import is_correct
from asyncgrpo.observe.metrics import METRICS
from asyncgrpo.types import Group, Lease
from asyncgrpo.wire.codec import Packet, pack_lease
from asyncgrpo.wire.schema import BUFFER_REQUESTS, check_fields

Fault = Literal["other_lease", "group_size", "rewards", "tokens", "versions"]


def check_request(packet: Packet, *, newest: int, num_learners: int) -> None:
    """WireError when a request is incomplete or asks for what cannot be; changes nothing.

    newest: the newest policy version that there can be.
    """
    kind, fields = packet.kind, packet.fields
    check_fields(kind, fields, BUFFER_REQUESTS)
    if kind in ("hello", "lease", "held") and fields.get("version", -1) > newest:
        raise WireError(f"{kind}: version={fields['version']} is not <= {newest}")
    if kind in ("take", "trained"):
        rank, world_size = fields.get("rank", 0), fields["world_size"]
        if not rank < world_size <= num_learners:
            raise WireError(f"{kind}: rank={rank} of {world_size} is no rank of {num_learners}")
    if kind == "fail" and f"groups_failed_{fields['reason']}" not in METRICS:
        raise WireError(f"fail: reason={fields['reason']!r} is no reason that is counted")


def newest_version(step: int) -> int:
    """The newest there can be while `step` is trained: it is published before that is told."""
    return step + 1


def is_holder(peer: str, opened: OpenLease) -> bool:
    """Whether a socket identity ("actor-0.17") is of the actor that the lease was given to."""
    return peer.partition(".")[0] == opened.peer.partition(".")[0]


def why_failed(group: Group, lease: Lease, newest: int) -> Fault | None:
    """Why a group must never be trained, and its lease fails; None when nothing is wrong.

    newest: the newest policy version that there can be. Log-probs that are not finite pass: the
    learner drops these completions one by one.
    """
    newest = lease.version if lease.purpose == "eval" else newest
    if group.lease is not lease and pack_lease(group.lease) != pack_lease(lease):
        return "other_lease"  # compared as on the wire, where a tuple is a list
    if len(group.completions) != lease.group_size:
        return "group_size"
    if not group.reward_parts or not all(map(math.isfinite, group.rewards.tolist())):
        return "rewards"
    tokens = group.completions
    lowest = min(group.prompt_token_ids.min(initial=0), tokens.token_ids.min(initial=0))
    if max(tokens.lengths) > lease.sampling.max_completion_tokens or lowest < 0:
        return "tokens"
    # Inside a completion they may fall: a learner that goes back to a checkpoint takes its weights
    # back, too.
    oldest, newest_of_all = tokens.version_span if group.num_tokens else (0, 0)
    return None if oldest >= 0 and newest_of_all <= newest else "versions"


def filter_reason(group: Group, config: Config) -> str:
    """empty_completion, all_correct or all_wrong; "" when the group is good to train on."""
    if not all(group.completions.lengths):
        return "empty_completion"
    if not config.algo.drop_uniform_groups:
        return ""
    scores = next(iter(group.reward_parts.values())).tolist()
    right = is_correct(scores, config.reward.correct_above)
    if all(right):
        return "all_correct"
    return "" if any(right) else "all_wrong"
