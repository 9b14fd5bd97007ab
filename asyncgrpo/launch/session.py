"""`asyncgrpo launch`: checks everything, makes what is missing, runs, and shows the end."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

from rich.console import Console

from asyncgrpo.config import Config, from_mapping
from asyncgrpo.data.check import length_warning
from asyncgrpo.data.prompts import open_prompts
from asyncgrpo.data.templates import tokenise
from asyncgrpo.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    AbsentData,
    AbsentModel,
    BadInput,
    ConfigError,
    DataError,
    ModelError,
)
from asyncgrpo.hints import unusual
from asyncgrpo.launch.child import Child
from asyncgrpo.launch.environment import detect_host, environment_report
from asyncgrpo.launch.local import Supervisor
from asyncgrpo.launch.model_folder import (
    EMBEDDED,
    check_model_folder,
    check_same_model,
    check_tensor_parallel,
    quick_tokenizer,
)
from asyncgrpo.launch.nodes import Seat
from asyncgrpo.launch.plan import Host, Plan, ProcessSpec, make_plan, render_plan, render_sizes
from asyncgrpo.launch.preflight import (
    check_resumable,
    check_run_dir,
    held_endpoints,
    keep_settings,
    missing_extra,
    only_launcher,
    point_latest,
    prepare_run_dir,
)
from asyncgrpo.launch.stall import StallWatch
from asyncgrpo.observe.progress import Progress, show_summary
from asyncgrpo.observe.writers import check_writers
from asyncgrpo.rewards.registry import RewardSet, load_rewards
from asyncgrpo.rundir import Endpoints, RunDir
from asyncgrpo.settings.algo import notices
from asyncgrpo.wire.keys import make_keys

SERIAL = "serial: one actor with the toy engine, one learner, no sockets"
_promised: set[Path] = set()  # directories of this process, made or not


def new_run_dir(config: Config) -> Path:
    """Where a run that starts now is written: run.dir, or a new runs/<time>-<name>."""
    if config.run.dir:
        return Path(config.run.dir).absolute()
    first = path = Path(f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.run.name}").absolute()
    count = 1
    while path in _promised or os.path.exists(path):
        count += 1
        path = first.with_name(f"{first.name}-{count}")
    _promised.add(path)
    return path


class Session:
    """One call of the launcher."""

    _new_child: Callable[[ProcessSpec, str], Child] = staticmethod(Child)

    def __init__(
        self,
        config: Config,
        console: Console | None = None,
        *,
        resume: bool = False,
        seats: Mapping[str, Seat] | None = None,
    ) -> None:
        """resume: run.dir holds a run, go on with it. seats: as of make_plan."""
        self._config, self._resume, self._seats = config, resume, seats
        self._console = console or Console(highlight=False, soft_wrap=True)
        self.run_dir = new_run_dir(config)
        self.stopped_by: int | None = None  # the signal that ended the run
        self._log_dir = self.run_dir / "logs"
        self._doors: Endpoints | None = None  # once it is prepared
        self._warnings = [*notices(config.algo), *unusual(config)]

    def show_plan(self, serial: bool = False) -> None:
        """Prints what would be started (`--dry-run`), the sizes, and what could not be checked."""
        if serial:
            self._make_serial()
        absent: list[object] = [*self.check(download=False)]
        host, gpus = detect_host(), self._config.launch.gpus
        if gpus > len(host.gpu_ids):
            absent.append(f"launch.gpus={gpus}: this machine shows {len(host.gpu_ids)} GPUs")
            host = replace(host, gpu_ids=tuple(map(str, range(gpus))))
        with held_endpoints(self._config) as doors:
            plan = SERIAL if serial else render_plan(self._plan(host, doors))
        notes = [f"warning: {warning}" for warning in self._warnings]
        notes += [f"not checked: {line}" for line in absent]
        blocks = [plan, render_sizes(self._config), "\n".join(notes)]
        self._console.print("\n\n".join(filter(None, blocks)), markup=False)

    def run(self) -> int:
        """Runs to the end; returns the exit code."""
        settings = self._config.launch
        shown = Progress(self.run_dir, self._config.run.max_steps, self._console)
        with self.prepared() as (_, plan):
            self._log_dir.mkdir(parents=True, exist_ok=True)
            with shown.skip() if self._resume else shown as progress:
                supervisor = Supervisor(plan, settings, progress.line, self._new_child)
                stalls = StallWatch(self.run_dir, settings, supervisor.run_id, supervisor.say)

                def tick() -> None:
                    progress.tick()
                    stalls()

                code = supervisor.run(on_tick=tick)
                progress.tick()
            self._end_scraping()
        self.stopped_by = supervisor.stopped_by
        if code == EXIT_DONE:
            show_summary(self.run_dir, self._console)
        return code

    def run_serially(self, stopping: Callable[[], bool] = lambda: False) -> int:
        """All roles in this process (`--serial`); stopping: to end early, with a checkpoint."""
        self._make_serial()
        with self.prepared() as (run, _):
            self._console.print(SERIAL)
            from asyncgrpo.serial import run_serial  # torch

            is_done = run_serial(run, stopping=stopping)
            self._end_scraping()
        if is_done:
            show_summary(self.run_dir, self._console)
        return EXIT_DONE if is_done else EXIT_INTERRUPTED

    def _make_serial(self) -> None:
        """Settings of one process; ConfigError when they need more."""
        if self._config.actor.sleep:
            raise ConfigError("actor.sleep=true is not for --serial; leave one of the two out")
        rooms = self._config.model_dump(mode="json", exclude_unset=True)
        rooms["actor"] = {**rooms.get("actor", {}), "engine": "toy"}
        rooms["launch"] = {**rooms.get("launch", {}), "actors": 1, "learners": 1}
        self._config = from_mapping(rooms)

    def _end_scraping(self) -> None:
        """Takes the run off Prometheus: what is still a target and gone has failed."""
        for target in (self.run_dir / "targets").glob("*.json"):
            target.unlink()

    def check(self, *, download: bool = True) -> list[BadInput]:
        """Refuses what cannot work; returns what is only not on this machine: models, data, extras.

        Starts nothing, writes nothing. download: whether a hub model counts as here.
        """
        config = self._config
        check_writers(config)
        if self._resume:
            step = check_resumable(self.run_dir, config)
            self._console.print(f"going on with {self.run_dir} at step {step}", markup=False)
        else:
            check_run_dir(self.run_dir)
        rewards = {block: load_rewards(reward) for block, reward in config.rewards.items()}
        models = [config.model.path]
        if config.algo.kl_coef and config.algo.reference.path:
            models.append(config.algo.reference.path)
        checks: list[Callable[[], object]] = [
            *(partial(check_model_folder, model, download=download) for model in models),
            partial(check_tensor_parallel, config.model.path, config.actor.tensor_parallel),
            partial(self._check_prompts, rewards),
        ]
        if self._resume:
            checks.append(partial(check_same_model, self.run_dir, config.model.path))
        absent: list[BadInput] = []
        for check in checks:
            try:
                check()
            except (AbsentData, AbsentModel) as error:
                absent.append(error)
        if missing := missing_extra(config):
            absent.append(ConfigError(missing))
        if config.algo.custom:
            from asyncgrpo.learner.objective import probe  # torch

            probe(config.algo)
        if config.learner.lora is not None and config.learner.lora.targets != "all-linear":
            from asyncgrpo.launch.memory_report import check_targets  # torch

            check_targets(config.model.path, config.learner.lora.targets)
        return absent

    def _check_prompts(self, rewards: Mapping[str, RewardSet]) -> None:
        """Also warns of prompts that are too long, where the tokenizer is here."""
        data, prompts = self._config.data, open_prompts(self._config)
        if prompts.get(0) is None:
            raise DataError(f"data.train={data.train!r} holds no prompt")
        for block, its in rewards.items():
            its.check(prompts.survey(block))
        if (tokenizer := quick_tokenizer(self._config.model.path)) is None:
            return
        for block in ("", *(block.name for block in self._config.evals)):
            warning = length_warning(
                list(prompts.survey(block)),
                lambda prompt: len(tokenise(tokenizer, prompt.messages, data)),
                data,
                f"evaluation {block}" if block else "data.train",
            )
            self._warnings += [warning] if warning else []

    def _plan(self, host: Host, doors: Endpoints) -> Plan:
        seats, log_dir = self._seats, self._log_dir
        return make_plan(self._config, host, doors, self.run_dir, seats=seats, log_dir=log_dir)

    @contextmanager
    def prepared(self) -> Iterator[tuple[RunDir, Plan]]:
        """Checks everything, then writes the run directory and holds it, and its ports."""
        for absent in self.check():
            raise absent
        with held_endpoints(self._config) as self._doors:
            plan = self._plan(detect_host(), self._doors)  # before the embedded model is made
            config, model = self._config, self._config.model
            if model.path == EMBEDDED:
                model = model.model_copy(update={"path": self._make_tiny()})
                config = config.model_copy(update={"model": model})
            if not self._resume:
                prepare_run_dir(self.run_dir)
            with only_launcher(self.run_dir):
                run = RunDir(path=self.run_dir, config=config, endpoints=plan.endpoints)
                self._write(run)
                for warning in (*plan.warnings, *self._warnings):
                    self._console.print(f"warning: {warning}", style="yellow", markup=False)
                yield run, plan

    def _write(self, run: RunDir) -> None:
        """What a run directory holds from the start; tells where it is, and the sizes."""
        if self._resume:
            keep_settings(self.run_dir)
            self._end_scraping()  # of a life before that failed, maybe with more actors
            point_latest(self.run_dir)
        run.write()
        if run.config.launch.encrypted:
            make_keys(self.run_dir)
        report = json.dumps(environment_report(run.config), indent=2)
        (self.run_dir / "env.json").write_text(report, encoding="utf-8")
        self._console.print(f"run directory {self.run_dir}", markup=False)
        self._console.print(render_sizes(run.config), markup=False)

    def _make_tiny(self) -> str:
        """The embedded model's folder; made in a process of its own, for it needs torch."""
        settings = self._config.data.tasks.model_dump_json()
        command = [sys.executable, "-m", "asyncgrpo.data.tiny", "--tasks", settings]
        command += ["--seed", str(self._config.model.tiny_seed)]
        command += ["--num-eval", str(self._config.num_held_out_tasks)]
        lines: deque[str] = deque(maxlen=15)
        with Popen(command, stdout=PIPE, stderr=STDOUT, text=True) as process:
            assert process.stdout is not None, "stdout is piped"
            for line in process.stdout:  # when nobody reads it any more, it ends at its next line
                lines.append(line.rstrip())
                self._console.print(f"[tiny model] {lines[-1]}", markup=False)
        if process.returncode != 0 or not lines:
            raise ModelError("the embedded model could not be made:\n  " + "\n  ".join(lines))
        return lines[-1]
