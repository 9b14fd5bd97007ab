"""Converts GSM8K (question, answer with its working) into records with a bare ground truth."""

from __future__ import annotations

import re
from pathlib import Path

from asyncgrpo.data.files import FILE_PATTERNS, Located, Row, read_rows, write_rows
from asyncgrpo.data.templates import with_suffix
from asyncgrpo.errors import DataError

INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
DATA_SOURCE, SPLITS = "openai/gsm8k", ("train", "test")
OTHER_VERSION = "socratic"  # the data set's second form, with other working; its rows repeat
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")


def convert_folder(
    folder: Path, out: Path, instruction: str = INSTRUCTION
) -> dict[str, tuple[int, list[int]]]:
    """Writes out/train.jsonl and out/test.jsonl from the Parquet or JSONL files of a folder.

    Returns, for each split found, the number of records and the indices of the rows that were
    left out because they have no final answer. DataError when no split is found.
    """
    done = {}
    for split in SPLITS:
        rows = enumerate(_rows_of(folder, split))
        records = [convert_row(row, index, split, instruction) for index, (_, row) in rows]
        if records:
            kept = [record for record in records if record is not None]
            write_rows(out / f"{split}.jsonl", kept)
            done[split] = len(kept), [i for i, record in enumerate(records) if record is None]
    if not done:
        raise DataError(
            f"--input-dir {folder} holds no GSM8K files; it needs train and test files "
            f"({' or '.join(FILE_PATTERNS)}) with the columns question and answer"
        )
    return done


def convert_row(
    row: Row | DataError, index: int, split: str, instruction: str = INSTRUCTION
) -> Row | None:
    """One record; None when the answer has no number after "####"."""
    if isinstance(row, DataError):
        raise row
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise DataError(
            f"row {index} of {split} has no question or no answer; it has the columns "
            f"{', '.join(row)}; give the data set's own files"
        )
    truth = final_answer(answer)
    if truth is None:
        return None
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"content": with_suffix(question, instruction), "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"answer": answer, "index": index, "question": question, "split": split},
    }


def final_answer(answer: str) -> str | None:
    """The number after the last "####", without calculator marks, commas and currency signs."""
    _, sign, tail = answer.rpartition("####")
    number = _NUMBER.search(re.sub("[,$£€]", "", _CALCULATOR.sub("", tail)))
    return number.group() if sign and number else None


def _rows_of(folder: Path, split: str) -> list[Located]:
    if (folder / split).is_dir():
        return read_rows(folder / split)
    home = folder / "main" if (folder / "main").is_dir() else folder
    files = sorted(file for pattern in FILE_PATTERNS for file in home.rglob(pattern))
    words = {file: re.findall("[a-z]+", str(file.relative_to(home)).lower()) for file in files}
    chosen = [file for file in files if split in words[file] and OTHER_VERSION not in words[file]]
    return [row for file in chosen for row in read_rows(file)]
