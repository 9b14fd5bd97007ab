"""Reward workers: slow, dying and broken reward functions harm only their own group."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from fakes import make_prompt

from asyncgrpo.actor import judge as judge_module
from asyncgrpo.actor.judge import InlineJudge, Job, JudgePool
from asyncgrpo.settings.reward import RewardSettings


def settings(use: str, **changes) -> RewardSettings:
    return RewardSettings.model_validate({"functions": [{"use": use}], **changes})


def job(number: int, *texts: str) -> Job:
    return Job(lease_id=f"t{number}", prompt=make_prompt(number), texts=texts or ("a", "b"))


def collect(judge, count, seconds=120.0):
    """Verdicts by lease id; fails when they do not come in time."""
    verdicts, end = {}, time.monotonic() + seconds
    while len(verdicts) < count:
        assert time.monotonic() < end, f"only {sorted(verdicts)} came back"
        for verdict in judge.done():
            verdicts[verdict.lease_id] = verdict
        threading.Event().wait(0.005)  # workers need this core, too
    return verdicts


@pytest.fixture
def pool():
    pools = []

    def start(use, **changes):
        pools.append(JudgePool({"": settings(use, **changes)}))
        return pools[-1]

    yield start
    for started in pools:
        started.close()


def test_groups_are_scored_in_other_processes_like_inline(pool):
    workers, inline = (
        pool("reward_functions:vowels", workers=2),
        InlineJudge({"": settings("reward_functions:vowels")}),
    )
    jobs = [job(i, "aeiou" * i, "xyz") for i in range(6)]
    for each in jobs:
        workers.submit(each)
        inline.submit(each)
    expected = {v.lease_id: v.scores.rewards.tolist() for v in inline.done()}
    assert {n: v.scores.rewards.tolist() for n, v in collect(workers, 6).items()} == expected


def test_an_evaluation_is_scored_by_its_own_reward(pool):
    rewards = {"": settings("reward_functions:vowels"), "strict": settings("exact")}
    workers, inline = JudgePool(rewards), InlineJudge(rewards)
    jobs = [job(0, "aeio", "1"), replace(job(1, "aeio", "2"), block="strict")]
    for each in jobs:
        workers.submit(each)
        inline.submit(each)
    try:
        for verdicts in (collect(workers, 2), {v.lease_id: v for v in inline.done()}):
            assert verdicts["t0"].scores.rewards.tolist() == [0.25, 0.0]
            assert verdicts["t1"].scores.rewards.tolist() == [0.0, 1.0]
            assert list(verdicts["t1"].scores.parts) == ["exact"]
    finally:
        workers.close()


def test_an_error_in_an_evaluation_scores_under_the_names_of_its_own_functions():
    own = {"": settings("reward_functions:vowels"), "b": settings("reward_functions:silent")}
    changes = {"on_error": "value", "error_value": -2.0}
    judge = InlineJudge({name: each.model_copy(update=changes) for name, each in own.items()})
    judge.submit(replace(job(1), block="b"))
    (verdict,) = judge.done()
    assert {n: part.tolist() for n, part in verdict.scores.parts.items()} == {"silent": [-2, -2]}


def test_the_math_judge_keeps_time_in_a_worker_process(pool):
    options = {"timeout_seconds": 5}
    workers = pool("math", functions=[{"use": "math", "options": options}])
    prompt = make_prompt(1)
    workers.submit(Job(lease_id="t1", prompt=prompt, texts=("$9^{9^{9^{9}}}$", r"$\frac{4}{2}$")))
    (verdict,) = collect(workers, 1).values()
    assert verdict.error == ""
    assert verdict.scores.rewards.tolist() == [0.0, 1.0]


def test_asking_for_verdicts_never_waits_for_a_slow_function(pool):
    workers = pool("reward_functions:sleepy", timeout_seconds=30)
    workers.submit(job(1, "sleep"))
    start = time.monotonic()
    for _ in range(100):
        assert workers.done() == []
    assert time.monotonic() - start < 20  # the function takes 60 s


def test_a_function_that_hangs_costs_its_group_only(pool):
    workers = pool("reward_functions:sleepy", timeout_seconds=2.0)
    workers.submit(job(1, "sleep"))
    workers.submit(job(2, "fine"))
    verdicts = collect(workers, 2)
    assert verdicts["t1"].scores is None
    assert "reward.timeout_seconds=2" in verdicts["t1"].error
    assert verdicts["t2"].scores.rewards.tolist() == [1.0]


@pytest.fixture
def slow_start(tmp_path, monkeypatch):
    """A function that is imported after some seconds, and scores at once."""

    def write(seconds: float) -> str:
        text = f"import time\ntime.sleep({seconds})\ndef f(completions):\n    return [1.0, 0.0]\n"
        (tmp_path / "slow_start.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)  # workers take it over
        return "slow_start:f"

    return write


def test_the_imports_of_a_worker_take_nothing_off_the_time_for_a_score(pool, slow_start):
    workers = pool(slow_start(3), timeout_seconds=2.0)
    workers.submit(job(1))
    (verdict,) = collect(workers, 1).values()
    assert verdict.scores.rewards.tolist() == [1.0, 0.0]


def test_a_worker_that_is_never_ready_costs_a_group_and_is_named(pool, slow_start, monkeypatch):
    monkeypatch.setattr(judge_module, "START_SECONDS", 0.5)
    workers = pool(slow_start(600), timeout_seconds=0.5)
    workers.submit(job(1))
    (verdict,) = collect(workers, 1).values()
    assert verdict.error == "the reward worker was not ready within 1 s: the imports hang"


def test_a_function_that_hangs_in_a_serial_run_costs_its_group_only_too():
    hasty = settings("reward_functions:sleepy", timeout_seconds=1.0, on_error="zero")
    judge = InlineJudge({"": hasty})
    judge.submit(job(1, "sleep"))
    judge.submit(job(2, "fine"))
    slow, quick = judge.done()
    assert "the reward gave no score within reward.timeout_seconds=1" in slow.error
    assert slow.scores.rewards.tolist() == [0.0]
    assert quick.scores.rewards.tolist() == [1.0]


def test_a_worker_that_dies_is_replaced_and_its_group_fails_after_a_second_try(pool):
    workers = pool("reward_functions:deadly")
    workers.submit(job(1, "die"))
    workers.submit(job(2, "live"))
    verdicts = collect(workers, 2)
    assert verdicts["t1"].error == "the reward worker died"
    assert not verdicts["t1"].contract
    assert verdicts["t2"].scores.rewards.tolist() == [1.0]


def test_a_lost_group_scores_what_on_error_says_and_still_names_the_cause(pool):
    workers = pool("reward_functions:deadly", on_error="value", error_value=-2)
    workers.submit(job(1, "die", "live"))
    (verdict,) = collect(workers, 1).values()
    assert verdict.error == "the reward worker died"
    assert verdict.scores.rewards.tolist() == [-2.0, -2.0]
    assert verdict.seconds > 0


def test_a_broken_function_scores_what_on_error_says_and_its_error_is_kept():
    judge = InlineJudge({"": settings("reward_functions:raises", on_error="zero")})
    judge.submit(job(1))
    (verdict,) = judge.done()
    assert verdict.scores.rewards.tolist() == [0.0, 0.0]
    assert "KeyError" in verdict.error


def test_a_group_of_an_unknown_source_fails_alone_even_when_errors_score():
    routes = {"routes": {"gsm": "gsm8k"}, "on_error": "zero"}
    judge = InlineJudge({"": RewardSettings.model_validate(routes)})
    judge.submit(job(1))
    (verdict,) = judge.done()
    assert verdict.scores is None
    assert "data_source 'task/add' has no judge" in verdict.error


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("reward_functions:raises", "KeyError"),
        ("reward_functions:too_few", "1"),
        ("reward_functions:not_finite", "nan"),
    ],
)
def test_a_broken_contract_is_a_verdict_that_says_what_is_wrong(use, said):
    judge = InlineJudge({"": settings(use)})
    judge.submit(job(1))
    (verdict,) = judge.done()
    assert verdict.scores is None
    assert verdict.contract
    assert said in verdict.error
    assert use.split(":")[1] in verdict.error
