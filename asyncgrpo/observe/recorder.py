"""Rank 0's record of the run: a row per step in metrics.jsonl, summary.json at the end."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asyncgrpo.observe.exporter import Exporter
from asyncgrpo.observe.metrics import COUNTERS, METRICS
from asyncgrpo.rundir import RunDir

log = logging.getLogger(__name__)


class RunRecorder:
    """A recorder over files and a metrics endpoint."""

    def __init__(self, run: RunDir, exporter: Exporter) -> None:
        self._run, self._exporter = run, exporter
        self._start = time.time()
        self._reported: set[int] = set()  # versions whose evaluation has been written
        self._last_time = self._start
        self._last_actors: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._totals = {"tokens_trained": 0.0, "staleness_max": 0.0, "steps": 0.0}

    def begin(self, step: int) -> None:
        """Opens metrics.jsonl; rows of steps that will be made again are taken out."""
        path = self._run.path / "metrics.jsonl"
        path.touch()
        kept, size = _rows_before(path, step)
        os.truncate(path, size)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        for row in kept:
            self._count(row)
        self._start -= kept[-1]["seconds"] if kept else 0.0

    def row(self, row: Mapping[str, float], summary: Mapping[str, Any]) -> None:
        """Joins a step's numbers with the actors' and the buffer's, and writes the line."""
        full = {**summary["metrics"], **self._actor_metrics(summary["actors"]), **row}
        full["seconds"] = time.time() - self._start
        if full.get("groups_arrived"):
            arrived = full["groups_arrived"]
            full["rewards/generated_mean"] = full["reward_arrived_sum"] / arrived
            completions = arrived * self._run.config.algo.group_size
            full["completions/generated_mean_length"] = full["tokens_arrived"] / completions
        for report in summary["evaluations"]:
            if report["version"] not in self._reported:
                full.update(self._eval_metrics(report))
        self._count(full)
        self._write(full)

    def _count(self, row: Mapping[str, float]) -> None:
        totals = self._totals
        totals["tokens_trained"] += row.get("tokens_trained", 0.0)
        totals["staleness_max"] = max(totals["staleness_max"], row.get("staleness/max", 0.0))
        totals["steps"] += 1

    def finish(self, reports: list[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
        """Writes the last evaluation as a row of its own, and the summary."""
        for report in reports:
            if report["version"] not in self._reported:
                final = {**self._eval_metrics(report), "seconds": time.time() - self._start}
                self._write(
                    {"step": self._last.get("step", 0), "version": report["version"]} | final
                )
        self._file.close()
        counts = summary.get("metrics", {})
        text = {
            "before": dict(reports[0]) if reports else None,
            "after": dict(reports[-1]) if reports else None,
            "seconds": time.time() - self._start,
            **self._totals,
            "tokens_generated": self._last.get("tokens_generated", 0.0),
            "leases": {name: count for name, count in counts.items() if name.startswith("leases")},
            "groups": {name: count for name, count in counts.items() if name.startswith("groups_")},
            "model": str(self._run.model_path),
        }
        path = self._run.path / "summary.json"
        path.write_text(json.dumps(text, indent=2), encoding="utf-8")

    def _eval_metrics(self, report: Mapping[str, Any]) -> dict[str, float]:
        self._reported.add(report["version"])
        log.info(
            "held-out accuracy %.1f %% at version %d (%d of %d prompts)",
            100 * report["accuracy"],
            report["version"],
            report["num_answered"],
            report["num_prompts"],
        )
        names = ("accuracy", "version", "reward_mean", "mean_tokens")
        return {f"eval/{name}": report[name] for name in names}

    def _actor_metrics(self, actors: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        """Sums of the actors' counters, and their rates since the last row."""
        sums: dict[str, float] = {}
        for status in actors.values():
            for name, value in status.items():
                if name in COUNTERS:
                    sums[name] = sums.get(name, 0.0) + value
        now = time.time()
        # a restarted actor counts from zero again: never show a negative rate
        grown = {n: max(0.0, v - self._last_actors.get(n, 0.0)) for n, v in sums.items()}
        judged = grown.get("judged_groups", 0.0)
        busy, idle = grown.get("generate_seconds", 0.0), grown.get("idle_seconds", 0.0)
        rates = {}
        if busy + idle > 0:
            elapsed = max(now - self._last_time, 1e-9)
            rates["actor_idle_share"] = idle / (busy + idle)
            rates["tokens_per_second"] = grown.get("tokens_generated", 0.0) / elapsed
            self._last_actors, self._last_time = sums, now
            if judged:
                rates["judge/error_rate"] = grown["judge_errors"] / judged
                rates["judge/latency_seconds"] = grown["judge_seconds"] / judged
        return {**sums, **rates}

    def _write(self, row: Mapping[str, float]) -> None:
        unknown = [name for name in row if name not in METRICS]
        if unknown:
            raise KeyError(f"{', '.join(unknown)}: declare in asyncgrpo/observe/metrics.py")
        finite = {n: (v if math.isfinite(v) else None) for n, v in row.items()}  # JSON has no NaN
        self._file.write(json.dumps(finite) + "\n")
        self._exporter.show(row)
        self._last.update(row)


def _rows_before(path: Path, step: int) -> tuple[list[dict[str, float]], int]:
    """Rows of earlier steps, and their bytes; a line that a kill cut short ends them."""
    rows: list[dict[str, float]] = []
    size = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or row["step"] >= step:
            break
        rows.append(row)
        size += len(line)
    return rows, size
