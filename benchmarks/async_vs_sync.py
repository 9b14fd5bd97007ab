"""Asynchronous actors against lock-step on the same cores: same model, prompts, seeds and amount.

    python benchmarks/async_vs_sync.py [--steps 60] [--seeds 0 1 2] [--out FILE.json]

Lock-step is the same code with buffer.max_staleness=0: a batch is generated, trained, published,
and only then may the next begin. The task is a long tail (data.tasks.long_tail): most completions
are short, some ten times longer. Each seed runs both ways, one after the other, so that ratios
are taken side by side. The limits are measured on their own cores in the same run: generation
alone (the learner takes no batch) and training alone (the same batches again).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BASE = {
    "run.name": "bench",
    "data.max_prompt_tokens": "96",
    "sampling.max_completion_tokens": "64",
    "data.tasks.kinds": "{check=2.0, sort=1.0, reverse=1.0}",
    "data.tasks.long_tail": "0.7",
    "buffer.groups_per_step": "16",
    "algo.group_size": "8",
    "actor.concurrency": "12",
    "learner.max_tokens_per_microbatch": "8192",
    "eval.every": "10",
    "eval.num_prompts": "150",
    "observe.trajectories": "false",
}
MODES = {
    "asynchronous": {"buffer.max_staleness": "4"},
    # everything in flight belongs to the one batch that lock-step may work on
    "lock-step": {"buffer.max_staleness": "0", "buffer.order": "ticket"},
}


def launch(folder: Path, steps: int, seed: int, changes: dict[str, str]) -> list[dict[str, Any]]:
    """One run from the command line; its rows."""
    settings = {**BASE, **changes}
    command = [sys.executable, "-m", "asyncgrpo.cli", "launch", "--run-dir", str(folder)]
    command += ["--max-steps", str(steps), "--seed", str(seed)]
    command += ["--actors", "2", "--learners", "2"]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def measure(rows: list[dict[str, Any]], target: float) -> dict[str, float]:
    """Figures of one run, without its first three steps (start-up, first evaluation)."""
    trained = [row for row in rows if "loss" in row][3:]
    seconds = sum(row["step_seconds"] for row in trained)
    tokens = sum(row["tokens_trained"] for row in trained)
    first, last = trained[0], trained[-1]
    busy = last["generate_seconds"] - first["generate_seconds"]
    idle = last["idle_seconds"] - first["idle_seconds"]
    generated = last["tokens_generated"] - first["tokens_generated"]
    reached = [row["seconds"] for row in rows if (row.get("eval/accuracy") or 0.0) >= target]
    return {
        "completions_per_second": 128 * len(trained) / seconds,
        "trained_tokens_per_second": tokens / seconds,
        "learner_idle_share": sum(row["wait_seconds"] for row in trained) / seconds,
        "actor_idle_share": idle / (busy + idle),
        "staleness_mean": statistics.mean(row["staleness/mean"] for row in trained),
        "staleness_max": max(row["staleness/max"] for row in trained),
        "seconds_to_target": min(reached, default=float("nan")),
        "final_accuracy": [r["eval/accuracy"] for r in rows if r.get("eval/accuracy")][-1],
        # the limits: what each side does while it is not waiting for the other
        "generation_limit_tokens_per_second": 2 * generated / busy,
        "training_limit_tokens_per_second": tokens / sum(r["train_seconds"] for r in trained),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=0.75, help="held-out accuracy to reach")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in MODES}
    with tempfile.TemporaryDirectory() as base:
        for seed in chosen.seeds:
            for name, changes in MODES.items():
                rows = launch(Path(base) / f"{name}-{seed}", chosen.steps, seed, changes)
                results[name].append(measure(rows, chosen.target))
    print(f"{os.cpu_count()} cores, {chosen.steps} steps, seeds {chosen.seeds}; medians")
    print(f"{'':36}{'asynchronous':>14}{'lock-step':>14}{'ratio':>8}")
    for key in results["asynchronous"][0]:
        one, two = ([result[key] for result in results[name]] for name in MODES)
        ratios = [a / b if b else float("nan") for a, b in zip(one, two, strict=True)]
        shown = (statistics.median(one), statistics.median(two), statistics.median(ratios))
        print(f"{key:36}{shown[0]:14.3f}{shown[1]:14.3f}{shown[2]:8.2f}")
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
