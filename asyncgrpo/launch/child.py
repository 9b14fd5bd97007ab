"""One process of a run with all that it started: begins it, reads its log, leaves nothing."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from asyncgrpo.errors import RoleFailed
from asyncgrpo.imports import PATH
from asyncgrpo.launch.ends import ERROR_FILE, as_shown
from asyncgrpo.launch.lifeline import ROLE, RUN_ID, kill_processes
from asyncgrpo.launch.plan import ProcessSpec
from asyncgrpo.rundir import STOP_SIGNAL

RESTART = "ASYNCGRPO_RESTART"
READ_BYTES = 1 << 20  # per call: a role that floods its log must not stop the others


class LogTail:
    """Hands out what was appended to a file since the last call, in whole lines."""

    def __init__(self, path: Path) -> None:
        """What the file holds already, of a run that goes on, is not handed out."""
        self._path, self._rest = path, b""
        self._position = path.stat().st_size if path.exists() else 0

    def new_lines(self, *, at_end: bool = False) -> list[str]:
        """New whole lines; with `at_end` everything, an unfinished last line included."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                read = file.read() if at_end else file.read(READ_BYTES)
        except FileNotFoundError:
            return []
        self._position += len(read)
        *lines, self._rest = (self._rest + read).split(b"\n")
        if at_end and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        return [as_shown(line) for line in lines]


class Child:
    """A process leads a group of its own: Ctrl-C reaches the launcher only, which decides."""

    def __init__(
        self, spec: ProcessSpec, run_id: str, stop_signal: signal.Signals = signal.SIGTERM
    ) -> None:
        """stop_signal: what asks the role to end; any other than SIGTERM makes it ignore that."""
        self.spec, self._run_id, self._stop_signal = spec, run_id, stop_signal
        self.tail = LogTail(spec.log_file)
        self.error_file = spec.log_file.with_suffix(".error.json")
        self.exit_code: int | None = None
        self.restarts = 0
        self.restarted: list[float] = []  # when; for its supervisor, as the next two
        self.restart_at = self.missing_at = math.inf
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Started and not yet seen to end (`poll` looks)."""
        return self._process is not None and self.exit_code is None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Starts the process; its output is appended to its log file. RoleFailed: it cannot."""
        self.error_file.unlink(missing_ok=True)
        self.exit_code, self._process = None, None
        ours = {
            RUN_ID: self._run_id,
            ROLE: self.spec.name,
            RESTART: str(self.restarts),
            STOP_SIGNAL: str(int(self._stop_signal)),
            ERROR_FILE: str(self.error_file),
            PATH: os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        }
        try:
            with self.spec.log_file.open("ab") as log:
                self._process = subprocess.Popen(
                    self.spec.argv,
                    env={**os.environ, **self.spec.environment, **ours},
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
        return self._end(self._process)

    def terminate(self) -> None:
        """Asks the process, and only it, to end: it knows best how to end its own children."""
        if self._process is not None and self.running:
            self._process.send_signal(self._stop_signal)

    def kill(self) -> None:
        """Ends the process and all that it started."""
        if self._process is not None and self.running:
            kill_strays(self._run_id, self.spec.name)
            self._end(self._process)

    def _end(self, process: subprocess.Popen[bytes]) -> int:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self.exit_code = process.wait()
        kill_strays(self._run_id, self.spec.name)
        return self.exit_code


def kill_strays(run_id: str, role: str = "") -> list[int]:
    """Kills what carries the run id (of one role, or all), waits until it is gone, returns it."""
    killed, left = kill_processes(run_id, role)
    if left:
        raise RoleFailed(f"processes {left} survive SIGKILL; end them by hand")
    return killed
