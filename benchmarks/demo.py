"""Runs the demo for several seeds and prints the README's table of accuracies and times.

    python benchmarks/demo.py [--seeds 0 1 2]

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
import tempfile
import threading
import time
from pathlib import Path

import psutil
from common import CONFIG, launch, launch_command, table_line

from asyncgrpo.rows import whole_rows


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


def run_demo(folder: Path, seed: int) -> dict[str, float]:
    watch = MemoryWatch(folder)
    watch.start()
    start = time.time()
    fresh = {**os.environ, "ASYNCGRPO_CACHE": f"{folder}-cache"}  # the warm start counts
    options = ("--config", CONFIG, "--seed", seed)
    launch(launch_command(folder, *options, settings={"model.tiny_seed": seed}), env=fresh)
    total = time.time() - start
    watch.done = True
    rows = whole_rows(folder / "metrics.jsonl")
    summary = json.loads((folder / "summary.json").read_text())
    published = {
        name: [
            1000 * row[f"publish/{name}_seconds"]
            for row in rows
            if f"publish/{name}_seconds" in row
        ]
        for name in ("stall", "copy", "live")
    }
    logs = [log.read_text() for log in (folder / "logs").glob("actor-*.log")]
    return {
        "before": 100 * summary["before"]["accuracy"],
        "after": 100 * summary["after"]["accuracy"],
        "training s": summary["seconds"],
        "whole command s": total,
        "actor ready s": max(float(re.findall(r"ready after ([\d.]+) s", log)[0]) for log in logs),
        "actor GiB": watch.largest / 2**30,
        **{f"{name} ms (median)": statistics.median(times) for name, times in published.items()},
        "stall ms (max)": max(published["stall"]),
        "max staleness": summary["staleness_max"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    print(f"{len(os.sched_getaffinity(0))} cores, 2 actors, 2 learners")
    with tempfile.TemporaryDirectory() as base:
        for seed in seeds:
            figures = run_demo(Path(base) / str(seed), seed)
            if seed == seeds[0]:
                print(table_line(["seed", *figures]))
                print(table_line(["---"] * (len(figures) + 1)))
            cells = [f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in figures.values()]
            print(table_line([seed, *cells]), flush=True)


if __name__ == "__main__":
    main()
