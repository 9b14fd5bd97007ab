"""`asyncgrpo traj ...`: look at what a run's model said. Imports late, starts fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from random import Random
from statistics import fmean
from textwrap import indent
from typing import Annotated

import typer

from asyncgrpo.buffer.commands import show_table
from asyncgrpo.errors import ConfigError, DataError
from asyncgrpo.observe import samples as of
from asyncgrpo.observe.samples import Row, Samples, shown

SHOWN_GROUPS, SHOWN_CHARACTERS, COMPARED_CHARACTERS = 2, 800, 200
FORMATS = {"answers": "d", "correct": ".1%", "reward": "+.3f", "std": ".3f", "tokens": ".1f"}
FORMATS |= {"p95": "d", "truncated": ".1%", "duplicate": ".1%", "stale": ".2f", "max": "d"}
Status = StrEnum("Status", ["trained", "replayed", "filtered", "evicted", "all"])
WIDTH = 300  # of a table, also on a narrow terminal: it would fold numbers
ENDINGS = ("jsonl", "csv", "parquet")
Shape = StrEnum("Shape", ["rows", "messages"])

traj_app = typer.Typer(help="Look at what a run's model said.", no_args_is_help=True)
Run = Annotated[Path, typer.Argument(help="run directory; the run may be going on")]
Steps = Annotated[str, typer.Option(help="K, or A:B with B not included; default: all")]
Which = Annotated[Status, typer.Option(help="what became of the group")]
Full = Annotated[bool, typer.Option("--full", help="whole texts")]


@traj_app.command()
def show(
    run: Run,
    step: Annotated[int | None, typer.Option(min=0, help="default: the last with any")] = None,
    best: Annotated[int | None, typer.Option(min=1, help="so many with high rewards")] = None,
    worst: Annotated[int | None, typer.Option(min=1, help="so many with low rewards")] = None,
    random: Annotated[int | None, typer.Option(min=1, help="so many, the same each time")] = None,
    source: Annotated[str | None, typer.Option(help="only this data_source")] = None,
    status: Which = Status.trained,
    full: Full = False,
) -> None:
    """Shows prompts and answers of a step with rewards, advantages, lengths and staleness.

    Without --best, --worst or --random: its first two groups.
    """
    if sum(count is not None for count in (best, worst, random)) > 1:
        raise typer.BadParameter("give one of --best, --worst and --random")
    samples = Samples(run)
    steps = samples.pick(str(step)) if step is not None else samples.steps[::-1]
    for number in steps:
        everything = list(samples.rows([number]))
        if _matching(everything, status, source):
            break
    rows = _selected(everything, status, source)
    groups = list(of.grouped(rows, of.group_key).values())
    chosen = [row for group in groups[:SHOWN_GROUPS] for row in group]
    if best or worst:
        chosen = of.best_of(rows, best or worst, 1 if best else -1)
    elif random:
        places = Random(0).sample(range(len(rows)), min(random, len(rows)))
        chosen = [rows[place] for place in sorted(places)]
    typer.secho(f"step {number}: {_ends(everything)}", bold=True)
    for _, answers in groupby(chosen, key=of.group_key):
        _show_group(list(answers), None if full else SHOWN_CHARACTERS)
    if len(chosen) < len(rows):
        others = f"{len(chosen)} of {len(rows)} answers in {len(groups)} groups"
        typer.echo(f"\n{others}; choose others with --best N, --worst N or --random N")


@traj_app.command()
def stats(run: Run, steps: Steps = ":") -> None:
    """Rewards, lengths, duplicates and staleness of each step's trained answers, and of all.

    correct: the first reward function is above reward.correct_above; std: of rewards; p95: of
    tokens; duplicate: the text occurs before in its group; stale: versions of the oldest token.
    """
    samples = Samples(run)
    # Of a whole run's texts only what tells them apart stays in memory.
    rows: list[Row] = [
        {**row, "prompt": (), "completion": hash(row["completion"])}
        for row in samples.rows(samples.pick(steps))
    ]
    table = []
    for label, part in [*of.grouped(rows, lambda row: row["step"]).items(), ("all", rows)]:
        found = samples.statistics(_matching(part, Status.trained))
        numbers = [format(found[n], form) if n in found else "-" for n, form in FORMATS.items()]
        table.append((label, *numbers, _ends(part)))
    show_table(("step", *FORMATS, "ended"), table, WIDTH)


@traj_app.command()
def diff(
    run: Run,
    before: Annotated[str, typer.Argument(help="step K, or A:B with B not included")],
    after: Annotated[str, typer.Argument(help="the same, of RUN or of --other")],
    other: Annotated[Path | None, typer.Option(help="another run for the second one")] = None,
    full: Full = False,
) -> None:
    """Compares answers to the same prompts, the largest change of mean reward first.

    Ends with 1 when no prompt occurs in both.
    """
    one, two = Samples(run), Samples(other or run)
    found = of.changes(one.rows(one.pick(before)), two.rows(two.pick(after)))
    rises = [rise for rise, _, _ in found]
    better, worse = sum(rise > 0 for rise in rises), sum(rise < 0 for rise in rises)
    text = f"no prompt occurs both in {before} of {run} and in {after} of {other or run}"
    if found:
        text = f"{len(found)} prompts occur in both: {better} better, {worse} worse, "
        text += f"{len(found) - better - worse} the same; mean reward {fmean(rises):+.3f}"
    typer.secho(text, bold=True)
    for rise, *sides in found:
        _show_prompt(sides[0][0], f"mean reward {rise:+.3f}", None if full else SHOWN_CHARACTERS)
        for which, steps, rows in zip(("left", "right"), (before, after), sides, strict=True):
            typer.secho(f"{which}  step {steps}: {_ends(rows)}", bold=True)
            _show_answers(rows, None if full else COMPARED_CHARACTERS)
    raise typer.Exit(0 if found else 1)


@traj_app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="file to write: .jsonl, .csv, .parquet")],
    steps: Steps = ":",
    best: Annotated[int | None, typer.Option(min=1, help="so many of each group")] = None,
    shape: Annotated[Shape, typer.Option("--as", help="messages: for fine-tuning")] = Shape.rows,
    status: Which = Status.trained,
) -> None:
    """Writes rows of many steps to one file; CSV holds lists and objects as JSON."""
    from asyncgrpo.data.files import write_rows

    samples = Samples(run)
    if out.resolve().parent == (run / "trajectories").resolve():
        raise ConfigError(
            f"--out {out} lies in the run's own trajectories/, which it would overwrite; write it "
            "somewhere else"
        )
    form = out.suffix[1:] or "jsonl"
    if form not in ENDINGS:
        raise ConfigError(f"--out {out}: {form!r} is not one of {', '.join(ENDINGS)}; take one")
    rows = _selected(list(samples.rows(samples.pick(steps))), status)
    if best:
        groups = of.grouped(rows, of.group_key).values()
        rows = [row for group in groups for row in of.best_of(group, best)]
    records = [of.as_messages(row) if shape == Shape.messages else dict(row) for row in rows]
    write_rows(out, records, form)
    typer.echo(f"{out}: {len(records)} records")


def _matching(rows: Iterable[Row], status: Status, source: str | None = None) -> list[Row]:
    kept = [row for row in rows if status in ("all", row["status"])]
    return [row for row in kept if source in (None, row["data_source"])]


def _selected(rows: list[Row], status: Status, source: str | None = None) -> list[Row]:
    """As _matching; DataError, with what there is, when that is nothing."""
    if found := _matching(rows, status, source):
        return found
    if not rows:
        raise DataError(
            "there is not one whole row in what was asked for: the run has only begun, or was "
            "killed; name other steps"
        )
    sources = ", ".join(sorted({row["data_source"] for row in rows}))
    wanted = f"status {status}" + (f" and data_source {source!r}" if source else "")
    raise DataError(f"no answer has {wanted}; there are {_ends(rows)}; data_source {sources}")


def _ends(rows: Iterable[Row]) -> str:
    """Such as: 128 trained, 24 filtered all_correct, 8 evicted stale."""
    ends = Counter(f"{row['status']} {row['reason']}".strip() for row in rows)
    return ", ".join(f"{count} {end}" for end, count in sorted(ends.items(), reverse=True))


def _show_prompt(row: Row, fact: str, limit: int | None) -> None:
    typer.echo()
    for message in row["prompt"]:
        typer.secho(f"[{message['role']}] {shown(message['content'], limit)}", fg="cyan")
    facts = (f"answer {row['answer']}", row["data_source"], row["prompt_id"], fact)
    typer.secho(" · ".join(shown(fact, limit) for fact in facts), dim=True)


def _show_group(rows: Sequence[Row], limit: int | None) -> None:
    """Answers of one group under their prompt."""

    def signed(value: float | None) -> str:
        return "-" if value is None else f"{value:+.3f}"

    first = rows[0]
    end = f"group {first['group']} {first['status']} {first['reason']}".strip()
    _show_prompt(first, end, limit)
    for row in rows:
        parts = ", ".join(f"{name} {signed(v)}" for name, v in row["reward_parts"].items())
        facts = f"#{row['sample']} reward {signed(row['reward'])} ({parts})"
        facts += f"  advantage {signed(row['advantage'])}  {row['num_tokens']} tokens, "
        facts += f"{row['finish_reason']}  staleness {row['staleness']}"
        facts += f"  {row['masked_share']:.0%} masked" if row["masked_share"] else ""
        typer.secho(facts, fg="green" if row["reward"] > 0 else "red")
        typer.echo(indent(shown(row["completion"], limit) or "(empty)", "    "))


def _show_answers(rows: Iterable[Row], limit: int | None) -> None:
    """How often each answer occurs and its reward, the best first."""
    counts = Counter((row["reward"], row["completion"]) for row in of.best_of(rows))
    for (reward, text), count in counts.items():
        answer = f"{count}x {reward:+.3f} {shown(text, limit) or '(empty)'}"
        typer.echo(indent(answer, "    "))
