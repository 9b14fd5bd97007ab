from __future__ import annotations

import ast
import math
import operator
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncgrpo.config import from_mapping
from asyncgrpo.data.prompts import open_prompts
from asyncgrpo.data.records import prompts_from_rows
from asyncgrpo.data.tasks import KINDS, Task, TaskSource, draw_task, task_records
from asyncgrpo.errors import ConfigError
from asyncgrpo.rewards.builtin import task
from asyncgrpo.settings.data import TaskSettings

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
ALL_KINDS = TaskSettings(kinds=dict.fromkeys(KINDS, 1.0))
seeds = st.integers(0, 2**31 - 1)


def expression_value(text: str) -> object:
    """An oracle for the four forms of `Eval:` prompts, from the text alone."""
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    if isinstance(call.func, ast.Attribute):
        return str(ast.literal_eval(call.func.value)).upper()
    arguments = [ast.literal_eval(argument) for argument in call.args]
    return {"len": len, "max": max, "abs": abs}[call.func.id](*arguments)


def truth_from_text(task: Task, modulus: int) -> str:
    """The answer computed anew from nothing but the prompt."""
    content = task.text.partition(": ")[2]
    words = content.split()
    if task.kind in ("add", "sub", "mul"):
        return str(OPERATORS[words[1]](int(words[0]), int(words[2])))
    if task.kind == "gcd":
        return str(math.gcd(int(words[0]), int(words[1])))
    if task.kind == "sort":
        return " ".join(sorted(words))
    if task.kind == "palindrome":
        return "YES" if list(content) == list(reversed(content)) else "NO"
    if task.kind == "reverse":
        return "".join(reversed(content))
    if task.kind == "expression":
        return str(expression_value(content))
    return str(sum(int(word) for word in words) % modulus)


@given(st.sampled_from(sorted(KINDS)), seeds, st.sampled_from([0.0, 0.7]), st.integers(2, 10))
def test_the_answer_is_the_truth_about_the_prompt(kind, seed, long_tail, modulus):
    tasks = TaskSettings(long_tail=long_tail, modulus=modulus)
    task = draw_task(kind, tasks, random.Random(seed))
    assert task.answer == truth_from_text(task, modulus)
    assert task.worked.split()[-1] == task.answer.split()[-1]


def test_each_kind_renders_its_prompt_as_documented():
    examples = {kind: draw_task(kind, TaskSettings(), random.Random(5)).text for kind in KINDS}
    assert examples == {
        "add": "Compute: 19 + 8",
        "sub": "Compute: 19 - 8",
        "mul": "Compute: 9 * 4",
        "gcd": "gcd: 20 9",
        "sort": "Sort: 4 5 8 0 7",
        "palindrome": "Palindrome: elflkia",
        "reverse": "Reverse: lfllk",
        "expression": "Eval: 'lfll'.upper()",
        "check": "Check: 2 0 3 1 0",
    }


def test_check_is_worked_as_running_totals_and_careless_is_right_at_once():
    task = draw_task("check", TaskSettings(modulus=4), random.Random(5))
    assert task.text == "Check: 2 0 3 1 0"
    assert (task.worked, task.careless, task.answer) == ("2 2 1 2 2", "2", "2")


@pytest.mark.parametrize(
    ("kind", "careless"),
    [
        ("add", "19"),
        ("sort", "4 5 8 0 7"),
        ("palindrome", "elf"),
        ("reverse", "lfllk"),
        ("expression", "lfll"),
    ],
)
def test_the_careless_answer_parrots_the_prompt(kind, careless):
    assert draw_task(kind, TaskSettings(), random.Random(5)).careless == careless


@settings(max_examples=20)
@given(seeds, st.integers(0, 10**9))
def test_a_prompt_depends_on_seed_and_position_only(seed, position):
    tasks = TaskSettings(kinds={"sort": 1.0})
    other = TaskSource(tasks, seed, 16)
    other.get(position + 1)  # asking elsewhere changes nothing
    assert TaskSource(tasks, seed, 16).get(position) == other.get(position)


def test_training_prompts_are_never_held_out_prompts():
    source = TaskSource(ALL_KINDS, 3, 318)
    held_out = {prompt.messages[0]["content"] for prompt in source.held_out()}
    assert len(held_out) == 318
    training = [source.get(position) for position in range(3000)]
    assert not held_out & {prompt.messages[0]["content"] for prompt in training}
    assert len({prompt.prompt_id for prompt in training}) == 3000


def test_the_training_stream_does_not_depend_on_how_many_prompts_are_evaluated():
    few, many = TaskSource(ALL_KINDS, 0, 8), TaskSource(ALL_KINDS, 0, 318)
    assert [few.get(i) for i in range(50)] == [many.get(i) for i in range(50)]


def test_held_out_prompts_are_the_same_for_every_seed_and_begin_alike():
    longest = TaskSource(ALL_KINDS, 0, 318).held_out()
    assert TaskSource(ALL_KINDS, 9, 318).held_out() == longest
    assert TaskSource(ALL_KINDS, 9, 20).held_out() == longest[:20]


def test_every_beginning_of_the_held_out_set_is_balanced():
    kinds = [prompt.columns["kind"] for prompt in TaskSource(ALL_KINDS, 0, 90).held_out()]
    for end in range(len(kinds)):
        counts = [kinds[:end].count(kind) for kind in KINDS]
        assert max(counts) - min(counts) <= 1


def test_the_answer_stands_in_the_record_and_not_in_the_prompt():
    prompt = TaskSource(TaskSettings(kinds={"add": 1.0}), 0, 0).get(4)
    assert prompt.data_source == "task/add"
    assert prompt.columns == {"kind": "add"}
    left, right = prompt.messages[0]["content"].removeprefix("Compute: ").split(" + ")
    assert prompt.answer == str(int(left) + int(right))
    assert prompt.messages[0]["role"] == "user"


def test_a_tiny_task_space_keeps_prompts_for_training():
    source = TaskSource(TaskSettings(kinds={"add": 1.0}, max_operand=1), 0, 100)
    assert len(source.held_out()) == 1  # a quarter of the four additions
    assert source.get(0).messages != source.held_out()[0].messages


def test_a_long_tail_reaches_far_but_not_past_its_bounds():
    source = TaskSource(TaskSettings(kinds={"reverse": 1.0}, long_tail=0.7), 0, 0)
    sizes = sorted(len(str(source.get(i).answer)) for i in range(2000))
    assert sizes[0] == 2
    assert sizes[len(sizes) // 2] in (5, 6, 7)
    assert 25 < sizes[-1] <= 40


def test_weights_choose_how_often_a_kind_is_drawn():
    source = TaskSource(TaskSettings(kinds={"add": 3.0, "sort": 1.0, "gcd": 0.0}), 0, 12)
    kinds = [source.get(i).columns["kind"] for i in range(2000)]
    assert kinds.count("add") / 2000 == pytest.approx(0.75, abs=0.05)
    assert "gcd" not in kinds
    assert {prompt.columns["kind"] for prompt in source.held_out()} == {"add", "sort"}


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"sorted": 1.0}, r"no task kind 'sorted'; did you mean 'sort'\? kinds are: add"),
        ({"add": -1.0}, r"kinds.add=-1.0 must be a finite number >= 0"),
        ({"add": 0.0}, r"no kind has a weight > 0"),
        ({}, r"no kind has a weight > 0"),
    ],
)
def test_impossible_kinds_are_refused_with_the_remedy(kinds, message):
    with pytest.raises(ConfigError, match=message):
        TaskSource(TaskSettings(kinds=kinds), 0, 8)


# -- files of tasks ------------------------------------------------------------------------

MADE = ("math", "gcd", "sort", "palindrome", "reverse", "expression")
MATH = ("add", "sub", "mul")


def make(kinds: tuple[str, ...], num: int, seed: int = 0) -> list[dict]:
    return list(task_records(kinds, num, seed, TaskSettings()))


@settings(max_examples=30)
@given(
    st.lists(st.sampled_from(MADE), min_size=1, max_size=6, unique=True),
    st.integers(1, 60),
    st.integers(0, 2**31 - 1),
)
def test_kinds_are_in_turn_each_prompt_comes_once_and_its_answer_is_right(kinds, num, seed):
    records = make(tuple(kinds), num, seed)
    assert len(records) == num
    names = Counter("math" if row["kind"] in MATH else row["kind"] for row in records)
    assert max(names.values()) - min(names[kind] for kind in kinds) <= 1
    assert len({row["prompt"][0]["content"] for row in records}) == num
    for row in records:
        truth = row["reward_model"]["ground_truth"]
        assert task(truth, truth, row["kind"]) == 1.0


def test_the_same_arguments_give_the_same_records_and_a_longer_file_begins_alike():
    assert make(MADE, 50, seed=3) == make(MADE, 80, seed=3)[:50]
    assert make(MADE, 50, seed=3) != make(MADE, 50, seed=4)


def test_the_truth_is_in_the_record_only():
    (record,) = make(("gcd",), 1, seed=5)
    assert record == {
        "data_source": "task/gcd",
        "prompt": [{"role": "user", "content": "gcd: 2 15"}],
        "ability": "task",
        "reward_model": {"ground_truth": "1", "style": "rule"},
        "kind": "gcd",
        "extra_info": {"index": 0},
    }


def test_no_record_is_a_held_out_task():
    held_out = open_prompts(from_mapping({})).held_out(318)
    reserved = {prompt.messages[0]["content"] for prompt in held_out}
    made = {row["prompt"][0]["content"] for row in make(MADE, 600)}
    assert not made & reserved


def test_records_are_read_back_as_the_prompts_of_the_tasks():
    rows = make(MADE, 12)
    prompts = prompts_from_rows([(str(i), row) for i, row in enumerate(rows)], "made")
    for prompt, row in zip(prompts, rows, strict=True):
        assert prompt.answer == row["reward_model"]["ground_truth"]
        assert (prompt.data_source, prompt.columns["kind"]) == (row["data_source"], row["kind"])


def test_more_tasks_than_there_are_different_ones_are_refused():
    with pytest.raises(ConfigError, match=r"only \d+ different tasks of kind 'mul' to be found"):
        make(("mul",), 200)


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="no task kind 'sorting'; did you mean 'sort'"):
        make(("sorting",), 1)
