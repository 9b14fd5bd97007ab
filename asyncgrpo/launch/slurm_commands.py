"""`asyncgrpo slurm ...`: a run as a job of Slurm. Imports late, starts fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asyncgrpo.launch.options import (
    Actors,
    ConfigFile,
    Learners,
    NewFolder,
    Overrides,
    Seed,
    overridden,
)

slurm_app = typer.Typer(help="Runs on the nodes of a Slurm cluster.", no_args_is_help=True)


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
    from asyncgrpo.launch.steps import ask

    flags = {"launch.actors": actors, "launch.learners": learners, "run.dir": run_dir}
    overrides = overridden(set_, flags)
    settings = load_config(config, overrides)
    if "grace_seconds" not in settings.launch.model_fields_set:  # a last checkpoint takes longer
        settings = load_config(config, [*overrides, "launch.grace_seconds=30"])
    session = Session(settings)
    absent: list[str] = []
    session.check(absent)
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
    from asyncgrpo.launch.slurm import SlurmSession
    from asyncgrpo.launch.steps import Job

    resume = run_dir is not None and (run_dir / "config.json").exists()
    settings = load_config(config, overridden(None, {"run.dir": run_dir, "run.seed": seed}))
    raise typer.Exit(SlurmSession(settings, Job(settings), resume=resume).run())
