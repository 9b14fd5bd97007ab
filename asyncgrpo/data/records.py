"""Reads JSONL records of the usual shapes into prompts.

| question                                          | ground truth                               |
|---------------------------------------------------|--------------------------------------------|
| prompt: text or messages; or messages             | reward_model.ground_truth                  |
| query, question or problem: text                  | ground_truth, answer, solution or target   |

The first name that a row has counts. Every column of the row stays in `Prompt.columns`. data_source
may be text, or judges with weights, which Prompt.data_source joins with "+".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asyncgrpo.errors import DataError
from asyncgrpo.types import Message, Prompt

PROMPT_COLUMNS = ("prompt", "messages", "query", "question", "problem")
ANSWER_COLUMNS = ("ground_truth", "answer", "solution", "target")
Row = dict[str, Any]


def read_jsonl(path: str | Path) -> tuple[Prompt, ...]:
    """One prompt per row, in file order, with ids "<file stem>:<row index>"; blank lines skipped.

    Prompt.answer is the ground truth as text; None only when no row of the file has an answer
    column. Raises DataError for a file that is missing, empty or not UTF-8, and, naming the
    line, for a row that is not a JSON object, or has no usable prompt or answer.
    """
    path = Path(path)
    rows = _read_rows(path)
    if not rows:
        raise DataError(f"{path} holds no records; it needs one JSON object per line")
    answered = any(_answer_column(row) is not None for _, row in rows)
    prompts = []
    for index, (line, row) in enumerate(rows):
        where = f"{path}:{line}"
        prompts.append(
            Prompt(
                prompt_id=f"{path.stem}:{index}",
                messages=_messages(row, where),
                answer=_answer(row, where) if answered else None,
                data_source=_data_source(row, path.stem, where),
                columns=row,
            )
        )
    return tuple(prompts)


def _read_rows(path: Path) -> list[tuple[int, Row]]:
    """(line number, row) of every line that is not blank."""
    if not path.is_file():
        raise DataError(f"data file {path} {_why_not(path)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; convert it to JSONL") from None
    # Only "\n" ends a line: JSON text may hold other line separators, e.g. U+2028.
    lines = enumerate(text.split("\n"), start=1)
    return [(number, _parse(line, f"{path}:{number}")) for number, line in lines if line.strip()]


def _why_not(path: Path) -> str:
    if path.is_dir():
        return "is a folder; give one JSONL file"
    near = sorted(str(found) for found in path.parent.glob("*.jsonl"))
    return "does not exist; " + (f"there are: {', '.join(near[:5])}" if near else "check the path")


def _parse(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}; each line must be one object") from None
    if not isinstance(row, dict):
        raise DataError(
            f"{where} holds {_shown(row)}, not an object; "
            'write rows like {"prompt": "...", "answer": "..."}'
        )
    return row


def _messages(row: Row, where: str) -> tuple[Message, ...]:
    column = next((name for name in PROMPT_COLUMNS if row.get(name) is not None), None)
    if column is None:
        raise DataError(
            f"{where} has no prompt; it has {_names(row)}; "
            f"name the column one of: {', '.join(PROMPT_COLUMNS)}"
        )
    value = row[column]
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: {column}={_shown(value)} must be text or a list of messages with at least "
            "one message"
        )
    return tuple(_message(item, f"{where}: {column}[{index}]") for index, item in enumerate(value))


def _message(item: object, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(
            f'{where}={_shown(item)} must be a message like {{"role": "user", "content": "..."}}'
        )
    for key in ("role", "content"):
        value = item.get(key)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}.{key}={_shown(value)} must be text that is not empty")
    return {"role": item["role"], "content": item["content"]}


def _answer_column(row: Row) -> str | None:
    """The column that holds the ground truth, wherever it stands; None without one."""
    if isinstance(row.get("reward_model"), Mapping) and "ground_truth" in row["reward_model"]:
        return "reward_model"
    return next((name for name in ANSWER_COLUMNS if name in row), None)


def _answer(row: Row, where: str) -> str:
    column = _answer_column(row)
    if column is None:
        raise DataError(
            f"{where} has no answer although other rows have one; it has {_names(row)}; add "
            f"one of: reward_model.ground_truth, {', '.join(ANSWER_COLUMNS)}"
        )
    nested = column == "reward_model"
    value = row[column]["ground_truth"] if nested else row[column]
    name = "reward_model.ground_truth" if nested else column
    if (
        isinstance(value, bool)
        or not isinstance(value, str | int | float)
        or not str(value).strip()
    ):
        raise DataError(f"{where}: {name}={_shown(value)} must be a number or text, not empty")
    return str(value)


def _data_source(row: Row, default: str, where: str) -> str:
    value = row.get("data_source", default)
    if isinstance(value, Mapping) and value and all(map(_is_weight, value.values())):
        return "+".join(map(str, value))
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{where}: data_source={_shown(value)} must be text that is not empty, or judges with "
            'weights such as {"gsm8k": 0.7, "tag": 0.3}'
        )
    return value


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(row: Row) -> str:
    return f"the columns {', '.join(map(str, row))}" if row else "no columns"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
