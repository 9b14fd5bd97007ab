"""Kills and stops the processes of a real run every few seconds, and counts what it cost.

    python benchmarks/chaos.py [--minutes 5] [--seed 0] [--run-dir D]

The tiny model with real engines: two actors, two learner ranks, a buffer, a launcher. Faults are
drawn by the seed: kill -9 of an actor, a learner rank, the buffer or the launcher (which is then
started again with --resume auto), SIGSTOP of an actor for some seconds. When the time is up, there
were 15 faults and each kind came (or a quarter of an hour more is over), the run is asked to stop
(SIGTERM), goes on for a few steps without faults and ends by itself.
Recovery is the time from a fault until the next step is trained. Prints the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil
from common import CONFIG, launch_command

FAULTS = {  # how often each is drawn
    "kill actor": 8,
    "stop actor": 4,
    "kill learner rank": 2,
    "kill buffer": 2,
    "kill launcher": 1,
}
SETTINGS = {
    "checkpoint.every": 5,
    "learner.lr": 1e-4,  # the tiny model has learned all after some 60 steps at the usual rate
    "eval.every": 0,
    "launch.max_restarts": 50,
    "launch.restart_window_seconds": 20,  # the back-off begins anew
    "weights.ready_timeout_seconds": 3,
    "weights.loaded_timeout_seconds": 10,
    "buffer.lease_deadline_seconds": 30,
}
TORCHRUN = {"torch.distributed.run", "asyncgrpo.learner.torchrun"}  # its agent is no rank
PAUSE_SECONDS = (3.0, 8.0)  # between a recovery and the next fault
STOPPED_SECONDS = (1.0, 15.0)
PATIENCE_SECONDS = 240.0  # for one recovery
LEAST_FAULTS, LONGEST_SECONDS = 15, 900.0


class Chaos:
    """One run and what is done to it."""

    def __init__(self, run_dir: Path, seed: int) -> None:
        self.run_dir, self._chance = run_dir, random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.recoveries: list[float] = []
        self._log = (run_dir.parent / "chaos.log").open("w", encoding="utf-8")
        self._launcher = self._launch("--config", CONFIG, "--seed", seed, steps=100_000)

    def _launch(self, *arguments: object, steps: int) -> subprocess.Popen[bytes]:
        options = (*arguments, "--max-steps", steps)
        command = launch_command(self.run_dir, *options, settings=SETTINGS)
        return subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def steps(self) -> int:
        """Rows in metrics.jsonl; a learner that goes back takes some away."""
        try:
            return (self.run_dir / "metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def disturb(self, seconds: float) -> None:
        """Draws faults, each after the recovery from the last; at the end, of missing kinds."""
        self._await_rows()
        end, kinds = time.monotonic() + seconds, FAULTS
        hard_end = end + LONGEST_SECONDS
        while time.monotonic() < hard_end:
            if time.monotonic() >= end and self.faults.total() >= LEAST_FAULTS:
                kinds = {kind: FAULTS[kind] for kind in FAULTS if not self.faults[kind]}
                if not kinds:
                    break
            time.sleep(self._chance.uniform(*PAUSE_SECONDS))
            (fault,) = self._chance.choices(list(kinds), list(kinds.values()))
            start = time.monotonic()
            if self._inject(fault):
                self.faults[fault] += 1
                self._await_rows()
                self.recoveries.append(time.monotonic() - start)
                print(f"{fault}: {self.recoveries[-1]:.1f} s", file=sys.stderr, flush=True)

    def finish(self) -> int:
        """Stops the run as Slurm would, lets it make ten more steps, and returns its exit code."""
        self._launcher.send_signal(signal.SIGTERM)
        self._launcher.wait(PATIENCE_SECONDS)
        steps = max(int(p.name[5:]) for p in (self.run_dir / "checkpoints").glob("step_*")) + 10
        self._launcher = self._launch("--resume", "auto", steps=steps)
        return self._launcher.wait(PATIENCE_SECONDS)

    def _inject(self, fault: str) -> bool:
        action, _, role = fault.partition(" ")
        if role == "launcher":
            self._launcher.kill()
            self._launcher.wait()
            psutil.wait_procs([*self.processes()], timeout=30)
            self._launcher = self._launch("--resume", "auto", steps=100_000)
            return True
        wanted = ["role", role.partition(" ")[0]]
        found = [
            process
            for process, line in self.processes().items()
            if wanted in map(list, pairwise(line)) and not TORCHRUN & {*line}
        ]
        if not found:
            return False  # it is being restarted
        process = self._chance.choice(sorted(found, key=lambda p: p.pid))
        if action == "kill":
            process.kill()
            return True
        process.suspend()
        threading.Timer(self._chance.uniform(*STOPPED_SECONDS), self._resume, [process]).start()
        return True

    def _resume(self, process: psutil.Process) -> None:
        with suppress(psutil.Error):  # another fault killed it
            process.resume()

    def processes(self) -> dict[psutil.Process, list[str]]:
        """Those of the run with their command lines; not the launcher."""
        found = {}
        for process in psutil.process_iter():
            try:
                line = process.cmdline()
                ours = str(self.run_dir) in line and any(w.startswith("asyncgrpo.") for w in line)
                is_other = process.pid != self._launcher.pid
                if ours and is_other and process.status() != psutil.STATUS_ZOMBIE:
                    found[process] = line
            except psutil.Error:
                continue
        return found

    def _await_rows(self) -> None:
        """Until two more steps are trained than now: the first may have been on its way."""
        last, grown, end = self.steps(), 0, time.monotonic() + PATIENCE_SECONDS
        while grown < 2:
            if time.monotonic() > end or self._launcher.poll() is not None:
                raise RuntimeError(f"no recovery; see {self._log.name}")
            time.sleep(0.05)
            count = self.steps()
            grown += max(0, count - last)
            last = count


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs it; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path)
    arguments = parser.parse_args(argv)
    run_dir = arguments.run_dir or Path(tempfile.mkdtemp()) / "run"
    chaos = Chaos(run_dir, arguments.seed)
    chaos.disturb(60 * arguments.minutes)
    code = chaos.finish()
    time.sleep(1.0)
    command = [sys.executable, "-m", "asyncgrpo.cli", "audit", str(run_dir), "--json"]
    audit = subprocess.run(command, capture_output=True, text=True, check=False)
    wrong = json.loads(audit.stdout)["wrong"]
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    result = {
        "cores": os.cpu_count(),
        "seed": arguments.seed,
        "faults": dict(chaos.faults),
        "recovery_seconds_median": round(statistics.median(chaos.recoveries), 1),
        "recovery_seconds_worst": round(max(chaos.recoveries), 1),
        "steps": chaos.steps(),
        "accuracy_before": summary["before"]["accuracy"],
        "accuracy_after": summary["after"]["accuracy"],
        "exit_code": code,
        "audit_exit_code": audit.returncode,
        "groups_lost": len(wrong.get("nothing lost", [])),
        "groups_trained_twice": len(wrong.get("trained once", [])),
        "orphans": [*chaos.processes().values()],
    }
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
