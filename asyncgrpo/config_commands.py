"""`asyncgrpo config ...`: settings as they are resolved, explained, and the presets."""

from __future__ import annotations

from typing import Annotated

import typer

from asyncgrpo.launch.options import ConfigFile, Overrides

config_app = typer.Typer(help="Show settings, explain them, list presets.", no_args_is_help=True)


@config_app.command()
def show(
    config: ConfigFile = None,
    set_: Overrides = None,
    only_changed: Annotated[
        bool, typer.Option("--changed", help="only what differs from the defaults")
    ] = False,
) -> None:
    """Prints the settings of a run as TOML that loads as the same settings again."""
    from asyncgrpo.config import load_config
    from asyncgrpo.reference import as_toml, changed

    settings = load_config(config, set_ or [])
    typer.echo(as_toml(changed(settings) if only_changed else settings.model_dump(mode="json")))


@config_app.command()
def explain(
    key: Annotated[str, typer.Argument(help="room, room.key, a name of TRL or XTuner, a preset")],
) -> None:
    """Says what a setting means, its default, what is allowed, and its names elsewhere."""
    from asyncgrpo import reference

    typer.echo(reference.explain(key))


@config_app.command()
def presets() -> None:
    """Lists the settings files that come along, for --config NAME, and the presets of algo."""
    from asyncgrpo.algorithms import PRESETS
    from asyncgrpo.config import preset_files
    from asyncgrpo.reference import summary

    for name, path in preset_files().items():
        typer.echo(f"--config {name:<22} {summary(path)}")
    for name, values in PRESETS.items():
        text = ", ".join(f"{key} = {value}" for key, value in values.items())
        typer.echo(f"algo.preset={name:<19} {text}")
