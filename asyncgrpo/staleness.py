"""The staleness rule: at step s a token of version v is s - v versions old."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from asyncgrpo.types import Group

StalenessAction = Literal["drop", "mask", "downweight", "wait"]


def bound_of(max_staleness: int, action: StalenessAction) -> int:
    """How old a token that is trained may be: twice max_staleness if the older ones weigh less."""
    return 2 * max_staleness if action == "downweight" else max_staleness


def share_of(
    staleness: NDArray[np.int32], max_staleness: int, action: StalenessAction
) -> NDArray[np.float64]:
    """How much a token's advantage counts: 1, and half for each version past the bound if they
    are weighed down.
    """
    excess = np.maximum(staleness - max_staleness, 0) * (action == "downweight")
    return 0.5**excess


def past_bound(group: Group, step: int, max_staleness: int, action: StalenessAction) -> bool:
    """Whether a group can no longer be trained at `step`.

    drop: as soon as any of its tokens is more than max_staleness versions old; so with wait, when
    the batch did not wait long enough, and with downweight at twice that age.
    mask: only when all of them are; the learner masks the others.
    """
    oldest_allowed = step - bound_of(max_staleness, action)
    if action != "mask":
        return group.completions.version_span[0] < oldest_allowed
    return group.completions.version_span[1] < oldest_allowed
