"""`asyncgrpo plan ...` and `env`: what a run needs, and what is here. Imports late, starts fast."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from asyncgrpo.launch.options import ConfigFile, Overrides

plan_app = typer.Typer(help="What a run needs, before it is started.", no_args_is_help=True)


def env(
    as_json: Annotated[bool, typer.Option("--json", help="as a run writes it to env.json")] = False,
) -> None:
    """Shows versions, hardware and source, and which optional extras are not installed."""
    from asyncgrpo.launch.environment import machine_report, missing_extras

    report = machine_report()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    packages, hardware = report["packages"], report["hardware"]
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    memory = hardware["memory_bytes"] / 2**30
    git = report["git"]
    rows = {
        "python": f"{report['python']} on {report['os']}",
        "packages": ", ".join(f"{name} {v}" for name, v in packages.items() if v),
        "hardware": f"{hardware['cores']} cores ({hardware['cpu']}), {memory:.0f} GiB, {gpus}",
        "git": f"{git['commit']}{' with changes' if git['dirty'] else ''}" if git else "",
    }
    rows |= {
        f"no {extra}": f"{', '.join(names)}: pip install 'asyncgrpo[{extra}]'"
        for extra, names in missing_extras().items()
    }
    typer.echo("\n".join(f"{name:<15} {text}" for name, text in rows.items() if text))


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
