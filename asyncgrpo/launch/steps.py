"""Roles as steps of the Slurm job that this process runs in, and what it asks of Slurm."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from signal import Signals

from asyncgrpo.config import Config
from asyncgrpo.errors import EXIT_ROLE_FAILED, ConfigError, RoleFailed
from asyncgrpo.launch.child import Child
from asyncgrpo.launch.nodes import Node, parse_job
from asyncgrpo.launch.plan import ProcessSpec

ANSWER_SECONDS = 60.0


class Job:
    """The job of this process. RoleFailed when Slurm does not answer or refuses."""

    def __init__(self, config: Config, environment: Mapping[str, str] = os.environ) -> None:
        if "SLURM_JOB_ID" not in environment:
            raise ConfigError(
                "SLURM_JOB_ID is not set, so this is no job of Slurm; start it with `asyncgrpo "
                "slurm submit`, or within salloc"
            )
        self._config, self.id = config, environment["SLURM_JOB_ID"]
        self.attempt = f"{self.id}.{environment.get('SLURM_RESTART_COUNT', '0')}"
        if task := environment.get("SLURM_ARRAY_TASK_ID"):  # the first one's id stands for them all
            self.id = f"{environment['SLURM_ARRAY_JOB_ID']}_{task}"

    def nodes(self) -> tuple[Node, ...]:
        """Those that the job has now, that of its batch script first."""
        job = self._describe()
        names = ",".join(re.findall(r"(?<!\S)NodeList=(\S+)", job))
        return parse_job(self._config, job, ask("scontrol", "-o", "show", "node", names))

    def is_preempted(self) -> bool:
        """Whether Slurm lets the job go on for its grace time only."""
        return bool(re.search(r"PreemptTime=\d", self._describe()))

    def signal(self, step: str, number: Signals) -> None:
        """Signals every process of the job's own steps of that name, if it can."""
        with suppress(RoleFailed):  # the caller sees whether they end; 22.05 fails after success
            ids = self.id
            if "_" not in ids:  # an array's task is one job, others may have several components
                ids = ",".join(re.findall(r"(?<!\S)JobId=(\d+)", self._describe()))
            steps = ask("squeue", "--steps", "--noheader", f"--jobs={ids}", "--format=%i %j")
            for step_id, _, found in (line.partition(" ") for line in steps.splitlines()):
                if found == step:
                    ask("scancel", f"--signal={int(number)}", step_id)

    def _describe(self) -> str:
        return ask("scontrol", "-o", "-d", "show", "job", self.id)


class StepChild(Child):
    """A role as an srun here, whose tasks are on the nodes; signals go to these through Slurm."""

    def __init__(
        self,
        spec: ProcessSpec,
        run_id: str,
        stop_signal: Signals,
        job: Job,
        place: Callable[[str], ProcessSpec],
    ) -> None:
        """place: where a role of that name starts again, on the nodes that are left."""
        super().__init__(spec, run_id, stop_signal)
        self._job, self._place = job, place

    def start(self) -> None:
        """As Child's. ConfigError when a restart finds no place."""
        if self.restarts:
            self.spec = self._place(self.spec.name)
        super().start()

    def poll(self) -> int | None:
        """As Child's. srun ends with 0 when a node is lost, which is no good end."""
        if self.exit_code is None and super().poll() == 0 and self._has_lost_nodes():
            self.exit_code = EXIT_ROLE_FAILED
        return self.exit_code

    def terminate(self) -> None:
        if self.running:
            self._job.signal(self.spec.name, self._stop_signal)

    def kill(self) -> None:
        if self.running:
            self._job.signal(self.spec.name, Signals.SIGKILL)
        super().kill()

    def _has_lost_nodes(self) -> bool:
        with suppress(RoleFailed):
            return not set(self.spec.nodes) <= {node.name for node in self._job.nodes()}
        return False


def ask(*command: str) -> str:
    """What a command of Slurm prints. RoleFailed when it fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RoleFailed(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise RoleFailed(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
