"""`asyncgrpo data ...`: look at data, check it, convert it, make it. Imports late, starts fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncgrpo.launch.commands import ConfigFile, Overrides

if TYPE_CHECKING:
    from asyncgrpo.config import Config
    from asyncgrpo.data.check import Finding

MAX_SHOWN = 30

data_app = typer.Typer(help="Look at data, check it, convert it, make it.", no_args_is_help=True)
File = Annotated[str, typer.Argument(help="file, glob, folder or hub name")]
Model = Annotated[str | None, typer.Option(help="whose tokenizer; default: the one of --config")]


@data_app.command()
def preview(
    file: File,
    num: Annotated[int, typer.Option("-n", min=1, help="records to show")] = 3,
    model: Model = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """Shows records raw, rendered and, with a model, tokenised, with their lengths."""
    from asyncgrpo.config import load_config
    from asyncgrpo.data.files import as_line, read_rows, source_name
    from asyncgrpo.data.records import prompts_from_rows
    from asyncgrpo.data.templates import render, tokenise

    settings = load_config(config, set_ or [])
    data, tokenizer = settings.data, _tokenizer(model, settings if config else None)
    rows = read_rows(file)[:num]
    prompts = prompts_from_rows(rows, source_name(file), settings.data.template_of(file))
    for (where, _), prompt in zip(rows, prompts, strict=True):
        typer.echo(f"--- {prompt.prompt_id} ({where}), data_source {prompt.data_source}")
        typer.echo(f"raw       {as_line(dict(prompt.columns))}answer    {prompt.answer}\nrendered")
        if tokenizer is None:
            typer.echo("\n".join(f"[{m['role']}] {m['content']}" for m in prompt.messages))
            typer.echo("tokens    give --model to see them")
            continue
        text = render(tokenizer, prompt.messages, data)
        ids = tokenise(tokenizer, prompt.messages, data)
        too_long = f": too long, {data.overlong_prompt}" * (len(ids) > data.max_prompt_tokens)
        typer.echo(f"{text}\ntokens    {ids}\nlengths   {len(text)} characters, {len(ids)} tokens")
        typer.echo(f"limit     {data.max_prompt_tokens} tokens (data.max_prompt_tokens){too_long}")


@data_app.command()
def validate(
    file: File,
    model: Model = None,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """Finds bad JSON, missing prompts and answers, unknown data_source, duplicates, long prompts.

    Ends with 1 when anything is found. A data_source is unknown when reward.routes has no judge for
    it. Lengths (data.max_prompt_tokens) are checked when there is a --model or --config.
    """
    from asyncgrpo.config import load_config
    from asyncgrpo.data.check import findings
    from asyncgrpo.data.files import read_rows
    from asyncgrpo.data.templates import tokenise

    settings = load_config(config, set_ or [])
    data, tokenizer = settings.data, _tokenizer(model, settings if config else None)
    rows = read_rows(file)
    found = list(
        findings(
            rows,
            file,
            settings,
            lambda p: len(tokenise(tokenizer, p.messages, data)) if tokenizer else 0,
        )
    )
    if found:
        _show(found)
    unmeasured = "" if tokenizer else "; without --model or --config no length is measured"
    typer.echo(f"{file}: {len(found)} problems in {len(rows)} records{unmeasured}")
    raise typer.Exit(1 if found else 0)


@data_app.command("convert-gsm8k")
def convert_gsm8k(
    input_dir: Annotated[Path, typer.Option(help="the data set's Parquet or JSONL files")],
    out_dir: Annotated[Path, typer.Option(help="for train.jsonl and test.jsonl")],
    instruction: Annotated[
        str | None, typer.Option(help="after each question; default: step by step, answer after #")
    ] = None,
) -> None:
    """Converts local files of GSM8K into records with a bare ground truth. Never goes online."""
    from asyncgrpo.data.gsm8k import INSTRUCTION, convert_folder

    done = convert_folder(input_dir, out_dir, INSTRUCTION if instruction is None else instruction)
    for split, (count, left_out) in done.items():
        typer.echo(f"{out_dir / split}.jsonl: {count} records")
        if left_out:
            rows = f"{len(left_out)} rows have no answer after ####, left out: "
            typer.echo(f"warning: {split}: {rows}{', '.join(map(str, left_out))}", err=True)


@data_app.command("make-tasks")
def make_tasks(
    num: Annotated[int, typer.Option(min=1, help="records")],
    kinds: Annotated[str, typer.Option(help="by commas; math: add, sub and mul")] = (
        "math,gcd,sort,palindrome,reverse,expression"
    ),
    seed: Annotated[int, typer.Option(min=0, help="the same seed gives the same file")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSONL file; without: standard output")] = None,
    set_: Overrides = None,
) -> None:
    """Makes tasks with exact answers, as many of each kind, each once; see data.tasks settings."""
    from asyncgrpo.config import load_config
    from asyncgrpo.data.files import as_line, write_rows
    from asyncgrpo.data.tasks import task_records

    names = [name.strip() for name in kinds.split(",")]
    records = list(task_records(names, num, seed, load_config(None, set_ or []).data.tasks))
    if out is None:
        typer.echo("".join(map(as_line, records)), nl=False)
    else:
        write_rows(out, records)
        typer.echo(f"{out}: {num} records")


def _tokenizer(model: str | None, settings: Config | None) -> Any:
    """The tokenizer of a model, else of the settings' model; None when neither is given."""
    path = model or (settings.model.path if settings else None)
    if path is None:
        return None
    from asyncgrpo.actor.process import load_tokenizer
    from asyncgrpo.errors import ModelError
    from asyncgrpo.launch.model_folder import quick_tokenizer

    try:
        return quick_tokenizer(path) or load_tokenizer(path)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"no tokenizer can be loaded from {path!r}: {reason}") from None


def _show(findings: list[Finding]) -> None:
    """One row for all places where the same is wrong: the first of them, and how many more."""
    from rich.console import Console
    from rich.table import Table

    places: dict[str, list[str]] = {}
    for where, what in findings:
        places.setdefault(what, []).append(where)
    table = Table("where", "what")
    for column in table.columns:
        column.overflow = "fold"  # a place that is cut off is of no use
    for what, (first, *others) in list(places.items())[:MAX_SHOWN]:
        table.add_row(first + (f" and {len(others)} more" if others else ""), what)
    if len(places) > MAX_SHOWN:
        table.add_row(f"and {len(places) - MAX_SHOWN} more")
    Console(highlight=False, markup=False).print(table)
