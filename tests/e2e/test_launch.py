"""Whole runs from the command line: what is written, what is left behind after each kind of end."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import psutil
import pytest
import torch
from fakes import write_jsonl
from small_run import SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncgrpo.buffer.audit import audit
from asyncgrpo.buffer.ledger import LedgerReader
from asyncgrpo.config import from_mapping
from asyncgrpo.data.tiny import build_untrained
from asyncgrpo.learner.saved import FOLDER, saved, step_of
from asyncgrpo.learner.schedule import learning_rate
from asyncgrpo.observe.metrics import metric_of
from asyncgrpo.rows import whole_rows
from asyncgrpo.rundir import RunDir
from asyncgrpo.wire.codec import Packet
from asyncgrpo.wire.sockets import DealerClient

TESTS = Path(__file__).parent.parent
SECONDS = 600
SIX_STEPS = [*SMALL, "run.max_steps=6", "launch.grace_seconds=3"]
TWO_BLOCKS = (
    "[{num_prompts=12, every=3}, {name='sampled', num_prompts=6, every=2, num_samples=4, k=4, "
    "sampling={temperature=1.0, max_completion_tokens=12}}]"
)


def words(process: psutil.Process) -> list[str]:
    """Its command line; nothing of one that is gone."""
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def assert_all_end(processes: list[psutil.Process]) -> None:
    end = time.monotonic() + 120
    while alive := [words(process) for process in processes if is_alive(process)]:
        assert time.monotonic() < end, alive
        time.sleep(0.05)


class Launch:
    """An `asyncgrpo launch` of ours, in its own folder."""

    def __init__(
        self, base: Path, model: Path, *overrides: str, engine: str = "toy", resume: bool = False
    ) -> None:
        self.run_dir = base / "run"
        self.out = base / "out.txt"
        settings = [*SIX_STEPS, f"actor.engine={engine}", f"model.path={model}", *overrides]
        command = [sys.executable, "-m", "asyncgrpo.cli", "launch", "--run-dir", str(self.run_dir)]
        command += ["--resume", str(self.run_dir)] if resume else []
        command += [part for setting in settings for part in ("--set", setting)]
        with self.out.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=Path(__file__).parent.parent
            )

    def text(self) -> str:
        return self.out.read_text()

    def wait(self) -> int:
        try:
            return self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running:\n{self.text()[-4000:]}") from None

    def finish(self) -> None:
        assert self.wait() == 0, self.text()[-4000:]

    def rows(self) -> list[dict]:
        return whole_rows(self.run_dir / "metrics.jsonl")  # the last one may just be written

    def targets(self) -> list[str]:
        """Roles that Prometheus is to scrape."""
        return sorted(self.told())

    def told(self) -> dict[str, str]:
        """What they tell it."""
        found = {}
        for path in (self.run_dir / "targets").glob("*.json"):
            with suppress(FileNotFoundError):  # a role that ends takes its own away
                found[path.stem] = path.read_text()
        return found

    def healthy(self) -> list[str]:
        """Those of them that answer as themselves where they are said to listen."""
        found = []
        for _, text in sorted(self.told().items()):
            (address,) = json.loads(text)[0]["targets"]
            url, lost = f"http://{address}/healthz", (OSError, HTTPException)
            with suppress(*lost), urllib.request.urlopen(url, timeout=5) as answer:
                found += [json.load(answer)["role"]]
        return found

    def processes(self) -> list[psutil.Process]:
        """Everything that names our run directory in its command line, and its children."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = str(self.run_dir) in " ".join(process.cmdline())
                if ours and process.pid != self.process.pid:
                    found += [process, *process.children(recursive=True)]
            except psutil.Error:
                continue
        return list(dict.fromkeys(found))

    def find(self, *wanted: str) -> psutil.Process:
        """The one process whose command line holds all the words."""
        for process in self.processes():
            if set(wanted) <= set(words(process)):
                return process
        raise AssertionError(f"no process {wanted} in {[*map(words, self.processes())]}")

    def until(self, done: Callable[[], object], what: str) -> None:
        end, has_ended = time.monotonic() + SECONDS, False
        while not done():
            assert not has_ended, f"ended before {what}:\n{self.text()[-4000:]}"
            assert time.monotonic() < end, f"never {what}:\n{self.text()[-4000:]}"
            has_ended = self.process.poll() is not None  # done() has one look after the end
            time.sleep(0.05)

    def until_training(self) -> list[psutil.Process]:
        self.until(lambda: len(self.rows()) >= 2, "trained")
        return self.processes()

    def ranks(self) -> list[psutil.Process]:
        """The learner's two ranks."""
        lines = [(process, words(process)) for process in self.processes()]
        found = [p for p, line in lines if line[-3:-2] == ["learner"] and "-u" in line]
        assert len(found) == 2
        return found

    def stop_after(self, step: int, rank: psutil.Process) -> int:
        """Stops a rank when it has trained that step; returns the first that is not saved."""
        last = -1

        def stopped() -> bool:
            nonlocal last
            rank.suspend()  # the other one can end one step more, which is not a fourth
            last = max((row["step"] for row in self.rows() if "loss" in row), default=-1)
            if last >= step and last % 4 < 2:
                return True
            rank.resume()
            return False

        self.until(stopped, f"step {step}")
        return last // 4 * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_untrained(tmp_path_factory.mktemp("model") / "untrained", True, 5)


@pytest.fixture
def launch(tmp_path, model):
    started: list[Launch] = []

    def start(*overrides: str, engine: str = "toy", resume: bool = False) -> Launch:
        started.append(Launch(tmp_path, model, *overrides, engine=engine, resume=resume))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.send_signal(signal.SIGTERM)
            each.wait()


def trained_rows(run_dir: Path, step: int) -> list[dict]:
    rows = whole_rows(run_dir / f"trajectories/step_{step}.jsonl")
    return [row for row in rows if row["status"] == "trained"]


def check_run_directory(run_dir: Path, steps: int, max_staleness: int) -> None:
    config = json.loads((run_dir / "config.json").read_text())
    assert config["run"]["max_steps"] == steps
    assert "torch" in json.dumps(json.loads((run_dir / "env.json").read_text()))
    for role in ("buffer", "learner", "actor-0", "actor-1"):
        assert (run_dir / "logs" / f"{role}.log").is_file()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(metric_of(name) for row in rows for name in row)
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(steps))
    settings = from_mapping(config)
    for row in trained:
        assert row["lr"] == learning_rate(row["step"], settings.learner, steps)
    assert {row["eval/version"] for row in rows if "eval/version" in row} >= {0, steps}
    for step, row in enumerate(trained):
        completions = trained_rows(run_dir, step)
        assert len(completions) == 16
        assert max(c["staleness"] for c in completions) == row["staleness/max"] <= max_staleness
        assert sum(c["num_tokens"] for c in completions) == row["tokens_trained"]
        assert all(step - c["version_min"] == c["staleness"] for c in completions)
        assert all(c["version_min"] <= c["version_max"] <= step for c in completions)
        by_group: dict[int, float] = {}
        for c in completions:
            by_group[c["group"]] = by_group.get(c["group"], 0.0) + c["advantage"]
        assert all(abs(total) < 1e-4 for total in by_group.values())
    assert not any(audit(RunDir.read(run_dir)).wrong.values())
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["after"]["num_answered"] == summary["before"]["num_answered"] == 12
    assert summary["leases"]["leases_trained"] == 4 * steps


def check_model(folder: Path, start: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trained = AutoModelForCausalLM.from_pretrained(folder)
    first = AutoModelForCausalLM.from_pretrained(start)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Compute: 1 + 2"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    with torch.no_grad():
        assert not torch.equal(trained(ids).logits, first(ids).logits)


@pytest.mark.engine
def test_a_run_with_the_real_engine_writes_everything_and_leaves_nothing(launch, model):
    run = launch("launch.max_restarts=1", f"eval={TWO_BLOCKS}", engine="vllm")
    started = run.until_training()
    roles = ["actor-0", "actor-1", "buffer", "learner-0", "learner-1"]
    assert run.targets() == roles
    run.finish()
    assert_all_end(started)
    assert run.targets() == []
    check_run_directory(run.run_dir, steps=6, max_staleness=2)
    check_model(run.run_dir / "model", model)
    assert "held-out accuracy, 12 prompts" in run.text()
    assert "sampled accuracy, 6 prompts, 4 samples at temperature 1" in run.text()
    evals = [json.loads(line) for line in (run.run_dir / "evals.jsonl").read_text().splitlines()]
    assert sorted((row["name"], row["version"]) for row in evals) == [
        *(("held-out", version) for version in (0, 3, 6)),
        *(("sampled", version) for version in (0, 2, 4, 6)),
    ]
    assert all(row["num_answered"] == row["num_prompts"] for row in evals)
    rows = [row for row in run.rows() if "publish/canary_difference" in row]
    assert rows
    assert all(row["publish/canary_difference"] < 1e-3 for row in rows)
    assert all(row["publish/evictions"] == 0 for row in rows)


@pytest.mark.engine
def test_an_actor_killed_while_training_is_restarted_and_nothing_is_lost_or_twice(launch):
    # A wide gate and a slow judge: an actor holds leases at nearly any time.
    judge = 'reward.functions=[{use="reward_functions:slow_vowels"}]'
    run = launch("run.max_steps=40", "buffer.max_staleness=30", judge, engine="vllm")
    run.until_training()
    doomed = run.find("actor", "1")
    family = [doomed, *doomed.children(recursive=True)]

    def stopped_with_leases() -> bool:
        doomed.suspend()
        time.sleep(1)  # what it has sent has come
        held = "SELECT count(*) FROM leases WHERE state = 'open' AND peer LIKE 'actor-1.%'"
        _, [(count,)] = LedgerReader(run.run_dir).query(held)
        if count == 0:
            doomed.resume()
            time.sleep(0.5)
        return count > 0

    run.until(stopped_with_leases, "with leases")
    doomed.kill()
    assert_all_end(family)
    run.until(lambda: run.text().count("joined") >= 3 or len(run.rows()) >= 40, "joined again")
    started = run.processes()
    run.finish()
    assert_all_end(started)
    leases = [row["lease_id"] for step in range(40) for row in trained_rows(run.run_dir, step)]
    assert len(leases) == 40 * 16
    assert len(set(leases)) == 40 * 4
    steps = [row for row in run.rows() if "loss" in row]
    assert steps[-1]["leases_expired"] >= 1
    assert not any(audit(RunDir.read(run.run_dir)).wrong.values())


@pytest.mark.slow
def test_the_only_actor_of_a_sharded_learner_is_killed_and_gets_its_weights_while_all_wait(launch):
    """No batch can be complete without it, and no rank may gather weights without the others."""
    settings = ("run.max_steps=30", "learner.parallel=fsdp", "launch.actors=1", "eval=[]")
    run = launch(*settings, "launch.learners=2", "buffer.max_staleness=0")
    run.until_training()
    run.find("actor", "0").kill()
    assert run.wait() == 0, run.text()[-4000:]
    assert [row["step"] for row in run.rows() if "loss" in row] == list(range(30))
    last = [row for row in run.rows() if "publish/proofs" in row][-1]
    assert last["publish/proofs"] >= 30
    assert last["publish/rejections"] == 0
    assert not any(audit(RunDir.read(run.run_dir)).wrong.values())


@pytest.mark.engine
def test_nothing_is_left_when_the_launcher_is_killed(launch):
    run = launch("run.max_steps=5000", engine="vllm")
    started = run.until_training()
    assert len(started) >= 5
    run.process.kill()
    run.process.wait()
    assert_all_end(started)


@pytest.mark.slow
def test_the_embedded_model_is_not_made_on_when_the_launcher_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("ASYNCGRPO_CACHE", str(tmp_path))
    run = Launch(tmp_path, Path("tiny"))
    children = psutil.Process(run.process.pid).children
    run.until(lambda: any("asyncgrpo.data.tiny" in words(p) for p in children()), "begun")
    started = children()
    run.process.kill()
    run.process.wait()
    assert_all_end(started)


@pytest.mark.slow
def test_a_learner_rank_killed_ends_the_run_with_its_last_log_lines(launch):
    run = launch("run.max_steps=5000", "launch.max_restarts=0")
    started = run.until_training()
    run.ranks()[-1].kill()
    assert run.wait() == 3
    assert "learner-1" in run.targets()
    assert_all_end(started)
    assert re.search(r"error: learner .*last lines of .*learner\.log", run.text())


def check_made_again(run: Launch, steps: int) -> None:
    """After roll-backs: every step is there once, of groups that were trained nowhere else."""
    found = audit(RunDir.read(run.run_dir))
    assert not any(found.wrong.values()), found.wrong
    assert found.next_step == steps
    assert found.rollbacks
    assert all(step % 4 == 0 and step < former for step, former in found.rollbacks)
    assert [row["step"] for row in run.rows() if "loss" in row] == list(range(steps))
    rows = [row for step in range(steps) for row in trained_rows(run.run_dir, step)]
    names = [(row["lease_id"], row["sample"]) for row in rows]
    assert len(set(names)) == len(names) == 16 * steps


def until_step(run: Launch, step: int) -> None:
    checkpoint = run.run_dir / f"checkpoints/step_{step // 4 * 4}"
    run.until(checkpoint.exists, "saved")
    run.until(lambda: [row for row in run.rows() if row["step"] >= step], "trained")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_killed_learner_rank_goes_on_from_the_checkpoint_with_the_same_batches(parallel, launch):
    run = launch("run.max_steps=40", "checkpoint.every=4", f"learner.parallel={parallel}")
    started, doomed = run.until_training(), run.ranks()[-1]
    first = run.stop_after(5, doomed)
    run.until(lambda: len(trained_rows(run.run_dir, first)) == 16, "written")
    before = trained_rows(run.run_dir, first)
    doomed.kill()
    run.finish()
    assert_all_end(started)
    check_made_again(run, 40)
    again = [row["lease_id"] for row in trained_rows(run.run_dir, first)]
    assert again == [row["lease_id"] for row in before]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_engines_that_sleep_in_turn_survive_kills_of_actors_and_the_learner(parallel, launch):
    turns = ("actor.sleep=true", "launch.max_restarts=9", f"learner.parallel={parallel}")
    run = launch(
        "run.max_steps=40",
        "checkpoint.every=4",
        "weights.ready_timeout_seconds=2",
        "weights.loaded_timeout_seconds=4",
        "eval.every=7",
        *turns,
    )
    until_step(run, 4)
    rank = run.ranks()[-1]
    for index in "01":
        doomed, seen = run.find("actor", index), len(run.rows())
        doomed.send_signal(signal.SIGSTOP)  # asleep or awake, it is not there when it is told
        run.until(lambda seen=seen: len(run.rows()) > seen, "trained without it")
        doomed.kill()
    run.stop_after(9, rank)
    rank.kill()
    started = run.processes()
    run.finish()
    assert_all_end(started)
    check_made_again(run, 40)
    rows = [row for row in run.rows() if "loss" in row]
    assert all(row["publish/sleep_seconds"] > 0 for row in rows)
    evals = [row["eval/version"] for row in run.rows() if "eval/version" in row]
    assert {0, 40} <= set(evals)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_ended_is_resumed_with_its_ledger(number, launch):
    grace = 60 if number == signal.SIGTERM else 3  # for its last checkpoint
    settings = ("checkpoint.every=4", f"launch.grace_seconds={grace}")
    run = launch("run.max_steps=5000", *settings)
    until_step(run, 5)
    started = run.processes()
    os.kill(run.process.pid, number)
    run.wait()
    assert_all_end(started)
    newest = max(map(step_of, saved(run.run_dir / FOLDER)), default=0)
    ended = audit(RunDir.read(run.run_dir)).next_step
    num_ahead = ended - newest  # the last may be formed only
    assert num_ahead <= 1 or number == signal.SIGKILL
    resumed = launch(f"run.max_steps={ended + 4}", *settings, resume=True)
    resumed.finish()
    found = audit(RunDir.read(run.run_dir))
    assert not any(found.wrong.values()), found.wrong
    assert found.next_step == ended + 4
    assert bool(found.rollbacks) == bool(num_ahead) or num_ahead == 1
    assert [row["step"] for row in resumed.rows() if "loss" in row] == list(range(ended + 4))


@pytest.mark.slow
def test_a_stopped_learner_is_named_by_the_stall_report_and_the_run_goes_on(launch):
    run = launch("run.max_steps=100", "launch.stall_seconds=3")
    run.until_training()
    doomed = run.ranks()[0]

    def reports() -> list[str]:  # the start may have been slow enough for one, too
        texts = [path.read_text() for path in sorted(run.run_dir.glob("stalls/*.txt"))]
        return [text for text in texts if "for the learner to train step" in text]

    known = len(reports())
    doomed.suspend()
    try:
        run.until(lambda: len(reports()) > known, "reported")
    finally:
        doomed.resume()
    text = reports()[known]
    assert f"(pid {doomed.pid}, stopped by a signal)\nno answer" in text
    assert re.search(r"-- actor-0 \(pid \d+, [^)]*\)\nThread", text)
    run.finish()
    assert "the run goes on after" in run.text()


@pytest.mark.slow
def test_targets_follow_restarted_roles_and_a_resume_with_fewer_actors(tmp_path, model):
    (tmp_path / "runs").mkdir()
    settings = ["run.max_steps=5000", "checkpoint.every=1", "launch.grace_seconds=60"]
    run = Launch(tmp_path / "runs", model, *settings)
    try:
        run.until_training()
        roles = ["actor-0", "actor-1", "buffer", "learner-0", "learner-1"]
        run.until(lambda: run.healthy() == roles, "healthy")
        before = run.told()
        run.find("actor", "1").kill()
        run.find("learner", "-u").kill()
        moved = ["actor-1", "learner-0", "learner-1"]
        run.until(
            lambda: (
                sorted(role for role, text in run.told().items() if text != before[role]) == moved
                and len(run.healthy()) == 5
            ),
            "listened elsewhere",
        )
        os.kill(run.process.pid, signal.SIGINT)
        assert run.wait() == 130
        assert run.targets() == []
        for role, text in before.items():  # as if that life had failed
            (run.run_dir / "targets" / f"{role}.json").write_text(text)
        steps = len(run.rows())
        command = [sys.executable, "-m", "asyncgrpo.cli", "launch", "--dry-run", "--resume"]
        command.append(str(tmp_path / "runs" / "latest"))
        said = subprocess.check_output(command, text=True, cwd=TESTS)
        assert f"going on with {run.run_dir} at" in said
        run = Launch(tmp_path / "runs", model, *settings, "launch.actors=1", resume=True)
        run.until(lambda: len(run.rows()) > steps, "went on")
        roles.remove("actor-1")
        run.until(lambda: run.healthy() == run.targets() == roles, "healthy")
    finally:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGTERM)
            run.wait()


@pytest.mark.parametrize(
    ("engine", "parallel"),
    [
        pytest.param("toy", "fsdp", marks=pytest.mark.slow),
        pytest.param("vllm", "ddp", marks=pytest.mark.engine),
    ],
)
def test_engines_load_the_weights_from_disk(engine, parallel, launch):
    settings = ("weights.transport=disk", f"learner.parallel={parallel}")
    run = launch(*settings, "run.max_steps=4", engine=engine)
    run.finish()
    check_run_directory(run.run_dir, steps=4, max_staleness=2)
    names = {folder.name for folder in (run.run_dir / "weights").iterdir()}
    assert {"v3", "v4"} <= names  # and what an actor may still be reading
    assert len(names) < 5
    last = [row for row in run.rows() if "publish/proofs" in row][-1]
    assert last["publish/proofs"] >= 4
    assert last["publish/rejections"] == last["publish/evictions"] == 0


@pytest.mark.slow
def test_ctrl_c_stops_everything_in_order(launch):
    run = launch("run.max_steps=5000", "launch.grace_seconds=60")
    started = run.until_training()
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait() == 130
    assert run.targets() == []
    assert_all_end(started)
    assert "Traceback" not in run.text()
    steps = [row["step"] for row in run.rows() if "loss" in row]
    assert steps == list(range(len(steps)))


@pytest.mark.slow
def test_a_run_that_cannot_make_a_single_step_says_so_and_is_bad_input(launch, tmp_path):
    write_jsonl(tmp_path / "one.jsonl", {"prompt": "a", "answer": "b"})
    run = launch(f"data.train={tmp_path / 'one.jsonl'}", "data.epochs=1", "data.eval=none")
    assert run.wait() == 2
    assert "error: nothing was trained: the prompts are used up" in run.text().splitlines()[-1]
    assert "restart" not in run.text()


@pytest.mark.slow
def test_a_run_with_one_learner_and_strict_ticket_order_at_staleness_zero(launch):
    run = launch(
        "launch.learners=1", "launch.actors=2", "buffer.max_staleness=0", "buffer.order=ticket"
    )
    run.finish()
    check_run_directory(run.run_dir, steps=6, max_staleness=0)


def listening(processes: list[psutil.Process]) -> set[str]:
    """Addresses on which these processes can be reached."""
    sockets = []
    for process in processes:
        with suppress(psutil.Error):  # it has ended
            sockets += process.net_connections("inet")
    return {c.laddr.ip for c in sockets if c.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)}


def attack(run_dir: Path, seconds: float) -> None:
    """Garbage and clients without keys, at every door that the run has."""
    endpoints = json.loads((run_dir / "endpoints.json").read_text())
    addresses = [endpoints["buffer"], endpoints["weights"]]
    doors = [(host, int(port)) for host, port in (a[6:].split(":") for a in addresses)]
    doors.append((endpoints["store"][0], endpoints["store"][1]))
    rng, end = random.Random(1), time.monotonic() + seconds
    clients = [DealerClient(address, "actor-0", "somebody") for address in addresses]
    while time.monotonic() < end:
        for door in doors:
            with socket.create_connection(door, timeout=60) as bare:
                bare.sendall(rng.randbytes(rng.randint(1, 500)))
        for client in clients:
            client.post(Packet(kind="hello", fields={"actor": "actor-0"}))
            client.post(Packet(kind="lease", fields={"version": 0, "max": 100}))
            client.post(Packet(kind="join", fields={"actor": "actor-0"}))
            assert client.poll(0.01) == []
    for client in clients:
        client.close()


def scraped(run_dir: Path) -> str:
    targets = [json.loads(path.read_text()) for path in (run_dir / "targets").glob("*.json")]
    urls = [f"http://{target['targets'][0]}/metrics" for (target,) in targets]
    assert all(url.startswith("http://127.0.0.1:") for url in urls)
    return "".join(urllib.request.urlopen(url, timeout=60).read().decode() for url in urls)


@pytest.mark.engine
def test_an_encrypted_run_shows_nothing_to_strangers_and_does_not_mind_them(launch):
    run = launch("run.max_steps=120", "launch.encrypt=true", engine="vllm")
    started = run.until_training()
    assert listening([psutil.Process(run.process.pid), *started]) == {"127.0.0.1"}
    shown = " ".join(
        " ".join([*words(p), *p.environ().values()]) for p in filter(is_alive, started)
    )
    metrics = scraped(run.run_dir)
    attack(run.run_dir, 2.0)
    run.finish()
    assert_all_end(started)
    check_run_directory(run.run_dir, steps=120, max_staleness=2)
    assert {row.get("publish/evictions", 0) for row in run.rows()} == {0}
    written = [p for p in run.run_dir.rglob("*") if p.is_file() and p.parent.name != "keys"]
    shown += run.text() + "".join(p.read_bytes().decode("latin-1") for p in written)
    keys = [word for path in (run.run_dir / "keys").iterdir() for word in path.read_text().split()]
    assert len(set(keys)) == 4
    assert not [key for key in keys if key in shown]
    lines = (run.run_dir / "trajectories/step_0.jsonl").read_text().splitlines()
    prompts = [message["content"] for line in lines for message in json.loads(line)["prompt"]]
    assert "asyncgrpo_buffer_leases_total" in metrics
    assert not [prompt for prompt in prompts if prompt in metrics]


BAD_INPUT = {
    ("--set", "learner.lrr=1"): "did you mean learner.lr?",
    ("--config", "none.toml"): "none.toml does not exist",
    ("--actors", "none"): "Invalid value for '--actors'",
    ("--actors", "0"): "launch.actors=0",
    ("--set", "model.path=/nowhere"): "'/nowhere' does not exist",
    ("--set", "data.train=nothing.jsonl"): "nothing.jsonl",
    ("--set", "data.tasks.kinds={sorting=1}"): "sort",
    ("--set", 'reward.functions=[{use="tsk"}]'): "task",
    ("--set", 'reward.functions=[{use="reward_functions:raises"}]'): "KeyError",
    ("--set", 'reward.functions=[{use="reward_functions:too_few"}]'): "too_few",
    ("--set", 'reward.functions=[{use="reward_functions:not_finite"}]'): "nan",
    ("--set", 'reward.functions=[{use="reward_functions:nothing"}]'): "nothing",
    ("--set", 'reward.routes={"task/ad"="task"}'): "has no judge; did you mean 'task/ad'?",
    ("--set", 'reward.routes={default={use="gsm8k",options={extrakt="x"}}}'): "'extract'?",
    ("--serial", "--set", "actor={engine='toy', sleep=true}"): "not for --serial; leave one",
    ("--set", "actor.sleep=true"): "needs launch.gpus >= 1 (now 0) and launch.share_gpus",
    ("--set", "launch.gpus=64"): "launch.gpus=64",
    ("--set", "weights.publish_every=9"): "deadlock",
    ("--set", "algo.group_size=1"): "algo.group_size=1",
    ("--set", "launch.host=0.0.0.0"): "'0.0.0.0' must be the IPv4 address of this machine",
    ("--set", "launch.host=192.0.2.77"): "launch.host=192.0.2.77 cannot be listened on",
}


@pytest.mark.parametrize("arguments", BAD_INPUT, ids=lambda a: a[-1])
def test_bad_input_is_refused_before_anything_is_started_or_written(
    arguments, tmp_path, monkeypatch, asyncgrpo
):
    monkeypatch.chdir(tmp_path)
    code, out, err = asyncgrpo("launch", *arguments)
    assert code == 2, out + err
    assert BAD_INPUT[arguments] in err
    assert "Traceback" not in err
    assert "started" not in out
    assert list(tmp_path.iterdir()) == []
