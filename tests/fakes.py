"""Stand-ins that tests share: prompts, files of rows, groups, a prompt source, a run directory."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from asyncgrpo.config import Config, from_mapping
from asyncgrpo.rundir import Endpoints, RunDir
from asyncgrpo.types import Completion, Completions, Group, Lease, Prompt, Sampling, Shard

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_completion_tokens=16)


def make_prompt(number: int, data_source: str = "task/add") -> Prompt:
    return Prompt(
        prompt_id=f"p{number}",
        messages=({"role": "user", "content": f"Compute: {number} + 1"},),
        answer=str(number + 1),
        data_source=data_source,
        columns={"kind": "add", "number": number},
    )


def write_jsonl(path: Path, *rows: object) -> Path:
    """Rows as lines of JSON (text as it is), in a folder that is made."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_parquet(path: Path, *rows: dict) -> Path:
    from pyarrow import Table, parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(Table.from_pylist([*rows]), path)
    return path


def make_lease(number: int = 1, group_size: int = 2, purpose: str = "train") -> Lease:
    return Lease(
        lease_id=f"{purpose[0]}{number}",
        prompt=make_prompt(number),
        group_size=group_size,
        sampling=SAMPLING,
        seed=number,
        purpose=purpose,  # type: ignore[arg-type]
        version=0,
        deadline_seconds=60.0,
    )


@functools.cache
def _tokens(length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(3, 90, length).astype(np.int32), -random.random(length).astype("f4")


def make_completion(versions: Sequence[int], seed: int = 0, text: str = "7") -> Completion:
    token_ids, logprobs = _tokens(len(versions), seed)
    return Completion(
        token_ids=token_ids.copy(),
        behavior_logprobs=logprobs.copy(),
        versions=np.array(versions, dtype=np.int32),
        finish_reason="stop",
        text=text,
    )


def make_group(
    lease: Lease,
    *,
    versions: Sequence[Sequence[int]] | None = None,
    scores: Sequence[float] | None = None,
    actor: str = "actor-0",
) -> Group:
    size = lease.group_size
    spans = versions if versions is not None else [[lease.version] * (2 + i) for i in range(size)]
    values = scores if scores is not None else [1.0] + [-1.0] * (size - 1)
    return Group(
        lease=lease,
        prompt_token_ids=np.arange(4, dtype=np.int32),
        completions=Completions.of([make_completion(span, seed=i) for i, span in enumerate(spans)]),
        rewards=np.array(values, dtype=np.float32),
        reward_parts={"task": np.array(values, dtype=np.float32)},
        actor=actor,
        timings={"generate": 0.1, "judge": 0.01},
    )


def completion_of(
    tokens: Sequence[int],
    versions: Sequence[int] | int = 0,
    logprobs: Sequence[float] | None = None,
    finish_reason: str = "stop",
) -> Completion:
    """A completion of these tokens; one version for all, log-probs made up unless given."""
    return Completion(
        token_ids=np.array(tokens, np.int32),
        behavior_logprobs=np.array(
            [-0.1 * t for t in tokens] if logprobs is None else logprobs, "f4"
        ),
        versions=np.broadcast_to(np.array(versions, np.int32), len(tokens)).copy(),
        finish_reason=finish_reason,  # type: ignore[arg-type]
    )


def group_of(
    number: int, prompt: Sequence[int], completions: Sequence[Completion], rewards: Sequence[float]
) -> Group:
    scores = np.array(rewards, np.float32)
    return Group(
        lease=make_lease(number, group_size=len(completions)),
        prompt_token_ids=np.array(prompt, np.int32),
        completions=Completions.of(completions),
        rewards=scores,
        reward_parts={"task": scores},
        actor="actor-0",
    )


def shard_of(groups: Sequence[Group], step: int, whole: Sequence[Group] | None = None) -> Shard:
    """The groups as one rank's shard; whole: of all ranks."""
    everything = whole or groups
    return Shard(
        step=step,
        groups=tuple(groups),
        num_loss_tokens_global=sum(group.num_tokens for group in everything),
        num_completions_global=sum(len(group.completions) for group in everything),
    )


def load_script(path: Path) -> ModuleType:
    """A module that stands outside of the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CountingPrompts:
    """A prompt source of numbered prompts; ends after `limit` when one is given."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit

    def get(self, position: int) -> Prompt | None:
        if self._limit is not None and position >= self._limit:
            return None
        return make_prompt(position)

    def epoch(self, position: int) -> None:
        """Numbered prompts never repeat."""

    def held_out(self, num: int, block: str = "held-out") -> tuple[Prompt, ...]:
        return tuple(make_prompt(1_000_000 + i) for i in range(num))


def make_run(path: Path, config: Config | None = None, **rooms: Any) -> RunDir:
    """A run directory that is written, of these settings; its endpoints lead nowhere."""
    path.mkdir(parents=True, exist_ok=True)
    endpoints = Endpoints(buffer="tcp://127.0.0.1:1", weights="", store=("", 0))
    run = RunDir(path=path, config=config or from_mapping(rooms), endpoints=endpoints)
    run.write()
    return run


def rows_of(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file, the last of which is whole."""
    *lines, end = path.read_text(encoding="utf-8").split("\n")
    assert end == ""
    return [json.loads(line) for line in lines]
