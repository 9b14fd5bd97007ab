"""`asyncgrpo audit` and `asyncgrpo ledger`: what a run did, proven and asked. Imports late."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from signal import SIG_DFL, SIGINT, signal
from typing import Annotated, Any

import typer

MAX_SHOWN = 20  # offending rows of one check
Run = Annotated[Path, typer.Argument(help="run directory; the run may be going on, done or killed")]
AsJson = Annotated[bool, typer.Option("--json", help="for programs")]


def audit(run: Run, as_json: AsJson = False) -> None:
    """Proves that nothing was lost, trained twice or too old; exit code 1 with the rows if not."""
    from asyncgrpo.buffer import audit as auditing
    from asyncgrpo.rundir import RunDir

    found = auditing.audit(RunDir.read(run))
    leases, tokens, sizes = (found.total(name) for name in ("leases", "tokens", "completions"))
    lengths = {state: tokens[state] / sizes[state] for state in tokens if sizes[state]}
    wrong = {name: rows for name, rows in found.wrong.items() if rows}
    if as_json:
        shown = {"next_step": found.next_step, "rollbacks": found.rollbacks}
        shown |= {"leases": leases, "mean_tokens": lengths}
        print(json.dumps({**shown, "groups": found.groups, "wrong": wrong}))
        raise typer.Exit(1 if wrong else 0)
    show_table(
        ("state", "reason", "leases", "tokens/completion", "mean reward"),
        [
            (
                *(group["state"], group["reason"], group["leases"]),
                f"{group['tokens'] / group['completions']:.2f}" if group["completions"] else "",
                "" if group["reward_mean"] is None else f"{group['reward_mean']:.2f}",
            )
            for group in found.groups
        ],
    )
    terms = " + ".join(f"{count} {state}" for state, count in leases.items() if count)
    print(f"\n{sum(leases.values())} leased = {terms or 0}; {found.next_step} steps trained")
    if found.rollbacks:
        again = sum(former - step for step, former in found.rollbacks)
        print(f"{again} steps rolled back and given again, in {len(found.rollbacks)} roll-backs")
    for state in ("filtered", "evicted", "expired"):
        if state in lengths and "trained" in lengths:
            bias = lengths[state] / lengths["trained"] - 1
            which = "longer" if bias > 0 else "shorter"
            print(f"{state} completions are {abs(bias):.0%} {which} than trained ones")
    print()
    for name, (promise, _) in auditing.CHECKS.items():
        rows = found.wrong[name]
        print(f"{'WRONG' if rows else 'ok':<6}{name}: {promise}")
        for ticket, what in rows[:MAX_SHOWN]:
            print(f"        {'' if ticket is None else f't{ticket} '}{what}")
        if len(rows) > MAX_SHOWN:
            print(f"        and {len(rows) - MAX_SHOWN} more (--json shows all)")
    raise typer.Exit(1 if wrong else 0)


def ledger(
    run: Run,
    sql: Annotated[str | None, typer.Option(help="a question; without: lists the tables")] = None,
    as_json: AsJson = False,
) -> None:
    """Answers questions about all leases of a run in SQL (SQLite); changes nothing."""
    from asyncgrpo.buffer.ledger import TABLES, LedgerReader

    reader = LedgerReader(run)
    if sql is None:
        print(TABLES.strip())
        return
    former = signal(SIGINT, SIG_DFL)  # else Ctrl-C waits for the answer
    columns, rows = reader.query(sql)
    signal(SIGINT, former)
    if as_json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], default=repr))
    else:
        show_table(columns, rows)


def show_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], width: int | None = None
) -> None:
    """Prints rows under their columns; None is empty, bytes are counted."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        shown = (f"{len(v)} bytes" if isinstance(v, bytes) else v for v in row)
        table.add_row(*("" if v is None else str(v) for v in shown))
    Console(highlight=False, markup=False, soft_wrap=True, width=width).print(table)
