"""Runs a plan on this machine: starts all processes, watches them, and leaves none behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from asyncgrpo.errors import EXIT_DONE, EXIT_INTERRUPTED, RunError
from asyncgrpo.launch import lifeline
from asyncgrpo.launch.child import Child, kill_strays
from asyncgrpo.launch.logs import before_torchrun_report, last_lines
from asyncgrpo.launch.plan import Plan, ProcessSpec
from asyncgrpo.launch.verdict import Verdict, describe_exit, failure, judge_exit

POLL_SECONDS = 0.05
# Before the next life: what killed the last one may need a moment to pass. Doubles each time.
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 60.0
READ_LINES, SHOWN_LINES = 100, 15
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
# The learner needs actors to finish a publish; the buffer takes what comes in from both.
STOP_ORDER = ("learner", "actor", "buffer")
PR_SET_CHILD_SUBREAPER = 36


class Supervisor:
    """The processes of one run from start to end.

    `on_line(name, line)` gets every log line, and our own events under the name "launcher";
    `on_tick()` is called about 20 times per second (a progress display). Both are called by the
    thread that called `run`; what they raise ends the run.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        grace_seconds: float,
        max_restarts: int,
        restart_window_seconds: float = 3600.0,
        on_line: Callable[[str, str], None],
        on_tick: Callable[[], None] = lambda: None,
        new_child: Callable[[ProcessSpec, str], Child] = Child,
    ) -> None:
        self.run_id = uuid.uuid4().hex
        self._children = [new_child(spec, self.run_id) for spec in plan.specs]
        self._log_file = plan.specs[0].log_file.with_name("launcher.log")
        self._grace_seconds = grace_seconds
        self._max_restarts, self._window = max_restarts, restart_window_seconds
        self._on_line, self._on_tick = on_line, on_tick
        self._callback_error: Exception | None = None
        self._signals: list[int] = []
        self._num_heeded = 0  # signals that the stop answers; one more means "kill now"
        self._restart_at: dict[str, float] = {}
        self._restarts: dict[str, list[float]] = defaultdict(list)  # when; within the window
        self._early_deadline: dict[str, float] = {}

    def run(self) -> int:
        """Returns 0 when the learner is done, 130 when interrupted; nothing is left either way.

        Raises, after everything was stopped: RoleFailed (exit code 3), BadInput (2) when a role
        found some, and whatever a callback raised.
        """
        check_main_thread()
        with self._signals_noted(), _adopting_orphans(), self._lifeline() as say_goodbye:
            try:
                self._start()
                code = self._watch()
            finally:
                self._stop()
                say_goodbye()
        self._raise_callback_error()
        return code

    @property
    def stopped_by(self) -> int | None:
        """The signal that ended the run, if one did."""
        return self._signals[0] if self._signals else None

    def _start(self) -> None:
        for child in self._children:
            child.start()
            self.say(f"started {child.spec.name} (pid {child.pid})")

    def _watch(self) -> int:
        """Until the learner is done, somebody interrupts, or a role fails (raises)."""
        while True:
            self._forward_lines()
            self._call(self._on_tick)
            self._raise_callback_error()
            if self._signals:
                self._num_heeded = len(self._signals)
                self.say(f"{signal.Signals(self._signals[0]).name}: stopping; again = kill now")
                return EXIT_INTERRUPTED
            if self._handle_exits():
                return EXIT_DONE
            self._restart_due()
            self._refuse_early_ends()
            time.sleep(POLL_SECONDS)

    def _handle_exits(self) -> bool:
        """Reacts to every process that has ended since the last look; True: the run is done."""
        ended = [child for child in self._children if child.running and child.poll() is not None]
        verdicts = [(child, self._judge(child)) for child in ended]
        if any(verdict == "done" for _, verdict in verdicts):
            self.say("the learner is done")
            return True
        now = time.monotonic()
        for child, verdict in verdicts:
            if verdict == "fail":
                raise self._failure(child)
            if verdict == "left":
                self.say(f"{child.spec.name} has left the run")
            if verdict == "early" or (verdict == "left" and not self._has_actor()):
                self._early_deadline[child.spec.name] = now + self._grace_seconds
            elif verdict == "restart":
                self._plan_restart(child, now)
        return False

    def _judge(self, child: Child) -> Verdict:
        code, now = child.poll() or 0, time.monotonic()
        recent = [at for at in self._restarts[child.spec.name] if now - at < self._window]
        self._restarts[child.spec.name] = recent
        return judge_exit(child.spec.role, code, len(recent), self._max_restarts)

    def _has_actor(self) -> bool:
        """Whether any actor runs or will run again."""
        actors = [child for child in self._children if child.spec.role == "actor"]
        return any(child.running or child.spec.name in self._restart_at for child in actors)

    def _plan_restart(self, child: Child, now: float) -> None:
        recent = self._restarts[child.spec.name]
        wait = min(BACKOFF_SECONDS * 2 ** len(recent), MAX_BACKOFF_SECONDS)
        self._restart_at[child.spec.name] = now + wait
        recent.append(now)
        count = f"restart {len(recent)} of {self._max_restarts} follows in {wait:g} s"
        self.say(f"{child.spec.name} {describe_exit(child.exit_code or 0)}; {count}")

    def _restart_due(self) -> None:
        for child in self._children:
            if time.monotonic() >= self._restart_at.get(child.spec.name, float("inf")):
                del self._restart_at[child.spec.name]
                child.restarts += 1
                child.start()
                self.say(f"restarted {child.spec.name} (pid {child.pid})")

    def _refuse_early_ends(self) -> None:
        """A role may end a moment before torchrun is through with ending, but not go missing."""
        for child in self._children:
            if time.monotonic() >= self._early_deadline.get(child.spec.name, float("inf")):
                raise self._failure(child)

    def _failure(self, child: Child) -> Exception:
        code, log_file = child.exit_code or 0, child.spec.log_file
        self._forward_lines()
        self.say(f"{child.spec.name} {describe_exit(code)}; stopping the run")
        lines = before_torchrun_report(last_lines(log_file, READ_LINES))[-SHOWN_LINES:]
        recorded = child.recorded_error()
        return failure(child.spec.name, code, child.restarts, recorded, log_file, lines)

    def _stop(self) -> None:
        """Ends all that is left, in order. Nothing a callback does can keep it from that."""
        for role in STOP_ORDER:
            self._stop_stage([child for child in self._children if child.spec.role == role])
        if strays := kill_strays(self.run_id):
            self.say(f"killed processes that the roles left behind: {strays}")
        self._forward_lines(at_end=True)
        self.say("all processes have ended")

    def _stop_stage(self, stage: Sequence[Child]) -> None:
        for child in stage:
            child.terminate()
        deadline = time.monotonic() + self._grace_seconds
        while left := [child for child in stage if child.running and child.poll() is None]:
            if time.monotonic() > deadline or len(self._signals) > self._num_heeded:
                break
            self._forward_lines()
            time.sleep(POLL_SECONDS)
        hurried = len(self._signals) > self._num_heeded
        patience = "at once" if hurried else f"within {self._grace_seconds:g} s"
        for child in left:
            child.kill()
            self.say(f"killed {child.spec.name}: it did not end {patience}")

    def _forward_lines(self, *, at_end: bool = False) -> None:
        for child in self._children:
            for line in child.tail.new_lines(at_end=at_end):
                self._call(self._on_line, child.spec.name, line)

    def say(self, line: str) -> None:
        """Shows and logs an event of the launcher's own."""
        self._call(self._log, line)
        self._call(self._on_line, "launcher", line)

    def _log(self, line: str) -> None:
        with self._log_file.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    def _call(self, callback: Callable[..., None], *arguments: str) -> None:
        """Calls back unless a callback has raised before; the error is raised between two turns."""
        if self._callback_error is not None:
            return
        try:
            callback(*arguments)
        except Exception as error:
            self._callback_error = error

    def _raise_callback_error(self) -> None:
        if self._callback_error is not None:
            raise self._callback_error

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """Handlers only take a note. nohup's ignored SIGHUP stays ignored."""

        def note(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [n for n in STOP_SIGNALS if not (n is signal.SIGHUP and ignored)]
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _lifeline(self) -> Iterator[Callable[[], object]]:
        """A process that stops the run should this one be killed before it says goodbye."""
        script = [sys.executable, "-I", "-S", lifeline.__file__]
        environment = {key: value for key, value in os.environ.items() if key != lifeline.RUN_ID}
        reading, writing = os.pipe()
        with self._log_file.open("ab") as log:
            process = subprocess.Popen(
                [*script, str(reading), self.run_id, str(self._grace_seconds)],
                env=environment,
                pass_fds=[reading],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os.close(reading)
        try:
            yield lambda: os.write(writing, b"x")
        finally:
            os.close(writing)
            process.wait()


def check_main_thread() -> None:
    """RunError elsewhere: signals arrive there, and our children end with the thread that forks."""
    if threading.current_thread() is not threading.main_thread():
        raise RunError("a run that is not serial must start in the main thread of its process")


@contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Orphans of our children become ours instead of init's, so that we can wait for their end."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
