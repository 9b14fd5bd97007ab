from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from fakes import make_prompt, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from asyncgrpo.config import from_mapping
from asyncgrpo.data.prompts import PromptSource, open_prompts
from asyncgrpo.data.streams import EpochStream
from asyncgrpo.data.tasks import SURVEYED
from asyncgrpo.errors import ConfigError
from asyncgrpo.types import Prompt

GSM8K = str(Path(__file__).parent / "data" / "gsm8k_8.jsonl")
seeds = st.integers(0, 2**31 - 1)


def numbered(*numbers: int) -> list[Prompt]:
    return [make_prompt(number) for number in numbers]


def ids(source: PromptSource | EpochStream, positions: range) -> list[str]:
    return [prompt.prompt_id for i in positions if (prompt := source.get(i)) is not None]


@given(st.integers(1, 30), seeds, st.integers(0, 5))
def test_every_prompt_comes_exactly_once_per_epoch(count, seed, epoch):
    stream = EpochStream(numbered(*range(count)), seed=seed)
    one_epoch = ids(stream, range(epoch * count, (epoch + 1) * count))
    assert sorted(one_epoch) == sorted(f"p{i}" for i in range(count))


@given(st.integers(1, 30), seeds, st.lists(st.integers(0, 200), max_size=20))
def test_a_position_holds_the_same_prompt_in_whatever_order_it_is_asked(count, seed, positions):
    prompts = numbered(*range(count))
    stream = EpochStream(prompts, seed=seed)
    for position in positions:
        assert stream.get(position) == EpochStream(prompts, seed=seed).get(position)


def test_epochs_and_seeds_have_orders_of_their_own():
    streams = [EpochStream(numbered(*range(50)), seed=seed) for seed in range(4)]
    epochs = [range(50 * epoch, 50 * (epoch + 1)) for epoch in range(4)]
    assert len({tuple(ids(stream, epoch)) for stream in streams for epoch in epochs}) == 16


def test_without_shuffling_the_order_is_that_of_the_file():
    stream = EpochStream(numbered(0, 1, 2), shuffle=False)
    assert ids(stream, range(7)) == ["p0", "p1", "p2", "p0", "p1", "p2", "p0"]


def test_after_the_last_epoch_there_is_no_prompt():
    stream = EpochStream(numbered(0, 1, 2), epochs=2)
    assert stream.get(5) is not None
    assert stream.get(6) is None
    assert stream.get(10**6) is None


def test_held_out_prompts_are_cut_to_the_number_asked_for():
    source = PromptSource(EpochStream(numbered(9)), {"held-out": numbered(*range(5))})
    assert source.held_out(2) == (make_prompt(0), make_prompt(1))
    assert len(source.held_out(100)) == 5


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


def test_a_survey_shows_each_training_prompt_once_or_those_of_one_evaluation():
    source = PromptSource(EpochStream(numbered(*range(5))), {"held-out": numbered(7, 8)})
    names = [prompt.prompt_id for prompt in source.survey()]
    assert sorted(names) == ["p0", "p1", "p2", "p3", "p4"]
    assert [prompt.prompt_id for prompt in source.survey("held-out")] == ["p7", "p8"]


def test_a_survey_of_an_endless_stream_ends():
    source = open_prompts(from_mapping({"eval": {"num_prompts": 4}}))
    assert len(list(source.survey())) == SURVEYED
    assert len(list(source.survey("held-out"))) == 4


def table(folder: Path, name: str, count: int) -> str:
    rows = [{"question": f"{name} {i}?", "answer": str(i), "row": i} for i in range(count)]
    return str(write_jsonl(folder / f"{name}.jsonl", *rows))


def mixed(*tables: dict, seed: int = 0, **data: object) -> PromptSource:
    settings = {"train": list(tables), "eval": "none", **data}
    return open_prompts(from_mapping({"run": {"seed": seed}, "data": settings}))


def sources(source: PromptSource, num: int) -> Counter[str]:
    return Counter(prompt_id.partition(":")[0] for prompt_id in ids(source, range(num)))


def test_two_tables_of_weights_3_and_1_are_mixed_exactly(tmp_path):
    a, b = table(tmp_path, "a", 5), table(tmp_path, "b", 50)
    source = mixed({"path": a, "weight": 3}, {"path": b, "weight": 1})
    for num in (4, 40, 1000):
        assert sources(source, num) == {"a": num * 3 / 4, "b": num / 4}


@pytest.mark.parametrize("weights", [(None, None), (9, 1), (0.2, 0.3)])
def test_tables_in_a_finite_run_give_every_prompt_exactly_epochs_times(tmp_path, weights):
    tables = [
        {"path": table(tmp_path, name, size), "weight": weight}
        for name, size, weight in zip("ab", (7, 30), weights, strict=True)
    ]
    source = mixed(*tables, epochs=3)
    used = Counter(ids(source, range(3 * 37)))
    assert used == Counter(
        {f"{name}:{i}": 3 for name, size in (("a", 7), ("b", 30)) for i in range(size)}
    )
    assert source.get(3 * 37) is None


def test_columns_stay_with_their_prompt_however_it_is_shuffled(tmp_path):
    source = mixed({"path": table(tmp_path, "a", 9)}, {"path": table(tmp_path, "b", 4)}, epochs=2)
    for position in range(26):
        prompt = source.get(position)
        name, _, row = prompt.prompt_id.partition(":")
        assert prompt.messages == ({"role": "user", "content": f"{name} {row}?"},)
        assert (prompt.answer, prompt.columns["row"]) == (row, int(row))


def test_tables_are_the_same_for_one_seed_at_any_position(tmp_path):
    tables = {"path": table(tmp_path, "a", 9)}, {"path": table(tmp_path, "b", 4), "name": "c"}
    whole = ids(mixed(*tables), range(100))
    assert ids(mixed(*tables), range(60, 100)) == whole[60:]
    assert ids(mixed(*tables, seed=1), range(100)) != whole


def test_a_sample_ratio_takes_that_part_of_a_table(tmp_path):
    a, b = table(tmp_path, "a", 10), table(tmp_path, "b", 10)
    source = mixed({"path": a, "sample_ratio": 0.3}, {"path": b, "sample_ratio": 2.0}, epochs=2)
    assert sources(source, 100) == {"a": 6, "b": 40}
    assert len(set(ids(source, range(46)))) == 13


def test_each_table_may_have_a_template_of_its_own(tmp_path):
    a, b = table(tmp_path, "a", 1), table(tmp_path, "b", 1)
    source = mixed(
        {"path": a, "template": {"suffix": "Think."}},
        {"path": b},
        template={"suffix": "Go."},
        eval=a,
        shuffle=False,
    )
    contents = {source.get(i).messages[0]["content"] for i in range(2)}
    assert contents == {"a 0? Think.", "b 0? Go."}
    assert source.held_out(1)[0].messages[0]["content"] == "a 0? Think."


def test_generated_tasks_take_the_template_too():
    settings = {"data": {"template": {"system": "Be brief.", "suffix": "="}}}
    plain, source = open_prompts(from_mapping({})), open_prompts(from_mapping(settings))
    for prompt, bare in ((source.get(0), plain.get(0)), (*source.held_out(1), *plain.held_out(1))):
        assert prompt.messages == (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": bare.messages[0]["content"] + " ="},
        )


def test_two_tables_of_one_name_are_refused(tmp_path):
    path = table(tmp_path, "a", 1)
    with pytest.raises(ConfigError, match=r"two tables are called 'a' .*give one of them another"):
        mixed({"path": path}, {"path": path})


@pytest.mark.parametrize("is_alone", [True, False])
def test_training_prompts_that_are_held_out_as_well_are_warned_about(tmp_path, caplog, is_alone):
    path = table(tmp_path, "a", 3)
    train = path if is_alone else [{"path": path}, {"path": table(tmp_path, "b", 3)}]
    with caplog.at_level(logging.WARNING):
        open_prompts(from_mapping({"data": {"train": train, "eval": path}}))
    assert "3 of 3 held-out prompts are training prompts too" in caplog.text


def test_an_evaluation_of_a_part_of_its_records_takes_a_sample_by_the_seed(tmp_path):
    path = table(tmp_path, "a", 100)

    def chosen(seed: int, name: str = "x", num: int = 10) -> list[str]:
        block = {"name": name, "num_prompts": num, "data": path}
        source = open_prompts(from_mapping({"run": {"seed": seed}, "eval": block}))
        return [prompt.prompt_id for prompt in source.held_out(num, name)]

    everything = [f"a:{i}" for i in range(100)]
    assert chosen(0, num=200) == everything
    assert chosen(0) == sorted(chosen(0), key=everything.index) != everything[:10]
    assert len(set(chosen(0))) == 10
    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)
    assert chosen(0) != chosen(0, name="y")
