"""The supervisor with real processes: how runs end, and that none leaves a process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncgrpo.errors import BadInput, RoleFailed, RunError
from asyncgrpo.launch import local
from asyncgrpo.launch.child import kill_strays
from asyncgrpo.launch.lifeline import find_run_processes
from asyncgrpo.launch.local import Supervisor
from asyncgrpo.launch.plan import TORCHRUN_MODULE, Plan, ProcessSpec
from asyncgrpo.launch.preflight import own_port
from asyncgrpo.rundir import Endpoints
from asyncgrpo.settings.run import LaunchSettings

PRELUDE = "import os, signal, subprocess, sys, time\n"
WORK = "print('ready', flush=True)\ntime.sleep(600)\n"
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WORK
WITH_RUNAWAY = (  # a grandchild that left its group, its session and its log, and ignores SIGTERM
    "subprocess.Popen([sys.executable, '-S', '-c', 'import signal, time; '\n"
    '    \'signal.signal(signal.SIGTERM, signal.SIG_IGN); open("up", "x"); time.sleep(600)\'],\n'
    "    start_new_session=True, cwd=os.environ['RUNAWAY'], stdout=subprocess.DEVNULL)\n"
    "while not os.path.exists(os.environ['RUNAWAY'] + '/up'): time.sleep(0.01)\n" + WORK
)
DEADLINE_SECONDS = 20.0


class Run:
    """A run of small scripts in place of roles; keeps what was shown."""

    def __init__(self, folder: Path, grace: float = 5.0, restarts: int = 0, **codes: str) -> None:
        self.shown: list[tuple[str, str]] = []
        self.on_ready: Callable[[], object] = lambda: None
        self.on_stopping: Callable[[], object] = lambda: None
        (folder / "logs").mkdir()
        specs = tuple(make_spec(folder, name.replace("_", "-"), codes[name]) for name in codes)
        endpoints = Endpoints(buffer="", weights="", store=("", 0))
        self._num_ready = 0
        self._num_wanted = sum(WORK in code for code in codes.values())
        self.supervisor = Supervisor(
            Plan(specs=specs, warnings=(), endpoints=endpoints),
            LaunchSettings(grace_seconds=grace, max_restarts=restarts),
            self._note,
        )

    def _note(self, name: str, line: str) -> None:
        self.shown.append((name, line))
        if "stopping; again" in line:
            self.on_stopping()
        self._num_ready += line == "ready"
        if line == "ready" and self._num_ready == self._num_wanted:
            self.on_ready()

    def said(self, part: str) -> bool:
        return any(name == "launcher" and part in line for name, line in self.shown)

    def pid(self, name: str) -> int:
        starts = (f"started {name} (pid ", f"restarted {name} (pid ")
        lines = [line for who, line in self.shown if who == "launcher" and line.startswith(starts)]
        return int(lines[-1].rpartition(" ")[2].rstrip(")"))

    def signal_when_ready(self, number: signal.Signals) -> None:
        self.on_ready = lambda: os.kill(os.getpid(), number)

    def assert_nothing_left(self) -> None:
        assert find_run_processes(self.supervisor.run_id) == []


def make_spec(folder: Path, name: str, code: str) -> ProcessSpec:
    return ProcessSpec(
        name=name,
        argv=(code,) if code.startswith("/") else (sys.executable, "-S", "-c", PRELUDE + code),
        environment={"RUNAWAY": str(folder), "PYTHONUNBUFFERED": "1"},
        cores=(),
        gpus=(),
        log_file=folder / "logs" / f"{name}.log",
    )


@pytest.fixture(autouse=True)
def _handlers_are_given_back() -> Iterator[None]:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    yield
    after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert after == before


@pytest.fixture(autouse=True)
def _restarts_follow_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "BACKOFF_SECONDS", 0.05)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        threading.Event().wait(0.02)


def is_alive(pid: int) -> bool:
    """Zombies do not count."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_run_is_done_when_the_learner_is_and_everyone_else_is_stopped(tmp_path: Path) -> None:
    finish = "print('learned', flush=True)"
    run = Run(tmp_path, buffer=WORK, learner=finish, actor_0=WORK, actor_1=WORK)
    assert run.supervisor.run() == 0
    run.assert_nothing_left()
    assert ("learner", "learned") in run.shown
    assert (tmp_path / "logs" / "learner.log").read_text() == "learned\n"
    assert "the learner is done" in (tmp_path / "logs" / "launcher.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything_and_says_interrupted(
    tmp_path: Path, number: signal.Signals
) -> None:
    run = Run(tmp_path, buffer=WORK, learner=WORK, actor_0=WORK)
    run.signal_when_ready(number)
    before = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        assert run.supervisor.run() == 130
    finally:
        signal.signal(number, before)
    run.assert_nothing_left()
    assert run.said(f"{number.name}: stopping")


def test_actors_and_learner_end_before_the_buffer_does(tmp_path: Path) -> None:
    farewell = (
        "def end(*_):\n    print(time.monotonic(), flush=True)\n    os._exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
    )
    run = Run(tmp_path, buffer=farewell + WORK, learner=farewell + WORK, actor_0=farewell + WORK)
    run.signal_when_ready(signal.SIGTERM)
    run.supervisor.run()
    ends = {name: float(line) for name, line in run.shown if name != "launcher" and "." in line}
    assert max(ends, key=ends.__getitem__) == "buffer"
    assert len(ends) == 3


def test_who_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    run = Run(tmp_path, grace=0.3, buffer=WORK, learner=WORK, actor_0=STUBBORN)
    run.signal_when_ready(signal.SIGINT)
    assert run.supervisor.run() == 130
    run.assert_nothing_left()
    assert run.said("killed actor-0: it did not end within 0.3 s")
    assert not run.said("left behind")


def test_a_second_signal_does_not_wait_for_the_grace(tmp_path: Path) -> None:
    run = Run(tmp_path, grace=60.0, buffer=STUBBORN, learner=STUBBORN, actor_0=STUBBORN)
    run.on_ready = lambda: [os.kill(os.getpid(), signal.SIGINT), again.start()]
    log = tmp_path / "logs" / "launcher.log"

    def interrupt_again() -> None:
        wait_until(lambda: "again = kill now" in log.read_text())
        os.kill(os.getpid(), signal.SIGINT)

    again = threading.Thread(target=interrupt_again)
    assert run.supervisor.run() == 130
    again.join()
    run.assert_nothing_left()


def test_a_second_signal_right_after_the_answer_to_the_first_counts(tmp_path: Path) -> None:
    run = Run(tmp_path, grace=60.0, buffer=STUBBORN, learner=STUBBORN)
    run.signal_when_ready(signal.SIGINT)
    run.on_stopping = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert run.supervisor.run() == 130
    assert run.said("killed learner: it did not end at once")
    run.assert_nothing_left()


def test_a_grandchild_in_its_own_session_is_found_and_ended(tmp_path: Path) -> None:
    run = Run(tmp_path, buffer=WORK, learner=WORK, actor_0=WITH_RUNAWAY)
    run.signal_when_ready(signal.SIGINT)
    assert run.supervisor.run() == 130
    assert (tmp_path / "up").exists()
    run.assert_nothing_left()


def test_a_grandchild_that_hides_its_role_is_found_by_the_last_sweep(tmp_path: Path) -> None:
    hidden = "os.environ['ASYNCGRPO_ROLE'] = 'nobody'\n" + WITH_RUNAWAY
    run = Run(tmp_path, buffer=WORK, learner=WORK, actor_0=hidden)
    run.signal_when_ready(signal.SIGINT)
    assert run.supervisor.run() == 130
    assert run.said("killed processes that the roles left behind")
    run.assert_nothing_left()


def test_a_child_without_our_environment_is_ended_with_its_group(tmp_path: Path) -> None:
    bare = (
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'],\n"
        "    env={}, stdout=subprocess.DEVNULL)\n"
        "print('child', child.pid, flush=True); sys.exit(1)"
    )
    run = Run(tmp_path, buffer=WORK, learner=WORK, actor_0=bare)
    with pytest.raises(RoleFailed):
        run.supervisor.run()
    (pid,) = [int(line.split()[1]) for _, line in run.shown if line.startswith("child ")]
    wait_until(lambda: not is_alive(pid))


@pytest.mark.parametrize("victim", ["buffer", "learner"])
def test_a_killed_buffer_or_learner_fails_the_run_with_its_last_lines(
    tmp_path: Path, victim: str
) -> None:
    run = Run(tmp_path, buffer=WORK, learner=WITH_RUNAWAY, actor_0=WORK)
    run.on_ready = lambda: os.kill(run.pid(victim), signal.SIGKILL)
    with pytest.raises(RoleFailed, match=rf"(?s){victim} was ended by SIGKILL.*ready") as caught:
        run.supervisor.run()
    assert caught.value.exit_code == 3
    run.assert_nothing_left()


def test_an_actor_is_restarted_with_a_count_and_then_the_run_fails(tmp_path: Path) -> None:
    crash = "print('life', os.environ['ASYNCGRPO_RESTART'], flush=True)\nsys.exit(7)"
    run = Run(tmp_path, buffer=WORK, learner=WORK, actor_0=crash, restarts=1)
    with pytest.raises(RoleFailed) as caught:
        run.supervisor.run()
    run.assert_nothing_left()
    message = str(caught.value)
    assert "actor-0 ended with exit code 7 after 1 restarts" in message
    assert message.endswith("\n  life 0\n  life 1")
    assert run.said("restart 1 of 1 follows in 0.05 s")


@pytest.mark.parametrize("victim", ["buffer", "learner"])
def test_a_killed_buffer_or_learner_gets_another_life_beside_the_others(
    tmp_path: Path, victim: str
) -> None:
    lives = {"buffer": WORK, "learner": WORK, "actor_0": WORK}
    lives[victim] = "print('life', os.environ['ASYNCGRPO_RESTART'], flush=True)\n" + WORK
    run = Run(tmp_path, **lives, restarts=1)
    pids: dict[str, int] = {}

    def kill() -> None:
        pids.update({name: run.pid(name) for name in ("buffer", "learner", "actor-0")})
        run.on_ready, run._num_wanted = lambda: os.kill(os.getpid(), signal.SIGINT), 4
        os.kill(pids[victim], signal.SIGKILL)

    run.on_ready = kill
    assert run.supervisor.run() == 130
    assert (victim, "life 1") in run.shown
    kept = [name for name, pid in pids.items() if run.pid(name) == pid]
    assert sorted([*kept, victim]) == ["actor-0", "buffer", "learner"]
    run.assert_nothing_left()


def test_waits_between_restarts_double(tmp_path: Path) -> None:
    run = Run(tmp_path, buffer=WORK, learner=WORK, actor_0="sys.exit(7)", restarts=3)
    with pytest.raises(RoleFailed, match="after 3 restarts"):
        run.supervisor.run()
    for count, seconds in ((1, "0.05"), (2, "0.1"), (3, "0.2")):
        assert run.said(f"restart {count} of 3 follows in {seconds} s")


def test_an_actor_that_was_asked_to_go_leaves_the_others_at_work(tmp_path: Path) -> None:
    polite = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n" + WORK
    run = Run(tmp_path, grace=0.3, buffer=WORK, learner=WORK, actor_0=polite, actor_1=WORK)
    left: list[bool] = []

    def look() -> None:
        try:
            wait_until(lambda: run.said("actor-0 has left the run"))
            threading.Event().wait(4 * local.POLL_SECONDS)
            left.append(is_alive(run.pid("actor-1")))
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    def ask_to_go() -> None:
        os.kill(run.pid("actor-0"), signal.SIGTERM)
        threading.Thread(target=look).start()

    run.on_ready = ask_to_go
    assert run.supervisor.run() == 130
    assert left == [True]


def test_the_last_actor_must_not_leave_before_the_learner_is_done(tmp_path: Path) -> None:
    run = Run(tmp_path, grace=0.3, buffer=WORK, learner=WORK, actor_0="pass", restarts=5)
    with pytest.raises(RoleFailed, match="actor-0 ended with exit code 0 before the learner"):
        run.supervisor.run()
    run.assert_nothing_left()


def test_what_a_crashed_actor_left_behind_is_gone_before_its_next_life(tmp_path: Path) -> None:
    first = "if os.environ['ASYNCGRPO_RESTART'] == '0':\n    "
    crash = WITH_RUNAWAY.replace(WORK, first + "sys.exit(1)\n" + WORK)
    look = first + "pass\nelse:\n    os.remove(os.environ['RUNAWAY'] + '/up')\n"
    run = Run(tmp_path, buffer=WORK, learner=WORK, actor_0=look + crash, restarts=1)
    found: list[int] = []

    def count() -> None:
        found.extend(find_run_processes(run.supervisor.run_id, "actor-0"))
        os.kill(os.getpid(), signal.SIGINT)

    run.on_ready = count
    assert run.supervisor.run() == 130
    assert len(found) == 2  # the second life and its own grandchild
    run.assert_nothing_left()


def test_bad_input_found_by_a_role_ends_the_run_with_its_message_and_no_restart(
    tmp_path: Path,
) -> None:
    refuse = (
        "open(os.environ['ASYNCGRPO_ERROR_FILE'], 'x').write("
        '\'{"exit_code": 2, "message": "reward r returned 3 of 4 scores"}\')\nsys.exit(2)'
    )
    run = Run(tmp_path, buffer=WORK, learner=WORK, actor_0=refuse, restarts=5)
    with pytest.raises(BadInput, match=r"^reward r returned 3 of 4 scores$") as caught:
        run.supervisor.run()
    assert caught.value.exit_code == 2
    assert not run.said("follows")
    run.assert_nothing_left()


def test_a_program_that_does_not_exist_fails_the_run_in_words(tmp_path: Path) -> None:
    run = Run(tmp_path, buffer=WORK, learner="/no/such/program")
    with pytest.raises(RoleFailed, match=r"learner could not be started: .*No such file"):
        run.supervisor.run()
    run.assert_nothing_left()


def test_an_error_of_a_callback_stops_everything_first(tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    run = Run(tmp_path, buffer=WORK, learner=WORK, actor_0=WORK)
    run.on_ready = fail
    with pytest.raises(ZeroDivisionError):
        run.supervisor.run()
    run.assert_nothing_left()


def test_a_run_is_started_from_the_main_thread_only(tmp_path: Path) -> None:
    run = Run(tmp_path, buffer=WORK, learner="pass")
    errors: list[RunError] = []

    def start() -> None:
        with contextlib.suppress(RunError):
            run.supervisor.run()
            return
        errors.append(RunError())

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert errors
    assert run.shown == []


LAUNCHER = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
import test_supervisor as t
roles = dict(buffer=t.WORK, learner=t.WITH_RUNAWAY, actor_0=t.STUBBORN)
run = t.Run(Path({folder!r}), grace=0.5, **roles)
run.on_ready = lambda: print(run.supervisor.run_id, flush=True)
run.supervisor.run()
"""


def test_after_kill_9_of_the_launcher_the_lifeline_stops_everything(tmp_path: Path) -> None:
    code = LAUNCHER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    run_id = launcher.stdout.readline().strip()
    assert len(find_run_processes(run_id)) == 4  # three roles and the runaway
    launcher.kill()
    launcher.communicate()
    log = tmp_path / "logs" / "launcher.log"
    try:
        wait_until(lambda: "the launcher was killed" in log.read_text())
        assert find_run_processes(run_id) == []
    finally:
        kill_strays(run_id)


@pytest.mark.slow
def test_bad_input_passes_through_torchrun_and_no_rank_is_left(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, sys, time\n"
        "from contextlib import suppress\n"
        "from pathlib import Path\n"
        "from asyncgrpo.errors import ConfigError\n"
        "from asyncgrpo.launch.ends import record_error\n"
        "other = Path(__file__).with_name('other')\n"
        "if os.environ['RANK'] == '1':\n"
        "    other.symlink_to(f'/proc/{os.getpid()}/stat')\n"
        "    record_error(ConfigError('lr=-1 must be > 0')); sys.exit(2)\n"
        "if os.environ['RANK'] == '0':  # fails because of the other, after its end\n"
        "    while not other.is_symlink(): time.sleep(0.01)\n"
        "    with suppress(OSError):\n"
        "        while ') Z ' not in other.read_text(): time.sleep(0.01)\n"
        "    sys.exit(1)\n"
        "time.sleep(600)\n"
    )
    port = own_port()
    options = ["--nnodes=1", "--nproc-per-node=3", "--monitor-interval=0.2", "--max-restarts=0"]
    options += ["--rdzv-backend=asyncgrpo", f"--rdzv-endpoint=127.0.0.1:{port}", str(rank)]
    argv = [sys.executable, "-m", TORCHRUN_MODULE, *options]
    environment = "os.environ['OMP_NUM_THREADS'] = '1'\n"
    learner = f"{environment}os.execv({argv[0]!r}, {argv!r})"
    run = Run(tmp_path, grace=10.0, restarts=1, buffer=WORK, learner=learner)
    with pytest.raises(BadInput, match=r"^lr=-1 must be > 0$"):
        run.supervisor.run()
    assert not run.said("restart 1 of 1")
    run.assert_nothing_left()
