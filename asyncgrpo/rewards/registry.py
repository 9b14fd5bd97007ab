"""All reward functions of a run: scores groups, checks the data, counts what fails."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from asyncgrpo.errors import RewardError
from asyncgrpo.rewards.finding import find, functions_for
from asyncgrpo.rewards.function import MAX_FLOAT32, BoundFunction, time_limit
from asyncgrpo.settings.reward import RewardFunction, RewardSettings
from asyncgrpo.types import Float32, Prompt

PROBES = ("", "0")  # harmless completions that show contract errors before anything starts
Chooser = Callable[[Prompt], Sequence[BoundFunction]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Rewards of one group of G completions."""

    rewards: Float32  # [G] weighted sum of the parts that apply
    parts: Mapping[str, Float32] = field(default_factory=dict)  # each [G]; NaN = not applicable
    errors: tuple[str, ...] = ()  # broken contracts that reward.on_error gave a score


class RewardSet:
    """Scores groups. `functions`: of a prompt; RewardError when its data_source has none.

    functions: what chooses them, or the same ones for all prompts.
    error_score: what a call that breaks its contract scores; None: the group has no score.
    timeout_seconds: of each function where no worker keeps the time: in `probe` and `parts`.
    """

    def __init__(
        self,
        functions: Sequence[BoundFunction] | Chooser,
        error_score: float | None = None,
        timeout_seconds: float = 30.0,
    ) -> None:
        self.functions: Chooser = functions if callable(functions) else lambda _: functions
        self._error_score, self._timeout_seconds = error_score, timeout_seconds

    def score(self, prompt: Prompt, completions: Sequence[str]) -> Scores:
        """Weighted sums and parts; RewardError when a function breaks its contract.

        Also when no function applies to a completion: then there is nothing to learn from.
        """
        functions = self.functions(prompt)
        # All are started before any is waited for: async ones are under way together.
        started = [(f.label, call) for f in functions for call in f.start(prompt, completions)]
        parts: dict[str, list[float]] = {function.label: [] for function in functions}
        errors: list[str] = []
        for label, call in started:
            try:
                parts[label] += call.scores()
            except RewardError as error:
                if self._error_score is None:
                    raise
                errors.append(str(error))
                parts[label] += [self._error_score] * call.count
        return _combine([function.weight for function in functions], parts, errors)

    def probe(self, prompt: Prompt) -> None:
        """Calls each function with two harmless completions; RewardError as in `score`."""
        self.parts(prompt, PROBES)

    def parts(self, prompt: Prompt, completions: Sequence[str]) -> dict[str, list[float]]:
        """Each function's own scores by label; RewardError whatever errors score in a run."""
        parts: dict[str, list[float]] = {}
        for function in self.functions(prompt):
            with time_limit(function, self._timeout_seconds):
                calls = function.start(prompt, completions)
                parts[function.label] = [score for call in calls for score in call.scores()]
        return parts

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Probes one prompt of each data_source: what cannot be scored is found before the run."""
        seen: set[str] = set()
        for prompt in prompts:
            source = repr(prompt.columns.get("data_source", prompt.data_source))
            if source not in seen:
                seen.add(source)
                self.probe(prompt)


def load_rewards(settings: RewardSettings) -> RewardSet:
    """Finds every function of the settings; RewardError says which is missing and what to do."""
    found: dict[str, BoundFunction] = {}

    def get(function: RewardFunction) -> BoundFunction:
        key = function.model_dump_json()
        if key not in found:
            found[key] = find(function)
        return found[key]

    for function in (*settings.functions, *(f for r in settings.routes.values() for f in r)):
        get(function)
    return RewardSet(
        lambda p: [get(f) for f in functions_for(settings, p)],
        settings.error_score,
        settings.timeout_seconds,
    )


def lost_scores(settings: RewardSettings, prompt: Prompt, count: int) -> Scores | None:
    """What reward.on_error gives a group whose worker hung or died: None means drop it.

    None as well when its data_source has no judge that could have failed.
    """
    score = settings.error_score
    if score is None:
        return None
    try:
        functions = functions_for(settings, prompt)
        parts: dict[str, list[float]] = {f.label: [score] * count for f in functions}
        return _combine([function.weight for function in functions], parts, ())
    except RewardError:
        return None


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


def _combine(
    weights: Sequence[float], parts: Mapping[str, list[float]], errors: Sequence[str]
) -> Scores:
    scores = np.array([*parts.values()])  # float64 [functions, G]
    with np.errstate(all="ignore"):  # what is too large is refused below
        totals = np.nansum(np.array(weights)[:, None] * scores, axis=0)
    for index, total in enumerate(totals.tolist()):
        if np.isnan(scores[:, index]).all():
            raise RewardError(
                f"no reward function applies to completion {index}: all returned None; let one of "
                "them return a number"
            )
        if not abs(total) <= MAX_FLOAT32:
            raise RewardError(
                f"the weighted reward of completion {index} is {total}, too large for float32; use "
                "smaller weights in reward.functions"
            )
    return Scores(
        rewards=totals.astype(np.float32),
        parts={label: np.array(scores, dtype=np.float32) for label, scores in parts.items()},
        errors=tuple(errors),
    )
