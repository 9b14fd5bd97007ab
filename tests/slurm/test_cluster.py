"""Runs on a real Slurm with several slurmd on this machine: every way in which a job can end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
from cluster import Cluster, missing
from small_run import MAX_STALENESS, SMALL

from asyncgrpo.data.tiny import build_untrained
from asyncgrpo.rows import whole_rows

ROOT = Path(__file__).parent.parent.parent
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"no Slurm here: {missing()}"),
]
SETTINGS = [*SMALL, "eval.every=0", "checkpoint.every=5"]


class Submitted:
    """A run of ours in a cluster; its folder has a name that scripts like to trip over."""

    def __init__(self, cluster: Cluster, base: Path, model: Path, *arguments: str) -> None:
        self.cluster, self.run_dir = cluster, base / "a run's 2% $HOME"
        own = [word for setting in SETTINGS for word in ("--set", setting)]
        text = cluster.call(
            *(sys.executable, "-m", "asyncgrpo.cli", "slurm", "submit"),
            *("--set", f"model.path={model}", "--set", "actor.engine=toy", *own),
            *("--run-dir", str(self.run_dir), "--actors", "2", "--learners", "2", "--nodes", "2"),
            *arguments,
            cwd=ROOT / "tests",
        )
        self.job = text.split()[1]

    def shown(self) -> str:
        files = sorted((self.run_dir / "logs").glob("slurm-*.log"))
        return "".join(file.read_text() for file in files)

    def rows(self, run_dir: Path | None = None) -> list[dict]:
        rows = whole_rows((run_dir or self.run_dir) / "metrics.jsonl")
        return [row for row in rows if "loss" in row]

    def until(self, done: Callable[[], object], what: str, seconds: float = 400) -> None:
        try:
            self.cluster.until(done, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.shown()[-6000:]}") from None

    def until_trained(self, steps: int) -> None:
        self.until(lambda: len(self.rows()) >= steps, f"{steps} steps")

    def until_state(self, state: str) -> None:
        self.until(lambda: self.cluster.state(self.job) == state, state)

    def checkpoints(self) -> list[int]:
        found = (self.run_dir / "checkpoints").glob("step_*")
        return sorted(int(path.name.removeprefix("step_")) for path in found)

    def processes(self) -> list[list[str]]:
        """Command lines of live processes of the run."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.run_dir) in " ".join(process.cmdline()):
                    found.append(process.cmdline())
            except psutil.Error:
                continue
        return found

    def assert_nothing_left(self) -> None:
        self.until(lambda: not self.processes(), "all processes ended", 120)

    def end(self) -> None:
        """Cancels what still runs; then nothing is left, and every group is accounted for."""
        self.cluster.start_dead_nodes()
        if self.cluster.state(self.job) in ("RUNNING", "PENDING"):
            self.cluster.call("scancel", self.job)
        self.assert_nothing_left()
        ledgers = [*self.run_dir.glob("ledger.sqlite"), *self.run_dir.glob("seed-*/ledger.sqlite")]
        assert ledgers or not self.rows()
        for ledger in ledgers:
            command = (sys.executable, "-m", "asyncgrpo.cli", "audit", str(ledger.parent))
            done = subprocess.run(
                command, env=self.cluster.environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr

    def assert_sound(self, steps: int, run_dir: Path | None = None) -> None:
        """Every step was made once, of groups that are not too old."""
        folder = run_dir or self.run_dir
        assert [row["step"] for row in self.rows(folder)] == list(range(steps))
        assert max(row["staleness/max"] for row in self.rows(folder)) <= MAX_STALENESS
        assert json.loads((folder / "summary.json").read_text())["steps"] == steps


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_untrained(tmp_path_factory.mktemp("model") / "untrained", True, 5)


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    started = Cluster(cpus=getattr(request, "param", 4))
    yield started
    started.stop()


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path, model: Path) -> Iterator[Callable[..., Submitted]]:
    runs: list[Submitted] = []

    def start(*arguments: str) -> Submitted:
        runs.append(Submitted(cluster, tmp_path, model, *arguments))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


@pytest.mark.engine
def test_a_run_over_two_nodes_with_the_real_engine_is_done_and_leaves_nothing(submit):
    metrics = ("--set", "observe.metrics_host=auto")
    run = submit("--set", "run.max_steps=6", "--set", "actor.engine=vllm", *metrics)
    run.until_trained(1)
    targets = {
        path.stem: json.loads(path.read_text())[0]["targets"][0]
        for path in (run.run_dir / "targets").glob("*.json")
    }
    assert set(targets) == {"buffer", "learner-0", "learner-1", "actor-0", "actor-1"}
    assert all(target.startswith(f"{run.cluster.address}:") for target in targets.values())
    with urlopen(f"http://{targets['actor-1']}/metrics", timeout=60) as page:
        assert b'role="actor-1"' in page.read()
    keys = {path.name: oct(path.stat().st_mode) for path in run.run_dir.glob("keys/*")}
    if run.cluster.address != "127.0.0.1":
        assert keys == {"server.key": "0o100600", "client.key": "0o100600"}
        assert f"tcp://{run.cluster.address}:" in (run.run_dir / "endpoints.json").read_text()
    run.until_state("COMPLETED")
    run.assert_sound(6)
    run.assert_nothing_left()
    assert f"logs of the roles in {run.run_dir}/logs/" in run.shown()
    names = {path.name for path in (run.run_dir / "logs" / f"{run.job}.0").glob("*.log")}
    roles = {"buffer", "learner", "actor-0", "actor-1"}
    assert names == {f"{name}.log" for name in roles | {"launcher"}}
    assert not list((run.run_dir / "targets").glob("*.json"))
    assert (run.run_dir / "submitted/code/asyncgrpo/cli.py").exists()
    assert (run.run_dir / "model/model.safetensors").exists()


def test_before_its_time_is_up_a_job_is_saved_requeued_and_goes_on(submit):
    run = submit("--set", "run.max_steps=150")
    run.until_trained(3)
    steps = run.cluster.steps(run.job)
    assert {"learner"} <= set(steps)
    run.cluster.call("scancel", "--signal=USR2", "--batch", run.job)  # as Slurm does
    run.until_state("PENDING")
    run.assert_nothing_left()
    saved = run.checkpoints()[-1]
    assert 3 <= saved < 150
    run.cluster.start_now(run.job)
    run.until_state("COMPLETED")
    assert f"at step {saved}" in run.shown()
    assert {path.name for path in (run.run_dir / "logs").iterdir() if path.is_dir()} == {
        f"{run.job}.0",
        f"{run.job}.1",
    }
    run.assert_sound(150)
    run.assert_nothing_left()


def test_slurms_own_time_limit_requeues_both_parts_of_a_job_and_loses_no_step(submit):
    limit = ("--time=30", "--sbatch", "signal=B:USR2@30")
    run = submit("--set", "run.max_steps=100000", *limit, "--nodes", "1", "--actor-nodes", "1")
    run.until_trained(1)
    assert run.cluster.job(run.job)["NodeList"] != run.cluster.job(f"{run.job}+1")["NodeList"]
    # Limits are in minutes; at least half a one is left. Slurm looks every 30 s.
    run.cluster.limit_time(run.job, (run.cluster.seconds(run.job) + 30) // 60 + 1)
    run.until_state("PENDING")
    saved = run.checkpoints()[-1]
    assert len(run.rows()) == saved
    run.cluster.limit_time(run.job, 30)
    run.cluster.start_now(run.job)
    run.until_trained(saved + 2)
    assert f"at step {saved}" in run.shown()
    assert [row["step"] for row in run.rows()[: saved + 2]] == list(range(saved + 2))


def test_a_job_without_time_for_a_step_is_not_requeued_for_ever(submit):
    run = submit("--set", "run.max_steps=25")
    run.until(lambda: "learner" in run.cluster.steps(run.job), "started")
    run.cluster.call("scancel", "--signal=USR2", "--batch", run.job)
    run.until_state("FAILED")
    assert "time was up before a step was saved" in run.shown()
    run.assert_nothing_left()


def test_a_cancelled_job_is_saved_ends_and_leaves_other_jobs_alone(submit, tmp_path):
    run = submit("--set", "run.max_steps=100000")
    run.until_trained(3)
    sleep = ("sbatch", "--parsable", "--output=/dev/null", "--wrap", "srun sleep 600")
    other = run.cluster.call(*sleep)
    run.until(lambda: run.cluster.steps(other), "the other job")
    run.cluster.call("scancel", run.job)
    run.until_state("CANCELLED")
    run.assert_nothing_left()
    assert run.checkpoints()[-1] >= 3
    assert run.cluster.state(other) == "RUNNING"
    assert "requeued" not in run.shown()


def test_a_killed_step_is_started_again_and_nothing_is_lost_or_twice(submit):
    run = submit("--set", "run.max_steps=150", "--set", "buffer.max_staleness=2")
    run.until_trained(3)
    step = run.cluster.steps(run.job)["actor-1"]
    run.cluster.call("scancel", "--signal=KILL", step)
    run.until(lambda: "restarted actor-1" in run.shown(), "restarted")
    run.until_state("COMPLETED")
    run.assert_sound(150)
    run.assert_nothing_left()


def test_when_a_node_is_lost_its_actors_move_to_what_remains(submit):
    run = submit("--set", "run.max_steps=100000", "--sbatch", "exclusive")
    run.until_trained(3)
    assert run.cluster.job(run.job)["NodeList"] == "n[0-1]"
    run.cluster.kill_node("n1")
    run.until(lambda: run.shown().count("restarted actor-") >= 2, "restarted")
    assert run.cluster.job(run.job)["NodeList"] == "n0"
    steps = len(run.rows())
    run.until_trained(steps + 5)
    learner = run.cluster.steps(run.job)["learner"]
    assert learner.endswith(".0") or "restarted learner" not in run.shown()
    rows = [row["step"] for row in run.rows()]
    assert rows == list(range(len(rows)))


def test_when_what_remains_is_too_small_the_job_is_requeued(submit):
    run = submit("--set", "run.max_steps=100000")
    run.until_trained(3)
    run.cluster.kill_node("n1")
    run.until_state("PENDING")
    assert "no room for actor-" in run.shown()
    assert "requeued; the next attempt" in run.shown()


def test_a_preempted_job_is_saved_and_goes_on_afterwards(submit, tmp_path):
    run = submit("--set", "run.max_steps=100000", "--set", "launch.grace_seconds=30")
    run.until_trained(3)
    urgent = ("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive")
    other = run.cluster.call(*urgent, "--output=/dev/null", "--wrap", "sleep 2")
    run.until_state("PENDING")
    run.assert_nothing_left()
    saved = run.checkpoints()[-1]
    assert saved >= 3
    run.until(lambda: run.cluster.state(other) == "COMPLETED", "the urgent job")
    run.cluster.start_now(run.job)
    run.until(lambda: f"at step {saved}" in run.shown(), "second attempt")


@pytest.mark.parametrize("cluster", [3], indirect=True)
def test_ranks_on_two_nodes_train_as_one_learner(submit):
    run = submit("--learners", "4", "--set", "run.max_steps=8")
    run.until_state("COMPLETED")
    run.assert_sound(8)
    log = (run.run_dir / "logs" / f"{run.job}.0" / "learner.log").read_text()
    assert {f"rank {rank} of 4 ready" in log for rank in range(4)} == {True}


def test_an_array_trains_one_run_for_each_seed(submit):
    run = submit("--nodes", "1", "--set", "run.max_steps=4", "--seeds", "3,5")
    folders = {seed: run.run_dir / f"seed-{seed}" for seed in (3, 5)}
    run.until(lambda: all((f / "summary.json").exists() for f in folders.values()), "both done")
    for seed, folder in folders.items():
        assert json.loads((folder / "config.json").read_text())["run"]["seed"] == seed
        run.assert_sound(4, folder)
    run.assert_nothing_left()


def test_what_cannot_fit_is_said_before_any_step_starts(submit):
    run = submit("--set", "run.max_steps=4", "--sbatch", "cpus-per-task=1")
    run.until_state("FAILED")
    assert "error: no room for" in run.shown()
    assert not (run.run_dir / "config.json").exists()
