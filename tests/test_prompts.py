from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from fakes import make_prompt
from hypothesis import given
from hypothesis import strategies as st

from asyncgrpo.config import from_mapping
from asyncgrpo.data.prompts import PromptSource, open_prompts
from asyncgrpo.data.streams import permutation
from asyncgrpo.errors import ConfigError, DataError

GSM8K = str(Path(__file__).parent / "data" / "gsm8k_8.jsonl")
seeds = st.integers(0, 2**31 - 1)


def ids(source: PromptSource, positions: range) -> list[str]:
    return [prompt.prompt_id for i in positions if (prompt := source.get(i)) is not None]


@given(st.integers(1, 30), seeds, st.integers(0, 5))
def test_every_prompt_comes_exactly_once_per_epoch(count, seed, epoch):
    source = PromptSource.from_prompts([make_prompt(i) for i in range(count)], seed=seed)
    one_epoch = ids(source, range(epoch * count, (epoch + 1) * count))
    assert sorted(one_epoch) == sorted(f"p{i}" for i in range(count))


@given(st.integers(1, 30), seeds, st.lists(st.integers(0, 200), max_size=20))
def test_a_position_holds_the_same_prompt_in_whatever_order_it_is_asked(count, seed, positions):
    prompts = [make_prompt(i) for i in range(count)]
    source = PromptSource.from_prompts(prompts, seed=seed)
    for position in positions:
        assert source.get(position) == PromptSource.from_prompts(prompts, seed=seed).get(position)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert permutation(50, 1, 2) == permutation(50, 1, 2)


def test_without_shuffling_the_order_is_that_of_the_file():
    source = PromptSource.from_prompts([make_prompt(i) for i in range(3)], shuffle=False)
    assert ids(source, range(7)) == ["p0", "p1", "p2", "p0", "p1", "p2", "p0"]


def test_after_the_last_epoch_there_is_no_prompt():
    source = PromptSource.from_prompts([make_prompt(i) for i in range(3)], epochs=2)
    assert source.get(5) is not None
    assert source.get(6) is None
    assert source.get(10**6) is None


def test_held_out_prompts_are_cut_to_the_number_asked_for():
    held_out = [make_prompt(i) for i in range(5)]
    source = PromptSource.from_prompts([make_prompt(9)], held_out)
    assert source.held_out(2) == (make_prompt(0), make_prompt(1))
    assert len(source.held_out(100)) == 5


def test_two_prompts_with_one_id_are_refused():
    with pytest.raises(DataError, match="2 training prompts have the prompt_id 'p1'"):
        PromptSource.from_prompts([make_prompt(1), make_prompt(1)])


def test_a_source_without_training_prompts_is_refused():
    with pytest.raises(DataError, match="no training prompts"):
        PromptSource.from_prompts([])


def test_held_out_prompts_that_are_trained_on_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        PromptSource.from_prompts([make_prompt(1), make_prompt(2)], [make_prompt(2)])
    assert "1 of 1 held-out prompts are training prompts too" in caplog.text


def test_the_default_configuration_trains_and_evaluates_generated_tasks():
    source = open_prompts(from_mapping({}))
    assert source.get(0) == open_prompts(from_mapping({})).get(0)
    assert source.get(0) != open_prompts(from_mapping({"run": {"seed": 1}})).get(0)
    assert len(source.held_out(318)) == 318


def test_a_file_can_be_trained_on_and_tasks_evaluated():
    source = open_prompts(from_mapping({"data": {"train": GSM8K, "epochs": 1}}))
    assert sorted(ids(source, range(9))) == [f"gsm8k_8:{i}" for i in range(8)]
    assert source.held_out(1)[0].data_source == "task/add"


def test_tasks_can_be_trained_on_and_a_file_evaluated():
    source = open_prompts(from_mapping({"data": {"eval": GSM8K}}))
    assert source.get(0) is not None
    assert [prompt.answer for prompt in source.held_out(2)] == ["72", "10"]


@pytest.mark.parametrize("nothing", [None, "none"])
def test_evaluation_can_be_left_out(nothing):
    assert open_prompts(from_mapping({"data": {"eval": nothing}})).held_out(10) == ()


def test_epochs_of_generated_tasks_are_refused():
    with pytest.raises(ConfigError, match=r"data.epochs=3 needs a file in data.train"):
        open_prompts(from_mapping({"data": {"epochs": 3}}))


def test_prompts_can_be_written_as_json():
    source = open_prompts(from_mapping({"data": {"eval": GSM8K}}))
    for prompt in (source.get(0), *source.held_out(8)):
        assert prompt is not None
        assert json.loads(json.dumps(dict(prompt.columns))) == prompt.columns
