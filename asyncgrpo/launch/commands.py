"""`asyncgrpo config`, `env`, `plan` and `slurm`, and options of several commands. Imports late."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from asyncgrpo.errors import ConfigError

ConfigFile = Annotated[Path | None, typer.Option(help="TOML settings or preset name")]
Actors = Annotated[int | None, typer.Option(help="actor processes, one engine each")]
Learners = Annotated[int | None, typer.Option(help="learner ranks under torchrun")]
NewFolder = Annotated[Path | None, typer.Option(help="new folder for everything written")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="room.key=value, repeatable")]
Seed = Annotated[int | None, typer.Option(help="of prompts and sampling")]
config_app = typer.Typer(help="Show settings, explain them, list presets.", no_args_is_help=True)
plan_app = typer.Typer(help="What a run needs, before it is started.", no_args_is_help=True)
slurm_app = typer.Typer(help="Runs on the nodes of a Slurm cluster.", no_args_is_help=True)


def overridden(
    asked: Sequence[str] | None, flags: Mapping[str, Path | str | float | list[int] | None]
) -> list[str]:
    """What --set asks for, then the flags by their settings' names; None is a flag not given."""
    given = {key: str(v) if isinstance(v, Path) else v for key, v in flags.items() if v is not None}
    for word in asked or ():
        if (key := word.partition("=")[0].strip()) in given:
            raise ConfigError(
                f"--set {word}, but an option of its own sets {key} to {given[key]!r}; keep one"
            )
    words = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items())
    return [*(asked or ()), *words]


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


def env(
    as_json: Annotated[bool, typer.Option("--json", help="as a run writes it to env.json")] = False,
) -> None:
    """Shows versions, hardware and source, and which optional extras are not installed."""
    from asyncgrpo.launch.environment import machine_report, missing_extras

    report = machine_report()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    hardware, git = report["hardware"], report["git"]
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    memory = f"{hardware['memory_bytes'] / 2**30:.0f} GiB"
    rows = {
        "python": f"{report['python']} on {report['os']}",
        "packages": ", ".join(f"{name} {v}" for name, v in report["packages"].items() if v),
        "hardware": f"{hardware['cores']} cores ({hardware['cpu']}), {memory}, {gpus}",
        "git": git and git["commit"] + " with changes" * git["dirty"],
    }
    for extra, names in missing_extras().items():
        rows[f"no {extra}"] = f"{', '.join(names)}: pip install 'asyncgrpo[{extra}]'"
    typer.echo("\n".join(f"{name:<15} {text}" for name, text in rows.items() if text))


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


@slurm_app.command("render", help="Writes the batch script, with code and settings frozen.")
@slurm_app.command("submit", help="The same, and hands the script to sbatch.")
def render(
    context: typer.Context,
    config: ConfigFile = None,
    actors: Actors = None,
    learners: Learners = None,
    nodes: Annotated[int, typer.Option(min=1, help="of all roles, or of the learners")] = 1,
    actor_nodes: Annotated[
        int | None, typer.Option(min=1, help="own nodes for the actors (heterogeneous job)")
    ] = None,
    time: Annotated[str, typer.Option(help="of one attempt; default: the partition's")] = "",
    seeds: Annotated[str, typer.Option(help="0,1,2: a job array, one run each")] = "",
    sbatch: Annotated[list[str] | None, typer.Option(help="more: partition=gpu ..")] = None,
    run_dir: NewFolder = None,
    set_: Overrides = None,
) -> None:
    from asyncgrpo.config import load_config
    from asyncgrpo.launch import sbatch as script
    from asyncgrpo.launch.session import Session
    from asyncgrpo.launch.slurm import ask

    flags = {"launch.actors": actors, "launch.learners": learners, "run.dir": run_dir}
    overrides = overridden(set_, flags)
    settings = load_config(config, overrides)
    if "grace_seconds" not in settings.launch.model_fields_set:  # a last checkpoint takes longer
        settings = load_config(config, [*overrides, "launch.grace_seconds=30"])
    session = Session(settings)
    absent = session.check(download=False)
    text = script.render(
        settings,
        session.run_dir,
        nodes=nodes,
        actor_nodes=actor_nodes,
        time=time,
        seeds=seeds,
        options=sbatch or (),
    )
    script.freeze(settings, session.run_dir)
    file = session.run_dir / "submitted" / "job.sbatch"
    file.write_text(text, encoding="utf-8")
    for line in absent:
        typer.echo(f"not checked: {line}", err=True)
    if context.info_name == "render":
        typer.echo(text, nl=False)
        typer.echo(f"written to {file}; start it with sbatch", err=True)
    else:
        job = ask("sbatch", "--parsable", str(file)).strip().partition(";")[0]
        typer.echo(f"job     {job}\nlogs    {session.run_dir / 'logs'}\nscript  {file}")


@slurm_app.command()
def run(
    config: ConfigFile = None,
    run_dir: Annotated[Path | None, typer.Option(help="goes on with the run there, if any")] = None,
    seed: Seed = None,
) -> None:
    """Runs on the nodes of the job that this is called in: by the batch script, or in salloc."""
    from asyncgrpo.config import load_config
    from asyncgrpo.launch.slurm import Job, SlurmSession

    resume = run_dir is not None and (run_dir / "config.json").exists()
    settings = load_config(config, overridden(None, {"run.dir": run_dir, "run.seed": seed}))
    raise typer.Exit(SlurmSession(settings, Job(settings), resume=resume).run())
