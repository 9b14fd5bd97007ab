"""A small real model to train: its settings, groups and shards of them, and ranks to train on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fakes import completion_of, group_of
from transformers import AutoModelForCausalLM

from asyncgrpo.buffer.replay import deal
from asyncgrpo.config import Config, from_mapping
from asyncgrpo.learner.update import PolicyUpdater
from asyncgrpo.types import Group, Shard

STEP = 6


def settings(folder: Path, **rooms: Any) -> Config:
    algo = {"group_size": 4, **rooms.pop("algo", {})}
    return from_mapping(
        {
            "model": {"path": str(folder)},
            "algo": algo,
            "learner": {"lr": 1e-2, "warmup_steps": 0, **rooms.pop("learner", {})},
            "buffer": {"groups_per_step": 6, "max_staleness": 6},
            "launch": {"learners": 1},
            **rooms,
        }
    )


def logprobs(model: torch.nn.Module, prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """float64 log-probs of the completion by a plain forward pass."""
    ids = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))[None]
    with torch.no_grad():
        table = model(input_ids=ids).logits[0].double().log_softmax(-1)
    places = torch.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1)
    return table[places, torch.from_numpy(tokens.astype(np.int64))].numpy()


def make_groups(folder: Path, count: int = 6, noise: float = 0.3, seed: int = 0) -> list[Group]:
    """Random completions; behaviour log-probs are the model's plus noise that grows with age."""
    random = np.random.default_rng(seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    groups = []
    for number in range(count):
        prompt = random.integers(3, 200, int(random.integers(2, 6))).astype(np.int32)
        completions = []
        for sample in range(4):
            tokens = random.integers(3, 200, int(random.integers(1, 13))).astype(np.int32)
            versions = np.sort(random.integers(STEP - 4, STEP + 1, len(tokens))).astype(np.int32)
            moved = noise * random.normal(size=len(tokens)) * (STEP - versions)
            own = (logprobs(model, prompt, tokens) + moved).astype(np.float32)
            reason = "length" if sample == 0 else "stop"
            completions.append(completion_of(tokens, versions, own, reason))
        groups.append(group_of(number, prompt, completions, random.normal(size=4)))
    return groups


def shard_of(groups: list[Group], whole: list[Group] | None = None, step: int = STEP) -> Shard:
    return fakes.shard_of(groups, step, whole)


def weights_of(updater: PolicyUpdater) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in updater.weights()}


def token_log(run: Path, step: int = STEP) -> dict[str, np.ndarray]:
    with np.load(run / "tokens" / f"step_{step}.rank0.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def part_of(shard: Shard, rank: int, count: int, step: int = STEP) -> Shard:
    """One rank's part, as the batch of any step."""
    return replace(shard, step=step, groups=deal(shard.groups, count)[rank])


def on_ranks(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Calls function(rank, count, *arguments) in processes of one gloo group; one rank: here."""
    if count == 1:
        function(0, 1, *arguments)
        if dist.is_initialized():  # FSDP opens a group for a lone rank
            dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_as_rank, args=(count, folder, function, arguments), nprocs=count)


def _as_rank(rank: int, count: int, folder: str, function: Any, arguments: Any) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
    function(rank, count, *arguments)
    dist.barrier()
    dist.destroy_process_group()
