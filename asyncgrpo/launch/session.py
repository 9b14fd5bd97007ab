"""`asyncgrpo launch`: checks everything, makes what is missing, runs, and shows the end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from rich.console import Console

from asyncgrpo.algo import notices
from asyncgrpo.config import Config
from asyncgrpo.data.prompts import open_prompts
from asyncgrpo.errors import DataError, ModelError
from asyncgrpo.launch.child import with_prelude
from asyncgrpo.launch.environment import detect_host, environment_report
from asyncgrpo.launch.local import Supervisor
from asyncgrpo.launch.model_folder import EMBEDDED, check_model_folder
from asyncgrpo.launch.plan import Plan, make_plan, render_plan
from asyncgrpo.launch.preflight import check_run_dir, choose_ports, prepare_run_dir
from asyncgrpo.observe.progress import Progress, show_summary
from asyncgrpo.rewards.registry import load_rewards
from asyncgrpo.rundir import RunDir
from asyncgrpo.wire.keys import make_keys


class Session:
    """One call of the launcher."""

    def __init__(self, config: Config, console: Console | None = None) -> None:
        self._config = config
        self._console = console or Console(highlight=False, soft_wrap=True)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.run_dir = Path(config.run.dir or f"runs/{stamp}-{config.run.name}").absolute()

    def show_plan(self) -> None:
        """Prints what would be started (`--dry-run`)."""
        self._check()
        self._console.print(render_plan(self._plan(self._config)), markup=False)

    def run(self) -> int:
        """Runs to the end; returns the exit code."""
        self._check()
        config = self._with_model()
        plan = self._plan(config)
        run = self._prepare(config, plan)
        if config.launch.encrypted:
            make_keys(self.run_dir)
        for warning in (*plan.warnings, *notices(config.algo)):
            self._console.print(f"warning: {warning}", style="yellow", markup=False)
        with Progress(self.run_dir, run.config.run.max_steps, self._console) as progress:
            supervisor = Supervisor(
                plan,
                self.run_dir,
                grace_seconds=run.config.launch.grace_seconds,
                max_actor_restarts=run.config.launch.max_actor_restarts,
                on_line=progress.line,
                on_tick=progress.tick,
            )
            code = supervisor.run()
            progress.tick()
        if code == 0:
            show_summary(self.run_dir, self._console)
        return code

    def run_serially(self) -> int:
        """All roles in this process (`--serial`)."""
        changes = {"actors": 1, "learners": 1}
        launch = self._config.launch.model_copy(update=changes)
        self._config = self._config.model_copy(update={"launch": launch})
        self._check()
        config = self._with_model()
        run = self._prepare(config, self._plan(config))
        self._console.print("serial: one actor with the toy engine, one learner, no sockets")
        from asyncgrpo.serial import run_serial  # torch

        run_serial(run)
        show_summary(self.run_dir, self._console)
        return 0

    def _check(self) -> None:
        """Refuses what cannot work. Starts nothing, writes nothing."""
        config = self._config
        check_run_dir(self.run_dir)
        prompts = open_prompts(config)
        if prompts.get(0) is None:
            raise DataError(f"data.train={config.data.train!r} holds no prompt")
        load_rewards(config.reward).check(prompts.survey())
        check_model_folder(config.model.path)
        if config.algo.kl_coef and config.algo.reference.path:
            check_model_folder(config.algo.reference.path)
        if config.algo.custom:
            from asyncgrpo.learner.objective import probe  # torch

            probe(config.algo)
        self._plan(config)

    def _plan(self, config: Config) -> Plan:
        """Chosen late, so that nobody takes a free port meanwhile."""
        return make_plan(
            config,
            detect_host(),
            choose_ports(config),
            self.run_dir,
            sys.executable,
            model_is_local=Path(config.model.path).is_dir(),
        )

    def _with_model(self) -> Config:
        """The settings with the model's folder; makes the embedded model if it is that one."""
        model = self._config.model
        if model.path != EMBEDDED:
            return self._config
        model = model.model_copy(update={"path": self._make_tiny()})
        return self._config.model_copy(update={"model": model})

    def _prepare(self, config: Config, plan: Plan) -> RunDir:
        """Writes the run directory."""
        prepare_run_dir(self.run_dir)
        run = RunDir(path=self.run_dir, config=config, endpoints=plan.endpoints)
        run.write()
        report = json.dumps(environment_report(config), indent=2)
        (self.run_dir / "env.json").write_text(report, encoding="utf-8")
        self._console.print(f"run directory {self.run_dir}", markup=False)
        return run

    def _make_tiny(self) -> str:
        """The embedded model's folder; made in a process of its own, for it needs torch."""
        settings = self._config.data.tasks.model_dump_json()
        command = [sys.executable, "-m", "asyncgrpo.data.tiny", "--tasks", settings]
        command += ["--seed", str(self._config.model.tiny_seed)]
        command += ["--num-eval", str(self._config.eval.num_prompts)]
        lines: deque[str] = deque(maxlen=15)
        with subprocess.Popen(
            with_prelude(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None, "stdout is piped"
            for line in process.stdout:
                lines.append(line.rstrip())
                self._console.print(f"[tiny model] {lines[-1]}", markup=False)
        if process.returncode != 0 or not lines:
            raise ModelError("the embedded model could not be made:\n  " + "\n  ".join(lines))
        return lines[-1]
