"""The command line. Parses first; imports the heavy part of one role afterwards."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from asyncgrpo.data.commands import data_app
from asyncgrpo.errors import EXIT_INTERRUPTED, AsyncGRPOError
from asyncgrpo.launch.error_file import record_error
from asyncgrpo.learner.commands import app as algo_app
from asyncgrpo.rewards.commands import reward_app

app = typer.Typer(
    name="asyncgrpo",
    help="Asynchronous GRPO: vLLM actors, a staleness-bounded buffer, a DDP learner.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(algo_app, name="algo")
app.add_typer(reward_app, name="reward")
app.add_typer(data_app, name="data")


@app.command()
def launch(
    config: Annotated[Path | None, typer.Option(help="TOML settings; without: defaults")] = None,
    actors: Annotated[int | None, typer.Option(help="actor processes, one engine each")] = None,
    learners: Annotated[int | None, typer.Option(help="learner ranks under torchrun")] = None,
    max_steps: Annotated[int | None, typer.Option(help="optimizer updates")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="new folder for everything written")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="room.key=value, repeatable")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of prompts and sampling")] = None,
    insecure: Annotated[bool, typer.Option(help="leave loopback without keys")] = False,
    serial: Annotated[bool, typer.Option(help="all roles in one process, repeatable")] = False,
    dry_run: Annotated[bool, typer.Option(help="print the plan, start nothing")] = False,
) -> None:
    """Starts a whole run on this machine and shows its progress."""
    from asyncgrpo.config import load_config
    from asyncgrpo.launch.session import Session

    flags = {
        "launch.actors": actors,
        "launch.learners": learners,
        "run.max_steps": max_steps,
        "run.dir": f'"{run_dir}"' if run_dir else None,
        "run.seed": seed,
        "launch.insecure": "true" if insecure else None,
    }
    overrides = [f"{key}={value}" for key, value in flags.items() if value is not None]
    settings = load_config(config, [*(set_ or []), *overrides])
    session = Session(settings)
    if dry_run:
        session.show_plan()
    else:
        raise typer.Exit(session.run_serially() if serial else session.run())


@app.command(hidden=True)
def role(
    name: Annotated[str, typer.Argument(help="buffer, actor or learner")],
    run_dir: Annotated[Path, typer.Option()],
    index: Annotated[int, typer.Option()] = 0,
) -> None:
    """One process of a run; the launcher starts it."""
    from asyncgrpo.rundir import RunDir

    run = RunDir.read(run_dir)
    logging.getLogger().setLevel(run.config.observe.log_level)
    stopping = _stop_flag()
    if name == "buffer":
        from asyncgrpo.buffer.server import run_buffer

        run_buffer(run, stopping)
    elif name == "actor":
        from asyncgrpo.actor.process import run_actor

        run_actor(run, index, int(os.environ.get("ASYNCGRPO_RESTART", "0")), stopping)
    elif name == "learner":
        from asyncgrpo.learner.process import run_learner

        run_learner(run)
    else:
        raise typer.BadParameter(f"{name!r} is no role; roles are buffer, actor, learner")


def _stop_flag() -> Callable[[], bool]:
    """A flag that SIGTERM sets; loops look at it between two turns."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    return lambda: bool(asked)


def main() -> None:
    """Entry point: errors raised on purpose become one message and their exit code."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    from asyncgrpo.rundir import leave

    end = leave if sys.argv[1:2] == ["role"] else sys.exit
    try:
        end(app(standalone_mode=False) or 0)
    except AsyncGRPOError as error:
        record_error(error)
        print(f"error: {error}", file=sys.stderr)
        end(error.exit_code)
    except typer.Abort:
        end(EXIT_INTERRUPTED)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # wrong usage of the command
            error.show()
            end(error.exit_code)
        record_error(error)
        traceback.print_exc()
        end(1)


if __name__ == "__main__":
    main()
