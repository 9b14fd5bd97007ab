"""Batch scripts for Slurm from launchers/*.sbatch, and what they run: code and settings, frozen."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import asyncgrpo
from asyncgrpo.config import Config
from asyncgrpo.errors import ConfigError
from asyncgrpo.launch.nodes import slot_cpus, slots_per_node

PACKAGE = Path(asyncgrpo.__file__).parent
BLANK = re.compile(r"\{\{(\w+)\}\}")
MARGIN_SECONDS = 60  # Slurm may be late; then the grace twice: for learner and actors, the buffer


def render(
    config: Config,
    run_dir: Path,
    *,
    nodes: int = 1,
    actor_nodes: int | None = None,
    time: str = "",
    seeds: str = "",
    options: Sequence[str] = (),
) -> str:
    """The batch script of a run, whose code and settings `freeze` puts into run_dir.

    nodes: of all roles; with actor_nodes: of the learners. time: limit of one attempt; default is
    the partition's. seeds: "0,1,2" for a run each. options: more of sbatch, as "partition=gpu".
    """
    launch = config.launch
    if seeds and (actor_nodes or not re.fullmatch(r"\d+(,\d+)*", seeds)):
        raise ConfigError(
            f"--seeds {seeds!r} must look like 0,1,2, and does not go with --actor-nodes: "
            "Slurm has no arrays of heterogeneous jobs"
        )
    width = config.actor.tensor_parallel
    slots = slots_per_node(launch.learners, 0 if actor_nodes else launch.actors, nodes, width)
    actor_slots = slots_per_node(0, launch.actors, actor_nodes or 1, width)
    in_array = ("slurm-%A_%a.log", '/seed-"$SLURM_ARRAY_TASK_ID"', ' --seed "$SLURM_ARRAY_TASK_ID"')
    log, folder, seed = in_array if seeds else ("slurm-%j.log", "", "")
    values = {
        "roles": f"{launch.learners} learner ranks and {launch.actors} actors",
        "name": _quoted(config.run.name),
        "log": _quoted(f"{run_dir / 'logs'}/".replace("%", "%%") + log),
        "nodes": nodes,
        "cpus": slots * slot_cpus(config),
        "gpus": slots * (launch.gpus > 0),
        "actor_nodes": actor_nodes,
        "actor_cpus": actor_slots * slot_cpus(config),
        "actor_gpus": actor_slots * (launch.gpus > 0),
        "time": time and _quoted(time),
        "seconds": MARGIN_SECONDS + int(2 * launch.grace_seconds),
        "seeds": seeds,
        "option": [f"--{_quoted(option)[1:-1].removeprefix('--')}" for option in options],
        "folder": shlex.quote(str(Path.cwd())),
        "run": shlex.quote(str(run_dir)) + folder,
        "frozen": shlex.quote(str(run_dir / "submitted")),
        "python": shlex.quote(sys.executable),
        "seed": seed,
    }
    form = PACKAGE / "launchers" / ("slurm_het.sbatch" if actor_nodes else "slurm.sbatch")
    lines = form.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(_filled(line, values) for line in lines)


def freeze(config: Config, run_dir: Path) -> None:
    """Copies the package, the user's functions and the settings into run_dir/submitted."""
    frozen, code = run_dir / "submitted", run_dir / "submitted" / "code"
    shutil.rmtree(frozen, ignore_errors=True)  # of a render before; nothing runs from it yet
    shutil.copytree(PACKAGE, code / "asyncgrpo", ignore=shutil.ignore_patterns("__pycache__"))
    settings = json.dumps(config.model_dump(mode="json", exclude_unset=True), indent=2)
    settings = re.sub(r'"([^":]+):([\w.]+)"', lambda use: _freeze_function(use, code), settings)
    (frozen / "config.json").write_text(settings, encoding="utf-8")
    (run_dir / "logs").mkdir(exist_ok=True)


def _freeze_function(use: re.Match[str], code: Path) -> str:
    """Copies the file of "file.py:function" or "module:function" with what lies beside it."""
    file, home = Path(use[1]), code
    if file.suffix == ".py" and file.is_file():
        home = code / f"beside-{file.stem}"
    else:
        file = Path(use[1].partition(".")[0]).with_suffix(".py")
        if file.with_suffix("").is_dir():
            shutil.copytree(file.with_suffix(""), code / file.stem, dirs_exist_ok=True)
    if file.is_file():
        home.mkdir(exist_ok=True)
        for neighbour in file.parent.glob("*.py"):
            shutil.copy(neighbour, home)
    return use[0] if home == code else json.dumps(f"{home / file.name}:{use[2]}")


def _filled(line: str, values: Mapping[str, Any]) -> str:
    """A line with its blanks filled in; #SBATCH lines go away with nothing in them, or repeat."""
    if not line.startswith("#SBATCH") or "{{" not in line:
        return BLANK.sub(lambda found: str(values[found[1]]), line)
    before, name, after = BLANK.split(line, maxsplit=1)
    value = values[name]
    items = value if isinstance(value, list) else [value] if value else []
    return "".join(f"{before}{item}{after}" for item in items)


def _quoted(text: str) -> str:
    """Text for an #SBATCH line, where Slurm, not bash, takes quotes away."""
    if re.search(r'["\\\n\r]', text):
        raise ConfigError(
            f"{text!r}: quotes, backslashes and line ends cannot stand in a batch script; give "
            "another --run-dir, run.name, --time or --sbatch"
        )
    return f'"{text}"'
