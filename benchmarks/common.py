"""What benchmarks share: groups of made-up completions, runs from the command line, tables."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asyncgrpo.types import Completion, Completions, Group, Lease, Prompt, Sampling, Shard

CONFIG = Path(__file__).parent.parent / "configs" / "tiny.toml"
GROUP_SIZE, STEP = 8, 4  # of made-up groups and shards
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_completion_tokens=4096)


def group_of(
    prompt: Prompt,
    prompt_token_ids: Sequence[int] | np.ndarray,
    completions: Sequence[Completion],
    parts: Mapping[str, np.ndarray],
    rewards: np.ndarray,
) -> Group:
    """A group as an actor sends it; its lease says no more than it must."""
    lease = Lease(
        lease_id=f"t{prompt.prompt_id}",
        prompt=prompt,
        group_size=len(completions),
        sampling=SAMPLING,
        seed=0,
        purpose="train",
        version=int(completions[0].versions[0]),
        deadline_seconds=60.0,
    )
    return Group(
        lease=lease,
        prompt_token_ids=np.array(prompt_token_ids, np.int32),
        completions=Completions.of(completions),
        rewards=rewards,
        reward_parts=parts,
        actor="benchmark",
        timings={"generate": 1.0, "judge": 0.1},
    )


def shard_of(step: int, groups: Iterable[Group]) -> Shard:
    """A batch for one rank."""
    groups = tuple(groups)
    return Shard(
        step=step,
        groups=groups,
        num_loss_tokens_global=sum(group.num_tokens for group in groups),
        num_completions_global=sum(len(group.completions) for group in groups),
    )


def made_up_group(
    number: int, lengths: Iterable[int], vocab: int, prompt_tokens: int = 8, newest: int = STEP
) -> Group:
    """Random completions of these lengths, of policy versions up to the newest."""
    random = np.random.default_rng(number)
    completions = [
        Completion(
            token_ids=random.integers(3, vocab, length).astype(np.int32),
            behavior_logprobs=(-5 - random.random(length)).astype(np.float32),
            versions=np.sort(random.integers(0, newest + 1, length)).astype(np.int32),
            finish_reason="stop",
            text="word " * length,
        )
        for length in lengths
    ]
    prompt = Prompt(prompt_id=str(number), messages=(), answer=None, data_source="random")
    rewards = random.normal(size=len(completions)).astype(np.float32)
    ids = random.integers(3, vocab, prompt_tokens)
    return group_of(prompt, ids, completions, {"task": rewards}, rewards)


def made_up_shard(lengths: Sequence[int], vocab: int) -> Shard:
    """Groups of GROUP_SIZE completions, so many tokens each."""
    starts = range(0, len(lengths), GROUP_SIZE)
    return shard_of(STEP, (made_up_group(i, lengths[i : i + GROUP_SIZE], vocab) for i in starts))


def launch_command(
    run_dir: Path, *arguments: object, settings: Mapping[str, object] | None = None
) -> list[str]:
    """`asyncgrpo launch` with two actors and two learners."""
    words = ["launch", "--run-dir", run_dir, "--actors", 2, "--learners", 2, *arguments]
    for name, value in (settings or {}).items():
        words += ["--set", f"{name}={value}"]
    return [sys.executable, "-m", "asyncgrpo.cli", *map(str, words)]


def launch(command: Sequence[str], **options: Any) -> None:
    """A run to its end; leaves with its last words when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def table_line(cells: Iterable[object]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(map(str, cells))} |"
