"""Finds reward functions and calls them, holding them to their contract.

A reward function is f(prompts, completions, **columns) -> list of G numbers or None:
prompts are G message lists, completions G texts, and every column of the record is a list of G
equal values. `answer` (the ground truth as text, or None) and `data_source` are always there. A
function may name just the arguments it wants. None means: not applicable to this completion.
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from asyncgrpo.config import RewardFunction, RewardSettings
from asyncgrpo.errors import RewardError
from asyncgrpo.imports import find_function, last_place, shown
from asyncgrpo.rewards.builtin import BUILTINS
from asyncgrpo.types import Float32, Prompt

PROBES = ("", "0")  # harmless completions that show contract errors before anything starts
MAX_FLOAT32 = float(np.finfo(np.float32).max)
Parameters = Mapping[str, inspect.Parameter]
Score = float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Rewards of one group of G completions."""

    rewards: Float32  # [G] weighted sum of the parts that apply
    parts: Mapping[str, Float32] = field(default_factory=dict)  # each [G]; NaN = not applicable


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundFunction:
    """A reward function with its label and weight."""

    label: str
    weight: float
    call: Callable[..., Any]
    parameters: Parameters

    def __str__(self) -> str:
        return f"reward function {self.label!r}"

    def score(self, prompt: Prompt, completions: Sequence[str]) -> list[Score]:
        """One finite number or None per completion; RewardError when the contract is broken."""
        arguments = self._arguments(_columns(prompt, completions))
        try:
            returned = self.call(**arguments)
        except Exception as error:  # a user's function may raise anything
            raise RewardError(
                f"{self} raised {type(error).__name__}: {error} at {last_place(error)}; it must "
                "score any text, also an empty one"
            ) from error
        values = self._as_list(returned, len(completions))
        return [self._number(value, index) for index, value in enumerate(values)]

    def _arguments(self, columns: dict[str, Any]) -> dict[str, Any]:
        """What the function names, or everything when it takes **kwargs."""
        kinds = inspect.Parameter
        if any(p.kind is kinds.VAR_KEYWORD for p in self.parameters.values()):
            chosen = columns
        else:
            chosen = {name: columns[name] for name in self.parameters if name in columns}
        for name, parameter in self.parameters.items():
            optional = parameter.default is not kinds.empty or parameter.kind in (
                kinds.VAR_KEYWORD,
                kinds.VAR_POSITIONAL,
            )
            if name not in columns and not optional:
                raise RewardError(
                    f"{self} needs a column {name!r} that the record does not have; available: "
                    f"{', '.join(columns)}; rename the parameter, give it a default, add the "
                    "column to the data, or use another reward function"
                )
        return chosen

    def _as_list(self, returned: object, count: int) -> list[Any]:
        is_text = isinstance(returned, str | bytes | Mapping)
        values = list(returned) if isinstance(returned, Iterable) and not is_text else None
        if values is None or len(values) != count:
            what = shown(returned) if values is None else f"{len(values)} values"
            raise RewardError(
                f"{self} returned {what} for {count} completions; return a list with "
                "one number (or None) per completion"
            )
        return values

    def _number(self, value: object, index: int) -> Score:
        if value is None:
            return None
        if not isinstance(value, numbers.Real | np.bool_):
            raise RewardError(
                f"{self} returned {shown(value)} ({type(value).__name__}) for completion {index}; "
                "return a float or None"
            )
        score = float(value)
        if not math.isfinite(score) or abs(score) > MAX_FLOAT32:
            raise RewardError(
                f"{self} returned {score} for completion {index}; return a finite float32 number, "
                "or None where the function does not apply"
            )
        return score


class RewardSet:
    """All reward functions of a run."""

    def __init__(self, functions: Sequence[BoundFunction]) -> None:
        self._functions = tuple(functions)

    def score(self, prompt: Prompt, completions: Sequence[str]) -> Scores:
        """Weighted sums and parts; RewardError when a function breaks its contract.

        Also when no function applies to a completion: then there is nothing to learn from.
        """
        return self._combine(self._parts(prompt, completions))

    def probe(self, prompt: Prompt) -> None:
        """Calls each function with two harmless completions; RewardError as in `score`."""
        self._parts(prompt, PROBES)

    def _parts(self, prompt: Prompt, completions: Sequence[str]) -> dict[str, list[Score]]:
        return {f.label: f.score(prompt, completions) for f in self._functions}

    def _combine(self, parts: Mapping[str, list[Score]]) -> Scores:
        weights = [function.weight for function in self._functions]
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
        )


def load_rewards(settings: RewardSettings) -> RewardSet:
    """Finds every function of the settings; RewardError says which is missing and what to do."""
    return RewardSet([_bind(function) for function in settings.functions])


def bind(label: str, call: Callable[..., Any], weight: float = 1.0) -> BoundFunction:
    """Makes a reward function of any callable whose arguments can be passed by name."""
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"reward function {label!r}: its arguments cannot be read ({error}); wrap it in a "
            "def f(prompts, completions, **columns)"
        ) from None
    unnamed = [p for p in parameters.values() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    if unnamed:
        raise RewardError(
            f"reward function {label!r}: parameter {unnamed[0].name!r} is positional-only, but "
            "arguments are passed by name; remove the '/' from its definition"
        )
    return BoundFunction(label=label, weight=weight, call=call, parameters=parameters)


def _bind(function: RewardFunction) -> BoundFunction:
    return bind(function.label, _find(function.use), function.weight)


def _find(use: str) -> Callable[..., Any]:
    if ":" in use:
        return find_function(use, "reward", RewardError)
    if use not in BUILTINS:
        raise RewardError(_unknown_builtin(use))
    return BUILTINS[use]


def _unknown_builtin(use: str) -> str:
    near = difflib.get_close_matches(use, BUILTINS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"there is no built-in reward {use!r}; {hint}built in are: {', '.join(BUILTINS)}; write "
        "your own as 'package.module:function'"
    )


def _columns(prompt: Prompt, completions: Sequence[str]) -> dict[str, Any]:
    """Arguments by name; each column becomes a list of G values. Ours win over the record's."""
    count = len(completions)
    values = {**prompt.columns, "answer": prompt.answer, "data_source": prompt.data_source}
    columns: dict[str, Any] = {name: [value] * count for name, value in values.items()}
    columns["prompts"] = [list(prompt.messages) for _ in range(count)]
    columns["completions"] = list(completions)
    return columns


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
