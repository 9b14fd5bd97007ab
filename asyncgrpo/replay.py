"""`asyncgrpo replay`: makes recorded steps again with the learner alone, to look at one closely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from asyncgrpo.buffer.commands import show_table
from asyncgrpo.errors import ConfigError
from asyncgrpo.rows import as_line, whole_rows

WIDTH = 140  # of the table, also where there is no terminal
OF_THE_RANKS = ("padding_share", "rank_balance")  # how a batch lies on them, not what it says
SHOWN = ("loss", "grad_norm", "objective/kl", "ess", "staleness/mean")


def replay(
    run: Annotated[Path, typer.Argument(help="run directory")],
    from_step: Annotated[int, typer.Option(min=0, help="the first step to show")],
    to_step: Annotated[int, typer.Option(min=0, help="the last one")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="other settings: what if? repeatable")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="new folder for rows.jsonl, token log")] = None,
) -> None:
    """Makes steps again with the groups they had, from the last checkpoint before them; no actors.

    Compares with what was recorded: with one learner rank on the same hardware it is the same to
    the last bit. Of a run with several ranks all groups are trained on one: sums differ a little.
    """
    if to_step < from_step:
        raise ConfigError(f"--to-step {to_step} must be >= --from-step {from_step}")
    if out is not None and out.exists():
        raise ConfigError(f"--out {out} exists; give a new folder")
    if not (metrics := run / "metrics.jsonl").exists():
        raise ConfigError(f"{run} holds no metrics.jsonl; give the directory of a run")
    recorded = {row["step"]: row for row in whole_rows(metrics) if "loss" in row}
    table = []
    for step, row in _steps(run, from_step, to_step, set_ or [], out):
        shown = (_number(row.get(name)) for name in SHOWN)
        table.append((step, *shown, _verdict(row, recorded.get(step))))
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)  # not before: what is refused leaves nothing
            with (out / "rows.jsonl").open("a", encoding="utf-8") as file:
                file.write(as_line({"step": step, **row}))
    show_table(("step", *SHOWN, "against the record"), table, WIDTH)


def _steps(
    path: Path, first: int, last: int, overrides: Sequence[str], out: Path | None
) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, metrics) of each step from `first` to `last`."""
    from asyncgrpo.buffer.ledger import LedgerReader
    from asyncgrpo.config import load_config
    from asyncgrpo.learner.saved import FOLDER, find_damage, saved, step_of
    from asyncgrpo.types import Shard

    config = load_config(path / "config.json", overrides)
    reader = LedgerReader(path)
    fit = [p for p in saved(path / FOLDER) if step_of(p) <= first and not find_damage(p)]
    start = step_of(fit[-1]) if fit else 0
    batches = reader.batches(start, last)
    missing = [step for step in range(start, last + 1) if step not in batches]
    if missing:
        kept = [step for step in reader.batches(0, 1 << 31) if step >= start]
        if kept and missing[0] > kept[-1]:
            raise ConfigError(f"--to-step {last} must be <= {kept[-1]}, the last step of the run")
        raise ConfigError(
            f"steps {first} to {last} begin at the checkpoint of step {start}, but the groups of "
            f"step {missing[0]} are not in the ledger: it keeps what the checkpoint.keep_last "
            f"checkpoints need, here steps {f'{kept[0]} to {kept[-1]}' if kept else '- none'}"
        )

    from transformers.utils import logging

    from asyncgrpo.learner.checkpoint import Checkpoints  # torch
    from asyncgrpo.learner.update import PolicyUpdater

    logging.disable_progress_bar()
    updater = PolicyUpdater(config, run_dir=out)
    if fit:
        updater.go_to(Checkpoints(path / FOLDER, config.checkpoint), fit[-1])
    for step, groups in batches.items():
        row = updater.update(
            Shard(
                step=step,
                groups=tuple(groups),
                num_loss_tokens_global=sum(group.num_tokens for group in groups),
                num_completions_global=sum(len(group.completions) for group in groups),
            )
        )
        if step >= first:
            yield step, row


def _verdict(row: dict[str, float], recorded: dict[str, Any] | None) -> str:
    """What differs most from the recorded row, relative to its size."""
    if recorded is None:
        return "not recorded"
    known = [n for n in row if recorded.get(n) is not None and n not in OF_THE_RANKS]
    pairs = {name: (row[name], recorded[name]) for name in known}
    differs = {n: abs(v - was) / max(abs(v), abs(was)) for n, (v, was) in pairs.items() if v != was}
    if not differs:
        return f"the same to the last bit ({len(pairs)} metrics)"
    worst = max(differs, key=lambda name: differs[name])
    return f"{worst} was {_number(pairs[worst][1])}, is {_number(pairs[worst][0])}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
