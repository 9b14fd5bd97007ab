"""Golden prompts for each part of a template, and the limit on their length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncgrpo.data.templates import fit, render, tokenise, with_suffix, with_template
from asyncgrpo.data.tiny import build_tokenizer
from asyncgrpo.errors import DataError
from asyncgrpo.settings.data import DataSettings, TemplateSettings
from asyncgrpo.types import Prompt

STEPS = 'Let\'s think step by step and output the final answer after "####".'
SYSTEM = {"role": "system", "content": "你是助手。"}
SHOT = {"user": "1 + 1?", "assistant": "<answer>2</answer>"}
QUESTION = {"role": "user", "content": "2 + 3?"}


def prompt(*messages: dict[str, str]) -> Prompt:
    return Prompt(prompt_id="p", messages=messages, answer="5", data_source="d", columns={"n": 1})


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# template, messages of the record -> messages of the prompt
GOLDEN = {
    "nothing": ({}, [QUESTION], [QUESTION]),
    "nothing keeps the record's system prompt": ({}, [SYSTEM, QUESTION], [SYSTEM, QUESTION]),
    "system": ({"system": "你是助手。"}, [QUESTION], [SYSTEM, QUESTION]),
    "system takes the place of the record's own": (
        {"system": "你是助手。"},
        [{"role": "system", "content": "Be brief."}, QUESTION],
        [SYSTEM, QUESTION],
    ),
    "few-shot": (
        {"few_shot": [SHOT]},
        [QUESTION],
        [user("1 + 1?"), assistant("<answer>2</answer>"), QUESTION],
    ),
    "few-shot stands after the record's system prompt": (
        {"few_shot": [SHOT, {"user": "a", "assistant": "b"}]},
        [SYSTEM, QUESTION],
        [
            SYSTEM,
            user("1 + 1?"),
            assistant("<answer>2</answer>"),
            user("a"),
            assistant("b"),
            QUESTION,
        ],
    ),
    "suffix": ({"suffix": STEPS}, [QUESTION], [user(f"2 + 3? {STEPS}")]),
    "suffix on a line of its own": ({"suffix": "\nGo."}, [QUESTION], [user("2 + 3?\nGo.")]),
    "suffix is there already": (
        {"suffix": STEPS},
        [user(f"2 + 3? {STEPS} ")],
        [user(f"2 + 3? {STEPS} ")],
    ),
    "suffix goes to the last question of a conversation": (
        {"suffix": "Go."},
        [user("a"), assistant("b"), QUESTION],
        [user("a"), assistant("b"), user("2 + 3? Go.")],
    ),
    "everything": (
        {"system": "你是助手。", "few_shot": [SHOT], "suffix": "Go."},
        [QUESTION],
        [SYSTEM, user("1 + 1?"), assistant("<answer>2</answer>"), user("2 + 3? Go.")],
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_a_template_makes_these_messages_and_changes_nothing_else(case):
    template, own, expected = GOLDEN[case]
    before = prompt(*own)
    after = with_template(before, TemplateSettings.model_validate(template))
    assert list(after.messages) == expected
    assert (after.answer, after.columns, after.prompt_id) == ("5", {"n": 1}, "p")
    assert list(before.messages) == own


@given(st.text(), st.text())
def test_a_suffix_is_never_added_twice(text, suffix):
    once = with_suffix(text, suffix)
    assert with_suffix(once, suffix) == once
    assert once.startswith(text)
    assert once.rstrip().endswith(suffix.strip())


def test_the_models_own_chat_template_is_rendered_and_tokenised_alike():
    tokenizer = build_tokenizer()
    text = render(tokenizer, [SYSTEM, QUESTION], DataSettings())
    assert text == (
        "<|im_start|>system\n你是助手。<|im_end|>\n<|im_start|>user\n2 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenise(tokenizer, [SYSTEM, QUESTION], DataSettings())
    assert tokenizer.decode(ids) == text


def test_plain_text_needs_no_chat_template():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    plain = DataSettings(chat_template=False)
    assert render(tokenizer, [SYSTEM, QUESTION], plain) == "你是助手。\n\n2 + 3?"
    assert (
        tokenizer.decode(tokenise(tokenizer, [SYSTEM, QUESTION], plain)) == "你是助手。\n\n2 + 3?"
    )
    with pytest.raises(DataError, match=r"no chat template.*set data\.chat_template=false"):
        tokenise(tokenizer, [QUESTION], DataSettings())


@pytest.mark.parametrize(
    ("policy", "expected"), [("drop", None), ("truncate_left", [3, 4, 5]), ("error", None)]
)
def test_an_overlong_prompt_is_dropped_or_cut_on_the_left_or_an_error(policy, expected):
    data = DataSettings(max_prompt_tokens=3, overlong_prompt=policy)
    assert fit([1, 2, 3], data, "gsm8k:7") == [1, 2, 3]
    if policy == "error":
        with pytest.raises(DataError, match=r"gsm8k:7 has 5 tokens, data\.max_prompt_tokens=3"):
            fit([1, 2, 3, 4, 5], data, "gsm8k:7")
    else:
        assert fit([1, 2, 3, 4, 5], data, "gsm8k:7") == expected
