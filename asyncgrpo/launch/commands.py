"""`asyncgrpo plan ...`: what a run would need, before it is started. Imports late, starts fast."""

from __future__ import annotations

from typing import Annotated

import typer

from asyncgrpo.launch.options import ConfigFile, Overrides

plan_app = typer.Typer(help="What a run needs, before it is started.", no_args_is_help=True)


@plan_app.callback()
def _group() -> None:
    """Keeps `memory` a command of its own while it is the only one."""


@plan_app.command()
def memory(
    config: ConfigFile = None,
    gpu_gib: Annotated[
        float | None, typer.Option(min=0.1, help="GiB of one GPU; default: of those found here")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Estimates the memory of each GPU, item by item; exit code 1 when something does not fit."""
    from asyncgrpo.config import load_config
    from asyncgrpo.launch.memory import GIB
    from asyncgrpo.launch.memory_report import MemoryReport, device_bytes

    settings = load_config(config, set_ or [])
    report = MemoryReport(settings)
    room = gpu_gib * GIB if gpu_gib else device_bytes(settings)
    typer.echo(report.all_devices(room))
    if room is None:
        typer.echo("no GPU is here to compare with; give --gpu-gib")
    elif not report.fits(room):
        raise typer.Exit(1)
