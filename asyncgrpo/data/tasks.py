"""Generated tasks with an exact answer: `TaskSource` draws them, seekably and seeded.

| kind       | prompt                | answer                                          |
|------------|-----------------------|-------------------------------------------------|
| add        | Compute: 3 + 4        | 7                                               |
| sub        | Compute: 3 - 4        | -1                                              |
| mul        | Compute: 3 * 4        | 12                                              |
| gcd        | gcd: 12 18            | 6                                               |
| sort       | Sort: 3 1 2           | 1 2 3                                           |
| palindrome | Palindrome: abba      | YES                                             |
| reverse    | Reverse: abc          | cba                                             |
| expression | Eval: 'abc'.upper()   | ABC (also len, max of three, abs)               |
| check      | Check: 3 1 2          | 2: the sum modulo `modulus`, here 4             |
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle, zip_longest
from typing import Any

from asyncgrpo.data.templates import AS_IT_IS, with_template
from asyncgrpo.errors import ConfigError
from asyncgrpo.hints import did_you_mean
from asyncgrpo.settings.data import TaskSettings, TemplateSettings
from asyncgrpo.types import Prompt

HELD_OUT_SEED = 1234567  # the held-out set is the same for every run seed
HELD_OUT_PROMPTS = 318  # kept from training even when fewer are evaluated
SURVEYED = 2_000  # prompts of the endless stream that stand for all of it
SURVEY_DRAWS = 2000  # draws per kind that estimate how many distinct prompts there are
MAX_HELD_OUT_SHARE = 0.25  # of a kind's distinct prompts, so that small tasks stay trainable
MAX_REDRAWS = 1000
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONG_TAIL_MEDIAN, LONG_TAIL_MIN, LONG_TAIL_MAX = 6, 2, 40
GROUPS = {"math": ("add", "sub", "mul")}  # names for several kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task. `worked` and `careless` are demonstrations for the tiny model's warm start."""

    kind: str
    text: str  # the prompt
    answer: str  # the exact truth
    worked: str  # a right answer as a careful solver writes it, steps included
    careless: str  # what someone answers who does not think: mostly wrong


Draw = Callable[[TaskSettings, random.Random], Task]


def draw_task(kind: str, settings: TaskSettings, rng: random.Random) -> Task:
    """Draws one task of a kind; ConfigError for an unknown kind, with the nearest known one."""
    if kind not in KINDS:
        raise ConfigError(
            f"data.tasks.kinds: there is no task kind {kind!r}; {did_you_mean(kind, KINDS)}kinds "
            f"are: {', '.join(KINDS)}"
        )
    return KINDS[kind](settings, rng)


class TaskSource:
    """An endless stream of prompts and a fixed held-out set, disjoint by prompt text."""

    def __init__(
        self,
        settings: TaskSettings,
        seed: int,
        num_eval: int,
        template: TemplateSettings = AS_IT_IS,
    ) -> None:
        """num_eval: prompts that `held_out` returns, fewer where a kind has too few prompts.

        Raises ConfigError for unknown kinds, negative weights, or no kind with a weight > 0.
        """
        self._settings, self._seed, self._template = settings, seed, template
        self._weights = _checked_weights(settings)
        reserved = _held_out_tasks(settings, max(num_eval, HELD_OUT_PROMPTS))
        self._reserved = frozenset(task.text for task in reserved)
        self._held_out = tuple(
            self._prompt(task, f"held-out:{index}")
            for index, task in enumerate(reserved[:num_eval])
        )

    def get(self, position: int) -> Prompt:
        """The prompt at a position >= 0: a pure function of settings, seed and position."""
        return self._prompt(self.task(position), f"task:{position}")

    def epoch(self, position: int) -> None:
        """Generated tasks never repeat."""

    def prompts(self) -> Iterator[Prompt]:
        """The first SURVEYED prompts, which stand for all."""
        return map(self.get, range(SURVEYED))

    def task(self, position: int) -> Task:
        """The task behind `get(position)`, with its demonstrations."""
        rng = random.Random(f"{self._seed}:{position}")
        (kind,) = rng.choices(list(self._weights), list(self._weights.values()))
        for _ in range(MAX_REDRAWS):
            task = draw_task(kind, self._settings, rng)
            if task.text not in self._reserved:
                return task
        raise ConfigError(
            f"data.tasks: {MAX_REDRAWS} draws of {kind!r} in a row were held-out prompts; allow "
            "more different ones: larger data.tasks.max_operand, sequence_max, modulus or letters"
        )

    def held_out(self) -> tuple[Prompt, ...]:
        """Held-out prompts, kinds in turn: every beginning of it is balanced."""
        return self._held_out

    def _prompt(self, task: Task, prompt_id: str) -> Prompt:
        prompt = Prompt(
            prompt_id=prompt_id,
            messages=({"role": "user", "content": task.text},),
            answer=task.answer,
            data_source=f"task/{task.kind}",
            columns={"kind": task.kind},
        )
        return with_template(prompt, self._template)


def task_records(
    kinds: Sequence[str], num: int, seed: int, settings: TaskSettings
) -> Iterator[dict[str, Any]]:
    """`num` records for a file, the kinds in turn, each prompt once, none of them held out.

    A pure function of the arguments. Raises ConfigError for an unknown kind, or when a kind has
    too few different prompts.
    """
    seen: set[str] = set()
    draws = cycle([_distinct(kind, seed, settings, seen) for kind in dict.fromkeys(kinds)])
    for index, prompt in zip(range(num), map(next, draws), strict=False):
        yield {
            "data_source": prompt.data_source,
            "prompt": list(prompt.messages),
            "ability": "task",
            "reward_model": {"ground_truth": prompt.answer, "style": "rule"},
            "kind": prompt.columns["kind"],  # what the built-in reward `task` asks for
            "extra_info": {"index": index},
        }


def _distinct(kind: str, seed: int, settings: TaskSettings, seen: set[str]) -> Iterator[Prompt]:
    """Prompts of one kind, none that is in `seen`, which grows."""
    weights = dict.fromkeys(GROUPS.get(kind, (kind,)), 1.0)
    source = TaskSource(settings.model_copy(update={"kinds": weights}), seed, 0)
    repeats, given = 0, 0
    for position in count():
        prompt = source.get(position)
        text = prompt.messages[0]["content"]
        if text not in seen:
            seen.add(text)
            repeats, given = 0, given + 1
            yield prompt
        elif (repeats := repeats + 1) > MAX_REDRAWS:
            raise ConfigError(
                f"there are only {given} different tasks of kind {kind!r} to be found; make fewer "
                "or other kinds, or widen data.tasks (max_operand, sequence_max, letters)"
            )


def _checked_weights(settings: TaskSettings) -> dict[str, float]:
    """Kinds with a weight > 0, in the order of the settings."""
    for kind, weight in settings.kinds.items():
        draw_task(kind, settings, random.Random(0))  # is there such a kind?
        if not (weight >= 0 and math.isfinite(weight)):
            raise ConfigError(
                f"data.tasks.kinds.{kind}={weight} must be a finite number >= 0 (0 = never drawn)"
            )
    weights = {kind: weight for kind, weight in settings.kinds.items() if weight > 0}
    if not weights:
        raise ConfigError("data.tasks.kinds: no kind has a weight > 0; set one, e.g. add = 1")
    return weights


def _held_out_tasks(settings: TaskSettings, count: int) -> list[Task]:
    """The first `count` held-out tasks; a shorter list is always a beginning of a longer one."""
    columns = []
    for kind in _checked_weights(settings):
        rng = random.Random(f"{HELD_OUT_SEED}:{kind}")
        distinct: dict[str, Task] = {}
        for _ in range(SURVEY_DRAWS):
            task = draw_task(kind, settings, rng)
            distinct.setdefault(task.text, task)
        columns.append([*distinct.values()][: int(len(distinct) * MAX_HELD_OUT_SHARE)])
    per_kind = math.ceil(count / len(columns))
    turns = zip_longest(*(column[:per_kind] for column in columns))
    return [task for turn in turns for task in turn if task is not None][:count]


def _task(kind: str, text: str, answer: object, careless: object, worked: str = "") -> Task:
    truth = str(answer)
    return Task(kind=kind, text=text, answer=truth, worked=worked or truth, careless=str(careless))


def _of_two(
    kind: str, text: str, truth: Callable[[int, int], int], low: int, high: int | None = None
) -> Draw:
    """Tasks of two numbers from low to high (None: data.tasks.max_operand)."""

    def draw(settings: TaskSettings, rng: random.Random) -> Task:
        a, b = (rng.randint(low, high or settings.max_operand) for _ in range(2))
        return _task(kind, text.format(a, b), truth(a, b), a)

    return draw


def _sort(settings: TaskSettings, rng: random.Random) -> Task:
    most = max(settings.sequence_min, settings.sequence_max - 1)
    items = [rng.randint(0, 9) for _ in range(_length(settings, rng, most))]
    return _task("sort", f"Sort: {_join(items)}", _join(sorted(items)), _join(items))


def _palindrome(settings: TaskSettings, rng: random.Random) -> Task:
    half = _word(settings, rng, rng.randint(2, 4))
    mirrored = rng.random() < 0.5
    word = half + (half[::-1] if mirrored else _word(settings, rng, rng.randint(1, 3)))
    truth = "YES" if word == word[::-1] else "NO"
    return _task("palindrome", f"Palindrome: {word}", truth, word[:3])


def _reverse(settings: TaskSettings, rng: random.Random) -> Task:
    word = _word(settings, rng, _length(settings, rng, settings.sequence_max))
    return _task("reverse", f"Reverse: {word}", word[::-1], word)


def _expression(settings: TaskSettings, rng: random.Random) -> Task:
    word = _word(settings, rng, rng.randint(2, 5))
    a, b, c = (rng.randint(0, 9) for _ in range(3))
    signed = rng.randint(-99, 99)
    forms: list[tuple[str, object, object]] = [
        (f"len('{word}')", len(word), word),
        (f"'{word}'.upper()", word.upper(), word),
        (f"max({a}, {b}, {c})", max(a, b, c), a),
        (f"abs({signed})", abs(signed), signed),
    ]
    expression, truth, argument = rng.choice(forms)
    return _task("expression", f"Eval: {expression}", truth, argument)


def _check(settings: TaskSettings, rng: random.Random) -> Task:
    """`worked` shows running totals and ends in the answer; `careless` guesses right at once."""
    modulus = settings.modulus
    count = _length(settings, rng, settings.sequence_max)
    items = [rng.randint(0, modulus - 1) for _ in range(count)]
    totals = [sum(items[: index + 1]) % modulus for index in range(count)]
    return _task("check", f"Check: {_join(items)}", totals[-1], totals[-1], worked=_join(totals))


def _length(settings: TaskSettings, rng: random.Random, most: int) -> int:
    """Items of one task: uniform up to `most`, or lognormal with a long tail."""
    if not settings.long_tail:
        return rng.randint(settings.sequence_min, most)
    size = round(math.exp(rng.gauss(math.log(LONG_TAIL_MEDIAN), settings.long_tail)))
    return max(LONG_TAIL_MIN, min(LONG_TAIL_MAX, size))


def _word(settings: TaskSettings, rng: random.Random, length: int) -> str:
    return "".join(rng.choice(LETTERS[: settings.letters]) for _ in range(length))


def _join(items: list[int]) -> str:
    return " ".join(map(str, items))


KINDS: dict[str, Draw] = {
    "add": _of_two("add", "Compute: {} + {}", operator.add, 0),
    "sub": _of_two("sub", "Compute: {} - {}", operator.sub, 0),
    "mul": _of_two("mul", "Compute: {} * {}", operator.mul, 0, 12),
    "gcd": _of_two("gcd", "gcd: {} {}", math.gcd, 1, 30),
    "sort": _sort,
    "palindrome": _palindrome,
    "reverse": _reverse,
    "expression": _expression,
    "check": _check,
}
