"""Runs the demo for several seeds and prints the README's table of accuracies and times.

    python benchmarks/demo.py [--seeds 0 1 2] [--actors 2] [--learners 2]

Seeds choose the embedded model, the prompts and the sampling alike; each model is made anew, so
that the whole command is what a first-time user waits for. Start-up is the time from the
launch of an actor until its engine can generate; memory is the largest resident size of an actor
process, engine included, sampled while the run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

CONFIG = Path(__file__).parent.parent / "configs" / "tiny.toml"


class MemoryWatch(threading.Thread):
    """Remembers the largest resident size of any actor of one run, in bytes."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(daemon=True)
        self._run_dir, self.largest, self.done = str(run_dir), 0, False

    def run(self) -> None:
        while not self.done:
            for process in psutil.process_iter():
                try:
                    line = process.cmdline()
                    if "actor" in line and self._run_dir in line:
                        self.largest = max(self.largest, process.memory_info().rss)
                except psutil.Error:
                    continue
            time.sleep(0.5)


def run_demo(folder: Path, seed: int, actors: int, learners: int) -> dict[str, float]:
    command = [sys.executable, "-m", "asyncgrpo.cli", "launch", "--config", str(CONFIG)]
    command += ["--actors", str(actors), "--learners", str(learners), "--run-dir", str(folder)]
    command += ["--seed", str(seed), "--set", f"model.tiny_seed={seed}"]
    watch = MemoryWatch(folder)
    watch.start()
    start = time.time()
    fresh = {**os.environ, "ASYNCGRPO_CACHE": str(folder) + "-cache"}  # the warm start counts
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=fresh)
    total = time.time() - start
    watch.done = True
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "publish/stall_seconds" in row]
    ready = [
        float(re.search(r"ready after ([\d.]+) s", log.read_text()).group(1))
        for log in sorted((folder / "logs").glob("actor-*.log"))
    ]
    return {
        "before": 100 * summary["before"]["accuracy"],
        "after": 100 * summary["after"]["accuracy"],
        "training s": summary["seconds"],
        "whole command s": total,
        "actor ready s": max(ready),
        "actor GiB": watch.largest / 2**30,
        "stall ms (median)": 1000 * statistics.median(r["publish/stall_seconds"] for r in steps),
        "stall ms (max)": 1000 * max(r["publish/stall_seconds"] for r in steps),
        "copy ms (median)": 1000 * statistics.median(r["publish/copy_seconds"] for r in steps),
        "live ms (median)": 1000 * statistics.median(r["publish/live_seconds"] for r in steps),
        "max staleness": summary["staleness_max"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--learners", type=int, default=2)
    chosen = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, {chosen.actors} actors, {chosen.learners} learners")
    with tempfile.TemporaryDirectory() as base:
        for number, seed in enumerate(chosen.seeds):
            figures = run_demo(Path(base) / str(seed), seed, chosen.actors, chosen.learners)
            if not number:
                print("| seed | " + " | ".join(figures) + " |")
                print("|---" * (len(figures) + 1) + "|")
            cells = [f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in figures.values()]
            print(f"| {seed} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
