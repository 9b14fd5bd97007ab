"""The staleness rule: at step s a token of version v is s - v versions old."""

from __future__ import annotations

from typing import Literal

from asyncgrpo.types import Group

StalenessAction = Literal["drop", "mask"]


def past_bound(group: Group, step: int, max_staleness: int, action: StalenessAction) -> bool:
    """Whether a group can no longer be trained at `step`.

    drop: as soon as any of its tokens is more than max_staleness versions old.
    mask: only when all of them are; the learner masks the others.
    """
    oldest_allowed = step - max_staleness
    if action == "drop":
        return group.oldest_version < oldest_allowed
    return all(int(c.versions.max(initial=-1)) < oldest_allowed for c in group.completions)
