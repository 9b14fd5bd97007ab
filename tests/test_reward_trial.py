"""`asyncgrpo reward test`: sound rewards pass, and each way of being cheated is flagged."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest

from asyncgrpo.data.records import read_prompts
from asyncgrpo.errors import DataError
from asyncgrpo.rewards.finding import bind
from asyncgrpo.rewards.registry import RewardSet, load_rewards
from asyncgrpo.rewards.trial import Row, try_rewards
from asyncgrpo.settings.reward import RewardSettings
from asyncgrpo.types import Prompt

GSM8K = Path(__file__).parent / "data" / "gsm8k_8.jsonl"
ANSWERS = ("7", "12", "-3", "7", "40")


def prompt(number: int, answer: str | None, source: str = "sums") -> Prompt:
    return Prompt(
        prompt_id=f"p{number}",
        messages=({"role": "user", "content": f"question {number}"},),
        answer=answer,
        data_source=source,
    )


PROMPTS = [prompt(number, answer) for number, answer in enumerate(ANSWERS)]


def rows(rewards: RewardSet, prompts=PROMPTS, **options) -> dict[str, Row]:
    found = try_rewards(rewards, prompts, **{"count": 50, "correct_above": 0.0, **options})
    return {row.label: row for row in found}


def built_in(*functions: object) -> RewardSet:
    return load_rewards(RewardSettings.model_validate({"functions": functions}))


@pytest.mark.parametrize(
    ("function", "template"),
    [
        ({"use": "exact"}, "{answer}"),
        ({"use": "integer"}, "{answer}"),
        ({"use": "gsm8k"}, "#### {answer}"),
        ({"use": "math"}, "{answer}"),
        ({"use": "tag"}, "<answer>{answer}</answer>"),
        ({"use": "tag", "options": {"tag": "solution"}}, "<solution>{answer}</solution>"),
        ({"use": "json", "options": {"key": "value"}}, '{"value": "{answer}"}'),
    ],
)
def test_a_sound_judge_passes_and_the_format_it_wants_is_found(function, template):
    found = rows(built_in(function))
    assert {row.template for row in found.values()} == {template}
    assert [row.flags for row in found.values()] == [[], []]
    assert found["total"].means == {"gold": 1.0, "empty": 0.0, "shuffled": 0.0, "random": 0.0}


def test_helpers_that_do_not_look_at_the_answer_are_not_flagged():
    think = {"use": "format", "weight": 0.1, "options": {"pattern": "^<think>.*</think>"}}
    found = rows(built_in({"use": "tag"}, think, {"use": "length_penalty"}))
    assert [row.flags for row in found.values()] == [[], [], [], []]
    assert found["total"].template == "<think>\n</think>\n<answer>{answer}</answer>"
    assert found["total"].means["shuffled"] < 0.1 < 1.0 < found["total"].means["gold"]


def wrong_truth(completion, answer):
    return float(completion == str(int(answer) + 1))


def any_number(completion, answer):
    return float(any(c.isdigit() for c in completion))


def partial(completion, answer):
    return 1.0 if completion == answer else 0.2 * any_number(completion, answer)


def talkative(completion, answer):
    return 1.0 if completion == answer else 0.1 * ("e" in completion)


def half_marks(completion, answer):
    return 1.0 if completion == answer == "7" else 0.5 * (completion == answer)


def generous(completion, answer):
    return 1.0 if completion == answer else 0.6 if completion else 0.0


def not_for_empty(completion, answer):
    return float(completion == answer) if completion else None


def test_a_function_that_does_not_apply_to_empty_texts_can_be_tried():
    found = rows(RewardSet([bind("judge", not_for_empty)]))
    assert [row.flags for row in found.values()] == [[], []]


@pytest.mark.parametrize(
    ("function", "label", "flag"),
    [
        (wrong_truth, "judge", "5 of 5 gold answers are not correct"),
        (wrong_truth, "total", "gold answers are not better than empty ones"),
        (any_number, "judge", "5 of 5 shuffled answers count as correct"),
        (any_number, "total", "100% of what gold gains over empty goes to shuffled"),
        (partial, "judge", "rewards format without correctness: shuffled gets 0.2"),
        (talkative, "judge", "rewards format without correctness: random gets 0."),
        (half_marks, "judge", r"3 of 5 gold answers get less than full marks \(1\)"),
        (generous, "total", "60% of what gold gains over empty goes to random"),
    ],
)
def test_a_judge_that_can_be_cheated_or_misses_gold_is_flagged(function, label, flag):
    found = rows(RewardSet([bind("judge", function)]))[label]
    assert any(re.search(flag, each) for each in found.flags), found.flags


def test_what_wrong_answers_may_get_can_be_allowed():
    reward_set = RewardSet([bind("judge", partial)])
    assert rows(reward_set, correct_above=0.5, allow=0.2)["judge"].flags == []
    assert rows(reward_set, correct_above=0.5, allow=0.1)["judge"].flags != []


def test_a_template_can_be_given():
    found = rows(built_in({"use": "gsm8k"}), template="so #### {answer}.")
    assert (found["gsm8k"].template, found["gsm8k"].flags) == ("so #### {answer}.", [])


def test_shuffled_answers_are_never_right_and_missing_when_all_are_equal():
    seen = []

    def look(completions, answer):
        seen.append((completions, answer[0]))
        return [float(c == answer[0]) for c in completions]

    rows(RewardSet([bind("look", look)]), template="{answer}")
    assert all(texts[0] == truth and texts[-1] != truth for texts, truth in seen)
    assert len(seen) == len(PROMPTS)  # a template that is given is not searched for
    same = rows(built_in({"use": "exact"}), [prompt(1, "7"), prompt(2, "7.0")])
    assert same["exact"].means["shuffled"] != same["exact"].means["shuffled"]  # NaN
    assert same["total"].flags == []


def test_each_source_is_tried_with_its_own_judge_up_to_the_count():
    settings = {"routes": {"a": "exact", "b": "gsm8k"}}
    prompts = [prompt(i, str(i), source) for i in range(5) for source in ("a", "b")]
    rewards = load_rewards(RewardSettings.model_validate(settings))
    found = try_rewards(rewards, prompts, count=3, correct_above=0.0)
    assert [(row.source, row.label) for row in found] == [
        ("a", "exact"),
        ("a", "total"),
        ("b", "gsm8k"),
        ("b", "total"),
    ]


def test_data_without_answers_cannot_be_tried():
    with pytest.raises(DataError, match="data_source 'chat' has no answers: add"):
        rows(built_in({"use": "length_penalty"}), [*PROMPTS, prompt(9, None, "chat")])


def test_a_real_sample_of_gsm8k_passes_with_both_extractions():
    for extract in ("strict", "flexible"):
        judge = {"use": "gsm8k", "options": {"extract": extract}}
        assert rows(built_in(judge), read_prompts(GSM8K))["gsm8k"].flags == []


@pytest.fixture
def command(asyncgrpo, tmp_path: Path, monkeypatch):
    """`reward test` on twenty sums."""
    records = [{"question": f"{i} + {i}", "answer": 2 * i} for i in range(20)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.chdir(tmp_path)
    data = ("--set", "data.train=sums.jsonl", "--set", "data.eval=none")
    return functools.partial(asyncgrpo, "reward", "test", *data)


def test_the_command_shows_a_table_and_leaves_with_0_for_sound_rewards(command):
    code, out, err = command("--set", "reward.routes={sums='gsm8k'}", "-n", "5")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["data_source", "function", "gold", "empty", "shuffled", "random", "verdict"]
    assert lines[1] == ["sums", "gsm8k", "1.000", "0.000", "0.000", "0.000", "ok"]
    assert "sums: answers are written as '#### {answer}' (--template)" in out


def test_the_command_leaves_with_1_when_a_reward_can_be_cheated(command):
    code, out, err = command(
        "--set", "reward.routes={sums={use='gsm8k', options={format_score=0.2}}}"
    )
    assert (code, err) == (1, "")
    assert "FLAGGED" in out
    assert "sums, gsm8k: rewards format without correctness: shuffled gets 0.2" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "none.toml"], "none.toml does not exist"),
        (["--set", "reward.routes={sum='gsm8k'}"], "'sums' has no judge; did you mean 'sum'?"),
        (["--set", "reward.functions=[{use='reward_functions:raises'}]"], "KeyError"),
        (["--template", "answer"], "must contain {answer}"),
        (["-n", "0"], "Invalid value for '-n'"),
    ],
)
def test_the_command_leaves_with_2_for_bad_input(command, arguments, said):
    code, _, err = command(*arguments)
    assert (code, "Traceback" in err) == (2, False)
    assert said in err
