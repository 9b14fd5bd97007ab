"""Rank 0's record of the run: a row per step in metrics.jsonl, summary.json at the end."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from asyncgrpo.observe.exporter import Exporter
from asyncgrpo.observe.metrics import TABLE, eval_metrics, metric_of
from asyncgrpo.observe.writers import open_writers
from asyncgrpo.rundir import RunDir

log = logging.getLogger(__name__)


class RunRecorder:
    """A recorder over files and a metrics endpoint."""

    def __init__(self, run: RunDir, exporter: Exporter) -> None:
        self._run, self._exporter = run, exporter
        self._start = time.time()
        self._file = (run.path / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._evals_file = (run.path / "evals.jsonl").open("a", encoding="utf-8", buffering=1)
        self._writers = open_writers(run)
        self._reported: set[tuple[str, int]] = set()  # evaluations and versions already written
        self._last_time = self._start
        self._last_actors: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._totals = {"tokens_trained": 0.0, "staleness_max": 0.0, "steps": 0.0}

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
            full.update(self._eval_metrics(report))
        self._totals["tokens_trained"] += full.get("tokens_trained", 0.0)
        self._totals["staleness_max"] = max(
            self._totals["staleness_max"], full.get("staleness/max", 0.0)
        )
        self._totals["steps"] += 1
        self._write(full)

    def finish(self, reports: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
        """Writes evaluations that came after the last step as rows of their own; the summary."""
        for version in sorted({report["version"] for report in reports}):
            row: dict[str, float] = {}
            for report in reports:
                row |= self._eval_metrics(report) if report["version"] == version else {}
            if row:
                now = {"step": self._last.get("step", 0), "seconds": time.time() - self._start}
                self._write({**now, "version": version, **row})
        self._file.close()
        self._evals_file.close()
        for writer in self._writers:
            writer.close()
        by_block = {
            block.name: [report for report in reports if report["name"] == block.name]
            for block in self._run.config.evals
        }
        evals = {name: {"before": r[0], "after": r[-1]} for name, r in by_block.items() if r}
        counts = summary.get("metrics", {})
        text = {
            **next(iter(evals.values()), {"before": None, "after": None}),  # of the first block
            "evals": evals,
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
        """Writes a report into evals.jsonl and returns its metrics; {} when that was done."""
        if (key := (report["name"], report["version"])) in self._reported:
            return {}
        self._reported.add(key)
        self._evals_file.write(json.dumps(report) + "\n")
        log.info(
            "%s accuracy %.1f %% at version %d (%d of %d prompts)",
            report["name"],
            100 * report["accuracy"],
            report["version"],
            report["num_answered"],
            report["num_prompts"],
        )
        return eval_metrics(report)

    def _actor_metrics(self, actors: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        """Sums of the actors' counters, and their rates since the last row."""
        sums: dict[str, float] = {}
        for status in actors.values():
            for name, value in status.items():
                if name in TABLE["counter", "actor"]:
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
        for name in row:
            metric_of(name)
        finite = {n: (v if math.isfinite(v) else None) for n, v in row.items()}  # JSON has no NaN
        self._file.write(json.dumps(finite) + "\n")
        for writer in self._writers:
            writer.write(int(row["step"]), row)
        others = () if self._exporter.role == "serial" else ("actor", "buffer")
        self._exporter.show({n: v for n, v in row.items() if metric_of(n)[0].room not in others})
        self._last.update(row)
