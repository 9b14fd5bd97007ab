"""Calls one reward function and holds it to its contract.

Scope "group": f(prompts, completions, **columns) -> list of G numbers or None. prompts are G
message lists, completions G texts, and every column of the record is a list of G equal values.
Scope "sample": f(prompt, completion, **columns) -> a number or None, once for each completion, with
plain values instead of lists; `response` and `label` are other names of completion and answer.

In both, `answer` (the ground truth as text, or None) and `data_source` are always there, a function
may name just the arguments it wants, and None means: does not apply to this completion. Either may
be `async def`: then all calls of a group, over all functions, are under way together.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import itertools
import math
import numbers
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from asyncgrpo.errors import RewardError
from asyncgrpo.imports import described, is_interrupt, last_place, shown
from asyncgrpo.settings.reward import Scope
from asyncgrpo.types import Prompt

MAX_FLOAT32 = float(np.finfo(np.float32).max)
Parameters = Mapping[str, inspect.Parameter]


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundFunction:
    """A reward function with its label and weight. `parameters`: those that columns may fill."""

    label: str
    weight: float
    call: Callable[..., Any]
    parameters: Parameters
    options: Mapping[str, Any]
    scope: Scope

    def __str__(self) -> str:
        return f"reward function {self.label!r}"

    @property
    def uses_truth(self) -> bool:
        """It names the answer or another column, so it should tell right from wrong."""
        texts = {"prompt", "prompts", "completion", "completions", "response"}
        named = {n for n, p in self.parameters.items() if p.kind is not p.VAR_KEYWORD}
        return not named <= texts

    def start(self, prompt: Prompt, completions: Sequence[str]) -> list[Call]:
        """Begins to score a group; `Call.scores` has the result. Raises nothing."""
        count = len(completions)
        record = {**prompt.columns, "answer": prompt.answer, "data_source": prompt.data_source}
        if self.scope == "group":
            columns = {name: [value] * count for name, value in record.items()}
            columns["prompts"] = [[*map(dict, prompt.messages)] for _ in range(count)]
            columns["completions"] = list(completions)
            return [self._start(columns, 0, count)]
        names = {"label": prompt.answer, **record, "prompt": list(prompt.messages)}
        return [
            self._start({"response": text, **names, "completion": text}, index, 1)
            for index, text in enumerate(completions)
        ]

    def _start(self, columns: dict[str, Any], first: int, count: int) -> Call:
        outcome: Future[Any] = Future()
        try:
            returned = self.call(**self._arguments(columns), **self.options)
            if inspect.isawaitable(returned):
                asyncio.run_coroutine_threadsafe(_await(returned, outcome), _loop())
            else:
                outcome.set_result(returned)
        except BaseException as error:  # a user's function may raise anything, also SystemExit
            if is_interrupt(error) or isinstance(error, _TooSlow):
                raise
            outcome.set_exception(error)
        return Call(function=self, first=first, count=count, outcome=outcome)

    def _arguments(self, columns: dict[str, Any]) -> dict[str, Any]:
        """What the function names, or everything when it takes **kwargs; copies, to change."""
        takes_any = any(p.kind is p.VAR_KEYWORD for p in self.parameters.values())
        wanted = columns if takes_any else self.parameters
        for name, p in self.parameters.items():
            optional = p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            if name not in columns and not optional:
                raise RewardError(
                    f"{self} (scope {self.scope!r}) needs a column {name!r} that the record does "
                    f"not have; available: {', '.join(columns)}; rename the parameter, give it a "
                    "default, add the column to the data, or use another scope or function"
                )
        chosen = {n: columns[n] for n in wanted if n in columns and n not in self.options}
        return copy.deepcopy(chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call under way, for `count` completions from index `first` on."""

    function: BoundFunction
    first: int
    count: int
    outcome: Future[Any]

    def scores(self) -> list[float]:
        """Waits; a finite number per completion, NaN for None. RewardError: a broken contract."""
        fault = self.outcome.exception()
        try:
            if fault is not None:
                raise fault
            returned = self.outcome.result()
            values = [returned] if self.function.scope == "sample" else self._as_list(returned)
            return [self._number(value, self.first + offset) for offset, value in enumerate(values)]
        except BaseException as error:  # also what it returned may raise anything
            if isinstance(error, RewardError | _TooSlow) or (
                is_interrupt(error) and error is not fault
            ):
                raise
            raise RewardError(
                f"{self.function} raised {described(error)} at {last_place(error)}; it must score "
                "any text, also an empty one"
            ) from error

    def _as_list(self, returned: object) -> list[Any]:
        values = None
        if isinstance(returned, Iterable) and not isinstance(returned, str | bytes | Mapping):
            values = list(itertools.islice(returned, self.count + 1))  # it may have no end
        if values is None or len(values) != self.count:
            got = shown(returned)
            if values is not None:
                more = f"more than {self.count}"
                got = f"{more if len(values) > self.count else len(values)} values"
            raise RewardError(
                f"{self.function} returned {got} for {self.count} completions; return a list with "
                'one number (or None) per completion, or set scope = "sample"'
            )
        return values

    def _number(self, value: object, index: int) -> float:
        if value is None:
            return math.nan
        if not isinstance(value, numbers.Real | np.bool_):
            raise RewardError(
                f"{self.function} returned {shown(value)} ({type(value).__name__}) for completion "
                f"{index}; return a float or None"
            )
        try:
            score = float(value)
        except OverflowError:
            score = math.inf
        if not math.isfinite(score) or abs(score) > MAX_FLOAT32:
            raise RewardError(
                f"{self.function} returned {score} for completion {index}; return a finite float32 "
                "number, or None where the function does not apply"
            )
        return score


class _TooSlow(BaseException):
    """No Exception: a function that tries again and again must not catch it."""


@contextmanager
def time_limit(what: object, seconds: float) -> Iterator[None]:
    """RewardError in the block after that time. In other threads than the main one no limit.

    A user's function stays in the main thread, as in a worker: some keep their own time by SIGALRM.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main:
        yield
        return

    def stop(*_: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    timer = threading.Timer(seconds, signal.pthread_kill, (main.ident, signal.SIGVTALRM))
    timer.daemon = True
    timer.start()
    try:
        yield
    except _TooSlow:
        raise RewardError(
            f"{what} gave no score within reward.timeout_seconds={seconds:g}; let it end "
            "sooner, or raise reward.timeout_seconds"
        ) from None
    finally:
        timer.cancel()
        timer.join()  # its signal may be on the way
        signal.signal(signal.SIGVTALRM, before)


async def _await(returned: Any, outcome: Future[Any]) -> None:
    try:
        outcome.set_result(await returned)
    except BaseException as error:  # SystemExit would end the loop of all async functions
        outcome.set_exception(error)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop for all async functions, in a thread: sessions kept in it stay usable."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop
