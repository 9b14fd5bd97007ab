"""Tokens/s of both roles, pause per publish and peak memory with one GPU for actor and learner.

    python benchmarks/single_gpu.py [--shape 0.5b] [--steps 12] [--transport auto] [--sleep]

A model of random weights in that shape answers task prompts, its rewards are random, and it is
trained on them: what it says does not matter, what it costs does. Medians over the steps after the
second. Memory is what the GPU has in use (nvidia-smi), sampled twice a second; without a GPU the
run is one on the CPU, where --shape tiny shows that the script works, and memory is resident.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from common import launch, launch_command
from transformers import AutoModelForCausalLM, Qwen2Config

from asyncgrpo.data.tiny_tokenizer import build_tokenizer

SEED, WARM_STEPS, GIB = 0, 2, 1 << 30
SHAPES = {  # layers, width, heads, key-value heads, MLP, vocabulary
    "tiny": (2, 64, 2, 1, 128, 512),
    "0.5b": (24, 896, 14, 2, 4864, 151_936),  # Qwen2.5-0.5B
    "1.5b": (28, 1536, 12, 2, 8960, 151_936),
}
SIZES = {
    "tiny": {"tokens": 32, "concurrency": 8, "cache": 1 << 25, "row": 2048},
    "0.5b": {"tokens": 512, "concurrency": 32, "cache": 8 << 30, "row": 16384},
    "1.5b": {"tokens": 512, "concurrency": 32, "cache": 16 << 30, "row": 16384},
}


def chance(completions: list[str]) -> list[float]:
    """The reward."""
    return [random.random() for _ in completions]


def make_model(shape: str, folder: Path) -> None:
    layers, width, heads, key_heads, inner, vocab = SHAPES[shape]
    torch.manual_seed(SEED)
    config = Qwen2Config(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=inner,
        vocab_size=vocab,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


class Watch(threading.Thread):
    """Remembers the most memory in use, in bytes."""

    def __init__(self, *, on_gpu: bool) -> None:
        super().__init__(daemon=True)
        self._on_gpu, self.most, self.done = on_gpu, 0, False

    def run(self) -> None:
        while not self.done:
            self.most = max(self.most, _gpu_bytes() if self._on_gpu else _resident_bytes())
            time.sleep(0.5)


def _gpu_bytes() -> int:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) << 20


def _resident_bytes() -> int:
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def settings(options: argparse.Namespace, *, on_gpu: bool) -> dict[str, object]:
    size = SIZES[options.shape]
    values: dict[str, object] = {
        "model.dtype": "bfloat16" if on_gpu else "float32",
        "learner.dtype": "bfloat16" if on_gpu else "float32",
        "launch.gpus": int(on_gpu),
        "launch.share_gpus": str(on_gpu).lower(),
        "launch.start_timeout_seconds": 900,
        "sampling.max_completion_tokens": size["tokens"],
        "actor.concurrency": size["concurrency"],
        "actor.kv_cache_bytes": size["cache"],
        "learner.max_tokens_per_microbatch": size["row"],
        "weights.transport": options.transport,
        "reward.functions": f"{Path(__file__).resolve()}:chance",
        "algo.drop_uniform_groups": "false",
        "data.eval": "none",
        "run.seed": SEED,
    }
    if options.sleep:
        values["actor.sleep"] = "true"
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--sleep", action="store_true")
    options = parser.parse_args()
    on_gpu = shutil.which("nvidia-smi") is not None
    with tempfile.TemporaryDirectory() as base:
        model, run = Path(base) / "model", Path(base) / "run"
        make_model(options.shape, model)
        words = ("--model", model, "--actors", 1, "--learners", 1, "--max-steps", options.steps)
        command = launch_command(run, *words, settings=settings(options, on_gpu=on_gpu))
        watch = Watch(on_gpu=on_gpu)
        watch.start()
        launch(command)
        watch.done = True
        lines = (run / "metrics.jsonl").read_text().splitlines()
        transport = json.loads((run / "endpoints.json").read_text())["transport"]
    rows = [row for row in map(json.loads, lines) if "train_seconds" in row][WARM_STEPS:]
    made, took = (rows[-1][name] - rows[0][name] for name in ("tokens_generated", "seconds"))

    def median(name: str) -> float:
        return statistics.median(row[name] for row in rows)

    trained = statistics.median(row["tokens_trained"] / row["train_seconds"] for row in rows)
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(
        f"{device}, {options.shape} by {transport}{', sleeping' * options.sleep}: generated "
        f"{made / took:.0f} tokens/s, trained {trained:.0f} tokens/s while training; a "
        f"step {median('step_seconds'):.2f} s, of it {median('wait_seconds'):.2f} s waiting for a "
        f"batch; a publish of {median('publish/bytes') / GIB:.2f} GiB live after "
        f"{median('publish/live_seconds'):.3f} s, pause {median('publish/stall_seconds'):.3f} s; "
        f"peak {watch.most / GIB:.1f} GiB"
    )


if __name__ == "__main__":
    main()
