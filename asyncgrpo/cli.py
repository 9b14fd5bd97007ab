"""The command line. Parses first; imports the heavy part of one role afterwards."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from asyncgrpo.buffer.commands import audit, ledger
from asyncgrpo.chat import chat
from asyncgrpo.data.commands import data_app
from asyncgrpo.errors import EXIT_INTERRUPTED, AsyncGRPOError, ConfigError
from asyncgrpo.launch.commands import (
    Actors,
    ConfigFile,
    Learners,
    NewFolder,
    Overrides,
    Seed,
    config_app,
    env,
    overridden,
    plan_app,
    slurm_app,
)
from asyncgrpo.launch.ends import record_error
from asyncgrpo.learner.commands import app as algo_app
from asyncgrpo.observe.commands import traj_app
from asyncgrpo.replay import replay
from asyncgrpo.rewards.commands import reward_app

app = typer.Typer(
    name="asyncgrpo",
    help="Asynchronous GRPO: vLLM actors, a staleness-bounded buffer, a DDP learner.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
GROUPS = {"algo": algo_app, "config": config_app, "plan": plan_app, "reward": reward_app}
GROUPS |= {"data": data_app, "traj": traj_app, "slurm": slurm_app}
for name, group in GROUPS.items():
    app.add_typer(group, name=name)
for command in (audit, chat, env, ledger, replay):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        from asyncgrpo import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print it")
    ] = False,
) -> None:
    """Options before any command; the text of --help is that of the app."""


@app.command()
def launch(
    config: ConfigFile = None,
    model: Annotated[str | None, typer.Option(help="folder or hub name (model.path)")] = None,
    data: Annotated[str | None, typer.Option(help="training prompts (data.train)")] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="held-out prompts, or none (data.eval)")
    ] = None,
    actors: Actors = None,
    learners: Learners = None,
    max_steps: Annotated[int | None, typer.Option(help="learner steps (batches)")] = None,
    run_dir: NewFolder = None,
    set_: Overrides = None,
    seed: Seed = None,
    insecure: Annotated[bool, typer.Option(help="leave loopback without keys")] = False,
    resume: Annotated[
        str | None, typer.Option(help="go on with a run: its directory, or 'auto' for the newest")
    ] = None,
    serial: Annotated[bool, typer.Option(help="all roles in one process, repeatable")] = False,
    dry_run: Annotated[bool, typer.Option(help="print the plan, start nothing")] = False,
) -> None:
    """Starts a whole run on this machine and shows its progress."""
    from asyncgrpo.config import load_config
    from asyncgrpo.launch.preflight import find_run
    from asyncgrpo.launch.session import Session
    from asyncgrpo.rundir import stop_flag

    flags = {
        "model.path": model,
        "data.train": data,
        "data.eval": eval_data,
        "launch.actors": actors,
        "launch.learners": learners,
        "run.max_steps": max_steps,
        "run.dir": run_dir,
        "run.seed": seed,
        "launch.insecure": insecure or None,
    }
    found = find_run(resume, run_dir) if resume else None
    if found is not None:  # its settings, unless others are given
        # not by a link such as runs/latest, which moves on to the next run
        flags["run.dir"] = found.resolve()
        config = config or found / "config.json"
    settings = load_config(config, overridden(set_, flags))
    session = Session(settings, resume=found is not None)
    if dry_run:
        session.show_plan(serial)
    else:
        raise typer.Exit(session.run_serially(stop_flag()) if serial else session.run())


@app.command()
def top(
    run: Annotated[Path, typer.Argument(help="run directory; the run may be going on elsewhere")],
    once: Annotated[bool, typer.Option("--once", help="show it once, do not wait")] = False,
) -> None:
    """Shows how far a run is, every second until it is done; Ctrl-C ends only the view."""
    from rich.console import Console

    from asyncgrpo.observe.progress import follow
    from asyncgrpo.rundir import RunDir

    max_steps = RunDir.read(run).config.run.max_steps
    with suppress(KeyboardInterrupt):
        follow(run, max_steps, Console(highlight=False, soft_wrap=True), once=once)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="model folder, hub name or 'tiny'")],
    data: Annotated[str, typer.Option(help="file, glob, folder, hub name, or 'tasks'")],
    k: Annotated[list[int] | None, typer.Option("-k", min=1, help="pass@k, repeatable")] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="completions per prompt; default: the largest k, or 1")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="default: 0 (greedy) for one sample, else 1")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="of a completion; default: sampling's")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="at most; default: all, or 318 tasks")
    ] = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    engine: Annotated[str | None, typer.Option(help="vllm, or toy: slow, repeatable")] = None,
    out: Annotated[Path | None, typer.Option(help="JSONL file for every completion")] = None,
) -> None:
    """Accuracy, pass@k, reward and length of a model on held-out prompts."""
    from rich.console import Console

    from asyncgrpo.config import TASKS, load_config
    from asyncgrpo.data.files import write_rows
    from asyncgrpo.evaluate_model import Desk, run
    from asyncgrpo.observe.progress import eval_table

    if not data:
        raise ConfigError("--data '' names nothing; give a file, folder, hub name, or 'tasks'")
    samples = num_samples or max(k or [1])
    flags = {
        "model.path": model,
        "actor.engine": engine,
        "eval.data": data,
        "eval.k": k or [],
        "eval.num_samples": samples,
        "eval.num_prompts": num_prompts or (None if data == TASKS else 2**31),
        "eval.sampling.temperature": float(samples > 1) if temperature is None else temperature,
        "eval.sampling.max_completion_tokens": max_tokens,
    }
    settings = load_config(config, ["eval={}", *overridden((), flags), *(set_ or [])])
    desk = Desk(settings)
    if out is not None:
        write_rows(out, [])  # before the work: can it be written?
    report = run(settings, desk)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(eval_table(report))
    for line in desk.unanswered():
        console.print(line)
    if out is not None:
        write_rows(out, list(desk.rows()))
        console.print(f"every completion  {out}")


Join = Annotated[Path, typer.Option(help="the run directory that `asyncgrpo buffer` made")]


@app.command()
def buffer(
    config: ConfigFile = None,
    run_dir: NewFolder = None,
    set_: Overrides = None,
    join: Annotated[Path | None, typer.Option(help="go on with the run in this folder")] = None,
) -> None:
    """The first process of a run that is started by hand; set launch.host to this machine."""
    from asyncgrpo.config import load_config
    from asyncgrpo.launch.session import Session

    folder = join or run_dir
    overrides = overridden(set_, {"run.dir": folder and folder.absolute()})
    settings = load_config(config or (join and join / "config.json"), overrides)
    with Session(settings, resume=join is not None, seats={}).prepared() as (run, _):
        print(f"then  asyncgrpo learner --join {run.path}   on this machine")
        print(f"and   asyncgrpo actor --join {run.path} --index 0   (1, 2 ..) anywhere", flush=True)
        role("buffer", run.path)


@app.command()
def learner(join: Join) -> None:
    """All learner ranks of a run that is started by hand, on the machine of the buffer."""
    _become("learner", join)


@app.command()
def actor(
    join: Join, index: Annotated[int, typer.Option(min=0, help="no two actors share one")] = 0
) -> None:
    """One actor of a run that is started by hand, on any machine that sees the run directory."""
    _become(f"actor-{index}", join)


def _become(name: str, join: Path) -> NoReturn:
    """Goes over to the process of a role, whose environment must be there when it begins."""
    from asyncgrpo.launch.plan import hand_started
    from asyncgrpo.launch.preflight import own_port
    from asyncgrpo.rundir import RunDir, is_done

    run = RunDir.read(join.absolute())
    if is_done(run.path):
        raise ConfigError(
            f"{join} is done, see its summary.json; to train on, start a run with its model: "
            f"--model {join / 'model'}"
        )
    spec = hand_started(name, run.config, run.path, own_port() if name == "learner" else 0)
    os.execvpe(spec.argv[0], spec.argv, {**os.environ, **spec.environment})


@app.command(hidden=True)
def role(
    name: Annotated[str, typer.Argument(help="buffer, actor or learner")],
    run_dir: Annotated[Path, typer.Option()],
    index: Annotated[int, typer.Option()] = 0,
) -> None:
    """One process of a run; the launcher starts it."""
    from asyncgrpo.launch.lifeline import RUN_ID
    from asyncgrpo.launch.stall import answer_with_stacks
    from asyncgrpo.rundir import RunDir, stop_flag

    run = RunDir.read(run_dir)
    logging.getLogger("asyncgrpo").setLevel(run.config.observe.log_level)
    unwatched = run_dir if RUN_ID not in os.environ and name != "learner" else None
    # actors first: they say goodbye to the buffer
    linger = run.config.launch.grace_seconds if name == "buffer" else 0.0
    stopping = stop_flag(unwatched, linger)
    answer_with_stacks(run_dir, f"{name}-{os.environ.get('RANK', index)}")
    if name == "buffer":
        from asyncgrpo.buffer.server import run_buffer

        run_buffer(run, stopping)
    elif name == "actor":
        from asyncgrpo.actor.process import run_actor

        run_actor(run, index, int(os.environ.get("ASYNCGRPO_RESTART", "0")), stopping)
    else:
        from asyncgrpo.learner.process import run_learner

        run_learner(run, stopping)


def main() -> None:
    """Entry point: errors raised on purpose become one message and their exit code."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    try:
        _end(app(standalone_mode=False) or 0)
    except typer.Abort:
        _end(EXIT_INTERRUPTED)
    except Exception as error:
        _end(_told(error))


def _told(error: Exception) -> int:
    """Says what went wrong, also to a launcher; the exit code."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        start = str(error.filename)[:60]
        error = ConfigError(f"{start}... is longer than a path may be here; give a shorter one")
    if hasattr(error, "exit_code") and hasattr(error, "show"):  # wrong usage of the command
        error.show()
        return int(error.exit_code)
    record_error(error)
    if isinstance(error, AsyncGRPOError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    traceback.print_exception(error)
    return 1


def _end(exit_code: int) -> NoReturn:
    """What may hold an engine ends at once, whatever still runs in it."""
    if sys.argv[1:2] in (["role"], ["eval"]):
        from asyncgrpo.rundir import leave

        leave(exit_code)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
