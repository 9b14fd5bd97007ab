"""The Python face of `asyncgrpo launch`: reward functions and data sets as objects."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncgrpo.config import Config, from_mapping, load_config
from asyncgrpo.data.files import as_jsonl
from asyncgrpo.errors import EXIT_INTERRUPTED, ConfigError
from asyncgrpo.imports import PACKED, importable_name, own_name, pack, shown
from asyncgrpo.launch.local import check_main_thread
from asyncgrpo.launch.preflight import check_run_dir
from asyncgrpo.launch.session import Session, new_run_dir
from asyncgrpo.rows import whole_rows

Reward = Callable[..., Any] | str | Mapping[str, Any]
Dataset = str | Path | Iterable[Mapping[str, Any]]
_busy = threading.Lock()  # held while this process trains


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a finished run left."""

    run_dir: Path
    model_path: Path  # loads with AutoModelForCausalLM.from_pretrained
    summary: Mapping[str, Any]  # summary.json: evaluations, steps, seconds, tokens, leases

    @property
    def accuracies(self) -> tuple[float, float] | None:
        """Held-out accuracy before and after training; None without held-out prompts."""
        before, after = self.summary["before"], self.summary["after"]
        return (before["accuracy"], after["accuracy"]) if before and after else None

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The rows of metrics.jsonl, in their order."""
        return iter(whole_rows(self.run_dir / "metrics.jsonl"))


class Trainer:
    """One run: settings, reward functions and data sets. `config` is what it comes to.

    config: Config, nested dict, or path of a TOML file; None: the defaults (the tiny demo).
    reward_funcs: in place of reward.functions. Functions (also of a script or notebook, lambdas,
        partials, bound methods), names as in `use`, or tables such as {"use": f, "weight": 0.5}.
        Other processes call copies of them.
    train_dataset, eval_dataset: in place of data.train and data.eval: dicts, a datasets.Dataset or
        a path. With a train_dataset alone nothing is evaluated, unless the config sets data.eval.

    Raises BadInput (ConfigError, RewardError, DataError) for what cannot become a run.
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any] | str | Path | None = None,
        *,
        reward_funcs: Iterable[Reward] | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        run_dir: str | Path | None = None,
        actors: int | None = None,
        learners: int | None = None,
    ) -> None:
        if isinstance(config, Mapping):
            config = from_mapping(config)
        if not isinstance(config, Config | str | Path | None):
            raise ConfigError(
                f"config={shown(config)} must be a Config, a dict of dicts, or the path of a file"
            )
        base = config if isinstance(config, Config) else load_config(config)
        self.run_dir = Path(run_dir).absolute() if run_dir else new_run_dir(base)
        self._files: dict[Path, bytes] = {}  # that the run directory is given
        changes = {
            "run.dir": str(self.run_dir),
            "launch.actors": actors,
            "launch.learners": learners,
            "data.train": self._data("train_dataset", train_dataset),
            "data.eval": self._data("eval_dataset", eval_dataset),
            "reward.functions": None if reward_funcs is None else self._rewards(reward_funcs),
        }
        raw: dict[str, Any] = base.model_dump(exclude_unset=True)
        if train_dataset is not None and "eval" not in base.data.model_fields_set:
            raw.setdefault("data", {})["eval"] = None
        for setting, value in changes.items():
            room, _, key = setting.partition(".")
            if value is not None:
                raw.setdefault(room, {})[key] = value
        self.config = from_mapping(raw)

    def fit(self, *, serial: bool = False) -> TrainResult:
        """Trains to the end, as `launch` (or `launch --serial`) does; once.

        Raises the error that the command would print; after Ctrl-C or SIGTERM KeyboardInterrupt,
        when all processes have ended. In another thread than the main one only serial runs start.
        """
        if not serial:
            check_main_thread()
        check_run_dir(self.run_dir)
        if not _busy.acquire(blocking=False):
            raise ConfigError(
                "fit() is called while this process trains already; when a module with a reward "
                "calls it on import, put that call under if __name__ == '__main__'"
            )
        is_new = not os.path.exists(self.run_dir)
        try:
            self._write_files()
            session = Session(self.config)
            code = session.run_serially() if serial else session.run()
        finally:
            _busy.release()
            if is_new and not os.path.exists(self.run_dir / "config.json"):  # it was refused
                shutil.rmtree(self.run_dir, ignore_errors=True)
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        summary = json.loads((self.run_dir / "summary.json").read_text(encoding="utf-8"))
        return TrainResult(run_dir=self.run_dir, model_path=self.run_dir / "model", summary=summary)

    def _write_files(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for file, content in self._files.items():
            file.write_bytes(content)

    def _data(self, name: str, dataset: Dataset | None) -> str | None:
        """What data.train or data.eval is set to; rows in memory become a file of the run."""
        if dataset is None or isinstance(dataset, str | Path):
            return None if dataset is None else str(dataset)
        file = self.run_dir / f"{name}.jsonl"
        self._files[file] = as_jsonl(dataset, name).encode()
        return str(file)

    def _rewards(self, rewards: Iterable[Reward]) -> list[dict[str, Any]]:
        """What reward.functions is set to; functions without a name become a file of the run."""
        file = self.run_dir / f"reward_funcs{PACKED}"
        packed: dict[str, Callable[..., Any]] = {}
        tables = []
        is_one = callable(rewards) or isinstance(rewards, str | Mapping)
        for reward in [rewards] if is_one else rewards:
            table: dict[str, Any] = dict(reward) if isinstance(reward, Mapping) else {"use": reward}
            if callable(function := table.get("use")):
                table["use"] = importable_name(function)
                if table["use"] is None:
                    table["name"] = table.get("name") or own_name(function)
                    name = re.sub(r"\W", "_", str(table["name"]))
                    while name in packed:
                        name += "_"
                    table["use"], packed[name] = f"{file}:{name}", function
            tables.append(table)
        if packed:
            self._files[file] = pack(packed)
        return tables
