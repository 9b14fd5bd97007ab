"""A run inside a Slurm job: its roles are steps on the job's nodes, this process watches them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from signal import Signals

from asyncgrpo.config import Config, from_mapping
from asyncgrpo.errors import EXIT_INTERRUPTED, EXIT_ROLE_FAILED, ConfigError, RoleFailed
from asyncgrpo.launch.child import Child
from asyncgrpo.launch.nodes import Node, find_seat, find_seats, parse_job
from asyncgrpo.launch.plan import LOOPBACK, Host, ProcessSpec
from asyncgrpo.launch.preflight import hold_port, port_of
from asyncgrpo.launch.session import Session
from asyncgrpo.learner.saved import FOLDER, saved
from asyncgrpo.rundir import is_done
from asyncgrpo.wire.address import own_address

ANSWER_SECONDS = 60.0
Place = Callable[[str], ProcessSpec]


class Job:
    """The job of this process. RoleFailed when Slurm does not answer or refuses."""

    def __init__(self, config: Config, environment: Mapping[str, str] = os.environ) -> None:
        if "SLURM_JOB_ID" not in environment:
            raise ConfigError("SLURM_JOB_ID is not set; start it by `asyncgrpo slurm submit`")
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
        self, spec: ProcessSpec, run_id: str, stop: Signals, job: Job, place: Place
    ) -> None:
        """place: where a role of that name starts again, on the nodes that are left."""
        super().__init__(spec, run_id, stop)
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


class SlurmSession(Session):
    """A session whose learner and actors are steps; it requeues the job when its time is up."""

    def __init__(self, config: Config, job: Job, *, resume: bool) -> None:
        if config.launch.share_gpus:
            raise ConfigError(
                "launch.share_gpus=true: Slurm gives each role a GPU of its own; leave it out"
            )
        self._job, self._nodes = job, job.nodes()
        others = [node.address for node in self._nodes[1:]]
        host = own_address(others[0], 1) if others else LOOPBACK  # as the others see it
        rooms = config.model_dump(mode="json", exclude_unset=True)
        config = from_mapping({**rooms, "launch": {**rooms.get("launch", {}), "host": host}})
        super().__init__(config, resume=resume, seats=find_seats(config, self._nodes))
        self._meeting = hold_port()  # of the learner's nodes, in its later lives
        self._log_dir = self.run_dir / "logs" / job.attempt

    def run(self) -> int:
        """As Session's. A job that must go before the run is done is put back into the queue."""
        before = self._newest()
        try:
            code = super().run()
        except (RoleFailed, ConfigError) as error:
            if set(self._nodes) == set(self._job.nodes()) and not self._job.is_preempted():
                raise
            self._console.print(f"error: {error}", markup=False)
            return self._requeue()
        if self.stopped_by is None:
            return code
        time_is_up = self.stopped_by == Signals.SIGUSR2
        if time_is_up and self._newest() == before:
            raise RoleFailed(
                "the job's time was up before a step was saved, so it is not requeued: it would "
                "go on like that for ever; give it more --time"
            )
        must_go = time_is_up or self._job.is_preempted()
        is_over = is_done(self.run_dir)  # by chance, meanwhile
        return self._requeue() if must_go and not is_over else code

    def _requeue(self) -> int:
        self._console.print("requeued; the next attempt goes on with the newest checkpoint")
        ask("scontrol", "requeue", self._job.id)  # which ends this process, too
        return EXIT_INTERRUPTED

    def _newest(self) -> list[Path]:
        return saved(self.run_dir / FOLDER)[-1:]

    def _new_child(self, spec: ProcessSpec, run_id: str) -> Child:
        # Of a job that must go Slurm sends every process a SIGTERM; the learner must be the first.
        stop_signal = Signals.SIGTERM if spec.role == "learner" else Signals.SIGUSR2
        if spec.nodes:
            return StepChild(spec, run_id, stop_signal, self._job, self._place)
        return Child(spec, run_id, stop_signal)

    def _place(self, name: str) -> ProcessSpec:
        nodes, others = self._job.nodes(), dict(self._seats or {})
        if not set(others.pop(name).nodes) <= set(nodes):
            self._seats = {**others, name: find_seat(self._config, name, nodes, others)}
        assert self._doors is not None, "it is prepared"
        doors = self._doors
        if name == "learner":  # not where it met before: what is left on a lost node may go there
            former, self._meeting = self._meeting, hold_port()
            former.close()
            doors = replace(doors, rendezvous=port_of(self._meeting))
        plan = self._plan(Host(cores=()), doors)
        return next(spec for spec in plan.specs if spec.name == name)


def ask(*command: str) -> str:
    """What a command of Slurm prints. RoleFailed when it fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RoleFailed(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise RoleFailed(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
