"""Writes what the model said, trained and dropped: one line per completion, one file per step.

`trajectories/step_<k>.jsonl` (UTF-8, text as it is) gets a group's rows when the group ends: it was
trained in step k, or filtered or evicted while step k was next. README.md explains the fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asyncgrpo.config import Config
from asyncgrpo.rows import as_line, keep_rows, whole_rows
from asyncgrpo.types import Completion, EndedGroup


class TrajectoryWriter:
    """Appends ended groups to the file of their step, unless observe.trajectories is off."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        self._folder, self._config = run_dir / "trajectories", config
        self._folder.mkdir(parents=True, exist_ok=True)
        self._step, self._num_groups = -1, 0

    def __call__(self, step: int, ended: Sequence[EndedGroup]) -> None:
        if not self._config.observe.trajectories:
            return
        path = self._folder / f"step_{step}.jsonl"
        if step != self._step:
            groups = [row["group"] for row in whole_rows(path)]
            self._step, self._num_groups = step, max(groups, default=-1) + 1
        lines = [
            as_line({"step": step, "group": number, **row})
            for number, group in enumerate(ended, start=self._num_groups)
            for row in _rows(step, group, self._config)
        ]
        self._num_groups += len(ended)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def rewind(self, step: int, state: Callable[[str], str | None]) -> None:
        """Takes out of the files of this step and later ones whatever has not ended as it says.

        state: of a lease, by its id.
        """
        self._step = -1
        for number, path in step_files(self._folder.parent).items():
            if number >= step and not keep_rows(
                path, lambda row: state(row["lease_id"]) == row["status"]
            ):
                path.unlink()


def step_files(run_dir: Path) -> dict[int, Path]:
    """The files of a run, by step, in order."""
    paths = (run_dir / "trajectories").glob("step_*.jsonl")
    found = {path.stem.removeprefix("step_"): path for path in paths}
    return dict(sorted((int(number), path) for number, path in found.items() if number.isdecimal()))


def _rows(step: int, ended: EndedGroup, config: Config) -> Iterator[dict[str, Any]]:
    group, prompt, is_trained = ended.group, ended.group.lease.prompt, ended.advantages is not None
    for index, completion in enumerate(group.completions):
        versions = completion.versions
        oldest, newest = (
            (int(versions.min()), int(versions.max())) if len(versions) else (None, None)
        )
        yield {
            "sample": index,
            "status": ended.status,
            "reason": ended.reason,
            "prompt_id": prompt.prompt_id,
            "data_source": prompt.data_source,
            "prompt": list(prompt.messages),
            "answer": prompt.answer,
            "completion": completion.text,
            "reward": _number(group.rewards[index]),
            "reward_parts": {n: _number(part[index]) for n, part in group.reward_parts.items()},
            "advantage": None if ended.advantages is None else _number(ended.advantages[index]),
            "num_prompt_tokens": len(group.prompt_token_ids),
            "num_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "version_min": oldest,
            "version_max": newest,
            "staleness": None if oldest is None else step - oldest,
            "masked_share": _masked_share(completion, step, config) if is_trained else None,
            "lease_id": group.lease.lease_id,
            "actor": group.actor,
        }


def _number(value: np.float32) -> float | None:
    """The shortest decimal number that is this float32; JSON has no NaN."""
    return None if math.isnan(value) else float(str(value))


def _masked_share(completion: Completion, step: int, config: Config) -> float:
    """As learner/batch.py decides."""
    is_truncated = config.algo.mask_truncated and completion.finish_reason == "length"
    if is_truncated or not np.isfinite(completion.behavior_logprobs).all():
        return 1.0
    if config.buffer.staleness_action != "mask":
        return 0.0
    return float((step - completion.versions > config.buffer.max_staleness).mean())
