"""Counts what scoring costs and how often it fails; ends the run when it fails too often."""

from __future__ import annotations

from collections import deque

from asyncgrpo.errors import RewardError
from asyncgrpo.settings.reward import RewardSettings


class RewardHealth:
    """Counters of the scored groups, and the window that reward.max_error_rate looks at."""

    def __init__(self, settings: RewardSettings) -> None:
        self._limit, self._size = settings.max_error_rate, settings.error_window
        self._failed: deque[bool] = deque(maxlen=self._size)
        self.counters = {"judged_groups": 0.0, "judge_errors": 0.0, "judge_seconds": 0.0}

    def note(self, error: str, seconds: float) -> None:
        """One group was scored, with an error or "". RewardError when there were too many.

        Errors are compared with the whole window from the start: a function that is simply broken
        ends the run after a few groups, and one bad group never does.
        """
        self.counters["judged_groups"] += 1
        self.counters["judge_errors"] += bool(error)
        self.counters["judge_seconds"] += seconds
        self._failed.append(bool(error))
        failed = sum(self._failed)
        if failed > self._limit * self._size:
            raise RewardError(
                f"{failed} of the last {len(self._failed)} groups could not be scored (at most "
                f"reward.max_error_rate={self._limit:g} of reward.error_window={self._size}): "
                f"{error}"
            )
