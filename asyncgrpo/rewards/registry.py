"""All reward functions of a run: scores groups, and checks the data against the routes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from asyncgrpo.errors import RewardError
from asyncgrpo.rewards.finding import bind, find
from asyncgrpo.rewards.function import MAX_FLOAT32, BoundFunction, Score, time_limit
from asyncgrpo.rewards.routes import functions_for
from asyncgrpo.settings.reward import RewardFunction, RewardSettings
from asyncgrpo.types import Float32, Prompt

__all__ = ["RewardSet", "Scores", "bind", "load_rewards", "lost_scores"]
PROBES = ("", "0")  # harmless completions that show contract errors before anything starts
Chooser = Callable[[Prompt], Sequence[BoundFunction]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Rewards of one group of G completions."""

    rewards: Float32  # [G] weighted sum of the parts that apply
    parts: Mapping[str, Float32] = field(default_factory=dict)  # each [G]; NaN = not applicable
    errors: tuple[str, ...] = ()  # broken contracts that reward.on_error gave a score


class RewardSet:
    """The functions that `choose` finds for a prompt (or the same ones for all prompts).

    error_score: what a call that breaks its contract scores; None: the group has no score.
    timeout_seconds: of each function where no worker keeps the time: in `probe` and `parts`.
    """

    def __init__(
        self,
        functions: Sequence[BoundFunction] | Chooser,
        error_score: float | None = None,
        timeout_seconds: float = 30.0,
    ) -> None:
        self._choose: Chooser = functions if callable(functions) else lambda _: functions
        self._error_score, self._timeout_seconds = error_score, timeout_seconds

    def score(self, prompt: Prompt, completions: Sequence[str]) -> Scores:
        """Weighted sums and parts; RewardError when a function breaks its contract.

        Also when no function applies to a completion: then there is nothing to learn from.
        """
        functions = self._choose(prompt)
        parts, errors = _parts(functions, prompt, completions, self._error_score)
        return _combine([function.weight for function in functions], parts, errors)

    def functions(self, prompt: Prompt) -> Sequence[BoundFunction]:
        """Those that score this prompt; RewardError when its data_source has none."""
        return self._choose(prompt)

    def probe(self, prompt: Prompt) -> None:
        """Calls each function with two harmless completions; RewardError as in `score`."""
        self.parts(prompt, PROBES)

    def parts(self, prompt: Prompt, completions: Sequence[str]) -> dict[str, list[Score]]:
        """Each function's own scores by label; RewardError whatever errors score in a run."""
        parts: dict[str, list[Score]] = {}
        for function in self._choose(prompt):
            with time_limit(function, self._timeout_seconds):
                parts |= _parts([function], prompt, completions, None)[0]
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
        parts: dict[str, list[Score]] = {f.label: [score] * count for f in functions}
        return _combine([function.weight for function in functions], parts, ())
    except RewardError:
        return None


def _parts(
    functions: Sequence[BoundFunction],
    prompt: Prompt,
    completions: Sequence[str],
    error_score: float | None,
) -> tuple[dict[str, list[Score]], list[str]]:
    """Scores by label, and the errors that error_score stands for; without one they are raised."""
    errors: list[str] = []
    parts: dict[str, list[Score]] = {}
    # All are started before any is waited for: async ones are under way together.
    calls = {f.label: f.start(prompt, completions) for f in functions}
    for label, started in calls.items():
        parts[label] = []
        for call in started:
            try:
                parts[label] += call.scores()
            except RewardError as error:
                if error_score is None:
                    raise
                errors.append(str(error))
                parts[label] += [error_score] * call.count
    return parts, errors


def _combine(
    weights: Sequence[float], parts: Mapping[str, list[Score]], errors: Sequence[str]
) -> Scores:
    rewards = [
        _weighted_sum(weights, scores, index)
        for index, scores in enumerate(zip(*parts.values(), strict=True))
    ]
    return Scores(
        rewards=np.array(rewards, dtype=np.float32),
        parts={
            label: np.array([math.nan if s is None else s for s in scores], dtype=np.float32)
            for label, scores in parts.items()
        },
        errors=tuple(errors),
    )


def _weighted_sum(weights: Sequence[float], scores: Sequence[Score], index: int) -> float:
    terms = [w * s for w, s in zip(weights, scores, strict=True) if s is not None]
    if not terms:
        raise RewardError(
            f"no reward function applies to completion {index}: all returned None; let one of them "
            "return a number"
        )
    total = sum(terms)
    if not abs(total) <= MAX_FLOAT32:
        raise RewardError(
            f"the weighted reward of completion {index} is {total}, too large for float32; use "
            "smaller weights in reward.functions"
        )
    return total
