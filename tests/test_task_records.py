"""Files of generated tasks: exact counts, each prompt once, held-out tasks never among them."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncgrpo.config import from_mapping
from asyncgrpo.data.prompts import open_prompts
from asyncgrpo.data.records import prompts_from_rows
from asyncgrpo.data.task_records import task_records
from asyncgrpo.errors import ConfigError
from asyncgrpo.rewards.builtin import task
from asyncgrpo.settings.data import TaskSettings

KINDS = ("math", "gcd", "sort", "palindrome", "reverse", "expression")
MATH = ("add", "sub", "mul")


def make(kinds: tuple[str, ...], num: int, seed: int = 0) -> list[dict]:
    return list(task_records(kinds, num, seed, TaskSettings()))


@settings(max_examples=30)
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=6, unique=True),
    st.integers(1, 60),
    st.integers(0, 2**31 - 1),
)
def test_kinds_are_in_turn_each_prompt_comes_once_and_its_answer_is_right(kinds, num, seed):
    records = make(tuple(kinds), num, seed)
    assert len(records) == num
    names = Counter("math" if row["kind"] in MATH else row["kind"] for row in records)
    assert max(names.values()) - min(names[kind] for kind in kinds) <= 1
    assert len({row["prompt"][0]["content"] for row in records}) == num
    for row in records:
        truth = row["reward_model"]["ground_truth"]
        assert task(truth, truth, row["kind"]) == 1.0


def test_the_same_arguments_give_the_same_records_and_a_longer_file_begins_alike():
    assert make(KINDS, 50, seed=3) == make(KINDS, 80, seed=3)[:50]
    assert make(KINDS, 50, seed=3) != make(KINDS, 50, seed=4)


def test_the_truth_is_in_the_record_only():
    (record,) = make(("gcd",), 1, seed=5)
    assert record == {
        "data_source": "task/gcd",
        "prompt": [{"role": "user", "content": "gcd: 2 15"}],
        "ability": "task",
        "reward_model": {"ground_truth": "1", "style": "rule"},
        "kind": "gcd",
        "extra_info": {"index": 0},
    }


def test_no_record_is_a_held_out_task():
    held_out = open_prompts(from_mapping({})).held_out(318)
    reserved = {prompt.messages[0]["content"] for prompt in held_out}
    made = {row["prompt"][0]["content"] for row in make(KINDS, 600)}
    assert not made & reserved


def test_records_are_read_back_as_the_prompts_of_the_tasks():
    rows = make(KINDS, 12)
    prompts = prompts_from_rows([(str(i), row) for i, row in enumerate(rows)], "made")
    for prompt, row in zip(prompts, rows, strict=True):
        assert prompt.answer == row["reward_model"]["ground_truth"]
        assert (prompt.data_source, prompt.columns["kind"]) == (row["data_source"], row["kind"])


def test_more_tasks_than_there_are_different_ones_are_refused():
    with pytest.raises(ConfigError, match=r"only \d+ different tasks of kind 'mul' to be found"):
        make(("mul",), 200)


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="no task kind 'sorting'; did you mean 'sort'"):
        list(islice(task_records(["sorting"], 1, 0, TaskSettings()), 1))
