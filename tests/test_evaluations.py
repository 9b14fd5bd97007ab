"""Evaluation blocks of whole runs, and `asyncgrpo eval` on the models that they start and save."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import make_run, rows_of
from typer.testing import CliRunner

from asyncgrpo.cli import app
from asyncgrpo.config import Config, from_mapping, load_config
from asyncgrpo.data.tiny import build_untrained
from asyncgrpo.errors import AsyncGRPOError, RunError
from asyncgrpo.evaluate_model import Desk, run
from asyncgrpo.rundir import RunDir
from asyncgrpo.serial import run_serial
from asyncgrpo.wire.codec import Packet

LENIENT = {"use": "reward_functions:vowels"}
SETTINGS = {
    "run": {"max_steps": 5, "seed": 3},
    "data": {"max_prompt_tokens": 32},
    "sampling": {"max_completion_tokens": 8},
    "reward": {"functions": [LENIENT]},
    "actor": {"engine": "toy", "concurrency": 10},
    "buffer": {"groups_per_step": 2, "max_staleness": 1},
    "algo": {"group_size": 4, "drop_uniform_groups": False},
    "learner": {"lr": 3e-3},
    "launch": {"actors": 1, "learners": 1},
    "eval": [
        {"every": 2, "num_prompts": 12},
        {
            "name": "sampled",
            "every": 3,
            "num_prompts": 6,
            "num_samples": 4,
            "k": [1, 4],
            "sampling": {"temperature": 1.0, "max_completion_tokens": 40},
            "reward": {"functions": [{"use": "length", "options": {"max_length": 6}}]},
        },
        {"name": "ends", "every": 0, "num_prompts": 2},
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_untrained(tmp_path_factory.mktemp("model") / "untrained", True, 5)


def settings(model: Path, **rooms) -> Config:
    return from_mapping({**SETTINGS, "model": {"path": str(model)}, **rooms})


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory) -> RunDir:
    made = make_run(tmp_path_factory.mktemp("serial"), settings(model))
    run_serial(made)
    return made


def reports(trained: RunDir, name: str) -> dict[int, dict]:
    found = [row for row in rows_of(trained.path / "evals.jsonl") if row["name"] == name]
    by_version = {row["version"]: row for row in found}
    assert len(by_version) == len(found)
    return by_version


def test_each_block_is_evaluated_at_the_start_every_n_steps_and_at_the_end(trained):
    assert list(reports(trained, "held-out")) == [0, 2, 4, 5]
    assert list(reports(trained, "sampled")) == [0, 3, 5]
    assert list(reports(trained, "ends")) == [0, 5]
    rows = rows_of(trained.path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(5))
    last = rows[-1]
    assert last["eval/accuracy"] == reports(trained, "held-out")[5]["accuracy"]
    assert last["eval/sampled/pass@4"] == reports(trained, "sampled")[5]["pass_at_k"]["4"]


def test_each_block_has_its_own_samples_limit_and_reward(trained):
    for row in reports(trained, "sampled").values():
        assert (row["num_prompts"], row["num_answered"], row["num_samples"]) == (6, 6, 4)
        assert row["reward_mean"] == row["accuracy"] == row["pass_at_k"]["1"]  # length: 0 or 1
        assert row["pass_at_k"]["4"] >= row["pass_at_k"]["1"]
        assert row["mean_tokens"] > 8  # more than training may have
    for row in reports(trained, "held-out").values():
        assert (row["num_answered"], row["num_samples"], row["temperature"]) == (12, 1, 0)
        assert row["mean_tokens"] <= 8


@pytest.mark.parametrize("version", [0, 5])
def test_a_model_alone_gets_the_report_that_its_version_got_in_the_run(trained, model, version):
    folder = trained.model_path if version else model
    config = settings(folder, eval={"num_prompts": 12})
    alone = run(config, Desk(config))
    in_run = reports(trained, "held-out")[version]
    same = ("accuracy", "accuracy_by_source", "reward_mean", "mean_tokens", "truncated_share")
    assert {name: alone[name] for name in same} == {
        name: pytest.approx(in_run[name]) for name in same
    }


def evaluate(model: Path, *arguments: str):
    sets = ["data.max_prompt_tokens=32", "sampling.max_completion_tokens=8"]
    options = [part for text in sets for part in ("--set", text)]
    command = ["eval", "--model", str(model), "--engine", "toy", *options, *arguments]
    return CliRunner().invoke(app, command)


def test_eval_prints_a_table_and_writes_every_completion(model, tmp_path):
    out = tmp_path / "new" / "rows.jsonl"
    done = evaluate(model, "--data", "tasks", "--num-prompts", "5", "-k", "2", "--out", str(out))
    assert done.exit_code == 0, done.output
    for part in ("5 prompts, 2 samples at temperature 1", "pass@2", "truncated", str(out)):
        assert part in done.output
    rows = rows_of(out)
    assert [row["sample"] for row in rows] == [0, 1] * 5
    assert len({row["prompt_id"] for row in rows}) == 5
    for row in rows:
        assert row["correct"] == (row["reward_parts"]["task"] > 0)
        assert row["reward"] == pytest.approx(sum(row["reward_parts"].values()))
        assert row["num_tokens"] <= 8


def test_eval_takes_its_reward_from_the_settings_and_all_of_a_file(model, tmp_path):
    file, config = tmp_path / "d.jsonl", tmp_path / "my.toml"
    file.write_text("".join(f'{{"question": "{i}?", "answer": "{i}"}}\n' for i in range(400)))
    config.write_text(
        '[reward]\nfunctions = [{ use = "length", options = { max_length = 0 } }]\n'
        '[[eval]]\ndata = "not-this.jsonl"\n'
    )
    shared = ["--data", str(file), "--config", str(config), "--max-tokens", "1"]
    done = evaluate(model, *shared, "--set", "reward.correct_above=-1")
    assert done.exit_code == 0, done.output
    assert "400 prompts, greedy" in done.output
    assert "100.0%" in done.output
    assert "3 prompts, greedy" in evaluate(model, *shared, "--num-prompts", "3").output


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("data='FILE'", "'task' (scope 'sample') needs a column 'kind'"),
        ("reward={functions=[{use='exakt'}]}", "did you mean 'exact'?"),
        ("data='FILE', reward={functions=[{use='exact'}]}", ""),
    ],
)
def test_launch_checks_each_block_with_the_reward_that_scores_it(block, message, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('{"question": "1", "answer": "1"}\n')
    blocks = f"eval=[{{}}, {{name='b', {block.replace('FILE', str(file))}}}]"
    done = CliRunner().invoke(app, ["launch", "--dry-run", "--set", blocks])
    assert (done.exit_code == 0) == (message == "")
    assert message in str(done.exception)


def test_eval_says_which_prompts_were_not_answered(model, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text(
        '{"question": "1", "answer": "1"}\n{"question": "%s", "answer": "1"}\n' % ("1" * 99)
    )
    reward = ["--data", str(file), "--set", 'reward.functions=[{use="integer"}]']
    done = evaluate(model, *reward)
    assert "1 prompts, greedy" in done.output
    assert "1 of 2 prompts were not answered: data.max_prompt_tokens=32" in done.output
    none = evaluate(model, *reward, "--set", "data.max_prompt_tokens=2")
    assert isinstance(none.exception, RunError)
    assert "2 of 2 prompts" in str(none.exception)


def test_eval_says_which_answers_were_not_scored_and_what_to_do(model):
    sets = [f"model.path={model}", "eval={}", "eval.data=tasks", "eval.num_prompts=2"]
    desk = Desk(load_config(None, [*sets, "reward.timeout_seconds=7"]))
    for lease_id, reason in (("e1", "reward_lost"), ("e2", "reward_contract")):
        desk.post(Packet(kind="fail", fields={"lease_id": lease_id, "reason": reason}))
    lost, broken = desk.unanswered()
    assert lost == (
        "1 of 2 prompts were answered, but not scored: their reward function took more than "
        "reward.timeout_seconds=7 or ended its process; make it quicker, raise the limit, or set "
        "reward.on_error"
    )
    assert "1 of 2 prompts were answered, but not scored: a reward function failed" in broken


BAD = {
    ("--model", "/nowhere", "--data", "tasks"): "'/nowhere' does not exist",
    ("--data", "nothing.jsonl"): "nothing.jsonl does not exist",
    ("--data", "none"): "--data names nothing",
    ("--data", "tasks", "-k", "4", "--num-samples", "2"): "k=4 must be <= num_samples=2",
    ("--data", "tasks", "-k", "4", "--temperature", "0"): "num_samples=4 with sampling.temperature",
    ("--data", "tasks", "--set", "eval.evry=1"): "did you mean eval.every?",
    ("--data", "tasks", "--set", "reward.functions=[{use='exakt'}]"): "'exact'",
    ("--data", "tasks", "--out", "/proc/nothing/rows.jsonl"): "cannot be written",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_eval_refuses_bad_input_before_the_model_is_loaded(arguments, model, monkeypatch):
    monkeypatch.setattr("asyncgrpo.evaluate_model.load_engine", None)
    done = evaluate(model, *arguments)
    assert isinstance(done.exception, AsyncGRPOError)
    assert done.exception.exit_code == 2
    assert BAD[arguments] in str(done.exception)
