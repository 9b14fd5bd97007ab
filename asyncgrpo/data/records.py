"""Makes one kind of prompt out of records of the usual shapes.

| question                                          | ground truth                               |
|---------------------------------------------------|--------------------------------------------|
| prompt: text or messages; or messages             | reward_model.ground_truth                  |
| query, question or problem: text                  | ground_truth, answer, solution or target   |

The first name that a row has counts, unless a template names the columns. Every column of the
row stays in `Prompt.columns`. data_source may be text, or judges with weights, which
Prompt.data_source joins with "+".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from asyncgrpo.data.files import Located, Row, read_rows, source_name
from asyncgrpo.data.templates import AS_IT_IS, with_template
from asyncgrpo.errors import DataError
from asyncgrpo.imports import shown
from asyncgrpo.settings.data import TemplateSettings
from asyncgrpo.types import Message, Prompt

PROMPT_COLUMNS = ("prompt", "messages", "query", "question", "problem")
ANSWER_COLUMNS = ("ground_truth", "answer", "solution", "target")


def read_prompts(
    path: str | Path, template: TemplateSettings = AS_IT_IS, name: str = ""
) -> tuple[Prompt, ...]:
    """One prompt per row of a file, glob, folder or hub data set (see files.py), in their order.

    Raises DataError for what cannot be read, and, naming the row, as `prompts_from_rows` does.
    """
    return prompts_from_rows(read_rows(path), name or source_name(path), template)


def prompts_from_rows(
    rows: Iterable[Located], name: str, template: TemplateSettings = AS_IT_IS
) -> tuple[Prompt, ...]:
    """One prompt per row, with ids "<name>:<row index>"; `name` is also the default data_source.

    Prompt.answer is the ground truth as text; None only when no row has an answer column.
    Raises DataError, naming its place, for a row that is an error, or has no usable prompt or
    answer.
    """
    sound: list[tuple[str, Row]] = []
    for where, row in rows:
        if isinstance(row, DataError):
            raise row
        sound.append((where, row))
    field = template.answer_field
    answered = bool(field) or any(_answers(row, field) for _, row in sound)
    return tuple(
        with_template(
            Prompt(
                prompt_id=f"{name}:{index}",
                messages=messages_of(row, where, template.user_field),
                answer=answer_of(row, where, field) if answered else None,
                data_source=source_of(row, where, name),
                columns=row,
            ),
            template,
        )
        for index, (where, row) in enumerate(sound)
    )


def messages_of(row: Row, where: str, field: str = "") -> tuple[Message, ...]:
    """The row's question as messages; `field` names its column. DataError if it is unusable."""
    names = (field,) if field else PROMPT_COLUMNS
    column = next((name for name in names if row.get(name) is not None), None)
    if column is None:
        raise DataError(
            f"{where} has no {field or 'prompt'}; it has {_names(row)}; "
            f"name the column one of: {', '.join(PROMPT_COLUMNS)}, or set template.user_field"
        )
    value = row[column]
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: {column}={shown(value)} must be text or a list of messages with at least "
            "one message"
        )
    return tuple(_message(item, f"{where}: {column}[{index}]") for index, item in enumerate(value))


def _message(item: object, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(
            f'{where}={shown(item)} must be a message like {{"role": "user", "content": "..."}}'
        )
    for key in ("role", "content"):
        value = item.get(key)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}.{key}={shown(value)} must be text that is not empty")
    return {"role": item["role"], "content": item["content"]}


def answer_of(row: Row, where: str, field: str = "") -> str:
    """The row's ground truth as text; `field` names its column. DataError if there is none."""
    answers = _answers(row, field)
    if not answers:
        raise DataError(
            f"{where} has no {field or 'answer'}; it has {_names(row)}; add one of: "
            f"reward_model.ground_truth, {', '.join(ANSWER_COLUMNS)}, or set template.answer_field"
        )
    name = next((name for name in answers if answers[name] is not None), next(iter(answers)))
    value = answers[name]
    if not (_is_number(value) or (isinstance(value, str) and value.strip())):
        raise DataError(
            f"{where}: {name}={shown(value)} must be a number or text, neither empty nor NaN nor "
            "infinite"
        )
    return str(value)


def _answers(row: Row, field: str) -> dict[str, object]:
    """What may be the ground truth, by name; the first that is not None counts."""
    if field:
        return {field: row[field]} if field in row else {}
    model = row.get("reward_model")
    if isinstance(model, Mapping) and "ground_truth" in model:
        return {"reward_model.ground_truth": model["ground_truth"]}
    return {name: row[name] for name in ANSWER_COLUMNS if name in row}


def source_of(row: Row, where: str, default: str) -> str:
    """The row's data_source, or the default; DataError when it is not text."""
    value = row.get("data_source", default)
    if isinstance(value, Mapping) and value and all(map(_is_number, value.values())):
        return "+".join(map(str, value))
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{where}: data_source={shown(value)} must be text that is not empty, or judges with "
            'weights such as {"gsm8k": 0.7, "tag": 0.3}'
        )
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(row: Row) -> str:
    return f"the columns {', '.join(map(str, row))}" if row else "no columns"
