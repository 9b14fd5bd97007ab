"""The data commands as a user types them: output, exit codes, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import write_jsonl

from asyncgrpo.config import from_mapping
from asyncgrpo.data import gsm8k
from asyncgrpo.data.check import findings
from asyncgrpo.data.files import read_rows
from asyncgrpo.data.records import read_prompts
from asyncgrpo.settings.data import TemplateSettings

SAMPLE = Path(gsm8k.__file__).parent / "gsm8k_sample" / "train.jsonl"


GOOD = {"question": "1 + 1?", "answer": "2", "data_source": "sums"}
JUDGED = {"sums": "integer", "rows": "integer"}  # rows without a source have the file's name
UNMEASURED = "; without --model or --config no length is measured"
ONLY_SUMS = ("--set", "reward.routes={sums='integer', rows='integer'}")
# row 2 of a file -> what validate finds there
FINDINGS = {
    '{"question": ': "is not JSON: Expecting value",
    "[1]": "holds [1], not an object",
    '{"answer": "2"}': "has no prompt; it has the columns answer",
    '{"question": " ", "answer": "2"}': "must be text that is not empty",
    '{"question": "a"}': "has no answer; it has the columns question",
    '{"question": "a", "answer": null}': "answer=None must be a number or text",
    '{"question": "a", "answer": ""}': "answer='' must be a number or text",
    '{"question": "a", "answer": "2", "data_source": 3}': "data_source=3 must be text",
    '{"question": "a", "answer": "2", "data_source": "math"}': "data_source 'math' has no judge",
    '{"question": "1 + 1?", "answer": "3", "data_source": "sums"}': "the same prompt as ",
}


@pytest.mark.parametrize("row", FINDINGS)
def test_validate_finds_what_is_wrong_and_where(tmp_path, asyncgrpo, row):
    path = write_jsonl(tmp_path / "rows.jsonl", GOOD, row, {**GOOD, "question": "b"})
    (finding,) = findings(read_rows(path), str(path), from_mapping({"reward": {"routes": JUDGED}}))
    assert finding[0] == f"{path}:2"
    assert FINDINGS[row] in finding[1]
    code, out, _ = asyncgrpo("data", "validate", path, *ONLY_SUMS)
    assert code == 1
    assert "rows.jsonl:2" in out
    assert f"{path}: 1 problems in 3 records" in out


def test_validate_reports_everything_at_once(tmp_path, asyncgrpo):
    path = write_jsonl(tmp_path / "rows.jsonl", GOOD, *FINDINGS)
    code, out, _ = asyncgrpo("data", "validate", path, *ONLY_SUMS)
    assert code == 1
    assert f"{len(FINDINGS)} problems in {len(FINDINGS) + 1} records" in out


def test_validate_says_what_is_wrong_with_many_records_once(tmp_path, asyncgrpo):
    rows = [{**GOOD, "question": f"{n} + 1?", "data_source": "words"} for n in range(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", *rows)
    code, out, _ = asyncgrpo("data", "validate", path, *ONLY_SUMS)
    assert (code, out.count("has no judge")) == (1, 1)
    assert "and 3 more" in out
    assert "4 problems in 4 records" in out


def test_validate_ends_with_0_when_nothing_is_found(asyncgrpo):
    code, out, _ = asyncgrpo("data", "validate", SAMPLE)
    assert (code, out) == (0, f"{SAMPLE}: 0 problems in 64 records{UNMEASURED}\n")


def test_validate_measures_prompts_with_the_model_and_the_template(tmp_path, asyncgrpo):
    path = write_jsonl(tmp_path / "rows.jsonl", GOOD)
    limit = ("data", "validate", path, "--model", "tiny", "--set")
    assert asyncgrpo(*limit, "data.max_prompt_tokens=20")[0] == 0
    code, out, _ = asyncgrpo(*limit, "data.max_prompt_tokens=5")
    assert code == 1
    assert "data.max_prompt_tokens is 5" in " ".join(out.replace("│", " ").split())
    template = ("--set", f"data.template.system={'a' * 30}")
    assert asyncgrpo(*limit, "data.max_prompt_tokens=20", *template)[0] == 1
    _, out, _ = asyncgrpo("data", "validate", path, "--set", "data.max_prompt_tokens=5")
    assert out == f"{path}: 0 problems in 1 records{UNMEASURED}\n"


def test_validate_takes_limit_model_and_template_from_the_config(tmp_path, asyncgrpo):
    path = write_jsonl(tmp_path / "rows.jsonl", {"text": "1 + 1?", "label": 2})
    config = tmp_path / "run.toml"
    settings = """[data]
        max_prompt_tokens = {limit}
        [[data.train]]
        path = "{path}"
        template = {{ user_field = "text", answer_field = "label" }}
    """
    for limit, expected in ((20, 0), (4, 1)):
        config.write_text(settings.format(limit=limit, path=path), encoding="utf-8")
        assert asyncgrpo("data", "validate", path, "--config", config)[0] == expected


def test_preview_shows_records_raw_rendered_and_tokenised_with_their_lengths(tmp_path, asyncgrpo):
    path = write_jsonl(tmp_path / "rows.jsonl", '{"question": "三加四?", "answer": "七"}', GOOD)
    code, out, _ = asyncgrpo(
        "data", "preview", path, "-n", 1, "--model", "tiny", "--set", "data.template.suffix=Go."
    )
    rendered = "<|im_start|>user\n三加四? Go.<|im_end|>\n<|im_start|>assistant\n"
    assert code == 0
    assert '{"question": "三加四?", "answer": "七"}' in out
    assert rendered in out
    tokens = json.loads(out.partition("tokens    ")[2].splitlines()[0])
    assert f"{len(rendered)} characters, {len(tokens)} tokens\nlimit     256" in out
    assert "1 + 1?" not in out


def test_preview_without_a_model_shows_messages_and_says_what_is_missing(asyncgrpo):
    code, out, _ = asyncgrpo("data", "preview", SAMPLE)
    assert code == 0
    assert out.count("[user] ") == out.count("give --model") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("preview", "nothing.jsonl"), "nothing.jsonl does not exist"),
        (("preview", SAMPLE, "--model", "/nowhere"), "no tokenizer can be loaded from '/nowhere'"),
        (("validate", "nobody/nothing"), "is no file or folder here"),
        (("make-tasks", "--num", 1, "--kinds", "sorting"), "no task kind 'sorting'"),
        (("make-tasks", "--num", 0), "Invalid value for '--num'"),
        (("make-tasks", "--num", 1, "--out", SAMPLE / "x.jsonl"), "x.jsonl cannot be written"),
        (("convert-gsm8k", "--out-dir", "x"), "Missing option '--input-dir'"),
        (("convert-gsm8k", "--input-dir", "/nowhere", "--out-dir", "x"), "holds no GSM8K files"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(asyncgrpo, arguments, message):
    code, _, err = asyncgrpo("data", *arguments)
    assert (code, "Traceback" in err) == (2, False)
    assert message in err


def test_made_tasks_can_be_checked_and_read(tmp_path, asyncgrpo):
    path = tmp_path / "new" / "tasks.jsonl"
    command = ("data", "make-tasks", "--kinds", "math,gcd,sort", "--num", 30, "--seed", 42)
    assert asyncgrpo(*command, "--out", path) == (0, f"{path}: 30 records\n", "")
    assert asyncgrpo("data", "validate", path)[0] == 0
    assert len(read_prompts(path, TemplateSettings(suffix="Go."))) == 30
    assert asyncgrpo(*command)[1] == path.read_text(encoding="utf-8")


def test_convert_gsm8k_writes_both_splits_and_names_rows_without_an_answer(tmp_path, asyncgrpo):
    folder = tmp_path / "in"
    row = {"question": "1 + 1?", "answer": "2\n#### 1,002"}
    write_jsonl(folder / "train.jsonl", row, {**row, "answer": "two"}, row)
    write_jsonl(folder / "test.jsonl", row)
    arguments = ("data", "convert-gsm8k", "--input-dir", folder, "--out-dir", tmp_path / "out")
    code, out, err = asyncgrpo(*arguments)
    assert code == 0
    assert "train.jsonl: 2 records" in out
    assert "test.jsonl: 1 records" in out
    assert err == "warning: train: 1 rows have no answer after ####, left out: 1\n"
    (prompt,) = read_prompts(tmp_path / "out" / "test.jsonl")
    assert prompt.answer == "1002"
