"""Writes what was trained on: one line per completion, one file per step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from asyncgrpo.types import Completion, Group


class TrajectoryWriter:
    """Appends nothing: each step's file is written once, whole, by the buffer process."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "trajectories"
        self._folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: int, groups: Sequence[Group]) -> None:
        lines = [json.dumps(row, ensure_ascii=False) for g in groups for row in rows(step, g)]
        draft = self._folder / f".step_{step}.tmp"
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
        draft.rename(self._folder / f"step_{step}.jsonl")


def rows(step: int, group: Group) -> Iterator[dict[str, Any]]:
    """The lines of one group. `staleness` is the age in versions of its oldest token."""
    for index, completion in enumerate(group.completions):
        yield {
            "step": step,
            "lease_id": group.lease.lease_id,
            "prompt_id": group.lease.prompt.prompt_id,
            "data_source": group.lease.prompt.data_source,
            "messages": list(group.lease.prompt.messages),
            "answer": group.lease.prompt.answer,
            "completion": completion.text,
            "reward": float(group.rewards[index]),
            "reward_parts": {n: float(part[index]) for n, part in group.reward_parts.items()},
            "num_prompt_tokens": len(group.prompt_token_ids),
            "num_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "versions": _runs(completion),
            "staleness": step - int(completion.versions.min()),
            "actor": group.actor,
        }


def _runs(completion: Completion) -> list[list[int]]:
    """[version, number of tokens] for each run of equal versions."""
    runs: list[list[int]] = []
    for version in completion.versions.tolist():
        if runs and runs[-1][0] == version:
            runs[-1][1] += 1
        else:
            runs.append([version, 1])
    return runs
