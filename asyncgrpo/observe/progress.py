"""What the launcher shows while a run goes on, and at its end, read from the run directory."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from asyncgrpo.rows import whole_rows
from asyncgrpo.rundir import is_done
from asyncgrpo.settings.reward import HELD_OUT

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH, COMPARED_STEPS = 30, 10
FAULTS = ("judge_errors", "updates_skipped", "publish/evictions", "publish/rejections")
IDLE_SHARE = 0.1  # who waits less has work
QUIET_SECONDS = 30.0  # without a new row, which is worth a word
History = list[tuple[float, float]]  # step or version, and what it had


class Progress:
    """On a terminal a live panel under the log lines; elsewhere one line per step."""

    def __init__(self, run_dir: Path, max_steps: int, console: Console | None = None) -> None:
        self._rows_file, self._max_steps = run_dir / "metrics.jsonl", max_steps
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._read_to = 0
        self._last: dict[str, Any] = {}
        self.rewards: History = []  # of trained groups
        self._accuracies: dict[str, History] = {}  # by evaluation
        self._live = (
            Live(console=self.console, refresh_per_second=4, transient=True)
            if self.console.is_terminal
            else None
        )

    def skip(self) -> Progress:
        """Leaves out what is there already: rows of the lives before a --resume."""
        self._read_to = self._rows_file.stat().st_size if self._rows_file.exists() else 0
        return self

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._live is not None:
            self._live.stop()

    def line(self, name: str, line: str) -> None:
        """Prints a log line with its role."""
        self.console.print(Text.assemble((f"[{name}] ", "cyan"), line))

    def tick(self) -> None:
        """Shows rows that were written since the last call."""
        rows = self.read()
        if self._live is not None:
            self._live.update(self.panel())
            return
        for row in rows:
            if "loss" in row:
                self.console.print(step_line(row, self._max_steps))

    def read(self) -> list[dict[str, Any]]:
        """Takes in, and returns, rows that were written since the last call."""
        rows = self._new_rows()
        for row in rows:
            for block, accuracy, version in evaluations(row):
                _put(self._accuracies.setdefault(block, []), version, accuracy)
            self._last.update({name: value for name, value in row.items() if value is not None})
            if row.get("rewards/mean") is not None:
                _put(self.rewards, row["step"], row["rewards/mean"])
        return rows

    def _new_rows(self) -> list[dict[str, Any]]:
        try:
            with self._rows_file.open("rb") as file:
                # A learner that goes on from a checkpoint takes rows back, and may have written
                # others since: then no row begins here.
                self._read_to = min(self._read_to, os.fstat(file.fileno()).st_size)
                file.seek(max(self._read_to - 1, 0))
                if self._read_to and file.read(1) != b"\n":
                    self._read_to = file.seek(0)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._read_to += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def panel(self) -> Group:
        """Where the run stands, by its rows so far."""
        if not self._last:
            return Group(Text(f"no step yet: see {self._rows_file.with_name('logs')}"))
        done = int(self._last.get("version", 0))
        seconds = self._last.get("seconds", 0.0)
        left = seconds / done * (self._max_steps - done) if done else 0.0
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"{done}/{self._max_steps} steps",
            ProgressBar(total=self._max_steps, completed=done, width=40),
            f"{duration(seconds)}, about {duration(left)} left{self._quiet()}",
        )
        rewards = [reward for _, reward in self.rewards]
        held_out = "   ".join(
            f"{block} {history[-1][1]:.1%} {sparkline([share for _, share in history])}"
            for block, history in self._accuracies.items()
        )
        facts = Text(
            f"reward {_number(self._last, 'rewards/mean', '+.2f')} "
            f"{sparkline(rewards, min(rewards, default=0.0), max(rewards, default=1.0))} "
            f"{phase(rewards)}   "
            f"{held_out or f'{HELD_OUT} -'}   "
            f"staleness {_number(self._last, 'staleness/mean', '.1f')}"
            f" (max {_number(self._last, 'staleness/max', '.0f')})\n"
            f"{self._groups()}\n"
            f"{self._pace()}   swap {1000 * self._last.get('publish/stall_seconds', 0.0):.0f} ms"
        )
        return Group(head, facts)

    def _quiet(self) -> str:
        age = time.time() - self._rows_file.stat().st_mtime
        return f"; no step for {duration(age)}" if age > QUIET_SECONDS else ""

    def _groups(self) -> str:
        states = {"done": ("trained",), "in flight": ("open",), "buffered": ("stored", "taken")}
        states |= {"filtered": ("filtered",), "failed": ("failed", "expired", "evicted")}
        counts = {
            name: sum(self._last.get(f"leases_{state}", 0) for state in of)
            for name, of in states.items()
        }
        return "groups " + ", ".join(f"{count:.0f} {name}" for name, count in counts.items())

    def _pace(self) -> str:
        of = {"step_seconds": float("inf"), **self._last}
        names = ("tokens_trained", "wait_seconds")
        trained, learner = (of.get(name, 0.0) / of["step_seconds"] for name in names)
        actors = of.get("actor_idle_share", 0.0)
        who = "the learner waits for actors" if learner > actors else "actors wait for the learner"
        who = who if max(learner, actors) > IDLE_SHARE else "nobody waits long"
        return (
            f"tokens/s {_number(of, 'tokens_per_second', '.0f')} generated, {trained:.0f} trained"
            f"   {who} (learner {learner:.0%}, actors {actors:.0%})"
        )


def _put(history: History, at: float, value: float) -> None:
    """Adds a point; points from there on are of a life whose steps are made again."""
    while history and history[-1][0] >= at:
        history.pop()
    history.append((at, value))


def _number(row: Mapping[str, Any], name: str, form: str) -> str:
    """A value of a row; "-" for one that is missing or was not finite."""
    value = row.get(name)
    return "-" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """In seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def follow(
    run_dir: Path,
    max_steps: int,
    console: Console,
    *,
    once: bool,
    pause: Callable[[], object] = lambda: time.sleep(1.0),
) -> None:
    """`asyncgrpo top`: the same view of a run that goes on elsewhere, until its summary is there.

    Elsewhere than on a terminal: where it stands now, then one line per step.
    """
    is_over = is_done(run_dir)
    progress = Progress(run_dir, max_steps, console)
    if not is_over and (once or not console.is_terminal):
        progress.read()
        console.print(progress.panel())
    if not (is_over or once):
        with progress:
            while not is_over:
                is_over = is_done(run_dir)
                progress.tick()
                pause()
    if is_over:
        show_summary(run_dir, console)


def step_line(row: Mapping[str, Any], max_steps: int) -> str:
    """One bounded line of a step, for logs: its number as in files, and how many are done."""
    parts = [
        f"step {row['step']} ({row['step'] + 1}/{max_steps})",
        f"reward {_number(row, 'rewards/mean', '+.3f')}",
        f"loss {_number(row, 'loss', '+.4f')}",
        f"kl {_number(row, 'objective/kl', '.1e')}",
        f"staleness {row['staleness/mean']:.1f}/{row['staleness/max']:.0f}",
        f"wait {row['wait_seconds']:.2f}s",
        f"train {row['train_seconds']:.2f}s",
        f"{_number(row, 'tokens_per_second', '.0f')} tok/s",
    ]
    parts += [f"{name} {share:.1%} at version {of:.0f}" for name, share, of in evaluations(row)]
    return "  ".join(parts)


def evaluations(row: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(name, accuracy, version) of the evaluations in a row of metrics.jsonl."""
    names = [name.removesuffix("accuracy") for name in row if re.match(r"eval/.*accuracy$", name)]
    return [
        (name[5:-1] or HELD_OUT, row[f"{name}accuracy"], row[f"{name}version"]) for name in names
    ]


def sparkline(values: Sequence[float], low: float = 0.0, high: float = 1.0) -> str:
    """Values in [low, high] as bars; of many, means of neighbours."""
    bars = min(len(values), SPARK_WIDTH)
    edges = [len(values) * bar // bars for bar in range(bars + 1)] if bars else [0]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    scale = len(SPARKS) / ((high - low) or 1.0)
    return "".join(SPARKS[min(int((mean - low) * scale), len(SPARKS) - 1)] for mean in means)


def phase(rewards: Sequence[float]) -> str:
    """How the mean reward moves now: what its last fifth gained, as a share of all it gained.

    Gains within two standard deviations of the noise from step to step are none.
    """
    fifth = len(rewards) // 5
    if fifth < 2:
        return ""
    first, before, now = (sum(rewards[at:][:fifth]) for at in (0, -2 * fifth, -fifth))
    noise = math.sqrt(fifth * fmean((b - a) ** 2 for a, b in pairwise(rewards)))
    share = (now - before) / (now - first) if now - first > 2 * noise else 0.0
    return "rising fast" if share > 0.15 else "rising" if share > 0.05 else "flat"


def show_summary(run_dir: Path, console: Console) -> None:
    """The last screen: accuracy before and after, where everything is, what to look at next."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    for reports in summary["evals"].values():
        console.print(eval_table(reports["before"], reports["after"]))
    console.print(
        f"{summary['steps']:.0f} steps in {duration(summary['seconds'])}; "
        f"{summary['tokens_arrived']:.0f} tokens arrived, "
        f"{summary['tokens_trained']:.0f} trained; staleness at most "
        f"{summary['staleness_max']:.0f}"
    )
    groups = {name.removeprefix("groups_"): n for name, n in summary["groups"].items() if n}
    arrived = groups.pop("arrived", 0)
    dropped = "".join(f", {n:.0f} {name.replace('_', ' ', 1)}" for name, n in groups.items())
    console.print(f"{arrived:.0f} groups arrived{dropped}", highlight=False)
    rows = whole_rows(run_dir / "metrics.jsonl")
    facts = {}
    if rewards := [row["rewards/mean"] for row in rows if row.get("rewards/mean") is not None]:
        steps = min(COMPARED_STEPS, -(-len(rewards) // 2))
        first, last = sum(rewards[:steps]) / steps, sum(rewards[-steps:]) / steps
        bars = sparkline(rewards, min(rewards), max(rewards))
        facts["reward"] = f"{first:+.3f} {bars} {last:+.3f} (first, last {steps} steps)"
    facts |= {
        "faults": _faults(run_dir, rows) or "none",
        "model": summary["model"],
        "every step": str(run_dir / "metrics.jsonl"),
        "what it said": f"asyncgrpo traj show {run_dir}",
        "next": "look at what it said; then change one thing, for example\n"
        f"{'':14}--set buffer.max_staleness=0, and compare eval/accuracy by seconds",
    }
    for name, fact in facts.items():
        console.print(f"{name:<14}{fact}")


def _faults(run_dir: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    log = run_dir / "logs" / "launcher.log"  # none of a serial run
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    restarts = Counter(line.split()[2] for line in lines if re.match(r"\S+ restarted ", line))
    parts = [f"{role} restarted {count} times" for role, count in restarts.items()]
    for name in FAULTS:
        counts = [0.0, *(row[name] for row in rows if row.get(name) is not None)]
        # less than before: a process that began anew counts from zero
        total = sum(b - a if b >= a else b for a, b in pairwise(counts))
        parts += [f"{total:.0f} {re.sub('[_/]', ' ', name)}"] if total else []
    return ", ".join(parts)


def eval_table(*reports: Mapping[str, Any]) -> Table:
    """An evaluation, or the same one before and after; reports as in evals.jsonl."""
    last = reports[-1]
    sampled = f"{last['num_samples']} samples at temperature {last['temperature']:g}"
    title = f"{last['name']} accuracy, {last['num_answered']} prompts, "
    title += sampled if last["temperature"] else "greedy"
    table = Table("data source", title=title, min_width=len(title))
    for heading in ("before", "after", "change") if len(reports) > 1 else ("value",):
        table.add_column(heading, justify="right")
    kinds = ((".1%", 100, "+.1f"), (".1%", 100, "+.1f"), (".2f", 1, "+.2f"))
    for (form, scale, change), *sides in zip(kinds, *map(_parts, reports), strict=True):
        for label in sides[-1]:
            values = [side.get(label, 0.0) for side in sides]
            cells = [format(value, form) for value in values]
            if len(values) > 1:
                cells.append(format(scale * (values[-1] - values[0]), change))
            table.add_row(label, *cells, style="bold" if label == "all" else "")
        table.add_section()
    return table


def _parts(report: Mapping[str, Any]) -> tuple[Mapping[str, float], ...]:
    """Shares by source, shares of all, and means."""
    passes = {f"pass@{k}": share for k, share in report["pass_at_k"].items()}
    return (
        report["accuracy_by_source"],
        {"all": report["accuracy"], **passes, "truncated": report["truncated_share"]},
        {"reward": report["reward_mean"], "tokens": report["mean_tokens"]},
    )
