"""The gate: how much work may start, so that it is not too old when it is trained. Pure.

With N groups per step and staleness bound S, an actor that holds policy version v may start a group
while

    groups that are trained or still may be < (S + v + 1) * N

because step s consumes N of them and updates version s: the newest that may start under v is
consumed at step S + v at the latest, S versions after it was sampled. A group that is dropped does
not count any more, so its replacement can start at once.

With batches of T tokens, work that has not come yet is counted by the mean: with k batches formed,
a group may start while

    tokens stored + groups being made * mean tokens of a group < (S + v + 1 - k) * T

This never locks: while nothing is being made and no batch can be formed, fewer than T tokens are
stored. A wrong mean only starts too much, and what gets too old is evicted as ever. Before any
group came the mean is T / N, which weighs as much as one batch later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from asyncgrpo.config import Config

if TYPE_CHECKING:
    from asyncgrpo.buffer.replay import Replay


class Gate:
    """How much may start, by what there is: it counts nothing itself."""

    def __init__(self, config: Config) -> None:
        buffer = config.buffer
        self._max_staleness, self._max_steps = buffer.max_staleness, config.run.max_steps
        self._num_groups, self._num_tokens = config.new_groups, buffer.tokens_per_step
        self._min_groups = config.min_groups

    def open_for(
        self, version: int, counts: Mapping[str, int], replay: Replay, num_formed: int
    ) -> int:
        """How many groups an actor that holds `version` may start now.

        counts: leases in each state; num_formed: batches, ever.
        """
        steps = min(self._max_staleness + version + 1, self._max_steps)
        if self._num_tokens is None:
            live = counts["open"] + counts["stored"] + counts["taken"] + counts["trained"]
            return max(0, steps * self._num_groups - live)
        steps -= num_formed
        arrived = self._num_tokens + replay.tokens_arrived
        mean = arrived / (self._num_groups + replay.groups_arrived)
        missing = math.ceil((steps * self._num_tokens - replay.num_tokens) / mean)
        missing = max(missing, steps * self._min_groups - len(replay))
        return max(0, missing - counts["open"]) if steps > 0 else 0
