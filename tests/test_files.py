"""Every way to name data gives the same rows; what cannot be read is named with the way out."""

from __future__ import annotations

import builtins
import datetime
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import datasets
import pytest
from fakes import make_lease, write_jsonl, write_parquet

from asyncgrpo.data.files import read_rows, source_name
from asyncgrpo.data.records import read_prompts
from asyncgrpo.errors import DataError
from asyncgrpo.types import Lease, Prompt
from asyncgrpo.wire.codec import Packet, decode, encode, lease_from, pack_lease

ROWS = [
    {
        "data_source": "openai/gsm8k",
        "prompt": [{"content": f"三加 {i}? 🦆", "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": str(i), "style": "rule"},
        "extra_info": {"index": i, "tags": ["a", None]},
    }
    for i in range(4)
]


def write_folder(path: Path, *rows: dict) -> Path:
    write_jsonl(path / "a" / "first.jsonl", rows[0])
    write_parquet(path / "b" / "second.parquet", *rows[1:3])
    write_jsonl(path / "third.jsonl", *rows[3:])
    (path / "README.md").write_text("not data")
    return path


def write_arrow(path: Path, *rows: dict) -> Path:
    datasets.Dataset.from_list([*rows]).save_to_disk(path)
    return path


def lease_of(prompt: Prompt) -> Lease:
    return replace(make_lease(1), prompt=prompt)


def contents(path: str | Path) -> list[object]:
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", write_jsonl),
        ("rows.parquet", write_parquet),
        ("rows", write_folder),
        ("arrow", write_arrow),
    ],
)
def test_every_kind_of_file_holds_the_same_rows(tmp_path, name, write):
    path = write(tmp_path / name, *ROWS)
    assert contents(path) == ROWS
    prompts = read_prompts(path)
    assert [prompt.answer for prompt in prompts] == ["0", "1", "2", "3"]
    assert [prompt.columns for prompt in prompts] == ROWS
    stem = name.partition(".")[0]
    assert [prompt.prompt_id for prompt in prompts] == [f"{stem}:{i}" for i in range(4)]


def test_a_glob_takes_what_it_matches_in_the_order_of_the_names(tmp_path):
    for number in (2, 0, 1):
        write_jsonl(tmp_path / "parts" / f"part-{number}.jsonl", ROWS[number])
    write_jsonl(tmp_path / "parts" / "other.jsonl", ROWS[3])
    assert contents(tmp_path / "parts" / "part-*.jsonl") == ROWS[:3]
    assert contents(tmp_path / "**" / "*.jsonl") == [ROWS[3], *ROWS[:3]]


def test_a_row_is_found_again_by_its_place(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", *ROWS[:1])
    path.write_text("\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert [where for where, _ in read_rows(path)] == [f"{path}:2"]
    path = write_parquet(tmp_path / "rows.parquet", *ROWS[:2])
    assert [where for where, _ in read_rows(path)] == [f"{path} row 0", f"{path} row 1"]


def test_dates_and_decimals_of_parquet_become_text_that_can_travel(tmp_path):
    row = {"question": "?", "answer": Decimal("7.50"), "day": datetime.date(2024, 2, 29), "n": 1}
    (prompt,) = read_prompts(write_parquet(tmp_path / "rows.parquet", row))
    assert prompt.answer == "7.50"
    assert prompt.columns == {"question": "?", "answer": "7.50", "day": "2024-02-29", "n": 1}
    packet = decode(encode(Packet(kind="lease", fields={"lease": pack_lease(lease_of(prompt))})))
    assert lease_from(packet.fields["lease"]).prompt == prompt


def test_columns_that_other_rows_lack_do_not_hide_an_answer(tmp_path):
    rows = [{"prompt": "a", "ground_truth": "1"}, {"prompt": "b", "answer": "2"}]
    path = write_parquet(tmp_path / "rows.parquet", {**rows[0], "answer": None}, rows[1])
    assert [prompt.answer for prompt in read_prompts(path)] == ["1", "2"]


def test_a_broken_line_is_an_error_in_its_place_and_the_others_are_read(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", *ROWS[:1])
    path.write_text(path.read_text(encoding="utf-8") + '{"a": \n[1]\n', encoding="utf-8")
    first, second, third = contents(path)
    assert first == ROWS[0]
    assert isinstance(second, DataError)
    assert "rows.jsonl:2 is not JSON" in str(second)
    assert "rows.jsonl:3 holds [1], not an object" in str(third)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("some/train.jsonl", "train"),
        ("some/folder/", "folder"),
        ("some/parts/*.jsonl", "parts"),
        ("*.jsonl", "data"),
        ("openai/gsm8k/main:test", "gsm8k"),
        ("nobody/some-set", "some-set"),
    ],
)
def test_a_source_is_named_after_its_file_folder_or_data_set(path, name):
    assert source_name(path) == name


def test_a_hub_name_without_a_connection_says_what_to_do():
    with pytest.raises(DataError, match=r"nobody/nothing is no file or folder here.*offline, give"):
        read_rows("nobody/nothing")


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("openai/gsm8k", ("openai/gsm8k", None, "train")),
        ("openai/gsm8k/main:test", ("openai/gsm8k", "main", "test")),
        ("openai/gsm8k:test", ("openai/gsm8k", None, "test")),
    ],
)
def test_a_hub_name_may_say_which_configuration_and_split(monkeypatch, text, asked):
    def load_dataset(name, config, split):
        assert (name, config, split) == asked
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert contents(text) == ROWS


@pytest.mark.parametrize("name", ["rows.parquet", "arrow"])
def test_a_missing_package_names_the_extra_that_brings_it(tmp_path, monkeypatch, name):
    path = (write_arrow if name == "arrow" else write_parquet)(tmp_path / name, *ROWS)

    def refuse(module, *arguments):
        raise ImportError(module)

    monkeypatch.setattr("asyncgrpo.data.files.importlib.import_module", refuse)
    with pytest.raises(DataError, match=r"not installed; pip install 'asyncgrpo\[data\]'"):
        read_rows(path)


def test_jsonl_needs_no_optional_package(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        assert name.partition(".")[0] not in ("pyarrow", "datasets")
        return real(name, *arguments, **options)

    path = write_jsonl(tmp_path / "rows.jsonl", *ROWS)
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert contents(path) == ROWS


def test_a_folder_of_several_splits_names_them(tmp_path):
    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"the splits train, test; give one of them: .*saved/train"):
        read_rows(tmp_path / "saved")
    assert contents(tmp_path / "saved" / "test") == ROWS


def test_what_cannot_be_read_is_named_with_the_remedy(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", *ROWS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.parquet").write_bytes(b"PAR1\xff\xfe\x00")
    for path, message in {
        "row.jsonl": r"row\.jsonl does not exist; there are: .*rows\.jsonl",
        "r*.json": r"no file matches .*r\*\.json'; there are: .*rows\.jsonl",
        "empty": r"empty holds no \*\.jsonl or \*\.parquet files",
        "rows.parquet": r"rows\.parquet is not a Parquet file",
    }.items():
        with pytest.raises(DataError, match=message):
            read_rows(tmp_path / path)


@pytest.mark.parametrize(
    "value", ["18446744073709551616", '[{"a": -9223372036854775809}]', '"\\ud83d"']
)
def test_values_that_no_process_could_be_sent_are_named_with_their_place(tmp_path, value):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "odd": ' + value + "}\n")
    (_, first), (_, second) = read_rows(file)
    assert first == {"prompt": "a"}
    assert isinstance(second, DataError)
    assert f"{file}:2: column 'odd' holds" in str(second)


def test_values_at_the_edge_of_what_can_be_sent_are_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 18446744073709551615, "b": -9223372036854775808, "c": "\\ud83d\\ude00"}')
    ((_, row),) = read_rows(file)
    assert row == {"a": 2**64 - 1, "b": -(2**63), "c": "\U0001f600"}
