from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncgrpo.config import RewardSettings, TaskSettings
from asyncgrpo.data.tasks import KINDS, TaskSource
from asyncgrpo.errors import RewardError
from asyncgrpo.rewards.builtin import exact, gsm8k, length_penalty, task_score
from asyncgrpo.rewards.registry import RewardSet, bind, load_rewards
from asyncgrpo.types import Prompt

PROMPT = Prompt(
    prompt_id="p1",
    messages=({"role": "user", "content": "Compute: 3 + 4"},),
    answer="7",
    data_source="task/add",
    columns={"kind": "add", "level": 3},
)
TASKS = TaskSource(TaskSettings(kinds=dict.fromkeys(KINDS, 1.0)), 0, 318).held_out()
# Texts near what the judges look for, besides any text at all.
near_answers = st.text(alphabet="0123456789-−.=,# `'\"yesnoYESNO\n\t٣𝟜é", max_size=60)


def rewards(*functions: object) -> RewardSet:
    return load_rewards(RewardSettings.model_validate({"functions": functions}))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of reward functions into the present folder; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)

    def write(source: str) -> str:
        (tmp_path / "my_rewards.py").write_text(source, encoding="utf-8")
        return "my_rewards"

    return write


# -- built-in judges -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "answer", "text", "right"),
    [
        ("add", "7", "7", True),
        ("add", "7", " 7\n", True),
        ("add", "7", "3 + 4 = 7", True),
        ("add", "7", "The answer is 7.", True),
        ("add", "7", "7 + 0 = 8", False),
        ("add", "7", "3 + 4 =", False),
        ("add", "7", "17", False),
        ("add", "7", "7.5", False),
        ("add", "7", "8\n7", False),
        ("add", "7", "", False),
        ("add", "7", "```\n7\n```", True),
        ("add", "7", "```python\n7\n```", True),
        ("add", "7", "```7```", True),
        ("add", "7", "```\n```", False),
        ("sub", "-1", "-1", True),
        ("sub", "-1", "\N{MINUS SIGN}1", True),
        ("sub", "-1", "1", False),
        ("sub", "3", "10-3", True),
        ("check", "2", "3 0 2", True),
        ("check", "2", "2 0 3", False),
        ("sort", "1 2 3", "1 2 3", True),
        ("sort", "1 2 3", "1, 2, 3", True),
        ("sort", "1 2 3", "3 1 2", False),
        ("sort", "1 2 3", "1 2 3 4", False),
        ("palindrome", "YES", "yes.", True),
        ("palindrome", "NO", "UNKNOWN", False),
        ("palindrome", "YES", "YES NO", False),
        ("palindrome", "NO", "No", True),
        ("reverse", "cba", "cba", True),
        ("reverse", "cba", "'cba'", True),
        ("reverse", "cba", "''cba''", False),
        ("reverse", "cba", "CBA", False),
        ("expression", "ABC", '"ABC"', True),
        ("expression", "ABC", "abc", False),
        ("expression", "3", "len = 3", True),
    ],
)
def test_the_task_judge_takes_the_last_number_whole_words_and_bare_text(kind, answer, text, right):
    assert task_score(text, answer, kind) == (1.0 if right else -1.0)


@given(st.text(max_size=200) | near_answers, st.sampled_from(TASKS))
def test_no_built_in_reward_raises_on_any_text(text, prompt):
    kind, answer = prompt.columns["kind"], prompt.answer
    assert task_score(text, answer, kind) in (-1.0, 1.0)
    assert exact([text], [answer])[0] in (0.0, 1.0)
    assert gsm8k([text], ["#### 7"])[0] in (0.0, 1.0)
    assert -0.4 <= length_penalty([text])[0] <= 0.0


def test_every_truth_scores_right_and_the_truth_of_another_task_mostly_wrong():
    scores = [task_score(str(p.answer), str(p.answer), p.columns["kind"]) for p in TASKS]
    assert scores == [1.0] * len(TASKS)
    swapped = [task_score("zz", str(p.answer), p.columns["kind"]) for p in TASKS]
    assert swapped == [-1.0] * len(TASKS)


def test_very_long_numbers_are_wrong_rather_than_an_error():
    assert task_score("9" * 10_000, "9", "add") == -1.0


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("so #### 72", "72", 1.0),
        ("#### 1,234", "1234", 1.0),
        ("48 + 24 makes 72", "24 + 48 #### 72", 1.0),
        ("#### 7\nbut maybe 8", "7", 0.0),
        ("72 #### none", "72", 0.0),
        ("", "72", 0.0),
    ],
)
def test_gsm8k_compares_the_final_numbers(text, answer, score):
    assert gsm8k([text], [answer]) == [score]


def test_exact_ignores_outer_white_space_only():
    assert exact([" 7\n", "7.", ""], ["7", "7", "7"]) == [1.0, 0.0, 0.0]


def test_the_length_penalty_grows_up_to_two_hundred_characters():
    assert length_penalty(["", "x" * 100, "x" * 200, "x" * 999]) == [0.0, -0.2, -0.4, -0.4]


# -- calling functions ---------------------------------------------------------------------


def test_the_default_rewards_are_the_task_judge_and_the_length_penalty():
    scores = load_rewards(RewardSettings()).score(PROMPT, ["7", "eight"])
    np.testing.assert_allclose(scores.rewards, [1 - 0.002, -1 - 0.01], rtol=1e-6)
    np.testing.assert_array_equal(scores.parts["task"], np.float32([1, -1]))
    assert scores.rewards.dtype == scores.parts["length_penalty"].dtype == np.float32


def test_columns_arrive_as_lists_of_equal_values():
    seen = {}

    def look(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0, 0.0]

    RewardSet([bind("look", look)]).score(PROMPT, ("a", "b"))
    message = [{"role": "user", "content": "Compute: 3 + 4"}]
    assert seen == {
        "prompts": [message, message],
        "completions": ["a", "b"],
        "kind": ["add", "add"],
        "level": [3, 3],
        "answer": ["7", "7"],
        "data_source": ["task/add", "task/add"],
    }


def test_a_function_gets_only_what_it_names_and_may_have_defaults():
    def brief(completions, level, bonus=0.5):
        return [float(number) + bonus for number in level]

    scores = RewardSet([bind("brief", brief)]).score(PROMPT, ["a", "b"])
    assert scores.rewards.tolist() == [3.5, 3.5]


def test_a_column_that_the_record_lacks_is_named_with_those_that_it_has():
    reward_set = RewardSet([bind("hard", lambda completions, difficulty: [0.0])])
    with pytest.raises(
        RewardError, match=r"needs a column 'difficulty' .*; available: kind, level, answer"
    ):
        reward_set.probe(PROMPT)


def test_none_leaves_the_weighted_sum_and_shows_as_nan():
    reward_set = RewardSet(
        [
            bind("half", lambda completions: [1.0, None], weight=0.5),
            bind("always", lambda completions: [10, 20]),
        ]
    )
    scores = reward_set.score(PROMPT, ["a", "b"])
    assert scores.rewards.tolist() == [10.5, 20.0]
    assert scores.parts["half"][0] == 1.0
    assert math.isnan(scores.parts["half"][1])


def test_a_completion_that_no_function_applies_to_is_an_error_but_not_when_probing():
    reward_set = RewardSet([bind("shy", lambda completions: [1.0, None])])
    reward_set.probe(PROMPT)
    with pytest.raises(RewardError, match="applies to completion 1: all returned None"):
        reward_set.score(PROMPT, ["a", "b"])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "'f' returned 1 values for 2 completions; return a list"),
        (1.0, "'f' returned 1.0 for 2 completions"),
        ("ab", "'f' returned 'ab' for 2 completions"),
        (None, "'f' returned None for 2 completions"),
        ([1.0, "7"], r"'f' returned '7' \(str\) for completion 1"),
        ([1.0, float("nan")], "'f' returned nan for completion 1"),
        ([float("-inf"), 1.0], "'f' returned -inf for completion 0"),
        ([1.0, 1e300], r"'f' returned 1e\+300 for completion 1"),
    ],
)
def test_a_broken_contract_names_the_function_the_value_and_the_completion(returned, message):
    with pytest.raises(RewardError, match=message):
        RewardSet([bind("f", lambda completions: returned)]).score(PROMPT, ["a", "b"])


def test_numbers_of_numpy_and_booleans_are_numbers():
    values = [np.float32(0.5), np.int64(2), True, np.bool_(False)]
    scores = RewardSet([bind("f", lambda completions: values)]).score(PROMPT, list("abcd"))
    assert scores.rewards.tolist() == [0.5, 2.0, 1.0, 0.0]


def test_an_overflow_of_the_weighted_sum_is_an_error():
    reward_set = RewardSet([bind("f", lambda completions: [1e38], weight=1e10)])
    with pytest.raises(RewardError, match="weighted reward of completion 0 is 1e"):
        reward_set.score(PROMPT, ["a"])


def test_probing_finds_a_function_that_cannot_take_an_empty_text(module):
    name = module("def first(completions):\n    return [float(ord(c[0])) for c in completions]\n")
    reward_set = rewards({"use": f"{name}:first"})
    assert reward_set.score(PROMPT, ["a"]).rewards.tolist() == [97.0]
    with pytest.raises(
        RewardError, match=r"'first' raised IndexError: string index out of range at .*rewards.py:2"
    ):
        reward_set.probe(PROMPT)


def test_a_record_without_an_answer_cannot_be_judged_by_its_answer():
    prompt = Prompt(prompt_id="p", messages=PROMPT.messages, answer=None, data_source="x")
    with pytest.raises(RewardError, match="the record has no answer; add an answer column"):
        rewards({"use": "exact"}).probe(prompt)


# -- finding functions ---------------------------------------------------------------------


def test_functions_of_the_present_folder_are_found(module):
    name = module(
        "class Judges:\n    @staticmethod\n    def zero(completions):\n        return [0]\n"
    )
    assert rewards({"use": f"{name}:Judges.zero"}).score(PROMPT, ["a"]).rewards.tolist() == [0.0]


@pytest.mark.parametrize(
    ("source", "use", "message"),
    [
        ("", "tasks", r"no built-in reward 'tasks'; did you mean 'task'\? built in are: task"),
        ("", "my_rewards.f", "write your own as 'package.module:function'"),
        ("", ":f", "must look like 'package.module:function'"),
        ("", "no_such_module:f", "no module 'no_such_module'; install it, or start from"),
        ("import no_such_thing", "my_rewards:f", "no module 'no_such_thing'; install it"),
        ("def f(:", "my_rewards:f", r"raised SyntaxError: .* at .*my_rewards.py:1; repair"),
        ("x = 1 / 0", "my_rewards:f", r"raised ZeroDivisionError: .* at .*my_rewards.py:1"),
        ("def score(): 0", "my_rewards:scores", r"'scores' is not defined .* mean 'score'\?"),
        ("score = 3", "my_rewards:score", r"is 3 \(int\), not a function"),
        ("def f(a, /): 0", "my_rewards:f", "parameter 'a' is positional-only"),
    ],
)
def test_a_function_that_cannot_be_used_is_named_with_the_remedy(module, source, use, message):
    module(source)
    with pytest.raises(RewardError, match=message):
        rewards({"use": use})
