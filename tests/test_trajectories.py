"""What is written about each completion: by hand-made groups, and in a whole serial run."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import make_group, make_lease, make_run, rows_of
from transformers import AutoModelForCausalLM

from asyncgrpo.config import from_mapping
from asyncgrpo.data.tiny import build_untrained
from asyncgrpo.errors import DataError
from asyncgrpo.observe.samples import Samples
from asyncgrpo.observe.trajectories import TrajectoryWriter
from asyncgrpo.rundir import RunDir
from asyncgrpo.serial import run_serial
from asyncgrpo.types import Completions, EndedGroup

FIELDS = [
    *("step", "group", "sample", "status", "reason", "prompt_id", "data_source", "prompt"),
    *("answer", "completion", "reward", "reward_parts", "advantage", "num_prompt_tokens"),
    *("num_tokens", "finish_reason", "version_min", "version_max", "staleness", "masked_share"),
    *("lease_id", "actor"),
]


def read(folder: Path, step: int) -> list[dict]:
    return rows_of(folder / "trajectories" / f"step_{step}.jsonl")


def ended(group, status="trained", reason="", advantages=(0.5, -0.5)):
    values = np.array(advantages, np.float32) if status == "trained" else None
    return EndedGroup(group=group, status=status, reason=reason, advantages=values)


def test_a_row_holds_all_there_is_to_know_of_a_completion(tmp_path):
    group = make_group(make_lease(3), versions=[[4, 4, 5], [5]], scores=[1.0, -1.0])
    TrajectoryWriter(tmp_path, from_mapping({}))(6, [ended(group)])
    one, two = read(tmp_path, 6)
    assert list(one) == FIELDS
    assert one == {
        **dict(step=6, group=0, sample=0, status="trained", reason="", lease_id="t3"),
        **dict(prompt_id="p3", data_source="task/add", answer="4", completion="7"),
        "prompt": [{"role": "user", "content": "Compute: 3 + 1"}],
        **dict(reward=1.0, reward_parts={"task": 1.0}, advantage=0.5, actor="actor-0"),
        **dict(num_prompt_tokens=4, num_tokens=3, finish_reason="stop"),
        **dict(version_min=4, version_max=5, staleness=2, masked_share=0.0),
    }
    facts = {name: two[name] for name in ("sample", "reward", "advantage", "staleness")}
    assert facts == {"sample": 1, "reward": -1.0, "advantage": -0.5, "staleness": 1}


def test_dropped_groups_are_in_the_file_of_the_step_at_which_they_ended(tmp_path):
    writer = TrajectoryWriter(tmp_path, from_mapping({}))
    groups = [make_group(make_lease(i)) for i in range(5)]
    writer(0, [ended(groups[0], "filtered", "all_wrong")])
    assert len(read(tmp_path, 0)) == 2  # at once: the run may be killed before step 0 is trained
    writer(0, [ended(groups[1]), ended(groups[2])])
    writer(0, [ended(groups[3], "filtered", "all_correct")])
    writer(1, [ended(groups[4], "evicted", "stale")])
    rows = read(tmp_path, 0)
    assert [row["group"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [row["lease_id"] for row in rows[::2]] == ["t0", "t1", "t2", "t3"]
    (first, _), (other, _) = rows[:2], read(tmp_path, 1)
    assert (first["status"], first["reason"]) == ("filtered", "all_wrong")
    assert first["advantage"] is first["masked_share"] is None
    assert (other["step"], other["group"], other["status"]) == (1, 0, "evicted")


def test_rows_that_are_no_longer_true_are_taken_back_and_groups_numbered_on(tmp_path):
    writer = TrajectoryWriter(tmp_path, from_mapping({}))
    groups = [make_group(make_lease(i)) for i in range(6)]
    writer(1, [ended(groups[0])])
    writer(2, [ended(groups[1], "filtered", "all_wrong")])
    writer(2, [ended(groups[2])])
    writer(3, [ended(groups[3])])
    before = read(tmp_path, 1)
    with (tmp_path / "trajectories/step_2.jsonl").open("a") as file:
        file.write('{"step": 2, "completion": "cut \u2028')
    states = {"t0": "taken", "t1": "filtered", "t2": "taken", "t3": "taken"}
    writer.rewind(2, states.get)
    assert read(tmp_path, 1) == before
    assert not (tmp_path / "trajectories/step_3.jsonl").exists()
    writer(2, [ended(groups[2]), ended(groups[4])])
    writer(3, [ended(groups[3])])
    found = [(row["lease_id"], row["group"]) for row in read(tmp_path, 2)[::2]]
    assert found == [("t1", 0), ("t2", 1), ("t4", 2)]
    assert [row["group"] for row in read(tmp_path, 3)] == [0, 0]


def test_a_completion_without_tokens_and_a_score_that_does_not_apply_are_null(tmp_path):
    group = make_group(make_lease(), versions=[[2, 3], []])
    group = replace(group, reward_parts={"task": np.array([1.0, np.nan], np.float32)})
    writer = TrajectoryWriter(tmp_path, from_mapping({}))
    writer(3, [ended(group, "filtered", "empty_completion")])
    text = (tmp_path / "trajectories/step_3.jsonl").read_text()
    assert "NaN" not in text
    empty = read(tmp_path, 3)[1]
    assert empty["num_tokens"] == 0
    assert empty["version_min"] is empty["version_max"] is empty["staleness"] is None
    assert empty["reward_parts"] == {"task": None}


@pytest.mark.parametrize(
    ("rooms", "share"),
    [
        ({"buffer": {"max_staleness": 2, "staleness_action": "mask"}}, [0.25, 0.0]),
        ({"algo": {"mask_truncated": True}}, [0.0, 1.0]),
        ({}, [0.0, 0.0]),
    ],
)
def test_the_masked_share_is_what_the_settings_take_out_of_the_loss(tmp_path, rooms, share):
    group = make_group(make_lease(), versions=[[2, 3, 4, 5], [5, 5]])
    cut = replace(group.completions[1], finish_reason="length")
    group = replace(group, completions=Completions.of([group.completions[0], cut]))
    TrajectoryWriter(tmp_path, from_mapping(rooms))(5, [ended(group)])
    assert [row["masked_share"] for row in read(tmp_path, 5)] == share


def test_a_completion_with_a_log_prob_that_is_not_finite_is_masked_whole(tmp_path):
    group = make_group(make_lease(), versions=[[5, 5], [5, 5]])
    group.completions[1].behavior_logprobs[0] = np.nan
    TrajectoryWriter(tmp_path, from_mapping({}))(5, [ended(group)])
    assert [row["masked_share"] for row in read(tmp_path, 5)] == [0.0, 1.0]


@pytest.mark.parametrize("text", ["答案是 42 🙂", "one\u2028two\u0085three\nfour", '"\\n"', ""])
def test_any_text_stays_text(tmp_path, text):
    lease = make_lease()
    prompt = replace(lease.prompt, messages=({"role": "user", "content": text},), answer=text)
    group = make_group(replace(lease, prompt=prompt))
    completions = Completions.of([replace(c, text=text) for c in group.completions])
    config = make_run(tmp_path).config
    TrajectoryWriter(tmp_path, config)(0, [ended(replace(group, completions=completions))])
    raw = (tmp_path / "trajectories/step_0.jsonl").read_bytes().decode("utf-8")
    assert ("🙂" in text) == ("🙂" in raw)
    samples = Samples(tmp_path)
    rows = list(samples.rows([0]))
    assert len(rows) == 2
    for row in rows:
        assert row["completion"] == row["answer"] == row["prompt"][0]["content"] == text


def test_nothing_is_written_when_the_setting_is_off(tmp_path):
    config = from_mapping({"observe": {"trajectories": False}})
    TrajectoryWriter(tmp_path, config)(0, [ended(make_group(make_lease()))])
    assert list((tmp_path / "trajectories").iterdir()) == []


@pytest.fixture(scope="module")
def serial_run(tmp_path_factory) -> RunDir:
    """Five steps of an untrained model that is paid for vowels."""
    return trained_serially(tmp_path_factory.mktemp("serial"), correct_above=0.07)


def trained_serially(base: Path, correct_above: float, **data: object) -> RunDir:
    model = build_untrained(base / "model", True, 5)
    wide = AutoModelForCausalLM.from_pretrained(model)
    wide.resize_token_embeddings(320)  # more than the tokenizer has, as in many published models
    wide.save_pretrained(model)
    functions = [
        {"use": "reward_functions:vowels", "weight": 2.0},
        {"use": "length_penalty", "options": {"per_character": 0.01}},
    ]
    run = make_run(
        base / "run",
        run={"max_steps": 5, "seed": 3},
        model={"path": str(model)},
        data={"max_prompt_tokens": 32, "eval": None, **data},
        sampling={"max_completion_tokens": 8},
        reward={"functions": functions, "correct_above": correct_above},
        actor={"engine": "toy", "concurrency": 12},
        buffer={"groups_per_step": 3, "max_staleness": 1},
        algo={"group_size": 4},
        learner={"lr": 3e-3},
        launch={"actors": 1, "learners": 1},
    )
    run_serial(run)
    return run


def test_the_rows_of_a_run_follow_from_their_definitions(serial_run):
    samples = Samples(serial_run.path)
    assert samples.steps[:5] == (0, 1, 2, 3, 4)
    for step in samples.steps:
        rows = list(samples.rows([step]))
        numbers = list(dict.fromkeys(row["group"] for row in rows))
        assert numbers == list(range(len(numbers)))
        for number in numbers:
            check_group([row for row in rows if row["group"] == number], step)
        trained = {row["group"] for row in rows if row["status"] == "trained"}
        assert len(trained) == (3 if step < 5 else 0)


def check_group(rows: list[dict], step: int) -> None:
    assert [row["sample"] for row in rows] == [0, 1, 2, 3]
    assert all(list(row) == FIELDS and row["step"] == step for row in rows)
    assert len({(row["lease_id"], row["prompt_id"], row["status"]) for row in rows}) == 1
    rewards = np.array([row["reward"] for row in rows])
    for row in rows:
        parts = row["reward_parts"]
        vowels = sum(letter in "aeiou" for letter in row["completion"].lower()) / 16
        assert parts["vowels"] == pytest.approx(vowels)
        assert row["reward"] == pytest.approx(2 * parts["vowels"] + parts["length_penalty"])
        assert row["staleness"] == step - row["version_min"]
        assert 1 <= row["num_tokens"] <= 8
        assert row["finish_reason"] == "stop" or row["num_tokens"] == 8
    right = [row["reward_parts"]["vowels"] > 0.07 for row in rows]
    if rows[0]["status"] == "filtered":
        assert rows[0]["reason"] == ("all_correct" if all(right) else "all_wrong")
    if rows[0]["status"] == "trained":
        assert len(set(right)) == 2
        assert max(row["staleness"] for row in rows) <= 1
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        found = [row["advantage"] for row in rows]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_a_runs_files_hold_each_group_that_ended_once(serial_run):
    samples = Samples(serial_run.path)
    ends = Counter(
        (row["status"], row["reason"]) for row in samples.rows(samples.steps) if not row["sample"]
    )
    summary = json.loads((serial_run.path / "summary.json").read_text())
    groups = {**summary["groups"], "trained": summary["leases"]["leases_trained"]}
    groups.pop("groups_arrived")
    names = {key: "_".join(filter(None, ("groups", *key))) for key in ends}
    names["trained", ""] = "trained"
    assert {names[key]: count for key, count in ends.items()} == groups
    assert {status for status, _ in ends} >= {"trained", "filtered"}


def test_a_run_whose_groups_are_all_filtered_counts_them_and_is_bad_input(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": str(i)}], "answer": "1"} for i in range(4)]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"train": str(tmp_path / "few.jsonl"), "epochs": 1}
    with pytest.raises(DataError, match=r"nothing was trained: the prompts are used up.*\(1\)"):
        trained_serially(tmp_path, correct_above=100.0, **files)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 0
    assert summary["leases"]["leases_filtered"] == 4
    assert summary["groups"] == {"groups_arrived": 4, "groups_filtered_all_wrong": 4}
    assert summary["tokens_arrived"] > 0
