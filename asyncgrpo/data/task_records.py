"""Generated tasks as records for a file: each prompt once, evenly many of each kind.

Held-out tasks (data.eval = "tasks") are never among them. The truth is in the record only
(reward_model.ground_truth), never in the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

from asyncgrpo.data.files import Row
from asyncgrpo.data.streams import Turns
from asyncgrpo.data.tasks import MAX_REDRAWS, TaskSource
from asyncgrpo.errors import ConfigError
from asyncgrpo.settings.data import TaskSettings
from asyncgrpo.types import Prompt

GROUPS = {"math": ("add", "sub", "mul")}  # names for several kinds of data/tasks.py


def task_records(
    kinds: Sequence[str], num: int, seed: int, settings: TaskSettings
) -> Iterator[Row]:
    """`num` records, the kinds in turn: a pure function of the arguments, each prompt once.

    Raises ConfigError for an unknown kind, or when a kind has too few different prompts.
    """
    seen: set[str] = set()
    draws = [_distinct(kind, seed, settings, seen) for kind in dict.fromkeys(kinds)]
    turns = Turns([1] * len(draws), [None] * len(draws), seed)
    for index in range(num):
        turn = turns.get(index)
        assert turn is not None, "without quotas turns never end"
        yield _record(next(draws[turn[0]]), index)


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


def _record(prompt: Prompt, index: int) -> Row:
    return {
        "data_source": prompt.data_source,
        "prompt": list(prompt.messages),
        "ability": "task",
        "reward_model": {"ground_truth": prompt.answer, "style": "rule"},
        "kind": prompt.columns["kind"],  # what the built-in reward `task` asks for
        "extra_info": {"index": index},
    }
