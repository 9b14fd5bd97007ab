"""The converter reproduces real converted records from nothing but question and answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import write_jsonl, write_parquet

from asyncgrpo.data import gsm8k
from asyncgrpo.data.gsm8k import convert_folder, convert_row, final_answer
from asyncgrpo.errors import DataError

SAMPLE = Path(gsm8k.__file__).parent / "gsm8k_sample"
LEAST = {"train": 64, "test": 16}


def records(split: str) -> list[dict]:
    lines = (SAMPLE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def originals(split: str) -> list[dict]:
    return [
        {"question": record["extra_info"]["question"], "answer": record["extra_info"]["answer"]}
        for record in records(split)
    ]


@pytest.mark.parametrize("split", LEAST)
def test_the_sample_is_large_enough_and_its_licence_stands_beside_it(split):
    assert len(records(split)) >= LEAST[split]
    assert "MIT licence" in (SAMPLE / "README.md").read_text(encoding="utf-8")
    assert "\\u" not in (SAMPLE / f"{split}.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("split", LEAST)
@pytest.mark.parametrize(
    ("name", "write"),
    [("{}.jsonl", write_jsonl), ("main/{}-00000-of-00001.parquet", write_parquet)],
)
def test_real_records_come_out_of_question_and_answer_to_the_byte(tmp_path, split, name, write):
    write(tmp_path / "in" / name.format(split), *originals(split))
    done = convert_folder(tmp_path / "in", tmp_path / "out")
    assert done == {split: (len(records(split)), [])}
    assert (tmp_path / "out" / f"{split}.jsonl").read_bytes() == (
        SAMPLE / f"{split}.jsonl"
    ).read_bytes()


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("She sold 24.\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("#### 1,234,567", "1234567"),
        ("#### -3", "-3"),
        ("#### 0.5", "0.5"),
        ("#### .5", ".5"),
        ("#### $72", "72"),
        ("#### -$5", "-5"),
        ("#### £1,000.50", "1000.50"),
        ("#### 72.", "72"),
        ("#### 12 apples", "12"),
        ("#### <<5*2=10>>10", "10"),
        ("2*3 = <<2*3=6>>6\n####6", "6"),
        ("#### 1\n#### 2", "2"),
        ("#### 5 6", "5"),
        ("There are 72.", None),
        ("72 ####", None),
        ("#### none", None),
        ("#### <<1+1=2>>", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_bare_number_after_the_last_marks(answer, truth):
    assert final_answer(answer) == truth


def test_rows_without_an_answer_are_left_out_and_named_by_index(tmp_path):
    rows = [{"question": f"{i}?", "answer": f"#### {i}" if i % 2 else "no"} for i in range(5)]
    write_jsonl(tmp_path / "in" / "train.jsonl", *rows)
    assert convert_folder(tmp_path / "in", tmp_path) == {"train": (2, [0, 2, 4])}
    kept = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [record["extra_info"]["index"] for record in kept] == [1, 3]


def test_the_instruction_can_be_another_or_none():
    row = {"question": "1 + 1?", "answer": "#### 2"}
    assert convert_row(row, 0, "test", "Go.")["prompt"][0]["content"] == "1 + 1? Go."
    assert convert_row(row, 0, "test", "")["prompt"][0]["content"] == "1 + 1?"


def test_the_other_version_of_the_data_set_is_left_alone(tmp_path):
    row = {"question": "1 + 1?", "answer": "#### 2"}
    for name in ("train.jsonl", "train_socratic.jsonl"):
        write_jsonl(tmp_path / "in" / name, row)
    assert convert_folder(tmp_path / "in", tmp_path) == {"train": (1, [])}


@pytest.mark.parametrize("rows", [[{"problem": "1 + 1?", "answer": "#### 2"}], [{"question": "?"}]])
def test_other_data_is_refused_with_the_columns_it_has(tmp_path, rows):
    write_jsonl(tmp_path / "in" / "train.jsonl", *rows)
    with pytest.raises(DataError, match="row 0 of train has no question or no answer; it has the"):
        convert_folder(tmp_path / "in", tmp_path)


def test_a_folder_without_the_data_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no GSM8K files; it needs train and test files"):
        convert_folder(tmp_path, tmp_path)
