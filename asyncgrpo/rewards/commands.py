"""`asyncgrpo reward ...`: tries rewards before a run pays for them. Imports late, starts fast."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from asyncgrpo.launch.commands import ConfigFile, Overrides

reward_app = typer.Typer(help="Try rewards before a run pays for them.", no_args_is_help=True)


@reward_app.command("test")
def try_out(
    config: ConfigFile = None,
    num: Annotated[int, typer.Option("-n", min=1, help="prompts of each data_source")] = 50,
    template: Annotated[
        str | None, typer.Option(help="how an answer is written, e.g. '#### {answer}'")
    ] = None,
    allow: Annotated[
        float, typer.Option(min=0, max=1, help="share of full marks that wrong answers may get")
    ] = 0.0,
    set_: Overrides = None,
) -> None:
    """Scores gold, empty, shuffled and random answers; exit code 1 when a reward can be cheated."""
    from rich.console import Console
    from rich.table import Table

    from asyncgrpo.config import load_config
    from asyncgrpo.data.prompts import open_prompts
    from asyncgrpo.rewards.registry import load_rewards
    from asyncgrpo.rewards.trial import HOLE, KINDS, try_rewards

    if template is not None and HOLE not in template:
        raise typer.BadParameter(f"--template {template!r} must contain {HOLE}")
    settings = load_config(config, set_ or [])
    opened = open_prompts(settings)
    alike = [name for name, reward in settings.rewards.items() if reward == settings.reward]
    rows = try_rewards(
        load_rewards(settings.reward),
        [prompt for name in alike for prompt in opened.survey(name)],
        count=num,
        correct_above=settings.reward.correct_above,
        template=template,
        allow=allow,
    )
    table = Table("data_source", "function", *KINDS, "verdict", box=None)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        means = [row.means[kind] for kind in KINDS]
        numbers = ["-" if math.isnan(mean) else f"{mean:.3f}" for mean in means]
        table.add_row(row.source, row.label, *numbers, "FLAGGED" if row.flags else "ok")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    for source, written in {row.source: row.template for row in rows}.items():
        console.print(f"{source}: answers are written as {written!r} (--template)")
    flags = [f"{row.source}, {row.label}: {flag}" for row in rows for flag in row.flags]
    for flag in flags:
        console.print(flag)
    if flags:
        raise typer.Exit(1)
