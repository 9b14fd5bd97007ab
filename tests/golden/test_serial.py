"""Serial mode with the toy engine: twenty steps, exactly repeatable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import make_run, rows_of
from safetensors.torch import load_file

from asyncgrpo.buffer.audit import audit
from asyncgrpo.data.tiny import build_untrained
from asyncgrpo.rundir import RunDir
from asyncgrpo.serial import run_serial

GOLDEN = Path(__file__).with_name("serial_20_steps.json")
EXACT = ("step", "version", "tokens_trained", "staleness/max", "leases_trained", "leases_evicted")
CLOSE = ("loss", "rewards/mean", "objective/kl", "objective/entropy", "ess", "grad_norm", "lr")


def train(folder: Path, model: Path) -> RunDir:
    run = make_run(
        folder,
        run={"max_steps": 20, "seed": 3},
        model={"path": str(model)},
        data={"max_prompt_tokens": 32},
        sampling={"max_completion_tokens": 8},
        reward={"functions": [{"use": "reward_functions:vowels"}]},
        actor={"engine": "toy", "concurrency": 10},
        buffer={"groups_per_step": 4, "max_staleness": 2},
        algo={"group_size": 4, "drop_uniform_groups": False},
        learner={"lr": 3e-3},
        launch={"actors": 1, "learners": 1},
        eval={"every": 8, "num_prompts": 12},
    )
    run_serial(run)
    return run


def rows(run: RunDir) -> list[dict[str, float]]:
    steps = [row for row in rows_of(run.path / "metrics.jsonl") if "loss" in row]
    return [{n: row[n] for n in (*EXACT, *CLOSE) if n in row} for row in steps]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> tuple[RunDir, RunDir]:
    base = tmp_path_factory.mktemp("serial")
    model = build_untrained(base / "model", True, 5)
    return train(base / "one", model), train(base / "two", model)


def test_two_serial_runs_are_equal_to_the_last_bit(two_runs):
    one, two = two_runs
    assert rows(one) == rows(two)
    first, second = (load_file(run.model_path / "model.safetensors") for run in two_runs)
    assert all((first[name] == second[name]).all() for name in first)
    for step in range(20):
        name = f"trajectories/step_{step}.jsonl"
        assert (one.path / name).read_text() == (two.path / name).read_text()


def test_twenty_steps_are_as_they_were(two_runs):
    """Whole numbers exactly; floats to 1e-4, for processors round differently."""
    expected = json.loads(GOLDEN.read_text())
    found = rows(two_runs[0])
    assert len(found) == len(expected) == 20
    for row, golden in zip(found, expected, strict=True):
        assert {n: row.get(n) for n in EXACT} == {n: golden.get(n, 0) for n in EXACT}
        for name in CLOSE:
            assert row[name] == pytest.approx(golden[name], rel=1e-4, abs=1e-6), name


def test_on_policy_tokens_have_a_ratio_of_exactly_one(two_runs):
    """The toy engine and the learner compute the same numbers: step 0 is on-policy to the bit."""
    lines = (two_runs[0].path / "metrics.jsonl").read_text().splitlines()
    first = next(row for row in map(json.loads, lines) if "loss" in row)
    assert first["staleness/max"] == 0
    assert first["logprob_diff_max"] == 0.0
    assert first["ess"] == 1.0
    assert first["chi2"] == 0.0
    assert first["lag_0/kl"] == 0.0
    assert first["lag_0/tokens"] == first["tokens_trained"]


def test_the_serial_run_learns_and_keeps_its_staleness_bound(two_runs):
    found = rows(two_runs[0])
    first = sum(row["rewards/mean"] for row in found[:4])
    last = sum(row["rewards/mean"] for row in found[-4:])
    assert last > first
    assert 0 < max(row["staleness/max"] for row in found) <= 2


def test_the_ledger_of_a_serial_run_is_the_same_and_proves_it(two_runs):
    one, two = (audit(run) for run in two_runs)
    assert one == two
    assert not any(one.wrong.values())
    assert one.next_step == 20
    assert one.total("leases")["trained"] == 80
