"""One process of a run with all that it started: begins it, notices its end, leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from asyncgrpo.errors import RoleFailed
from asyncgrpo.imports import PATH
from asyncgrpo.launch.error_file import ERROR_FILE, RecordedError, read_error
from asyncgrpo.launch.lifeline import KILL_SECONDS, ROLE, RUN_ID, find_run_processes, send
from asyncgrpo.launch.logs import LogTail
from asyncgrpo.launch.plan import ProcessSpec
from asyncgrpo.rundir import STOP_SIGNAL

RESTART = "ASYNCGRPO_RESTART"
PRELUDE = Path(__file__).with_name("prelude.py")


def with_prelude(argv: Sequence[str]) -> list[str]:
    """A command line that the kernel ends together with this process."""
    return [sys.executable, "-I", "-S", str(PRELUDE), str(os.getpid()), *argv]


class Child:
    """A process leads a group of its own: Ctrl-C reaches the launcher only, which decides."""

    def __init__(
        self, spec: ProcessSpec, run_id: str, stop_signal: signal.Signals = signal.SIGTERM
    ) -> None:
        """stop_signal: what asks the role to end; any other than SIGTERM makes it ignore that."""
        self.spec, self._stop_signal = spec, stop_signal
        self.tail = LogTail(spec.log_file)
        self.restarts = 0
        self.exit_code: int | None = None
        self._run_id = run_id
        self._error_file = spec.log_file.with_suffix(".error.json")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Started and not yet seen to end (`poll` looks)."""
        return self._process is not None and self.exit_code is None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Starts the process; its output is appended to its log file. RoleFailed: cannot fork."""
        self._error_file.unlink(missing_ok=True)
        self.exit_code, self._process = None, None
        try:
            with self.spec.log_file.open("ab") as log:
                self._process = subprocess.Popen(
                    with_prelude(self.spec.argv),
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
        except OSError as error:
            raise RoleFailed(f"{self.spec.name} could not be started: {error}") from error

    def poll(self) -> int | None:
        """The exit code once the process has ended; then also ends everything it left behind."""
        if self._process is None or self.exit_code is not None:
            return self.exit_code
        # Looked at without reaping: until then nobody else can get its id, nor its group's.
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        self._kill_group()
        self.exit_code = self._process.wait()
        kill_strays(self._run_id, self.spec.name)
        return self.exit_code

    def terminate(self) -> None:
        """Asks the process, and only it, to end: it knows best how to end its own children."""
        if self._process is not None and self.running:
            self._process.send_signal(self._stop_signal)

    def kill(self) -> None:
        """Ends the process and all that it started, these first: torchrun cannot do it then."""
        if self._process is None or not self.running:
            return
        kill_strays(self._run_id, self.spec.name, besides=self.pid)
        self._kill_group()
        self.exit_code = self._process.wait()
        kill_strays(self._run_id, self.spec.name)

    def recorded_error(self) -> RecordedError | None:
        """Why it ended, in its own words, if it had time for them."""
        return read_error(self._error_file)

    def _kill_group(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            **self.spec.environment,
            RUN_ID: self._run_id,
            ROLE: self.spec.name,
            RESTART: str(self.restarts),
            STOP_SIGNAL: str(int(self._stop_signal)),
            ERROR_FILE: str(self._error_file),
            PATH: os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        }


def kill_strays(run_id: str, role: str = "", besides: int = 0) -> list[int]:
    """Kills what carries the run id (of one role, or all), waits until it is gone, returns it.

    The launcher adopts orphans of its children (PR_SET_CHILD_SUBREAPER) and so reaps them here.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + KILL_SECONDS
    while left := set(find_run_processes(run_id, role)) - {besides}:
        if time.monotonic() > deadline:
            raise RoleFailed(f"processes {sorted(left)} survive SIGKILL; end them by hand")
        send(left, signal.SIGKILL)
        killed |= left
        time.sleep(0.005)
    for pid in killed:
        _reap(pid)
    return sorted(killed)


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return  # somebody else's child, who reaps it
