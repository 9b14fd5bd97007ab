"""A serial run that was killed or stopped and goes on is the one that was not, to the last bit."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_run import BY_THE_CLOCK, SMALL

from asyncgrpo.data.tiny import build_untrained
from asyncgrpo.rows import whole_rows

pytestmark = pytest.mark.slow
STEPS, SECONDS = 12, 600
SETTINGS = [
    *SMALL,
    f"run.max_steps={STEPS}",
    "checkpoint.every=4",
    "algo.kl_coef=0.01",
    "actor.concurrency=6",
    "eval.num_prompts=6",
    "eval.every=2",  # also where a checkpoint is made
]


def launch(run_dir: Path, model: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "asyncgrpo.cli", "launch", "--serial", *arguments]
    for setting in [*SETTINGS, f"model.path={model}"]:
        command += ["--set", setting]
    return subprocess.Popen([*command, "--run-dir", str(run_dir)], cwd=Path(__file__).parent.parent)


def rows(run_dir: Path, name: str) -> list[dict]:
    return whole_rows(run_dir / name)


def end_after(step: int, run_dir: Path, model: Path, number: signal.Signals) -> int:
    """Ends a run with a signal when it has made so many steps; its exit code."""
    process, end = launch(run_dir, model), time.monotonic() + SECONDS
    while len(rows(run_dir, "metrics.jsonl")) < step:
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(SECONDS)


def told(run_dir: Path) -> dict:
    """All that a run leaves, but what clocks say."""
    metrics = [
        {n: v for n, v in row.items() if n not in BY_THE_CLOCK}
        for row in rows(run_dir, "metrics.jsonl")
    ]
    evals = [
        {n: v for n, v in row.items() if n != "seconds"} for row in rows(run_dir, "evals.jsonl")
    ]
    files = sorted((run_dir / "trajectories").glob("step_*.jsonl"))
    weights = load_file(run_dir / "model" / "model.safetensors")
    return {
        "metrics": metrics,
        "evals": evals,
        "trajectories": {file.name: file.read_text() for file in files},
        "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
    }


def test_a_run_that_was_interrupted_equals_one_that_was_not_to_the_last_bit(tmp_path):
    model = build_untrained(tmp_path / "untrained", True, 5)
    assert launch(tmp_path / "whole", model).wait(SECONDS) == 0
    expected = told(tmp_path / "whole")
    assert len(expected["trajectories"]) == STEPS
    assert sum("loss" in row for row in expected["metrics"]) == STEPS

    killed = tmp_path / "killed"
    assert end_after(7, killed, model, signal.SIGKILL) == -signal.SIGKILL  # past the checkpoint
    assert (killed / "checkpoints" / "step_4").is_dir()
    assert launch(killed, model, "--resume", "auto").wait(SECONDS) == 0
    for name, value in told(killed).items():
        assert value == expected[name], name
    audit = [sys.executable, "-m", "asyncgrpo.cli", "audit", str(killed)]
    assert subprocess.run(audit, check=False).returncode == 0


def test_a_run_that_was_stopped_keeps_its_step_and_goes_on(tmp_path):
    model = build_untrained(tmp_path / "untrained", True, 5)
    stopped = tmp_path / "stopped"
    assert end_after(5, stopped, model, signal.SIGTERM) == 130
    (newest,) = sorted((stopped / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))[-1:]
    assert int(newest.name[5:]) == len(rows(stopped, "metrics.jsonl")) >= 5
    assert launch(stopped, model, "--resume", "auto").wait(SECONDS) == 0
    assert len([row for row in rows(stopped, "metrics.jsonl") if "loss" in row]) == STEPS


def test_recorded_steps_are_made_again_to_the_last_bit(tmp_path):
    run = tmp_path / "run"
    assert launch(run, build_untrained(tmp_path / "untrained", True, 5)).wait(SECONDS) == 0

    def replay(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "asyncgrpo.cli", "replay", str(run), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, said = replay("--from-step", "9", "--to-step", "11", "--out", str(tmp_path / "again"))
    assert (code, said.count("the same to the last bit")) == (0, 3), said
    again = [json.loads(line) for line in (tmp_path / "again" / "rows.jsonl").open()]
    recorded = {row["step"]: row for row in rows(run, "metrics.jsonl") if "loss" in row}
    assert [row["step"] for row in again] == [9, 10, 11]
    assert [row["loss"] for row in again] == [recorded[step]["loss"] for step in (9, 10, 11)]
    lines = (run / "metrics.jsonl").read_text()  # as ranks that pack their own parts record it
    (run / "metrics.jsonl").write_text(re.sub(r'("padding_share": )[\d.]+', r"\g<1>0.7", lines))
    code, said = replay("--from-step", "10", "--to-step", "11")
    assert said.count("the same to the last bit") == 2, said
    code, said = replay("--from-step", "9", "--to-step", "10", "--set", "learner.lr=0.1")
    assert (code, said.count("the same to the last bit")) == (0, 0), said
    code, said = replay("--from-step", "11", "--to-step", "99")
    assert (code, "--to-step 99 must be <= 11, the last step" in said) == (2, True), said
    shutil.rmtree(run / "checkpoints")
    with sqlite3.connect(run / "ledger.sqlite") as ledger:
        ledger.execute("DELETE FROM payloads WHERE ticket = (SELECT min(ticket) FROM payloads)")
    code, said = replay("--from-step", "11", "--to-step", "11")
    assert (code, "the groups of step 0 are not in the ledger" in said) == (2, True), said
