"""Asynchronous actors against lock-step on the same cores: same model, prompts, seeds and amount.

    python benchmarks/async_vs_sync.py [--steps 60] [--seeds 0 1 2]

Lock-step is the same code with buffer.max_staleness=0: a batch is generated, trained, published,
and only then may the next begin. The task is a long tail (data.tasks.long_tail): most completions
are short, some ten times longer. Each seed runs both ways, one after the other, so that ratios
are taken side by side. The limits are measured on their own cores in the same run: generation
alone (the learner takes no batch) and training alone (the same batches again).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import launch, launch_command

from asyncgrpo.rows import whole_rows

TARGET = 0.75  # held-out accuracy to reach
BASE = {
    "run.name": "bench",
    "data.max_prompt_tokens": 96,
    "sampling.max_completion_tokens": 64,
    "data.tasks.kinds": "{check=2.0, sort=1.0, reverse=1.0}",
    "data.tasks.long_tail": 0.7,
    "buffer.groups_per_step": 16,
    "algo.group_size": 8,
    "actor.concurrency": 12,
    "learner.max_tokens_per_microbatch": 8192,
    "eval.every": 10,
    "eval.num_prompts": 150,
    "observe.trajectories": "false",
}
MODES = {
    "asynchronous": {"buffer.max_staleness": 4},
    # everything in flight belongs to the one batch that lock-step may work on
    "lock-step": {"buffer.max_staleness": 0, "buffer.order": "ticket"},
}


def measure(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Figures of one run, without its first three steps (start-up, first evaluation)."""
    trained = [row for row in rows if "loss" in row][3:]
    sums = {
        name: sum(row[name] for row in trained)
        for name in ("step_seconds", "wait_seconds", "train_seconds", "tokens_trained")
    }
    busy, idle, generated = (
        trained[-1][name] - trained[0][name]
        for name in ("generate_seconds", "idle_seconds", "tokens_generated")
    )
    accuracies = [
        (row["seconds"], row["eval/accuracy"]) for row in rows if row.get("eval/accuracy")
    ]
    return {
        "completions_per_second": 128 * len(trained) / sums["step_seconds"],
        "trained_tokens_per_second": sums["tokens_trained"] / sums["step_seconds"],
        "learner_idle_share": sums["wait_seconds"] / sums["step_seconds"],
        "actor_idle_share": idle / (busy + idle),
        "staleness_mean": statistics.mean(row["staleness/mean"] for row in trained),
        "staleness_max": max(row["staleness/max"] for row in trained),
        "seconds_to_target": min((s for s, a in accuracies if a >= TARGET), default=float("nan")),
        "final_accuracy": accuracies[-1][1],
        # the limits: what each side does while it is not waiting for the other
        "generation_limit_tokens_per_second": 2 * generated / busy,
        "training_limit_tokens_per_second": sums["tokens_trained"] / sums["train_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in MODES}
    with tempfile.TemporaryDirectory() as base:
        for seed in chosen.seeds:
            for name, changes in MODES.items():
                folder = Path(base) / f"{name}-{seed}"
                options = ("--max-steps", chosen.steps, "--seed", seed)
                launch(launch_command(folder, *options, settings={**BASE, **changes}))
                rows = whole_rows(folder / "metrics.jsonl")
                results[name].append(measure(rows))
    print(f"{os.cpu_count()} cores, {chosen.steps} steps, seeds {chosen.seeds}; medians")
    print(f"{'':36}{'asynchronous':>14}{'lock-step':>14}{'ratio':>8}")
    for key in results["asynchronous"][0]:
        one, two = ([result[key] for result in results[name]] for name in MODES)
        ratios = [a / b if b else float("nan") for a, b in zip(one, two, strict=True)]
        shown = map(statistics.median, (one, two, ratios))
        print("{:36}{:14.3f}{:14.3f}{:8.2f}".format(key, *shown))


if __name__ == "__main__":
    main()
