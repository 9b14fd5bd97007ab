"""The gate: how much work may start, so that it is not too old when it is trained.

A ticket is the permission to make one group. With N groups per step and staleness bound S, an
actor that holds policy version v may start a group while

    issued < (S + v + 1) * N

because step s consumes tickets s*N .. (s+1)*N - 1 and updates version s: the newest ticket that
may start under v is consumed at step S + v at the latest, S versions after it was sampled.
A group that is dropped returns its ticket, so its replacement can start at once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from asyncgrpo.config import Config
from asyncgrpo.errors import ConfigError

if TYPE_CHECKING:
    from asyncgrpo.buffer.replay import Replay


class Gate:
    """Three numbers and two questions."""

    def __init__(
        self, *, groups_per_step: int, max_staleness: int, max_steps: int, publish_every: int
    ) -> None:
        if publish_every > max_staleness + 1:
            raise ConfigError(
                f"publish_every={publish_every} must be <= max_staleness + 1 = {max_staleness + 1}:"
                f" after {max_staleness + 1} steps no ticket is left until the next publish"
            )
        self._groups_per_step = groups_per_step
        self._max_staleness, self._max_steps = max_staleness, max_steps
        self.issued = 0  # tickets given and not returned

    def open_for(self, version: int) -> int:
        """How many groups an actor that holds `version` may start now."""
        steps = min(self._max_staleness + version + 1, self._max_steps)
        return max(0, steps * self._groups_per_step - self.issued)

    def issue(self, version: int) -> None:
        """Gives one ticket."""
        assert self.open_for(version) > 0, "ask open_for before issue"
        self.issued += 1

    def restore(self, num_live: int, num_formed: int, in_batches: int) -> None:
        """Takes up tickets given and not returned, batches formed and the groups in these."""
        self.issued = num_live

    def give_back(self) -> None:
        """Returns the ticket of a group that will not be trained."""
        assert self.issued > 0, "a ticket was returned twice"
        self.issued -= 1

    def formed(self, num_groups: int) -> None:
        """A batch was made of so many groups."""


class TokenGate(Gate):
    """The gate for batches of T tokens: work that has not come yet is counted by the mean.

    With k batches formed, an actor that holds policy version v may start a group while

        tokens stored + groups being made * mean tokens of a group < (S + v + 1 - k) * T

    It never locks: while nothing is being made and no batch can be formed, fewer than T tokens are
    stored. A wrong mean only starts too much, and what gets too old is evicted as ever. Before any
    group came the mean is T / groups_per_step, which weighs as much as one batch later.
    """

    def __init__(
        self, replay: Replay, *, tokens_per_step: int, min_groups: int, **limits: int
    ) -> None:
        """min_groups: the fewest of a batch; limits: as of Gate."""
        super().__init__(**limits)
        self._replay, self._tokens, self._min_groups = replay, tokens_per_step, min_groups
        self._num_formed = self._in_batches = 0

    def open_for(self, version: int) -> int:
        """How many groups an actor that holds `version` may start now."""
        steps = min(self._max_staleness + version + 1, self._max_steps) - self._num_formed
        mean = (self._tokens + self._replay.tokens_arrived) / (
            self._groups_per_step + self._replay.groups_arrived
        )
        missing = math.ceil((steps * self._tokens - self._replay.num_tokens) / mean)
        missing = max(missing, steps * self._min_groups - len(self._replay))
        being_made = self.issued - self._in_batches - len(self._replay)
        return max(0, missing - being_made) if steps > 0 else 0

    def restore(self, num_live: int, num_formed: int, in_batches: int) -> None:
        """As of Gate."""
        super().restore(num_live, num_formed, in_batches)
        self._num_formed, self._in_batches = num_formed, in_batches

    def formed(self, num_groups: int) -> None:
        """A batch was made of so many groups."""
        self._num_formed += 1
        self._in_batches += num_groups


def make_gate(config: Config, replay: Replay) -> Gate:
    """The gate for the unit that batches are counted in."""
    limits = {
        "groups_per_step": config.new_groups,
        "max_staleness": config.buffer.max_staleness,
        "max_steps": config.run.max_steps,
        "publish_every": config.weights.publish_every,
    }
    tokens = config.buffer.tokens_per_step
    if tokens is None:
        return Gate(**limits)
    return TokenGate(replay, tokens_per_step=tokens, min_groups=config.min_groups, **limits)
