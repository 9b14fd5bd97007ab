"""Rank 0's record of the run: a row per step in metrics.jsonl, summary.json at the end."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
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
        self._reports: list[Mapping[str, Any]] = []  # of all evaluations, oldest first
        self._reported: set[tuple[str, int]] = set()  # evaluations and versions already written
        self._last_time = self._start
        self._last_actors: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._totals = {"tokens_trained": 0.0, "staleness_max": 0.0, "steps": 0.0}

    def begin(self, step: int) -> None:
        """Opens files and writers; rows of steps that will be made again are taken out."""
        path = self._run.path / "metrics.jsonl"
        path.touch()
        kept, size = _rows_before(path, step)
        os.truncate(path, size)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        for row in kept:
            self._count(row)
        self._start -= kept[-1]["seconds"] if kept else 0.0
        self._begin_evals(step)
        self._writers = open_writers(self._run, step)

    def _begin_evals(self, version: int) -> None:
        path = self._run.path / "evals.jsonl"
        path.touch()
        reports = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        self._reports = [report for report in reports if report["version"] <= version]
        self._reported = {(report["name"], report["version"]) for report in self._reports}
        draft = path.with_suffix(".part")
        draft.write_text("".join(json.dumps(r) + "\n" for r in self._reports), encoding="utf-8")
        draft.rename(path)
        self._evals_file = path.open("a", encoding="utf-8", buffering=1)

    def row(self, row: Mapping[str, float], summary: Mapping[str, Any]) -> None:
        """Joins a step's numbers with the actors' and the buffer's, and writes the line."""
        full = {**summary["metrics"], **self._actor_metrics(summary["actors"]), **row}
        now = time.time()
        full["seconds"] = now - self._start
        arrived = full.get("tokens_arrived", 0.0)
        # from what arrived: the actors' own counters come at their own pace
        full["tokens_per_second"] = (arrived - self._last.get("tokens_arrived", 0.0)) / max(
            now - self._last_time, 1e-9
        )
        self._last_time = now
        if full.get("groups_arrived"):
            arrived = full["groups_arrived"]
            full["rewards/generated_mean"] = full["reward_arrived_sum"] / arrived
            completions = arrived * self._run.config.algo.group_size
            full["completions/generated_mean_length"] = full["tokens_arrived"] / completions
        for report in summary["evaluations"]:
            full.update(self._eval_metrics(report))
        self._count(full)
        self._write(full)

    def _count(self, row: Mapping[str, float]) -> None:
        totals = self._totals
        totals["tokens_trained"] += row.get("tokens_trained", 0.0)
        totals["staleness_max"] = max(totals["staleness_max"], row.get("staleness/max", 0.0))
        totals["steps"] += 1

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
            block.name: [report for report in self._reports if report["name"] == block.name]
            for block in self._run.config.evals
        }
        evals = {name: {"before": r[0], "after": r[-1]} for name, r in by_block.items() if r}
        counts = summary.get("metrics", {})
        text = {
            **next(iter(evals.values()), {"before": None, "after": None}),  # of the first block
            "evals": evals,
            "seconds": time.time() - self._start,
            **self._totals,
            "tokens_arrived": counts.get("tokens_arrived", 0.0),
            "leases": {name: count for name, count in counts.items() if name.startswith("leases")},
            "groups": {name: count for name, count in counts.items() if name.startswith("groups_")},
            "model": str(self._run.model_path),
        }
        draft = self._run.path / "summary.part"  # who watches the run sees it whole
        draft.write_text(json.dumps(text, indent=2), encoding="utf-8")
        draft.rename(draft.with_suffix(".json"))

    def _eval_metrics(self, report: Mapping[str, Any]) -> dict[str, float]:
        """Writes a report into evals.jsonl and returns its metrics; {} when that was done."""
        if (key := (report["name"], report["version"])) in self._reported:
            return {}
        self._reported.add(key)
        self._reports.append(report)
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
        # a restarted actor counts from zero again: never show a negative rate
        grown = {n: max(0.0, v - self._last_actors.get(n, 0.0)) for n, v in sums.items()}
        judged = grown.get("judged_groups", 0.0)
        busy, idle = grown.get("generate_seconds", 0.0), grown.get("idle_seconds", 0.0)
        rates = {}
        if busy + idle > 0:
            rates["actor_idle_share"] = idle / (busy + idle)
            self._last_actors = sums
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
