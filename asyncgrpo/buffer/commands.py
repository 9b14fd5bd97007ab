"""`asyncgrpo audit` and `asyncgrpo ledger`: what a run did, proven and asked. Imports late."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

MAX_SHOWN = 20  # offending rows of one check
Run = Annotated[Path, typer.Argument(help="run directory; the run may be going on, done or killed")]
AsJson = Annotated[bool, typer.Option("--json", help="for programs")]


def audit(run: Run, as_json: AsJson = False) -> None:
    """Proves that nothing was lost, trained twice or too old; exit code 1 with the rows if not."""
    from asyncgrpo.buffer.audit import CHECKS
    from asyncgrpo.buffer.audit import audit as check_run
    from asyncgrpo.rundir import RunDir

    found = check_run(RunDir.read(run))
    wrong = {name: rows for name, rows in found.rows.items() if rows}
    if as_json:
        everything = {"next_step": found.next_step, "leases": found.num_leases, "wrong": wrong}
        print(json.dumps({**everything, "mean_tokens": found.mean_tokens, "groups": found.groups}))
        raise typer.Exit(1 if wrong else 0)
    _show(
        ("state", "reason", "leases", "tokens/completion", "mean reward"),
        [
            (
                *(row["state"], row["reason"], row["leases"]),
                _number(row["tokens"] / row["completions"] if row["completions"] else None),
                _number(row["reward_mean"]),
            )
            for row in found.groups
        ],
    )
    counts = found.num_leases
    terms = " + ".join(f"{count} {state}" for state, count in counts.items() if count)
    print(f"\n{sum(counts.values())} leased = {terms or 0}; {found.next_step} steps trained")
    for line in _length_bias(found.mean_tokens):
        print(line)
    print()
    for name, check in CHECKS.items():
        rows = found.rows[name]
        print(f"{'WRONG' if rows else 'ok':<6}{name}: {check.promise}")
        for ticket, what in rows[:MAX_SHOWN]:
            print(f"        {'' if ticket is None else f't{ticket} '}{what}")
        if len(rows) > MAX_SHOWN:
            print(f"        and {len(rows) - MAX_SHOWN} more (--json shows all)")
    if wrong:
        raise typer.Exit(1)


def ledger(
    run: Run,
    sql: Annotated[str | None, typer.Option(help="a question; without: lists the tables")] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="for spreadsheets")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds for the answer")] = 60.0,
) -> None:
    """Answers questions about all leases of a run in SQL (SQLite); changes nothing."""
    from asyncgrpo.buffer.ledger import TABLES, LedgerReader

    reader = LedgerReader(run, timeout)
    if sql is None:
        print(TABLES.strip())
        return
    columns, rows = reader.query(sql)
    if as_json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], default=repr))
    elif as_csv:
        writer = csv.writer(sys.stdout)
        writer.writerows([columns, *rows])
    else:
        _show(columns, rows)


def _length_bias(mean_tokens: dict[str, float]) -> Iterable[str]:
    """How much longer or shorter what was dropped is than what was trained."""
    trained = mean_tokens.get("trained")
    for state in ("filtered", "evicted", "expired"):
        if trained and state in mean_tokens:
            share = mean_tokens[state] / trained - 1
            yield (
                f"{state} completions are {mean_tokens[state]:.1f} tokens long, trained ones "
                f"{trained:.1f} ({share:+.0%})"
            )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _show(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        shown = (f"{len(v)} bytes" if isinstance(v, bytes) else v for v in row)
        table.add_row(*("" if v is None else str(v) for v in shown))
    Console(highlight=False, markup=False, soft_wrap=True).print(table)
