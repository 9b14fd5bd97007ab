from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import write_jsonl

from asyncgrpo.data.records import read_prompts
from asyncgrpo.errors import DataError
from asyncgrpo.settings.data import TemplateSettings
from asyncgrpo.types import Prompt

GSM8K = Path(__file__).parent / "data" / "gsm8k_8.jsonl"
QUESTION = ({"role": "user", "content": "2 + 3?"},)


def write(folder: Path, *rows: object) -> Path:
    return write_jsonl(folder / "rows.jsonl", *rows)


# The documented shapes, some with columns of their own.
SHAPES = [
    {
        "data_source": "openai/gsm8k",
        "prompt": [{"content": "2 + 3?", "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": "5", "style": "rule"},
        "extra_info": {"answer": "2+3=<<2+3=5>>5\n#### 5", "index": 0, "split": "train"},
    },
    {"prompt": [{"role": "user", "content": "2 + 3?"}], "reward_model": {"ground_truth": "5"}},
    {"prompt": [{"role": "user", "content": "2 + 3?"}], "solution": 5, "hint": "数"},
    {"prompt": "2 + 3?", "answer": "5", "level": 1, "tags": ["sum", None]},
    {"messages": [{"content": "2 + 3?", "role": "user"}], "ground_truth": 5},
    {"query": "2 + 3?", "ground_truth": 5, "id": "q-1"},
    {"question": "2 + 3?", "answer": "5", "data_source": "own"},
    {"problem": "2 + 3?", "target": "5"},
]


@pytest.mark.parametrize("row", SHAPES)
def test_each_documented_shape_becomes_the_same_prompt_with_its_own_columns(tmp_path, row):
    (prompt,) = read_prompts(write(tmp_path, row))
    source = row.get("data_source", "rows")
    assert prompt == Prompt(
        prompt_id="rows:0", messages=QUESTION, answer="5", data_source=source, columns=row
    )


def test_a_template_may_name_the_columns_of_question_and_answer(tmp_path):
    row = {"prompt": "no", "answer": "no", "instruction": "2 + 3?", "label": 5}
    template = TemplateSettings(user_field="instruction", answer_field="label")
    (prompt,) = read_prompts(write(tmp_path, row), template)
    assert (prompt.messages, prompt.answer, prompt.columns) == (QUESTION, "5", row)


@pytest.mark.parametrize("field", ["user_field", "answer_field"])
def test_a_column_that_a_template_names_and_a_row_lacks_is_an_error(tmp_path, field):
    with pytest.raises(DataError, match=r"rows.jsonl:1 has no lable; it has the columns prompt, "):
        read_prompts(write(tmp_path, GOOD), TemplateSettings(**{field: "lable"}))


def test_real_gsm8k_records_keep_every_column():
    prompts = read_prompts(GSM8K)
    assert len(prompts) == 8
    assert prompts[0].answer == "72"
    assert prompts[0].data_source == "openai/gsm8k"
    assert prompts[0].messages[0]["content"].startswith("Natalia sold clips to 48")
    assert prompts[7].prompt_id == "gsm8k_8:7"
    raw = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    assert [prompt.columns for prompt in prompts] == raw


def test_conversations_with_several_messages_are_kept_whole(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (prompt,) = read_prompts(write(tmp_path, {"prompt": chat}))
    assert list(prompt.messages) == chat


def test_any_language_and_line_separators_inside_text_survive(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "三\u2028加四 🦆", "answer": "七"}\n', encoding="utf-8")
    (prompt,) = read_prompts(path)
    assert (prompt.messages[0]["content"], prompt.answer) == ("三\u2028加四 🦆", "七")


def test_a_file_without_any_answer_column_gives_prompts_without_answers(tmp_path):
    path = write(tmp_path, {"prompt": "Hi"}, {"prompt": "Ho", "reward_model": {"style": "model"}})
    assert [prompt.answer for prompt in read_prompts(path)] == [None, None]


def test_a_record_may_name_judges_with_weights_as_its_source(tmp_path):
    weights = {"gsm8k": 0.7, "tag": 0.3}
    (prompt,) = read_prompts(write(tmp_path, {**GOOD, "data_source": weights}))
    assert (prompt.data_source, prompt.columns["data_source"]) == ("gsm8k+tag", weights)


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path):
    path = write(tmp_path, '\ufeff{"prompt": "Hi"}', "", '{"prompt": "Ho"}', "  ")
    assert [prompt.prompt_id for prompt in read_prompts(path)] == ["rows:0", "rows:1"]


GOOD = {"prompt": "Hi", "answer": "7"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": ', "rows.jsonl:2 is not JSON"),
        ("[" * 100_000, "rows.jsonl:2 is not JSON"),
        ([1, 2], r"rows.jsonl:2 holds \[1, 2\], not an object"),
        ({"answer": "7"}, "rows.jsonl:2 has no prompt; it has the columns answer; name the column"),
        ({}, "rows.jsonl:2 has no prompt; it has no columns"),
        ({"prompt": [], "answer": "7"}, r"rows.jsonl:2: prompt=\[\] must be text or a list"),
        ({"prompt": 3, "answer": "7"}, r"rows.jsonl:2: prompt=3 must be text or a list"),
        ({"prompt": " ", "answer": "7"}, r"prompt\[0\].content=' ' must be text that is not"),
        ({"prompt": ["Hi"], "answer": "7"}, r"prompt\[0\]='Hi' must be a message"),
        ({"prompt": [{"content": "Hi"}], "answer": "7"}, r"prompt\[0\].role=None must be text"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "7"},
            r"prompt\[0\].content=\[\{'type': 'image'\}\] must be text",
        ),
        ({"prompt": "Ho"}, "rows.jsonl:2 has no answer; it has the columns prompt; add one of"),
        ({"prompt": "Ho", "answer": None}, "rows.jsonl:2: answer=None must be a number or text"),
        *(
            ({"prompt": "Ho", "answer": float(n)}, rf"rows.jsonl:2: answer={n} must .* nor NaN")
            for n in ("nan", "inf", "-inf")
        ),
        ({"prompt": "Ho", "answer": ""}, "rows.jsonl:2: answer='' must be a number or text"),
        (
            {"prompt": "Ho", "reward_model": {"ground_truth": ["7"]}},
            r"rows.jsonl:2: reward_model.ground_truth=\['7'\] must be a number or text",
        ),
        ({**GOOD, "data_source": ""}, "rows.jsonl:2: data_source='' must be text"),
        ({**GOOD, "data_source": {}}, r"data_source=\{\} must be text .* or judges with weights"),
        ({**GOOD, "data_source": {"gsm8k": "much"}}, "rows.jsonl:2: data_source=.* with weights"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_the_remedy(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_prompts(write(tmp_path, GOOD, row))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="holds no records"):
        read_prompts(tmp_path / "rows.jsonl")


def test_a_file_that_is_not_text_is_an_error(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"PAR1\xff\xfe\x00")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_prompts(tmp_path / "rows.jsonl")
