"""Trained tokens per second: packed rows against padded ones, and two ranks against one.

    python benchmarks/learner.py [--steps 5]

Prints for each mix of lengths the completion tokens trained per second, padded and packed, and
which share of this machine's matrix products, timed between the steps, their FLOPs are (those of
padding not counted). even: 8 to 256 tokens (4096 on a GPU); long tail: lognormal, most are short.
Padded: the same model, loss and optimizer; micro-batches of as many sequences as fit when all are
of the longest kind, in the order of arrival, each filled up to its own longest. One thread a rank.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import made_up_shard
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncgrpo.buffer.replay import deal
from asyncgrpo.config import Config, from_mapping
from asyncgrpo.launch.preflight import own_port
from asyncgrpo.learner import prepare
from asyncgrpo.learner.batch import Batch, PackReport, pack
from asyncgrpo.learner.update import PolicyUpdater
from asyncgrpo.types import Group, Shard

ON_GPU = torch.cuda.is_available()
SEED = 0
VOCAB, WIDTH, LAYERS, LONGEST, GROUPS = (
    (151_936, 1024, 24, 4096, 16) if ON_GPU else (2048, 256, 4, 256, 16)
)
MAX_TOKENS = 8 * LONGEST + 8 * 8  # 8 of the longest completions with their prompts


def make_model(folder: str) -> None:
    """Random weights; 0.5B-shaped on a GPU, 4 M parameters on a CPU."""
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 128,
        head_dim=64,
        max_position_embeddings=LONGEST + 64,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def make_config(folder: str, learners: int = 1, layout: str = "ddp") -> Config:
    """On a GPU in bfloat16."""
    return from_mapping(
        {
            "model": {"path": folder},
            "data": {"max_prompt_tokens": 8},
            "sampling": {"max_completion_tokens": LONGEST},
            "algo": {"group_size": 8},
            "learner": {
                "max_tokens_per_microbatch": MAX_TOKENS,
                "dtype": "bfloat16" if ON_GPU else "float32",
                "parallel": layout,
            },
            "launch": {"learners": learners, "gpus": learners * ON_GPU},
        }
    )


def shard_of_mix(mix: str) -> Shard:
    """A batch of completions whose lengths are of that mix."""
    random, count = np.random.default_rng(SEED), 8 * GROUPS
    if mix == "even":
        lengths = random.integers(8, LONGEST + 1, count)
    else:
        drawn = random.lognormal(np.log(LONGEST / 8), 1.0, count)
        lengths = np.clip(drawn, 8, LONGEST).astype(int)
    return made_up_shard(lengths.tolist(), VOCAB)


def pack_padded(
    groups: Sequence[Group], step: int, config: Config, agree: Callable[[int], int]
) -> tuple[tuple[Batch, ...], PackReport]:
    """As `pack`, with places that hold nothing behind each sequence."""
    each_alone = config.learner.model_copy(update={"max_tokens_per_microbatch": 1})
    ones, report = pack(groups, step, config.model_copy(update={"learner": each_alone}), agree)
    ones = sorted(ones, key=lambda one: int(one.completion_ids[0]))
    size = MAX_TOKENS // max(len(one.input_ids) for one in ones)
    rows = [ones[first : first + size] for first in range(0, len(ones), size)]
    return tuple(_padded(row) for row in rows), report


def _padded(row: Sequence[Batch]) -> Batch:
    count, longest = len(row), max(len(one.input_ids) for one in row)

    def filled(name: str) -> np.ndarray:
        values = [getattr(one, name) for one in row]
        return np.concatenate([np.pad(v, (0, longest - len(v))) for v in values])

    names = ("input_ids", "target_ids", "loss_mask", "behavior_logprobs", "advantages", "staleness")
    return Batch(
        **{name: filled(name) for name in names},
        position_ids=np.tile(np.arange(longest), count),
        sequence_ids=np.repeat(np.arange(count, dtype=np.int32), longest),
        completion_ids=np.concatenate([one.completion_ids for one in row]),
        cu_seqlens=np.arange(count + 1, dtype=np.int32) * longest,
    )


def flops(shard: Shard, policy: torch.nn.Module) -> float:
    """Of forward and backward: 6 per weight and token, and causal attention's 6 x width x L^2."""
    matrices = sum(w.numel() for n, w in policy.named_parameters() if ".layers." in n)
    total = 0.0
    for group in shard.groups:
        for length in group.completions.lengths:
            places = len(group.prompt_token_ids) + length - 1
            total += 6.0 * (matrices * places + VOCAB * WIDTH * length)
            total += 6.0 * LAYERS * WIDTH * places**2
    return total


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_flops() -> float:
    """Per second, of one product of large square matrices in the learner's dtype."""
    size = 8192 if ON_GPU else 1024
    dtype, device = (torch.bfloat16, "cuda") if ON_GPU else (torch.float32, "cpu")
    one, other = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / min(seconds(lambda: one @ other) for _ in range(3))


def packing(steps: int, folder: str) -> None:
    """Padded and packed steps in turn, so that both meet the same machine."""
    updater = PolicyUpdater(make_config(folder))
    for mix in ("even", "long tail"):
        shard = shard_of_mix(mix)
        took: dict[str, list[float]] = {"padded": [], "packed": []}
        peaks = []
        for _ in range(steps + 1):
            peaks.append(peak_flops())
            with patch.object(prepare, "pack", pack_padded):
                took["padded"].append(seconds(partial(updater.update, shard)))
            took["packed"].append(seconds(partial(updater.update, shard)))
        typical = {name: statistics.median(times[1:]) for name, times in took.items()}
        work, best = flops(shard, updater._policy), max(peaks)
        for name, time_ in typical.items():
            print(
                f"{mix}, {name}: {shard.num_loss_tokens_global / time_:.0f} tokens/s, "
                f"{100 * work / time_ / best:.0f} % of {best / 1e9:.0f} GFLOP/s"
            )
        print(f"{mix}: packed / padded = {typical['padded'] / typical['packed']:.2f}", flush=True)


def ranks(steps: int, folder: str) -> None:
    """The same batch on one rank and dealt to two."""
    shard = shard_of_mix("long tail")
    with tempfile.TemporaryDirectory() as out:
        for layout in ("ddp", "fsdp"):
            for count in (1, 2):
                port = own_port()
                arguments = (count, port, steps, layout, folder, shard, out)
                mp.spawn(_rank, args=arguments, nprocs=count)
            one, two = (float(Path(out, f"{layout}_{n}").read_text()) for n in (1, 2))
            print(f"{layout}: 2 ranks / 1 rank = {one / two:.2f} ({1e3 * two:.0f} ms)", flush=True)


def _rank(
    rank: int, count: int, port: int, steps: int, layout: str, folder: str, shard: Shard, out: str
) -> None:
    torch.set_num_threads(1)
    backend = "gloo"
    if ON_GPU:
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=count)
    updater = PolicyUpdater(make_config(folder, count, layout))
    own = replace(shard, groups=deal(shard.groups, count)[rank])
    times = [seconds(partial(updater.update, own)) for _ in range(steps + 1)]
    if rank == 0:
        Path(out, f"{layout}_{count}").write_text(str(statistics.median(times[1:])))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as model:
        make_model(model)
        packing(options.steps, model)
        if not ON_GPU or torch.cuda.device_count() > 1:
            ranks(options.steps, model)
