"""Ports and run directories, new ones and those of runs that go on: what cannot work is refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from asyncgrpo.buffer.ledger import FILE as LEDGER_FILE
from asyncgrpo.buffer.ledger import LedgerReader
from asyncgrpo.config import Config
from asyncgrpo.errors import ConfigError
from asyncgrpo.launch.plan import role_names
from asyncgrpo.learner.saved import FOLDER, newest, saved, step_of
from asyncgrpo.rundir import Endpoints

LAST_PORT = 65535
AUTO = "auto"
# The ledger, the prompt stream and the checkpoints stand on these; they cannot change in a run.
FIXED = ("run.seed", "data", "buffer.groups_per_step", "learner.lora")


def hold_port(host: str = "", port: int = 0) -> socket.socket:
    """Keeps a port (0: any free one) for those who ask for it by its number, until it is closed.

    Nothing listens on it. The system gives it to no connection and no listener that takes any port,
    such as those of gloo, vLLM and srun, which would be there before a role is, or between two
    lives of it. host: "" keeps it on all addresses.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as listeners do that may share it
    held.bind((host, port))
    return held


def port_of(held: socket.socket) -> int:
    """The port that it keeps."""
    return int(held.getsockname()[1])


def own_port() -> int:
    """A free port, kept until this process ends, or what it becomes by exec."""
    held = hold_port()
    port = port_of(held)
    held.set_inheritable(True)
    held.detach()  # stays open, though nobody knows it any more
    return port


@contextmanager
def held_endpoints(config: Config) -> Iterator[Endpoints]:
    """Ports that the settings name, proven free, and free ones for the others; no cores yet.

    They are kept (`hold_port`) until the end; those of other machines cannot be.
    """
    launch, names = config.launch, role_names(config.launch.actors, config.launch.learners)
    count, host = len(names), launch.host
    first, own = launch.metrics_port, config.observe.metrics_host.replace("auto", host)
    if first and first + count - 1 > LAST_PORT:
        raise ConfigError(
            f"launch.metrics_port={first} leaves no room for {count} endpoints; "
            f"it must be <= {LAST_PORT - count + 1}, or 0 for any free ports"
        )
    asked = [
        ("launch.buffer_port", host, launch.buffer_port),
        ("launch.weights_port", host, launch.weights_port),
        *(("launch.metrics_port", own, first + place) for place in range(count if first else 1)),
    ]
    with ExitStack() as held:
        with ExitStack() as listening:  # together: no two settings may name one port
            for setting, address, port in asked:
                try:
                    listening.enter_context(socket.create_server((address, port)))
                except OSError as error:
                    raise ConfigError(_refused(setting, address, port, error)) from None
            free = [port_of(held.enter_context(hold_port())) for _ in range(4)]
        for _, address, port in asked:
            if port:
                held.enter_context(hold_port(address, port))
        yield Endpoints(
            buffer=f"tcp://{host}:{launch.buffer_port or free[0]}",
            weights=f"tcp://{host}:{launch.weights_port or free[1]}",
            store=(host, free[2]),
            rendezvous=free[3],
            metrics={name: first and first + place for place, name in enumerate(names)},
        )


def _refused(setting: str, host: str, port: int, error: OSError) -> str:
    """Why nobody can listen there, and what to change."""
    why, wanted = os.strerror(error.errno or 0), f"{setting}: port {port} on {host}"
    remedy = (
        f"end the process that listens there, or set another {setting} (0 = any free port); no two "
        "doors share one, and launch.metrics_port is the first of one per role"
    )
    if error.errno == errno.EADDRNOTAVAIL:
        wanted = f"{'observe.metrics_host' if 'metrics' in setting else 'launch.host'}={host}"
        remedy = "set it to an address of this machine, such as 127.0.0.1"
    return f"{wanted} cannot be listened on ({why}); {remedy}"


def check_run_dir(path: Path) -> None:
    """ConfigError when a run cannot be written there, or one is there already. Changes nothing."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(
                f"run directory {str(path)[:60]}... is longer than a path may be here; "
                "give a shorter --run-dir"
            ) from None
    # os.path.exists, unlike Path.exists, takes "may not look" for "no".
    if os.path.exists(path / "config.json"):
        raise ConfigError(
            f"run directory {path} already holds a run; give another --run-dir, or go on with it "
            "by --resume (asyncgrpo buffer: --join; each Trainer makes one run)"
        )
    ancestor = path.absolute()
    while not os.path.exists(ancestor):
        ancestor = ancestor.parent
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        why = "may not be written" if ancestor.is_dir() else "is a file"
        raise ConfigError(
            f"run directory {path} cannot be made: {ancestor} {why}; give another --run-dir"
        )


def missing_extra(config: Config) -> str:
    """What the learner needs and is not installed, with the remedy; "" when nothing is."""
    lora = config.learner.lora
    if config.learner.optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
        return "learner.optimizer='adamw_8bit' needs bitsandbytes: pip install 'asyncgrpo[qlora]'"
    absent = [name for name in ("liger_kernel", "cutlass") if find_spec(name) is None]
    if config.learner.fused_head and absent:
        return f"learner.fused_head needs {' and '.join(absent)}: pip install 'asyncgrpo[liger]'"
    needed = {"peft": lora, "bitsandbytes": lora and lora.quantize}
    missing = [name for name, use in needed.items() if use and find_spec(name) is None]
    install = f"pip install 'asyncgrpo[{'qlora' if lora and lora.quantize else 'lora'}]'"
    return f"learner.lora needs {' and '.join(missing)}: {install}" if missing else ""


def prepare_run_dir(path: Path) -> None:
    """Checks the run directory and makes it, with logs/ and trajectories/."""
    check_run_dir(path)
    try:
        for name in ("logs", "trajectories"):
            (path / name).mkdir(parents=True, exist_ok=True)
        point_latest(path)
    except OSError as error:
        raise ConfigError(
            f"run directory {path} cannot be written ({error.strerror}: {error.filename}); "
            "give another --run-dir"
        ) from None


def point_latest(path: Path) -> None:
    """Makes runs/latest, where grafana/prometheus.yml looks, a link to a run directory of runs/."""
    if path.parent.name == "runs":
        draft = path.with_name(".latest")
        draft.unlink(missing_ok=True)
        draft.symlink_to(path.name)
        draft.replace(path.with_name("latest"))


def find_run(resume: str, run_dir: Path | None) -> Path | None:
    """The run directory that --resume means; None for "auto" when there is none to go on with.

    "auto" is the given run directory, or the newest below runs/. ConfigError for a path without a
    run.
    """
    if resume == AUTO:
        runs = [run_dir / "config.json"] if run_dir else Path("runs").glob("*/config.json")
        found = sorted(filter(Path.exists, runs), key=lambda path: path.stat().st_mtime)
        return found[-1].parent if found else None
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
    for setting in FIXED:
        room, _, key = setting.partition(".")
        old, new = before.get(room, {}), now[room]
        if key:
            old, new = old.get(key), new[key]
        if old != new:
            raise ConfigError(
                f"{setting}={new!r} cannot change within a run: it was {old!r}; "
                "leave it as it was, or start another run"
            )
    ledger = run_dir / LEDGER_FILE
    if ledger.exists():  # not yet, when the run was killed at its start
        LedgerReader(run_dir).close()
    checkpoint = newest(run_dir / FOLDER)
    if checkpoint is None and saved(run_dir / FOLDER):
        raise ConfigError(
            f"every checkpoint in {run_dir / FOLDER} is damaged; start another run with "
            "model.path set to the last model that you trust"
        )
    step = step_of(checkpoint) if checkpoint is not None else 0
    is_empty = not ledger.exists() or not ledger.stat().st_size
    if checkpoint is not None and is_empty and not (checkpoint / LEDGER_FILE).exists():
        raise ConfigError(
            f"{ledger} is missing or empty: without it nobody knows what {step} steps were made "
            f"of; put it back, or start another run with model.path={run_dir / 'model'}"
        )
    made = max(step, _steps_of_finished(run_dir))
    if made >= config.run.max_steps:
        raise ConfigError(
            f"run.max_steps={config.run.max_steps} must be > {made}, the steps that {run_dir} has "
            "made already; set a larger one"
        )
    return step


def _steps_of_finished(run_dir: Path) -> int:
    """0 when the run has not come to its end."""
    summary = run_dir / "summary.json"
    return int(json.loads(summary.read_text())["steps"]) if summary.exists() else 0


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
