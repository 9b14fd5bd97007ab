"""What the launcher shows while a run goes on, and at its end, read from the run directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SPARKS = "▁▂▃▄▅▆▇█"


class Progress:
    """On a terminal a live panel under the log lines; elsewhere one line per step."""

    def __init__(self, run_dir: Path, max_steps: int, console: Console | None = None) -> None:
        self._rows_file, self._max_steps = run_dir / "metrics.jsonl", max_steps
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._read_to = 0
        self._last: dict[str, Any] = {}
        self._accuracies: list[float] = []
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
            if row.get("eval/accuracy") is not None:
                self._accuracies.append(row["eval/accuracy"])
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
            f"step {done}/{self._max_steps}",
            ProgressBar(total=self._max_steps, completed=done, width=40),
            f"{seconds:.0f} s, about {left:.0f} s left",
        )
        facts = Text(
            f"reward {self._value('rewards/generated_mean', '+.2f')}   "
            f"held-out {self._value('eval/accuracy', '.1%')} {sparkline(self._accuracies)}   "
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
    """One bounded line of a step, for logs."""
    parts = [
        f"step {row['step'] + 1}/{max_steps}",
        f"reward {row['rewards/mean']:+.3f}",
        f"loss {row['loss']:+.4f}",
        f"kl {row['objective/kl']:.1e}",
        f"staleness {row['staleness/mean']:.1f}/{row['staleness/max']:.0f}",
        f"wait {row['wait_seconds']:.2f}s",
        f"train {row['train_seconds']:.2f}s",
    ]
    if row.get("tokens_per_second") is not None:
        parts.append(f"{row['tokens_per_second']:.0f} tok/s")
    if row.get("eval/accuracy") is not None:
        parts.append(f"held-out {row['eval/accuracy']:.1%} at version {row['eval/version']:.0f}")
    return "  ".join(parts)


def sparkline(shares: list[float]) -> str:
    """Shares in [0, 1] as bars."""
    return "".join(SPARKS[min(int(share * len(SPARKS)), len(SPARKS) - 1)] for share in shares)


def show_summary(run_dir: Path, console: Console) -> None:
    """The last screen: accuracy before and after, where everything is, what to look at next."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    if summary["before"] and summary["after"]:
        console.print(accuracy_table(summary["before"], summary["after"]))
    console.print(
        f"{summary['steps']:.0f} steps in {summary['seconds']:.0f} s; "
        f"{summary['tokens_generated']:.0f} tokens generated, "
        f"{summary['tokens_trained']:.0f} trained; staleness at most "
        f"{summary['staleness_max']:.0f}"
    )
    console.print(f"model         {summary['model']}")
    console.print(f"every step    {run_dir / 'metrics.jsonl'}")
    console.print(f"what it said  {run_dir / 'trajectories'}")
    console.print("next          read the last trajectories; then change one thing, for example")
    console.print(
        "              --set buffer.max_staleness=0, and compare eval/accuracy by seconds"
    )


def accuracy_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """Held-out accuracy per data source."""
    table = Table(title=f"held-out accuracy, {after['num_answered']} prompts, greedy")
    for name in ("data source", "before", "after", "change"):
        table.add_column(name, justify="left" if name == "data source" else "right")
    pairs = [
        (source, before["accuracy_by_source"].get(source, 0.0), share)
        for source, share in after["accuracy_by_source"].items()
    ]
    for source, first, last in [*pairs, ("all", before["accuracy"], after["accuracy"])]:
        table.add_row(
            source,
            f"{first:.1%}",
            f"{last:.1%}",
            f"{100 * (last - first):+.1f}",
            style="bold" if source == "all" else "",
        )
    return table
