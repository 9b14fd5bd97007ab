"""The gate: how much work may start, so that it is not too old when it is trained.

A ticket is the permission to make one group. With N groups per step and staleness bound S, an
actor that holds policy version v may start a group while

    issued < (S + v + 1) * N

because step s consumes tickets s*N .. (s+1)*N - 1 and updates version s: the newest ticket that
may start under v is consumed at step S + v at the latest, S versions after it was sampled.
A group that is dropped returns its ticket, so its replacement can start at once.
"""

from __future__ import annotations

from asyncgrpo.errors import ConfigError


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
        self._max_staleness = max_staleness
        self._max_tickets = max_steps * groups_per_step
        self.issued = 0  # tickets given and not returned

    def open_for(self, version: int) -> int:
        """How many groups an actor that holds `version` may start now."""
        limit = (self._max_staleness + version + 1) * self._groups_per_step
        return max(0, min(limit, self._max_tickets) - self.issued)

    def issue(self, version: int) -> None:
        """Gives one ticket."""
        assert self.open_for(version) > 0, "ask open_for before issue"
        self.issued += 1

    def give_back(self) -> None:
        """Returns the ticket of a group that will not be trained."""
        assert self.issued > 0, "a ticket was returned twice"
        self.issued -= 1
