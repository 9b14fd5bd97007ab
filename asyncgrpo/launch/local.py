"""Runs a plan on this machine: starts all processes, watches them, and leaves none behind."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from asyncgrpo.errors import EXIT_DONE, EXIT_INTERRUPTED, RunError
from asyncgrpo.launch import lifeline
from asyncgrpo.launch.child import Child, kill_strays
from asyncgrpo.launch.ends import Verdict, describe_exit, failure, judge_exit
from asyncgrpo.launch.plan import Plan, ProcessSpec
from asyncgrpo.settings.run import LaunchSettings

POLL_SECONDS = 0.05
# Before the next life: what killed the last one may need a moment to pass. Doubles each time.
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 60.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
# The learner needs actors to finish a publish; the buffer takes what comes in from both.
STOP_ORDER = ("learner", "actor", "buffer")


class Supervisor:
    """The processes of one run from start to end.

    `on_line(name, line)` gets every log line, and our own events under the name "launcher", in the
    thread that calls `run`; what it raises ends the run.
    """

    def __init__(
        self,
        plan: Plan,
        settings: LaunchSettings,
        on_line: Callable[[str, str], None],
        new_child: Callable[[ProcessSpec, str], Child] = Child,
    ) -> None:
        self.run_id = uuid.uuid4().hex
        self._children = [new_child(spec, self.run_id) for spec in plan.specs]
        self._log_file = plan.specs[0].log_file.with_name("launcher.log")
        self._settings, self._on_line = settings, on_line
        self._is_stopping = False
        self._signals: list[int] = []
        self._num_heeded = 0  # signals that the stop answers; one more means "kill now"

    def run(self, on_tick: Callable[[], object] = lambda: None) -> int:
        """Returns 0 when the learner is done, 130 when interrupted; nothing is left either way.

        on_tick: called about 20 times per second. Raises, after everything was stopped: RoleFailed
        (exit code 3), BadInput (2) when a role found some, and whatever a callback raised.
        """
        check_main_thread()
        held = held_lifeline(self.run_id, self._settings.grace_seconds, self._log_file)
        with self._signals_noted(), held as say_goodbye:
            try:
                for child in self._children:
                    child.start()
                    self.say(f"started {child.spec.name} (pid {child.pid})")
                code = self._watch(on_tick)
            finally:
                self._stop()
                say_goodbye()
        return code

    @property
    def stopped_by(self) -> int | None:
        """The signal that ended the run, if one did."""
        return self._signals[0] if self._signals else None

    def _watch(self, on_tick: Callable[[], object]) -> int:
        """Until the learner is done, somebody interrupts, or a role fails (raises)."""
        while True:
            self._forward_lines()
            on_tick()
            if self._signals:
                self._num_heeded = len(self._signals)
                self.say(f"{signal.Signals(self._signals[0]).name}: stopping; again = kill now")
                return EXIT_INTERRUPTED
            if self._handle_exits():
                return EXIT_DONE
            self._heed_deadlines()
            time.sleep(POLL_SECONDS)

    def _handle_exits(self) -> bool:
        """Reacts to every process that has ended since the last look; True: the run is done."""
        ended = [child for child in self._children if child.running and child.poll() is not None]
        verdicts = [(child, self._judge(child)) for child in ended]
        if any(verdict == "done" for _, verdict in verdicts):
            self.say("the learner is done")
            return True
        for child, verdict in verdicts:
            if verdict == "fail":
                raise self._failure(child)
            if verdict == "restart":
                self._plan_restart(child)
                continue
            if verdict == "left":
                self.say(f"{child.spec.name} has left the run")
            if verdict == "early" or not self._has_actor():
                child.missing_at = time.monotonic() + self._settings.grace_seconds
        return False

    def _judge(self, child: Child) -> Verdict:
        oldest = time.monotonic() - self._settings.restart_window_seconds
        child.restarted = [at for at in child.restarted if at > oldest]
        count, most = len(child.restarted), self._settings.max_restarts
        return judge_exit(child.spec.role, child.exit_code or 0, count, most)

    def _has_actor(self) -> bool:
        """Whether any actor runs or will run again."""
        actors = [child for child in self._children if child.spec.role == "actor"]
        return any(child.running or child.restart_at < math.inf for child in actors)

    def _plan_restart(self, child: Child) -> None:
        wait = min(BACKOFF_SECONDS * 2 ** len(child.restarted), MAX_BACKOFF_SECONDS)
        child.restarted.append(time.monotonic())
        child.restart_at = time.monotonic() + wait
        count = f"restart {len(child.restarted)} of {self._settings.max_restarts}"
        how = describe_exit(child.exit_code or 0)
        self.say(f"{child.spec.name} {how}; {count} follows in {wait:g} s")

    def _heed_deadlines(self) -> None:
        """A role may end a moment before torchrun is through with ending, but not go missing."""
        now = time.monotonic()
        for child in self._children:
            if now >= child.missing_at:
                raise self._failure(child)
            if now >= child.restart_at:
                child.restart_at = math.inf
                child.restarts += 1
                child.start()
                self.say(f"restarted {child.spec.name} (pid {child.pid})")

    def _failure(self, child: Child) -> Exception:
        spec, code = child.spec, child.exit_code or 0
        self._forward_lines()
        self.say(f"{spec.name} {describe_exit(code)}; stopping the run")
        return failure(spec.name, code, child.restarts, child.error_file, spec.log_file)

    def _stop(self) -> None:
        """Ends all that is left, in order. Nothing a callback does can keep it from that."""
        self._is_stopping = True
        for role in STOP_ORDER:
            self._stop_stage([child for child in self._children if child.spec.role == role])
        if strays := kill_strays(self.run_id):
            self.say(f"killed processes that the roles left behind: {strays}")
        self._forward_lines(at_end=True)
        self.say("all processes have ended")

    def _stop_stage(self, stage: Sequence[Child]) -> None:
        for child in stage:
            child.terminate()
        grace = self._settings.grace_seconds
        deadline, patience = time.monotonic() + grace, f"within {grace:g} s"
        while left := [child for child in stage if child.running and child.poll() is None]:
            if len(self._signals) > self._num_heeded:
                patience = "at once"
                break
            if time.monotonic() > deadline:
                break
            self._forward_lines()
            time.sleep(POLL_SECONDS)
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
        """What it raises ends the run, and is left out once the run is stopping."""
        try:
            callback(*arguments)
        except Exception:
            if not self._is_stopping:
                raise

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
def held_lifeline(run_id: str, grace: float, log_file: Path) -> Iterator[Callable[[], object]]:
    """A process that stops the run should this one be killed before it says goodbye."""
    with (
        log_file.open("ab") as log,
        subprocess.Popen(
            [sys.executable, "-I", "-S", lifeline.__file__, run_id, str(grace)],
            env={**os.environ, lifeline.RUN_ID: ""},  # this launcher may be part of a run
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as process,
    ):
        yield lambda: process.communicate(b"x")


def check_main_thread() -> None:
    """RunError elsewhere: only there can signals be noted."""
    if threading.current_thread() is not threading.main_thread():
        raise RunError("a run that is not serial must start in the main thread of its process")
