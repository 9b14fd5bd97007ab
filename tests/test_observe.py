"""What a run shows: the table of metrics, the endpoint, the rows, the progress display."""

from __future__ import annotations

import io
import json
import re
import urllib.request

import pytest
from rich.console import Console

from asyncgrpo.config import Config
from asyncgrpo.errors import ConfigError
from asyncgrpo.observe.exporter import Exporter
from asyncgrpo.observe.metrics import METRICS, eval_metrics, metric_of
from asyncgrpo.observe.progress import Progress, eval_table, show_summary, sparkline
from asyncgrpo.observe.recorder import RunRecorder
from asyncgrpo.rundir import Endpoints, RunDir

ENDPOINTS = Endpoints(buffer="tcp://127.0.0.1:1", weights="tcp://127.0.0.1:2", store=("h", 3))
REPORT = {
    "name": "held-out",
    "version": 0,
    "num_prompts": 4,
    "num_answered": 4,
    "num_samples": 1,
    "temperature": 0.0,
    "accuracy": 0.5,
    "pass_at_k": {},
    "truncated_share": 0.25,
    "seconds": 1.5,
    "reward_mean": 0.1,
    "mean_tokens": 3.0,
    "accuracy_by_source": {"task/add": 0.25, "task/sort": 0.75},
}
ROW = {
    "step": 0,
    "version": 1,
    "loss": 0.1,
    "rewards/mean": 0.2,
    "objective/kl": 0.01,
    "staleness/mean": 0.5,
    "staleness/max": 1.0,
    "wait_seconds": 0.1,
    "train_seconds": 0.2,
    "tokens_trained": 100.0,
    "tokens_per_second": 40.0,
}


def counters(tokens: float, busy: float, idle: float) -> dict:
    return {"tokens_generated": tokens, "generate_seconds": busy, "idle_seconds": idle}


def summary(actors=None, evaluations=(), **more) -> dict:
    metrics = {
        "groups_arrived": 4.0,
        "tokens_arrived": 320.0,
        "reward_arrived_sum": 2.0,
        "leases_trained": 4,
        **more,
    }
    return {"metrics": metrics, "actors": actors or {}, "evaluations": list(evaluations)}


@pytest.fixture
def run(tmp_path) -> RunDir:
    made = RunDir(path=tmp_path, config=Config(), endpoints=ENDPOINTS)
    made.write()
    return made


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return answer.read().decode()


def port_of(run: RunDir, role: str) -> int:
    target = json.loads((run.path / "targets" / f"{role}.json").read_text())
    return int(target[0]["targets"][0].rsplit(":", 1)[1])


def test_every_metric_has_a_unit_a_meaning_and_a_name_that_prometheus_accepts():
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.unit
        assert metric.rises
        assert re.fullmatch(r"asyncgrpo_[a-z0-9_]+", metric.prometheus_name)
    assert len({metric.prometheus_name for metric in METRICS.values()}) == len(METRICS)


def test_the_endpoint_serves_the_last_values_with_role_and_help(run):
    exporter = Exporter("actor-0", 0, run.path)
    exporter.show({"rewards/mean": 0.25, "tokens_generated": 7})
    exporter.show({"rewards/mean": 0.5})
    text = scrape(port_of(run, "actor-0"))
    assert 'asyncgrpo_rewards_mean{role="actor-0"} 0.5' in text
    assert 'asyncgrpo_tokens_generated_total{role="actor-0"} 7.0' in text
    assert "# TYPE asyncgrpo_tokens_generated_total counter" in text
    assert (
        f"# HELP asyncgrpo_rewards_mean reward; rises when {METRICS['rewards/mean'].rises}" in text
    )


def test_evaluations_have_the_names_of_their_blocks_and_labels_for_prometheus(run):
    sampled = {**REPORT, "name": "sampled", "accuracy": 0.25, "pass_at_k": {"1": 0.25, "4": 0.75}}
    values = eval_metrics(REPORT) | eval_metrics(sampled)
    assert values["eval/accuracy"] == 0.5
    assert values["eval/truncated_share"] == 0.25
    assert values["eval/sampled/accuracy"] == 0.25
    assert values["eval/sampled/pass@4"] == 0.75
    Exporter("learner-0", 0, run.path).show({**values, "loss": 1.0})
    text = scrape(port_of(run, "learner-0"))
    assert 'asyncgrpo_eval_accuracy{eval="held-out",role="learner-0"} 0.5' in text
    assert 'asyncgrpo_eval_accuracy{eval="sampled",role="learner-0"} 0.25' in text
    assert 'asyncgrpo_eval_pass{eval="sampled",k="4",role="learner-0"} 0.75' in text
    assert 'asyncgrpo_loss{role="learner-0"} 1.0' in text
    assert text.count("# TYPE asyncgrpo_eval_accuracy gauge") == 1
    with pytest.raises(KeyError, match="eval/median"):
        metric_of("eval/sampled/median")


def test_each_evaluation_is_one_line_of_its_file_however_often_it_is_told(run):
    recorder = RunRecorder(run, Exporter("learner-0", 0, run.path))
    recorder.begin(0)
    sampled = {**REPORT, "name": "sampled", "pass_at_k": {"4": 0.75}}
    recorder.row(ROW, summary(evaluations=[REPORT]))
    recorder.row(ROW, summary(evaluations=[REPORT]))
    last = [{**report, "version": 1} for report in (REPORT, sampled)]
    recorder.finish([REPORT, sampled, *last], summary())
    rows = [json.loads(line) for line in (run.path / "evals.jsonl").read_text().splitlines()]
    assert rows == [REPORT, sampled, *last]
    metrics = list(map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines()))
    assert [row["version"] for row in metrics] == [1, 1, 0, 1]
    assert metrics[2]["eval/sampled/pass@4"] == 0.75
    assert "eval/accuracy" not in metrics[2]
    assert (metrics[3]["eval/version"], metrics[3]["eval/sampled/version"]) == (1, 1)


def test_a_name_outside_the_table_is_refused(run):
    with pytest.raises(KeyError, match="rewards/median"):
        Exporter("x", 0, run.path).show({"rewards/median": 1.0})
    recorder = RunRecorder(run, Exporter("y", 0, run.path))
    recorder.begin(0)
    with pytest.raises(KeyError, match="rewards/median"):
        recorder.row({**ROW, "rewards/median": 1.0}, summary())


def test_a_metrics_port_in_use_is_refused_with_the_setting(run):
    Exporter("one", 0, run.path)
    with pytest.raises(ConfigError, match=r"launch\.metrics_port"):
        Exporter("two", port_of(run, "one"), run.path)


def test_a_row_joins_the_learner_the_actors_and_the_buffer(run):
    recorder = RunRecorder(run, Exporter("learner-0", 0, run.path))
    recorder.begin(0)
    first = {"actor-0": counters(100, 1.0, 1.0), "actor-1": counters(50, 1.0, 1.0)}
    second = {"actor-0": counters(300, 4.0, 1.0), "actor-1": counters(10, 1.0, 0.0)}  # restarted
    recorder.row(ROW, summary(first, [REPORT]))
    recorder.row({**ROW, "step": 1, "grad_norm": float("inf")}, summary(second, [REPORT]))
    one, two = (json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines())
    assert one["tokens_generated"] == 150
    assert one["actor_idle_share"] == pytest.approx(0.5)
    assert one["rewards/generated_mean"] == pytest.approx(0.5)
    assert one["completions/generated_mean_length"] == pytest.approx(320 / (4 * 8))
    assert (one["eval/accuracy"], one["eval/version"]) == (0.5, 0)
    assert "eval/accuracy" not in two
    assert two["actor_idle_share"] == pytest.approx(0.0)
    assert two["grad_norm"] is None


def test_tokens_per_second_and_the_total_are_of_what_arrived(run, monkeypatch):
    clock = iter([100.0, 104.0, 106.0, 107.0])
    monkeypatch.setattr("asyncgrpo.observe.recorder.time.time", lambda: next(clock))
    recorder = RunRecorder(run, Exporter("learner-0", 0, run.path))
    recorder.begin(0)
    row = {name: value for name, value in ROW.items() if name != "tokens_per_second"}
    recorder.row(row, summary({}))  # no actor has told its counters yet
    recorder.row(row, summary({}, tokens_arrived=480))
    recorder.finish([], summary({"actor-0": counters(150, 1.0, 1.0)}, tokens_arrived=500))
    rows = list(map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines()))
    assert [row["tokens_per_second"] for row in rows] == [80.0, 80.0]
    assert json.loads((run.path / "summary.json").read_text())["tokens_arrived"] == 500


def test_a_run_without_a_step_says_why_nothing_was_trained(run):
    counts = {"groups_filtered_all_wrong": 3, "groups_filtered_empty_completion": 1}
    recorder = RunRecorder(run, Exporter("learner-0", 0, run.path))
    recorder.begin(0)
    recorder.finish([], summary(**counts))
    out = io.StringIO()
    show_summary(run.path, Console(file=out, width=200))
    for part in (
        "0 steps",
        "4 groups arrived, 3 filtered all_wrong, 1 filtered empty_completion",
        "nothing was trained",
        f"traj show {run.path} --status all",
    ):
        assert part in out.getvalue()


def test_the_error_rate_and_latency_of_rewards_are_those_since_the_last_row(run):
    recorder = RunRecorder(run, Exporter("learner-0", 0, run.path))
    recorder.begin(0)
    for judged, errors, seconds in ((10, 5, 1.0), (30, 6, 3.0), (30, 6, 3.0)):
        judge = {"judged_groups": judged, "judge_errors": errors, "judge_seconds": seconds}
        recorder.row(ROW, summary({"actor-0": {**counters(judged, judged, 0.0), **judge}}))
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    one, two, three = map(json.loads, lines)
    assert (one["judge/error_rate"], one["judge/latency_seconds"]) == (0.5, 0.1)
    assert (two["judge/error_rate"], two["judge/latency_seconds"]) == (0.05, 0.1)
    assert "judge/error_rate" not in three
    assert three["judge_errors"] == 6


def test_the_summary_compares_before_and_after_and_is_shown_as_a_table(run):
    recorder = RunRecorder(run, Exporter("learner-0", 0, run.path))
    recorder.begin(0)
    recorder.row(ROW, summary({"actor-0": counters(100, 1.0, 1.0)}))
    after = {
        **REPORT,
        "version": 1,
        "accuracy": 0.9,
        "accuracy_by_source": {"task/add": 0.8, "task/sort": 1.0},
    }
    recorder.finish([REPORT, after], summary())
    written = json.loads((run.path / "summary.json").read_text())
    assert written["evals"] == {"held-out": {"before": REPORT, "after": after}}
    assert (written["before"]["accuracy"], written["after"]["accuracy"]) == (0.5, 0.9)
    assert (written["steps"], written["tokens_trained"], written["staleness_max"]) == (1, 100, 1)
    out = io.StringIO()
    show_summary(run.path, Console(file=out, width=100))
    for part in ("task/add", "25.0%", "80.0%", "+55.0", "+40.0", "320 tokens arrived", "model"):
        assert part in out.getvalue()
    assert "held-out accuracy, 4 prompts, greedy" in out.getvalue()


def test_the_table_of_one_evaluation_says_how_it_was_sampled_and_shows_pass_at_k():
    out = io.StringIO()
    sampled = {"name": "sampled", "num_samples": 8, "temperature": 0.6, "pass_at_k": {"8": 0.875}}
    Console(file=out, width=100).print(eval_table({**REPORT, **sampled}))
    assert "sampled accuracy, 4 prompts, 8 samples at temperature 0.6" in out.getvalue()
    cells = [re.findall(r"[^│|┃\s]+", line) for line in out.getvalue().splitlines()]
    for row in (["pass@8", "87.5%"], ["all", "50.0%"], ["truncated", "25.0%"], ["tokens", "3.00"]):
        assert row in cells


def test_progress_without_a_terminal_is_one_line_per_step_and_only_whole_rows(run):
    out = io.StringIO()
    rows = run.path / "metrics.jsonl"
    with Progress(run.path, 5, Console(file=out, width=200)) as progress:
        progress.tick()
        blocks = {"eval/b/accuracy": 0.25, "eval/b/version": 0, "eval/b/pass@2": 0.5}
        evals = {"eval/accuracy": 0.5, "eval/version": 0, **blocks}
        rows.write_text(json.dumps({**ROW, **evals}) + '\n{"st')
        progress.tick()
        progress.tick()
        progress.line("actor-0", "a [bracketed] word")
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 0 (1/5)  reward +0.200")
    assert lines[0].endswith("held-out 50.0% at version 0  b 25.0% at version 0")
    assert lines[1] == "[actor-0] a [bracketed] word"


def test_the_live_panel_shows_where_the_run_stands(run):
    out = io.StringIO()
    evals = {"eval/accuracy": 0.5, "eval/version": 0, "eval/b/accuracy": 1, "eval/b/version": 0}
    (run.path / "metrics.jsonl").write_text(json.dumps({**ROW, "seconds": 3.0, **evals}) + "\n")
    console = Console(file=out, width=120, force_terminal=True)
    with Progress(run.path, 4, console) as progress:
        progress.tick()
    assert "1/4 steps" in out.getvalue()
    assert "about 9 s left" in out.getvalue()
    assert "held-out 50.0% ▅   b 100.0% █" in out.getvalue()


def test_sparklines_rise_with_the_share():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"


def test_a_resumed_run_takes_back_rows_that_are_made_again(run):
    recorder = RunRecorder(run, Exporter("learner-0", 0, run.path))
    recorder.begin(0)
    nothing = {"metrics": {}, "actors": {}, "evaluations": []}
    for step in range(5):
        recorder.row({"step": step, "version": step + 1, "tokens_trained": 10.0}, nothing)
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "ver', encoding="utf-8")
    again = RunRecorder(run, Exporter("learner-0", 0, run.path))
    again.begin(3)
    again.row({"step": 3, "version": 4, "tokens_trained": 1.0}, nothing)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["tokens_trained"]) for row in rows] == [
        *((step, 10.0) for step in range(3)),
        (3, 1.0),
    ]
    assert rows[3]["seconds"] >= rows[2]["seconds"]
    again.finish([], nothing)
    assert json.loads((run.path / "summary.json").read_text())["tokens_trained"] == 31.0
