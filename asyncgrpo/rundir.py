"""The run directory: what the launcher writes there and every role reads.

config.json     resolved settings          endpoints.json  addresses, cores, metric ports
env.json        versions, hardware, seeds  logs/           one file per role
metrics.jsonl   one row per learner step   trajectories/   step_<k>.jsonl: what it said
evals.jsonl     one row per evaluation     summary.json    the run in numbers
model/          final weights, tokenizer   targets/        Prometheus file_sd targets
flow.json       who waits for whom now     stalls/         reports of launch.stall_seconds
stacks/         what the processes answer  ledger.sqlite   what became of every lease
keys/           of an encrypted run, for its owner only
and, of a Trainer: train_dataset.jsonl, eval_dataset.jsonl, reward_funcs.pkl
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

from pydantic import TypeAdapter

from asyncgrpo.config import Config, load_config
from asyncgrpo.errors import ConfigError

FLOW_FILE = "flow.json"  # buffer/server.py writes it, launch/stall.py reads it
STOP_SIGNAL = "ASYNCGRPO_STOP_SIGNAL"  # the launcher's; when it is not SIGTERM, that is nobody's


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Where the roles of one run find each other, and the cores they are pinned to."""

    buffer: str  # "tcp://127.0.0.1:PORT"
    weights: str
    store: tuple[str, int]
    rendezvous: int = 0  # port where torchrun's nodes meet
    cores: dict[str, tuple[int, ...]] = field(default_factory=dict)  # "actor-0" -> cores
    metrics: dict[str, int] = field(default_factory=dict)  # role -> port; 0 = any
    transport: str = "gloo"  # of the weights


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDir:
    """A run directory that the launcher has prepared."""

    path: Path
    config: Config
    endpoints: Endpoints

    @classmethod
    def read(cls, path: Path) -> RunDir:
        """Reads what `write` wrote; ConfigError when this is no run directory, or a broken one."""
        file = path / "endpoints.json"
        try:
            endpoints = TypeAdapter(Endpoints).validate_json(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(f"{path} is not a run directory: {file} is missing") from None
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).partition(" [type=")[0].split())  # pydantic's first
            raise ConfigError(
                f"{file} is not whole ({reason}): the run was killed while it started, or the file "
                "was changed; put it back, or name another run directory"
            ) from None
        return cls(path=path, config=load_config(path / "config.json"), endpoints=endpoints)

    def write(self) -> None:
        """Writes config.json and endpoints.json."""
        config = self.config.model_dump(mode="json")
        (self.path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        endpoints = json.dumps(asdict(self.endpoints), indent=2)
        (self.path / "endpoints.json").write_text(endpoints, encoding="utf-8")

    @property
    def model_path(self) -> Path:
        """Where the trained model is saved."""
        return self.path / "model"


def is_done(run_dir: Path) -> bool:
    """Whether the learner has come to the end of the run: its last file is there."""
    return (run_dir / "summary.json").exists()


def stop_flag(unwatched: Path | None = None, linger_seconds: float = 0.0) -> Callable[[], bool]:
    """A flag that the launcher's signal sets, or Ctrl-C; loops look at it between two turns.

    unwatched: directory of a run without a launcher, whose end sets the flag too, after a while.
    """
    asked: list[int] = []
    seen: list[float] = []  # when the run was found to be over

    def is_over() -> bool:
        if unwatched and not seen and is_done(unwatched):
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= linger_seconds

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: asked.append(number))
    if int(os.environ.get(STOP_SIGNAL, signal.SIGTERM)) != signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return lambda: bool(asked) or is_over()


def leave(exit_code: int) -> NoReturn:
    """Ends a role's process at once, without taking its objects apart.

    A regular exit of vLLM takes seconds, and the destructor of a gloo process group can wait
    forever for the interpreter lock that its own caller holds (seen in torch 2.13).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
