"""A run inside a Slurm job: its roles are steps on the job's nodes, this process watches them."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

from asyncgrpo.config import Config, from_mapping
from asyncgrpo.errors import EXIT_INTERRUPTED, ConfigError, RoleFailed
from asyncgrpo.launch.child import Child
from asyncgrpo.launch.nodes import find_seat, find_seats
from asyncgrpo.launch.plan import LOOPBACK, Host, ProcessSpec
from asyncgrpo.launch.preflight import choose_ports, pick_free_ports
from asyncgrpo.launch.session import Session
from asyncgrpo.launch.steps import Job, StepChild, ask
from asyncgrpo.learner.saved import FOLDER, saved
from asyncgrpo.wire.address import own_address


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
        self._ports = choose_ports(config)
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
        time_is_up = self.stopped_by == signal.SIGUSR2
        if time_is_up and self._newest() == before:
            raise RoleFailed(
                "the job's time was up before a step was saved, so it is not requeued: it would "
                "go on like that for ever; give it more --time"
            )
        is_done = (self.run_dir / "summary.json").exists()  # by chance, meanwhile
        must_go = time_is_up or self._job.is_preempted()
        return self._requeue() if must_go and not is_done else code

    def _requeue(self) -> int:
        self._console.print("requeued; the next attempt goes on with the newest checkpoint")
        ask("scontrol", "requeue", self._job.id)  # which ends this process, too
        return EXIT_INTERRUPTED

    def _newest(self) -> list[Path]:
        return saved(self.run_dir / FOLDER)[-1:]

    def _new_child(self, spec: ProcessSpec, run_id: str) -> Child:
        # Of a job that must go Slurm sends every process a SIGTERM; the learner must be the first.
        stop_signal = signal.SIGTERM if spec.role == "learner" else signal.SIGUSR2
        if spec.nodes:
            return StepChild(spec, run_id, stop_signal, self._job, self._place)
        return Child(spec, run_id, stop_signal)

    def _place(self, name: str) -> ProcessSpec:
        nodes, others = self._job.nodes(), dict(self._seats or {})
        if not set(others.pop(name).nodes) <= set(nodes):
            self._seats = {**others, name: find_seat(self._config, name, nodes, others)}
        free = pick_free_ports(1, host=self._config.launch.host)[0]  # the old one may be taken
        self._ports = replace(self._ports or choose_ports(self._config), rendezvous=free)
        plan = self._plan(self._config, Host(cores=()))
        return next(spec for spec in plan.specs if spec.name == name)
