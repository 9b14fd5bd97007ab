from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import re
import signal
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from asyncgrpo.errors import RewardError
from asyncgrpo.rewards.finding import bind
from asyncgrpo.rewards.registry import RewardHealth, RewardSet, load_rewards, lost_scores
from asyncgrpo.settings.reward import RewardSettings
from asyncgrpo.types import Prompt

PROMPT = Prompt(
    prompt_id="p1",
    messages=({"role": "user", "content": "Compute: 3 + 4"},),
    answer="7",
    data_source="task/add",
    columns={"kind": "add", "level": 3},
)


def rewards(*functions: object) -> RewardSet:
    return load_rewards(RewardSettings.model_validate({"functions": functions}))


def routed(routes: object, functions: object = (), **settings: object) -> RewardSet:
    raw = {"functions": functions, "routes": routes, **settings}
    return load_rewards(RewardSettings.model_validate(raw))


def sourced(source: object, **changes: object) -> Prompt:
    """A prompt as the record reader makes it from a data_source column."""
    text = source if isinstance(source, str) else "+".join(source)
    columns = {"kind": "add", "data_source": source}
    return replace(PROMPT, data_source=text, columns=columns, **changes)


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


def test_what_a_function_changes_stays_with_it():
    def spoil(prompts, tests, **columns):
        for its in prompts:
            its[0]["content"] += "!"
        tests[0].append("x")
        return [float(len(its[0]["content"])) for its in prompts]

    def spoil_one(prompt, completion, tests):
        prompt[0]["content"] += "!"
        tests.append("x")
        return float(len(tests))

    prompt = replace(PROMPT, columns={"tests": ["a"]})
    scores = RewardSet([bind("g", spoil), bind("s", spoil_one)]).score(prompt, ["a", "b"])
    assert scores.parts["g"].tolist() == [len("Compute: 3 + 4!")] * 2
    assert scores.parts["s"].tolist() == [2.0, 2.0]
    assert prompt.messages[0]["content"] == "Compute: 3 + 4"
    assert prompt.columns == {"tests": ["a"]}


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


class Shy:
    def __repr__(self) -> str:
        raise ValueError("no")


class ShyError(Exception):
    def __str__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize("error", [SystemExit(0), ShyError(), asyncio.CancelledError()])
@pytest.mark.parametrize("kind", ["plain", "async", "lazy"])
def test_whatever_a_function_raises_is_its_own_error_or_the_error_score(error, kind):
    def plain(completions):
        raise error

    async def waiting(completions):
        raise error

    def lazy(completions):
        yield from plain(completions)

    function = bind("f", {"plain": plain, "async": waiting, "lazy": lazy}[kind])
    match = f"reward function 'f' raised {type(error).__name__}.* at .*test_rewards.py"
    with pytest.raises(RewardError, match=match):
        RewardSet([function]).probe(PROMPT)
    assert RewardSet([function], 0.5).score(PROMPT, ["a"]).rewards.tolist() == [0.5]


def hang(completions):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


async def hang_waiting(completions):
    await asyncio.Event().wait()


def hang_lazily(completions):
    while True:
        yield from hang(completions)


@pytest.mark.parametrize("function", [hang, hang_waiting, hang_lazily])
def test_a_function_that_hangs_is_found_before_the_run(function):
    before = signal.getsignal(signal.SIGVTALRM)
    reward_set = RewardSet([bind("quick", score_all), bind("f", function)], timeout_seconds=1.0)
    match = r"reward function 'f' gave no score within reward.timeout_seconds=1; let it end"
    with pytest.raises(RewardError, match=match):
        reward_set.probe(PROMPT)
    assert signal.getsignal(signal.SIGVTALRM) == before


def score_all(completions):
    """In the main thread, or setting the signal's handler fails."""
    signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))
    return [1.0 for _ in completions]


def test_the_limit_of_a_check_is_that_of_the_settings(module):
    name = module("import time\ndef f(completions):\n    time.sleep(9)\n")
    settings = {"functions": [{"use": f"{name}:f"}], "timeout_seconds": 0.05}
    with pytest.raises(RewardError, match=r"'f' gave no score within .*=0.05"):
        load_rewards(RewardSettings.model_validate(settings)).check([PROMPT])


def test_ctrl_c_is_no_error_of_the_function_but_in_the_thread_of_async_ones_it_is():
    def interrupted(completions):
        raise KeyboardInterrupt

    async def waiting(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RewardSet([bind("f", interrupted)]).probe(PROMPT)
    for _ in range(2):  # their loop lives on
        error = RewardSet([bind("f", waiting)], 0.5).score(PROMPT, ["a"]).errors[0]
        assert "'f' raised KeyboardInterrupt" in error


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
        (range(9), "'f' returned more than 2 values for 2 completions"),
        (itertools.count(), "'f' returned more than 2 values for 2 completions"),
        ([1.0, 10**400], "'f' returned inf for completion 1"),
        (np.array(1.0), "'f' raised TypeError: .*0-d array"),
        ((1 / n for n in (1, 0)), "'f' raised ZeroDivisionError"),
        (Shy(), "'f' returned <Shy> for 2 completions"),
        ([1.0, Shy()], r"'f' returned <Shy> \(Shy\) for completion 1"),
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


def test_a_sample_function_is_called_once_per_completion_with_plain_values():
    seen = []

    def compute(response, label, level, **rest):
        seen.append((response, label, level, rest["prompt"], rest["completion"]))
        return float(response == label)

    scores = RewardSet([bind("compute", compute)]).score(PROMPT, ["7", "8"])
    assert scores.rewards.tolist() == [1.0, 0.0]
    message = [{"role": "user", "content": "Compute: 3 + 4"}]
    assert seen == [("7", "7", 3, message, "7"), ("8", "7", 3, message, "8")]


@pytest.mark.parametrize(
    ("call", "scope"),
    [
        (lambda completions: [1.0], "group"),
        (lambda **columns: [1.0], "group"),
        (lambda completion: 1.0, "sample"),
        (lambda response, label: 1.0, "sample"),
    ],
)
def test_the_scope_is_sample_for_a_function_of_one_completion(call, scope):
    assert bind("f", call).scope == scope


def test_a_scope_that_does_not_fit_the_function_says_so():
    with pytest.raises(RewardError, match=r"scope 'group'\) needs a column 'completion'"):
        RewardSet([bind("f", lambda completion: 1.0, scope="group")]).probe(PROMPT)
    with pytest.raises(RewardError, match='or set scope = "sample"'):
        RewardSet([bind("f", lambda **columns: 1.0)]).probe(PROMPT)
    RewardSet([bind("f", lambda **columns: 1.0, scope="sample")]).probe(PROMPT)


def test_async_functions_of_both_scopes_are_under_way_together():
    waiting, everybody = [], asyncio.Event()

    async def meet():
        waiting.append(1)
        if len(waiting) == 4:  # three single completions and one group
            everybody.set()
        await asyncio.wait_for(everybody.wait(), 20)

    async def single(completion):
        await meet()
        return float(len(completion))

    async def together(completions):
        await meet()
        return [None, 10.0, None]

    reward_set = RewardSet([bind("single", single), bind("together", together)])
    assert reward_set.score(PROMPT, ["", "a", "bb"]).rewards.tolist() == [0.0, 11.0, 2.0]


def test_async_functions_can_be_scored_inside_a_running_event_loop():
    async def one(completions):
        return [1.0 for _ in completions]

    async def notebook():
        return RewardSet([bind("one", one)]).score(PROMPT, ["a"])

    assert asyncio.run(notebook()).rewards.tolist() == [1.0]


def test_an_async_function_that_raises_is_named_with_its_place():
    async def broken(completion):
        return 1 / len(completion)

    with pytest.raises(RewardError, match=r"'broken' raised ZeroDivisionError.*test_rewards.py:"):
        RewardSet([bind("broken", broken)]).probe(PROMPT)


def test_options_are_passed_and_no_column_takes_their_place():
    def above(completions, level, bonus=0.0):
        return [level[0] + bonus for _ in completions]

    with pytest.raises(RewardError, match="no option 'level'"):
        bind("above", above, options={"level": [0.5]})
    prompt = replace(PROMPT, columns={"level": 3, "bonus": 9, "extract": "junk"})
    reward_set = RewardSet([bind("above", above, options={"bonus": 2})])
    assert reward_set.score(prompt, ["a"]).rewards.tolist() == [5.0]
    assert rewards({"use": "gsm8k"}).score(prompt, ["#### 7"]).rewards.tolist() == [1.0]


# -- errors that score something -----------------------------------------------------------


def test_only_the_call_that_fails_scores_the_error_value():
    def picky(completion):
        if completion == "bad":
            raise ValueError("no")
        return 1.0

    reward_set = RewardSet([bind("picky", picky), bind("two", lambda completions: [2, 2])], -0.5)
    scores = reward_set.score(PROMPT, ["good", "bad"])
    assert scores.rewards.tolist() == [3.0, 1.5]
    assert len(scores.errors) == 1
    assert "'picky' raised ValueError: no" in scores.errors[0]


def test_a_failed_group_function_scores_zero_for_the_whole_group():
    settings = {"functions": [{"use": "reward_functions:raises"}, {"use": "exact"}]}
    loaded = load_rewards(RewardSettings.model_validate({**settings, "on_error": "zero"}))
    scores = loaded.score(PROMPT, ["7", "8"])
    assert scores.parts["raises"].tolist() == [0.0, 0.0]
    assert scores.rewards.tolist() == [1.0, 0.0]


def test_probing_is_strict_whatever_errors_score():
    with pytest.raises(RewardError, match="raises"):
        routed({}, [{"use": "reward_functions:raises"}], on_error="zero").probe(PROMPT)


def test_a_lost_group_scores_the_error_value_of_every_function_or_nothing():
    raw = {"functions": [{"use": "exact", "weight": 2}, {"use": "integer"}]}
    assert lost_scores(RewardSettings.model_validate(raw), PROMPT, 2) is None
    settings = RewardSettings.model_validate({**raw, "on_error": "value", "error_value": -1})
    scores = lost_scores(settings, PROMPT, 2)
    assert scores.rewards.tolist() == [-3.0, -3.0]
    assert list(scores.parts) == ["exact", "integer"]
    lost = RewardSettings.model_validate({"routes": {"gsm": "gsm8k"}, "on_error": "zero"})
    assert lost_scores(lost, PROMPT, 2) is None


# -- routes --------------------------------------------------------------------------------


ROUTES = {
    "gsm": "gsm8k",
    "tagged": {"use": "tag", "options": {"tag": "a"}},
    "both": {"exact": 0.7, "integer": 0.3},
    "listed": ["exact", {"use": "length", "weight": 0.5, "options": {"max_length": 1}}],
}


@pytest.mark.parametrize(
    ("source", "text", "total", "parts"),
    [
        ("gsm", "#### 7", 1.0, ["gsm8k"]),
        ("tagged", "<a>7</a>", 1.0, ["tag"]),
        ("both", "7", 1.0, ["exact", "integer"]),
        ("both", "7.", 0.3, ["exact", "integer"]),
        ("listed", "7", 1.5, ["exact", "length"]),
        ({"tagged": 0.7, "gsm": 0.3}, "<a>7</a>", 0.7, ["tagged", "gsm"]),
        ({"tagged": 0.7, "gsm": 0.3}, "<a>8</a> #### 7", 0.3, ["tagged", "gsm"]),
        ({"exact": 0.7, "integer": 0.3}, "7!", 0.3, ["exact", "integer"]),
        ({"both": 2.0}, "7.", 0.6, ["both/exact", "both/integer"]),
    ],
)
def test_a_record_is_judged_as_its_data_source_says(source, text, total, parts):
    scores = routed(ROUTES).score(sourced(source), [text])
    np.testing.assert_allclose(scores.rewards, [total], rtol=1e-6)
    assert list(scores.parts) == parts


def test_functions_score_every_record_after_its_judge():
    scores = routed(ROUTES, [{"use": "length_penalty"}]).score(sourced("gsm"), ["#### 7"])
    assert list(scores.parts) == ["gsm8k", "length_penalty"]
    np.testing.assert_allclose(scores.rewards, [1 - 0.012], rtol=1e-6)


def test_the_default_route_takes_all_other_sources_but_no_judge_that_a_record_names():
    reward_set = routed({"gsm": "gsm8k", "default": "exact"})
    assert list(reward_set.score(sourced("other"), ["7"]).parts) == ["exact"]
    with pytest.raises(RewardError, match=r"names the judge 'gsn', .* did you mean 'gsm'\?"):
        reward_set.score(sourced({"gsn": 1.0}), ["7"])


def test_an_unknown_source_is_found_before_the_run_with_the_nearest_name():
    with pytest.raises(RewardError, match=r"data_source 'gsn' has no judge; did you mean 'gsm'\?"):
        routed(ROUTES).check([sourced("gsm"), sourced("gsm"), sourced("gsn")])


def test_every_source_is_probed_before_the_run():
    with pytest.raises(RewardError, match="'blue' holds no number"):
        routed(ROUTES).check([sourced("tagged"), sourced("gsm", answer="blue")])


def test_a_record_cannot_choose_what_code_runs():
    with pytest.raises(RewardError, match="names the judge 'os:system', which is no route"):
        routed(ROUTES).score(sourced({"os:system": 1.0}), ["7"])


def test_without_routes_the_data_source_does_not_matter_unless_it_names_judges():
    assert list(rewards({"use": "exact"}).score(sourced("any"), ["7"]).parts) == ["exact"]
    assert list(routed({}).score(sourced({"gsm8k": 1.0}), ["7"]).parts) == ["gsm8k"]
    with pytest.raises(RewardError, match=r"'any' has no reward: reward.functions and"):
        routed({}).score(sourced("any"), ["7"])


def test_two_judges_of_one_name_are_refused():
    with pytest.raises(RewardError, match="'gsm' has two rewards called 'gsm8k'; give one"):
        routed(ROUTES, [{"use": "gsm8k"}]).check([sourced("gsm")])


def test_every_routed_judge_is_loaded_at_once():
    with pytest.raises(RewardError, match=r"no built-in reward 'gsm9k'; did you mean 'gsm8k'\?"):
        routed({"a": {"gsm8k": 0.5, "gsm9k": 0.5}})


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
        ("raise SystemExit", "my_rewards:f", r"raised SystemExit: .* at .*my_rewards.py:1; repair"),
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


def test_the_rewards_of_the_readme_work_as_it_says(module):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    toml, source = re.findall(r"```(?:toml|python)\n# my.*?\n```", readme, re.DOTALL)[:2]
    module(source.strip("`").removeprefix("python"))
    settings = tomllib.loads(toml.strip("`").removeprefix("toml"))["reward"]
    loaded = load_rewards(RewardSettings.model_validate(settings))
    scores = loaded.score(sourced("mixed"), ["please: <answer>7</answer>", "7"])
    assert list(scores.parts) == ["tag", "polite", "correct", "length_penalty"]
    np.testing.assert_allclose(scores.rewards, [1 - 0.026, 1 - 0.001], rtol=1e-6)
    assert next(iter(loaded.score(sourced("else"), ["7"]).parts)) == "exact"


# -- the error rate ------------------------------------------------------------------------


def health(**changes: object) -> RewardHealth:
    return RewardHealth(RewardSettings.model_validate(changes))


def test_a_run_goes_on_up_to_the_error_rate_and_stops_above_it_with_the_cause():
    watched = health(max_error_rate=0.25, error_window=8)
    for error in ("", "late", "", "late", "", ""):
        watched.note(error, 0.5)
    with pytest.raises(RewardError, match=r"3 of the last 7 groups .*max_error_rate=0.25 .*: junk"):
        watched.note("junk", 0.5)
    assert watched.counters == {"judged_groups": 7, "judge_errors": 3, "judge_seconds": 3.5}


def test_errors_that_left_the_window_are_forgotten():
    watched = health(max_error_rate=0.25, error_window=8)
    for _ in range(20):
        for error in ("late", "", "", ""):
            watched.note(error, 0.0)
    assert watched.counters["judge_errors"] == 20


@pytest.mark.parametrize(("rate", "stops_at"), [(0.0, 1), (0.5, 3), (1.0, None)])
def test_a_function_that_always_fails_stops_the_run_at_once_or_never(rate, stops_at):
    watched, count = health(max_error_rate=rate, error_window=4), 0
    try:
        for _ in range(20):
            count += 1
            watched.note("junk", 0.0)
    except RewardError:
        assert count == stops_at
    else:
        assert stops_at is None
