"""A Slurm of our own on this machine: Debian's packages, several slurmd, all in one folder."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from asyncgrpo.launch.preflight import hold_port, port_of
from asyncgrpo.wire.address import own_address

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "srun")
SECONDS = 120.0
CONF = """
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/sock/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=900
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=60
SlurmdTimeout=300
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=9 PreemptMode=off
"""


def missing() -> str:
    """Why no cluster can be started here; "" when one can."""
    absent = [program for program in PROGRAMS if not _which(program)]
    if absent:
        return f"{absent[0]} is not installed (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "only root can start a Slurm cluster"


class Cluster:
    """Nodes n0, n1 .. that are all this machine; each has CPUs and two GPUs that are none."""

    def __init__(self, nodes: int = 2, cpus: int = 4) -> None:
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short, and open to munge's eyes
        self.folder, self.nodes = folder, [f"n{i}" for i in range(nodes)]
        for name in ("munge", "state", "log", "sock", *(f"spool/{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        (folder / "munge").chmod(0o700)
        for place in (folder, folder / "sock"):
            place.chmod(0o755)
        key = folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        self._held = [hold_port() for _ in range(nodes + 1)]
        ports = [port_of(held) for held in self._held]
        self.address = outer_address()
        host = socket.gethostname().partition(".")[0]
        lines = [CONF.format(host=host, port=ports[0], folder=folder)]
        gpus = []
        for node, port in zip(self.nodes, ports[1:], strict=True):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr={self.address} Port={port} "
                f"CPUs={cpus} "
                "RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
            )
            gpus.append(f"NodeName={node} Name=gpu File=/dev/tty[0-1]")
        self.conf = folder / "slurm.conf"
        self.conf.write_text("\n".join(lines) + "\n")
        (folder / "gres.conf").write_text("\n".join(gpus) + "\n")
        checkout = str(Path(__file__).parent.parent.parent)
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf), "PYTHONPATH": checkout}
        self._start()

    def _start(self) -> None:
        munge = self.folder / "munge"
        self.call(
            *("munged", f"--key-file={munge / 'key'}", f"--pid-file={munge / 'pid'}"),
            *(f"--socket={self.folder}/sock/munge.socket", f"--log-file={munge / 'log'}"),
            *(f"--seed-file={munge / 'seed'}", "--num-threads=2"),
        )
        self.call("slurmctld", "-f", str(self.conf))
        for node in self.nodes:
            self.start_node(node)
        self.until(lambda: self.states() == {node: "idle" for node in self.nodes}, "nodes idle")

    def start_dead_nodes(self) -> None:
        for node in self.nodes:
            if not is_alive(int((self.folder / f"slurmd-{node}.pid").read_text())):
                self.start_node(node)

    def start_node(self, node: str) -> None:
        self.call("slurmd", "-N", node, "-f", str(self.conf))

    def kill_node(self, node: str) -> None:
        """As a crash of its slurmd: what runs there goes on, unknown to Slurm, which is told so."""
        os.kill(int((self.folder / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
        down = (f"nodename={node}", "state=down", "reason=crashed")  # else it takes SlurmdTimeout
        self.call("scontrol", "update", *down)

    def stop(self) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True)
        with contextlib.suppress(AssertionError):
            self.until(lambda: not self.call("squeue", "--noheader"), "jobs ended")
        names = ("slurmd-*.pid", "slurmctld.pid", "munge/pid")
        pids = [int(f.read_text()) for name in names for f in self.folder.glob(name)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self.until(lambda: not any(map(is_alive, pids)), "daemons ended")
        shutil.rmtree(self.folder)
        for held in self._held:
            held.close()

    def call(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [_which(command[0]) or command[0], *command[1:]],
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=SECONDS * 2,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        lines = self.call("sinfo", "--noheader", "-N", "-p", "main", "-o", "%N %t").splitlines()
        return dict(line.split() for line in lines)

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, NodeList, Restarts ..."""
        text = self.call("scontrol", "-o", "show", "job", job)
        return dict(re.findall(r"(?<!\S)(\w+)=(\S*)", text.splitlines()[0]))

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def steps(self, job: str) -> dict[str, str]:
        """Name -> id of the steps that run."""
        text = self.call("squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%j %i")
        return dict(line.split() for line in text.splitlines())

    def until(self, done: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
            time.sleep(0.1)

    def start_now(self, job: str) -> None:
        """A requeued job waits for two minutes, unless it is told otherwise."""

        self.until(lambda: self.state(job) == "PENDING", "requeued")
        self.until(lambda: "idle" in self.states().values(), "nodes idle")
        time.sleep(2)  # Slurm sets the waiting time when it has cleaned up
        for part in self._parts(job):
            self.call("scontrol", "update", f"jobid={part}", "starttime=now")
        self.until(lambda: self.state(job) == "RUNNING", "started again")

    def limit_time(self, job: str, minutes: int) -> None:
        """Sets how long the job may run, from its start, in all its parts."""
        for part in self._parts(job):
            self.call("scontrol", "update", f"jobid={part}", f"timelimit={minutes}")

    def seconds(self, job: str) -> int:
        """How long it has run."""
        *days, clock = self.job(job)["RunTime"].split("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        return ((sum(map(int, days)) * 24 + hours) * 60 + minutes) * 60 + seconds

    def _parts(self, job: str) -> list[str]:
        text = self.call("scontrol", "-o", "show", "job", job)
        return re.findall(r"(?<!\S)JobId=(\d+)", text)


def outer_address() -> str:
    """This machine's address in its network; loopback when it is in none."""
    try:
        return own_address("192.0.2.1", 9)
    except OSError:
        return "127.0.0.1"


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _which(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
