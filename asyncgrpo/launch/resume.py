"""Going on with a run that was stopped or killed: which one, and with which settings."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asyncgrpo.config import Config
from asyncgrpo.errors import ConfigError
from asyncgrpo.learner.saved import FOLDER, newest, saved, step_of

AUTO = "auto"
# The ledger, the prompt stream and the checkpoints stand on these; they cannot change in a run.
FIXED = (("run", "seed"), ("data",), ("buffer", "groups_per_step"), ("learner", "lora"))


def find_run(resume: str, run_dir: Path | None) -> Path | None:
    """The run directory that --resume means; None for "auto" when there is none to go on with.

    "auto" is the given run directory, or the newest below runs/. ConfigError for a path without a
    run.
    """
    if resume == AUTO:
        if run_dir is not None:
            return run_dir if (run_dir / "config.json").exists() else None
        runs = sorted(Path("runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime)
        return runs[-1].parent if runs else None
    path = Path(resume)
    if not (path / "config.json").exists():
        raise ConfigError(
            f"--resume {resume}: there is no run ({path / 'config.json'} is missing); give a run "
            f"directory, or {AUTO!r}"
        )
    return path


def check_resumable(run_dir: Path, config: Config) -> int:
    """The step a run goes on from. ConfigError when these settings cannot go on with it."""
    before = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    now = config.model_dump(mode="json")
    for keys in FIXED:
        old, new = _at(before, keys), _at(now, keys)
        if old != new:
            raise ConfigError(
                f"{'.'.join(keys)}={new!r} cannot change within a run: it was {old!r}; "
                "leave it as it was, or start another run"
            )
    checkpoint = newest(run_dir / FOLDER)
    if checkpoint is None and saved(run_dir / FOLDER):
        raise ConfigError(
            f"every checkpoint in {run_dir / FOLDER} is damaged; start another run with "
            "model.path set to the last model that you trust"
        )
    step = step_of(checkpoint) if checkpoint is not None else 0
    if step >= config.run.max_steps:
        raise ConfigError(
            f"run.max_steps={config.run.max_steps}, but {run_dir} has made {step} steps already; "
            "set a larger run.max_steps"
        )
    return step


def keep_settings(run_dir: Path) -> None:
    """Keeps the settings of the life before as config.<n>.json; its summary is no longer true."""
    number = len(list(run_dir.glob("config.*.json"))) + 1
    (run_dir / "config.json").rename(run_dir / f"config.{number}.json")
    (run_dir / "summary.json").unlink(missing_ok=True)


@contextmanager
def only_launcher(run_dir: Path) -> Iterator[None]:
    """Holds the run directory. ConfigError when another launcher does; a killed one lets go."""
    with (run_dir / "launcher.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"run directory {run_dir} is in use by the launcher with pid {file.read().strip()};"
                " end that one first, or give another --run-dir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _at(tree: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
