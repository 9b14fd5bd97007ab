"""Questions to the trajectories of a run: which rows there are, and what they say. Only reads.

README.md explains the fields of a row. A run may be going on or have been killed: lines that are
not whole are left out with a warning.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from asyncgrpo.errors import ConfigError, DataError
from asyncgrpo.observe.trajectories import step_files
from asyncgrpo.rows import numbered_rows
from asyncgrpo.rundir import RunDir

log = logging.getLogger(__name__)
Row = Mapping[str, Any]
# What a row must have to be shown or counted.
NEEDED = {
    *("step", "group", "sample", "status", "reason", "prompt_id", "data_source", "prompt"),
    *("answer", "completion", "reward", "reward_parts", "advantage", "num_tokens"),
    *("finish_reason", "staleness", "masked_share"),
}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Samples:
    """The trajectories of one run directory; steps: those that have a file, in order."""

    def __init__(self, run_dir: Path) -> None:
        """ConfigError when this is no run directory, DataError when it has no trajectories."""
        self.run_dir, self._files = run_dir, step_files(run_dir)
        self._correct_above = RunDir.read(run_dir).config.reward.correct_above
        self.steps = tuple(self._files)
        if not self.steps:
            raise DataError(
                f"{run_dir}/trajectories holds no step_<k>.jsonl: no group has ended yet, or "
                "observe.trajectories is false"
            )

    def pick(self, wanted: str) -> list[int]:
        """The steps of "5", of "0:5" (5 not included), ":5", "5:" or ":".

        ConfigError for other text, DataError, with the nearest step, when there are none.
        """
        match = re.fullmatch(r"(\d+)|(\d*):(\d*)", wanted)
        if not match:
            raise ConfigError(
                f"steps {wanted!r} must be like 5, or a range like 0:5 (5 not included), :5 or 5:"
            )
        first = int(match[1] or match[2] or 0)
        end = first + 1 if match[1] else int(match[3] or self.steps[-1] + 1)
        found = [step for step in self.steps if first <= step < end]
        if not found:
            nearest = min(self.steps, key=lambda step: abs(step - first))
            raise DataError(
                f"{self.run_dir} has no trajectories of step {wanted}; the nearest is {nearest}, "
                f"there are {len(self.steps)} from {self.steps[0]} to {self.steps[-1]}"
            )
        return found

    def rows(self, steps: Iterable[int]) -> Iterator[Row]:
        """The rows of some steps, in the order in which they were written."""
        for step in steps:
            for number, row in numbered_rows(self._files[step]):
                if isinstance(row, dict) and row.keys() >= NEEDED:
                    yield row
                else:
                    note = "%s:%d is not a whole row (the run goes on, or was killed)"
                    log.warning(note, self._files[step], number)

    def statistics(self, rows: Sequence[Row]) -> dict[str, float]:
        """Counts, shares and means of some trained completions; only their number if it is 0.

        correct: share whose first reward function scores above reward.correct_above; duplicate:
        share whose text occurs before in the group; stale: versions of a completion's oldest token.
        """
        if not rows:
            return {"answers": 0}
        count = len(rows)
        rewards, lengths, ages = (
            [row[name] for row in rows] for name in ("reward", "num_tokens", "staleness")
        )
        texts = {(*group_key(row), row["completion"]) for row in rows}
        first_scores = [next(iter(row["reward_parts"].values())) for row in rows]
        right = [score is not None and score > self._correct_above for score in first_scores]
        return {
            "answers": count,
            "correct": sum(right) / count,
            "reward": fmean(rewards),
            "std": pstdev(rewards),
            "tokens": fmean(lengths),
            "p95": sorted(lengths)[ceil(0.95 * count) - 1],
            "truncated": sum(row["finish_reason"] == "length" for row in rows) / count,
            "duplicate": 1 - len(texts) / count,
            "stale": fmean(ages),
            "max": max(ages),
        }


def changes(
    before: Iterable[Row], after: Iterable[Row]
) -> list[tuple[float, list[Row], list[Row]]]:
    """Of each prompt in both: how much its mean reward rose, and its rows; largest change first."""
    one, two = grouped(before, prompt_key), grouped(after, prompt_key)
    pairs = [(one[key], two[key]) for key in one if key in two]
    means = [[fmean(row["reward"] for row in side) for side in pair] for pair in pairs]
    found = [(new - old, *pair) for (old, new), pair in zip(means, pairs, strict=True)]
    return sorted(found, key=lambda change: -abs(change[0]))


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by key, in the order in which the keys first occur."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def group_key(row: Row) -> tuple[int, int]:
    """The same for the completions of one group."""
    return row["step"], row["group"]


def prompt_key(row: Row) -> str:
    """The same for the same prompt_id with the same messages."""
    return json.dumps([row["prompt_id"], row["prompt"]], sort_keys=True)


def best_of(rows: Iterable[Row], count: int | None = None, sign: int = 1) -> list[Row]:
    """Those with the highest rewards (sign -1: the lowest), default all; ties in their order."""
    return sorted(rows, key=lambda row: -sign * row["reward"])[:count]


def as_messages(row: Row) -> dict[str, Any]:
    """A record for supervised fine-tuning: the conversation with its answer."""
    answer = {"role": "assistant", "content": row["completion"]}
    kept = {name: row[name] for name in ("prompt_id", "data_source", "reward")}
    return {"messages": [*row["prompt"], answer], **kept}


def shown(text: str, limit: int | None = None) -> str:
    """Text with its control characters escaped, cut after `limit` characters."""
    left = 0 if limit is None else max(len(text) - limit, 0)
    escaped = CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text[:limit])
    return escaped + f" … [{left} more characters: --full]" * (left > 0)
