"""Cost of the loss with all diagnostics, and peak memory of log-probs with a large vocabulary.

    python benchmarks/loss.py

Prints two lines: seconds of the loss (all losses and corrections in turn) as a share of the
learner's step on the tiny model at 64k tokens, and GiB beyond model and weights' gradients for
forward and backward of 32k tokens with a vocabulary of 150k. One thread; each in its own process.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import made_up_shard
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncgrpo.config import from_mapping
from asyncgrpo.data.tiny import build_untrained
from asyncgrpo.learner.diagnostics import measure
from asyncgrpo.learner.model import PolicyHead, load_policy, packed_row
from asyncgrpo.learner.objective import objective
from asyncgrpo.learner.prepare import Preparer
from asyncgrpo.learner.update import PolicyUpdater
from asyncgrpo.settings.algo import AlgoSettings

SPAWN = multiprocessing.get_context("spawn")
ALGOS = {
    "ppo_clip, decoupled (default)": {},
    "ppo_clip, all masks and tis_sequence": {
        "correction": ["icepop", "geometric_mask", "opsm", "m2po", "tis_sequence"]
    },
    "gspo": {"loss": "gspo", "correction": "bypass", "aggregation": "sequence_mean"},
    "vespo": {"loss": "vespo", "correction": "bypass"},
}


def settings(path: str, algo: dict[str, object], max_tokens: int):
    """Defaults of the tiny run, one learner, on that model."""
    return from_mapping(
        {
            "model": {"path": path},
            "algo": algo,
            "learner": {"max_tokens_per_microbatch": max_tokens},
            "launch": {"learners": 1},
        }
    )


def cost() -> None:
    """Loss, diagnostics and their backward pass against a whole learner step."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = str(build_untrained(Path(folder) / "tiny", True, 0))
        shard = made_up_shard([64] * 1024, 250)
        for name, algo in ALGOS.items():
            config = settings(path, algo, 8192)
            updater = PolicyUpdater(config)
            head = PolicyHead(load_policy(path))
            preparer = Preparer(config, head, None, "cpu")
            (ready,) = preparer.prepare(shard.step, [shard.groups], 0.0)
            step, loss = [], []
            for _ in range(3):
                start = time.perf_counter()
                updater.update(shard)
                step.append(time.perf_counter() - start)
                loss.append(sum(loss_seconds(ready, i, config) for i in range(len(ready.batches))))
            share = statistics.median(loss) / statistics.median(step)
            print(
                f"{name}: loss and diagnostics {1e3 * statistics.median(loss):.0f} ms of "
                f"{statistics.median(step):.2f} s per step = {100 * share:.1f} % "
                f"({shard.num_loss_tokens_global} tokens)",
                flush=True,
            )


def loss_seconds(ready, index: int, config) -> float:
    """Forward, measurement and backward of one micro-batch's loss, the model left out."""
    count = len(ready.batches[index].input_ids)
    logprobs = (-5 - torch.rand(count)).requires_grad_()
    start = time.perf_counter()
    inputs = ready.inputs(index, logprobs, torch.rand(count), config)
    found = objective(inputs, config.algo, 0.0)
    measure(inputs, found, config.algo)
    found.loss.backward()
    return time.perf_counter() - start


def memory() -> None:
    """Peak resident memory above what the loaded model takes."""
    torch.set_num_threads(1)
    vocab = 151_936
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        Qwen3ForCausalLM(config).save_pretrained(folder)
        shard = made_up_shard([512] * 64, vocab)
        settings_ = settings(folder, {}, 64 * 1024)
        head = PolicyHead(load_policy(folder))
        (ready,) = Preparer(settings_, head, None, "cpu").prepare(4, [shard.groups], 0.0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        algo = AlgoSettings()
        for index, batch in enumerate(ready.batches):
            inputs = ready.inputs(index, *head(packed_row(batch)), settings_)
            objective(inputs, algo, 0.0).loss.backward()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    tokens = shard.num_loss_tokens_global
    whole = tokens * vocab * 4 / 2**30
    print(
        f"forward and backward of {tokens} tokens x {vocab} words: peak {after - before:.2f} GiB "
        f"beyond the model (its logits alone, whole, would be {whole:.1f} GiB)",
        flush=True,
    )


if __name__ == "__main__":
    for part in (cost, memory):
        process = SPAWN.Process(target=part)
        process.start()
        process.join()
