"""What the launcher shows while a run goes on, and at its end, read from the run directory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from asyncgrpo.config import HELD_OUT

SPARKS = "▁▂▃▄▅▆▇█"


class Progress:
    """On a terminal a live panel under the log lines; elsewhere one line per step."""

    def __init__(self, run_dir: Path, max_steps: int, console: Console | None = None) -> None:
        self._rows_file, self._max_steps = run_dir / "metrics.jsonl", max_steps
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._read_to = 0
        self._last: dict[str, Any] = {}
        self._accuracies: dict[str, list[float]] = {}  # by evaluation
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
        for row in self._new_rows():
            for block, accuracy, _ in evaluations(row):
                self._accuracies.setdefault(block, []).append(accuracy)
            self._last.update({name: value for name, value in row.items() if value is not None})
            if self._live is None and "loss" in row:
                self.console.print(step_line(row, self._max_steps))
        if self._live is not None and self._last:
            self._live.update(self._panel())

    def _new_rows(self) -> list[dict[str, Any]]:
        try:
            with self._rows_file.open("rb") as file:
                # A learner that goes on from a checkpoint takes rows back.
                self._read_to = min(self._read_to, os.fstat(file.fileno()).st_size)
                file.seek(self._read_to)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._read_to += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _panel(self) -> Group:
        done = int(self._last.get("version", 0))
        seconds = self._last.get("seconds", 0.0)
        left = seconds / done * (self._max_steps - done) if done else 0.0
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"{done}/{self._max_steps} steps",
            ProgressBar(total=self._max_steps, completed=done, width=40),
            f"{seconds:.0f} s, about {left:.0f} s left",
        )
        held_out = "   ".join(
            f"{block} {shares[-1]:.1%} {sparkline(shares)}"
            for block, shares in self._accuracies.items()
        )
        facts = Text(
            f"reward {self._value('rewards/generated_mean', '+.2f')}   "
            f"{held_out or f'{HELD_OUT} -'}   "
            f"staleness {self._value('staleness/mean', '.1f')}"
            f" (max {self._value('staleness/max', '.0f')})\n"
            f"{self._value('tokens_per_second', '.0f')} tokens/s   "
            f"learner waits {self._value('wait_seconds', '.2f')} s per step   "
            f"actors idle {self._value('actor_idle_share', '.0%')}   "
            f"swap {1000 * self._last.get('publish/stall_seconds', 0.0):.0f} ms"
        )
        return Group(head, facts)

    def _value(self, name: str, form: str) -> str:
        return format(self._last[name], form) if name in self._last else "-"


def step_line(row: Mapping[str, Any], max_steps: int) -> str:
    """One bounded line of a step, for logs: its number as in files, and how many are done."""
    parts = [
        f"step {row['step']} ({row['step'] + 1}/{max_steps})",
        f"reward {row['rewards/mean']:+.3f}",
        f"loss {row['loss']:+.4f}",
        f"kl {row['objective/kl']:.1e}",
        f"staleness {row['staleness/mean']:.1f}/{row['staleness/max']:.0f}",
        f"wait {row['wait_seconds']:.2f}s",
        f"train {row['train_seconds']:.2f}s",
        f"{row['tokens_per_second']:.0f} tok/s",
    ]
    parts += [f"{name} {share:.1%} at version {of:.0f}" for name, share, of in evaluations(row)]
    return "  ".join(parts)


def evaluations(row: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(name, accuracy, version) of the evaluations in a row of metrics.jsonl."""
    names = [name.removesuffix("accuracy") for name in row if re.match(r"eval/.*accuracy$", name)]
    return [
        (name[5:-1] or HELD_OUT, row[f"{name}accuracy"], row[f"{name}version"]) for name in names
    ]


def sparkline(shares: list[float]) -> str:
    """Shares in [0, 1] as bars."""
    return "".join(SPARKS[min(int(share * len(SPARKS)), len(SPARKS) - 1)] for share in shares)


def show_summary(run_dir: Path, console: Console) -> None:
    """The last screen: accuracy before and after, where everything is, what to look at next."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    for reports in summary["evals"].values():
        console.print(eval_table(reports["before"], reports["after"]))
    console.print(
        f"{summary['steps']:.0f} steps in {summary['seconds']:.0f} s; "
        f"{summary['tokens_arrived']:.0f} tokens arrived, "
        f"{summary['tokens_trained']:.0f} trained; staleness at most "
        f"{summary['staleness_max']:.0f}"
    )
    groups = {name.removeprefix("groups_"): n for name, n in summary["groups"].items() if n}
    arrived = groups.pop("arrived", 0)
    dropped = "".join(f", {n:.0f} {name.replace('_', ' ', 1)}" for name, n in groups.items())
    console.print(f"{arrived:.0f} groups arrived{dropped}", highlight=False)
    if not summary["steps"]:
        console.print(
            "nothing was trained, the model is as it was: look at what was dropped; then change "
            "the prompts, sampling.temperature, or set algo.drop_uniform_groups=false"
        )
    console.print(f"model         {summary['model']}")
    console.print(f"every step    {run_dir / 'metrics.jsonl'}")
    every = "" if summary["steps"] else " --status all"
    console.print(f"what it said  asyncgrpo traj show {run_dir}{every}")
    if summary["steps"]:
        console.print("next          look at what it said; then change one thing, for example")
        console.print(
            "              --set buffer.max_staleness=0, and compare eval/accuracy by seconds"
        )


def eval_table(*reports: Mapping[str, Any]) -> Table:
    """An evaluation, or the same one before and after; reports as in evals.jsonl."""
    last = reports[-1]
    sampled = f"{last['num_samples']} samples at temperature {last['temperature']:g}"
    title = f"{last['name']} accuracy, {last['num_answered']} prompts, "
    title += sampled if last["temperature"] else "greedy"
    table = Table("data source", title=title, min_width=len(title))
    for heading in ("before", "after", "change") if len(reports) > 1 else ("value",):
        table.add_column(heading, justify="right")
    shares = [
        (name, [report["accuracy_by_source"].get(name, 0.0) for report in reports])
        for name in last["accuracy_by_source"]
    ]
    shares += [("all", [report["accuracy"] for report in reports])]
    shares += [(f"pass@{k}", [r["pass_at_k"][k] for r in reports]) for k in last["pass_at_k"]]
    shares += [("truncated", [report["truncated_share"] for report in reports])]
    means = [
        ("reward", [report["reward_mean"] for report in reports]),
        ("tokens", [report["mean_tokens"] for report in reports]),
    ]
    for rows, form, scale, change in ((shares, ".1%", 100, "+.1f"), (means, ".2f", 1, "+.2f")):
        for label, values in rows:
            cells = [format(value, form) for value in values]
            if len(values) > 1:
                cells.append(format(scale * (values[-1] - values[0]), change))
            table.add_row(label, *cells, style="bold" if label == "all" else "")
    return table
