"""Rank 0's record of the run: a row per step in metrics.jsonl, summary.json at the end."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from asyncgrpo.observe.exporter import Exporter
from asyncgrpo.observe.metrics import counters, eval_metrics, metric_of
from asyncgrpo.observe.writers import open_writers
from asyncgrpo.rows import as_line, keep_rows, replace_file
from asyncgrpo.rundir import RunDir

log = logging.getLogger(__name__)


class RunRecorder:
    """A recorder over files and a metrics endpoint."""

    def __init__(self, run: RunDir, exporter: Exporter) -> None:
        self._run, self._exporter = run, exporter
        self._start = self._last_time = time.time()
        self._reports: dict[tuple[str, int], Mapping[str, Any]] = {}  # evaluations, oldest first
        self._owed: list[Mapping[str, Any]] = []  # of these, those whose row was taken out
        self._last_actors: Counter[str] = Counter()
        self._last: dict[str, float] = {}
        self._totals = {"tokens_trained": 0.0, "staleness_max": 0.0, "steps": 0.0}

    def begin(self, step: int) -> None:
        """Opens files and writers; rows of steps that will be made again are taken out."""
        paths = [self._run.path / name for name in ("metrics.jsonl", "evals.jsonl")]
        kept = keep_rows(paths[0], lambda row: row["step"] < step)
        reports = keep_rows(paths[1], lambda report: report["version"] <= step)
        self._file, self._evals_file = (
            path.open("a", encoding="utf-8", buffering=1) for path in paths
        )
        for row in kept:
            if "tokens_trained" in row:  # not one of evaluations alone
                self._count(row)
        if kept:  # what arrived since then, nobody knows
            self._last["tokens_arrived"] = math.nan
        self._start -= kept[-1]["seconds"] if kept else 0.0
        self._reports = {_key(report): report for report in reports}
        self._owed = [
            report
            for report in reports
            if report["version"] == step
            and not any(eval_metrics(report).items() <= row.items() for row in kept)
        ]
        self._writers = open_writers(self._run, step)

    def row(self, row: Mapping[str, float], summary: Mapping[str, Any]) -> None:
        """Joins a step's numbers with the actors' and the buffer's, and writes the line."""
        full = {**summary["metrics"], **self._actor_metrics(summary["actors"]), **row}
        now = time.time()
        full["seconds"] = now - self._start
        # from what arrived: the actors' own counters come at their own pace
        new = full.get("tokens_arrived", 0.0) - self._last.get("tokens_arrived", 0.0)
        full["tokens_per_second"] = new / max(now - self._last_time, 1e-9)
        self._last_time = now
        if arrived := full.get("groups_arrived"):
            full["rewards/generated_mean"] = full["reward_arrived_sum"] / arrived
            completions = arrived * self._run.config.algo.group_size
            full["completions/generated_mean_length"] = full["tokens_arrived"] / completions
        for report in self._untold(summary["evaluations"]):
            full.update(eval_metrics(report))
        self._count(full)
        self._write(full)

    def _count(self, row: Mapping[str, float]) -> None:
        totals = self._totals
        totals["tokens_trained"] += row.get("tokens_trained", 0.0)
        totals["staleness_max"] = max(totals["staleness_max"], row.get("staleness/max", 0.0))
        totals["steps"] += 1

    def finish(self, reports: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
        """Writes evaluations that came after the last step as rows of their own; the summary."""
        rows: dict[int, dict[str, float]] = {}
        for report in self._untold(reports):
            rows.setdefault(report["version"], {}).update(eval_metrics(report))
        for version, row in sorted(rows.items()):
            now = {"step": self._last.get("step", 0), "seconds": time.time() - self._start}
            self._write({**now, "version": version, **row})
        self._file.close()
        self._evals_file.close()
        for writer in self._writers:
            writer.close()
        by_block = {
            block.name: [r for (name, _), r in self._reports.items() if name == block.name]
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
        replace_file(self._run.path / "summary.json", json.dumps(text, indent=2))

    def _untold(self, reports: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Those that no row shows yet; what is new among them is written into evals.jsonl."""
        new = [report for report in reports if _key(report) not in self._reports]
        for report in new:
            self._reports[_key(report)] = report
            self._evals_file.write(as_line(report))
            told = "%(name)s accuracy %(share).1f %% at version %(version)d"
            told += " (%(num_answered)d of %(num_prompts)d prompts)"
            log.info(told, {**report, "share": 100 * report["accuracy"]})
        untold, self._owed = [*self._owed, *new], []
        return untold

    def _actor_metrics(self, actors: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        """Sums of the actors' counters, and their rates since the last row."""
        sums: Counter[str] = Counter()
        for status in actors.values():
            sums.update({name: status[name] for name in counters("actor") if name in status})
        # a restarted actor counts from zero again: never show a negative rate
        grown = Counter({name: max(0, v - self._last_actors[name]) for name, v in sums.items()})
        busy, idle, judged = (
            grown[name] for name in ("generate_seconds", "idle_seconds", "judged_groups")
        )
        rates = {}
        if busy + idle > 0:
            rates["actor_idle_share"] = idle / (busy + idle)
            self._last_actors = sums
            if judged:
                rates["judge/error_rate"] = grown["judge_errors"] / judged
                rates["judge/latency_seconds"] = grown["judge_seconds"] / judged
        return {**sums, **rates}

    def _write(self, row: Mapping[str, float]) -> None:
        rooms = {name: metric_of(name)[0].room for name in row}
        finite = {n: (v if math.isfinite(v) else None) for n, v in row.items()}  # JSON has no NaN
        self._file.write(as_line(finite))
        for writer in self._writers:
            writer.write(int(row["step"]), row)
        others = () if self._exporter.role == "serial" else ("actor", "buffer")
        self._exporter.show({n: v for n, v in row.items() if rooms[n] not in others})
        self._last.update(row)


def _key(report: Mapping[str, Any]) -> tuple[str, int]:
    return report["name"], report["version"]
