"""What a run shows: the table of metrics, the endpoint, the rows, the progress display."""

from __future__ import annotations

import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from fakes import make_group, make_lease, make_run, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY, Counter
from prometheus_client.utils import floatToGoString
from rich.console import Console
from typer.testing import CliRunner

from asyncgrpo.cli import app
from asyncgrpo.config import from_mapping
from asyncgrpo.errors import ConfigError
from asyncgrpo.launch.preflight import hold_port, port_of
from asyncgrpo.observe.exporter import Exporter, serve_metrics
from asyncgrpo.observe.metrics import BUCKETS, METRICS, eval_metrics, metric_of
from asyncgrpo.observe.progress import (
    Progress,
    duration,
    eval_table,
    follow,
    phase,
    show_summary,
    sparkline,
    step_line,
)
from asyncgrpo.observe.recorder import RunRecorder
from asyncgrpo.rundir import RunDir
from asyncgrpo.types import Shard

REPORT = {
    **dict(name="held-out", version=0, num_prompts=4, num_answered=4, num_samples=1),
    **dict(temperature=0.0, accuracy=0.5, pass_at_k={}, truncated_share=0.25, seconds=1.5),
    **dict(reward_mean=0.1, mean_tokens=3.0),
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
    arrived = dict(groups_arrived=4.0, tokens_arrived=320.0, reward_arrived_sum=2.0)
    metrics = {**arrived, "leases_trained": 4, **more}
    return {"metrics": metrics, "actors": actors or {}, "evaluations": list(evaluations)}


@pytest.fixture
def run(tmp_path) -> RunDir:
    return make_run(tmp_path)


@pytest.fixture
def recorder(run) -> RunRecorder:
    """Of a run that begins."""
    return begun(run)


def begun(run: RunDir, role: str = "learner-0", step: int = 0) -> RunRecorder:
    made = RunRecorder(run, Exporter(role, 0, run.path))
    made.begin(step)
    return made


def printed(show: Callable[[Console], object]) -> str:
    """What a function prints, elsewhere than on a terminal."""
    console = Console(file=io.StringIO(), width=200)
    show(console)
    return console.file.getvalue()


def summary_of(run: RunDir) -> str:
    """The last screen."""
    return printed(lambda console: show_summary(run.path, console))


def target_of(run: RunDir, role: str) -> dict:
    (target,) = json.loads((run.path / "targets" / f"{role}.json").read_text())
    return target


def scrape(run: RunDir, role: str, page: str = "metrics") -> str:
    (address,) = target_of(run, role)["targets"]
    with urllib.request.urlopen(f"http://{address}/{page}", timeout=5) as answer:
        return answer.read().decode()


def test_every_metric_has_a_unit_a_meaning_and_a_name_of_its_own_for_prometheus():
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.unit
        assert metric.rises
        assert re.fullmatch(rf"asyncgrpo_{metric.room}_[a-z0-9_]+", metric.prometheus_name)
        assert metric.prometheus_name.endswith("_total") == (metric.kind == "counter")
        unit = {"share": "ratio", "tokens/s": "per_second", "1": "", "reward": ""}
        end = unit.get(metric.unit, metric.unit)
        assert metric.prometheus_name.removesuffix("_total").endswith(end) or "_per_" in name
    series = {(m.prometheus_name, tuple(m.labels.items())) for m in METRICS.values()}
    assert len(series) == len(METRICS)


def test_metrics_of_one_family_share_kind_help_and_label_names():
    families: dict[str, set] = {}
    for m in METRICS.values():
        families.setdefault(m.prometheus_name, set()).add((m.kind, m.help, tuple(m.labels)))
    assert {name: len(shapes) for name, shapes in families.items() if len(shapes) > 1} == {}
    assert METRICS["lag_3/kl"].labels == {"lag": "3"}
    assert METRICS["masked/opsm/decile_7"].labels == {"rule": "opsm", "decile": "7"}
    ended = METRICS["groups_filtered_all_wrong"]
    assert ended.prometheus_name == "asyncgrpo_buffer_ended_groups_total"
    assert ended.labels == {"state": "filtered", "reason": "all_wrong"}


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "tokens_generated": "asyncgrpo_actor_generated_tokens_total",
        "eval/accuracy": "asyncgrpo_eval_accuracy_ratio",
        "buffer_groups": "asyncgrpo_buffer_groups",
        "tokens_per_second": "asyncgrpo_run_tokens_per_second",
        "setting/groups_per_step": "asyncgrpo_setting_groups_per_step",
        "judge/error_rate": "asyncgrpo_run_judge_error_ratio",
        "publish/stall_seconds": "asyncgrpo_weights_publish_stall_seconds",
        "completion/reward": "asyncgrpo_actor_completion_reward",
        "rewards/mean": "asyncgrpo_learner_rewards_mean",
    }.items(),
)
def test_names_for_prometheus_are_room_thing_and_unit(name, expected):
    assert METRICS[name].prometheus_name == expected


def test_the_endpoint_serves_the_last_values_with_role_and_help(run):
    exporter = Exporter("actor-0", 0, run.path)
    exporter.show({"rewards/mean": 0.25, "tokens_generated": 7})
    exporter.show({"rewards/mean": 0.5})
    text = scrape(run, "actor-0")
    assert 'asyncgrpo_learner_rewards_mean{role="actor-0"} 0.5' in text
    assert 'asyncgrpo_actor_generated_tokens_total{role="actor-0"} 7.0' in text
    assert "# TYPE asyncgrpo_actor_generated_tokens_total counter" in text
    help_text = f"reward; rises when {METRICS['rewards/mean'].rises}"
    assert f"# HELP asyncgrpo_learner_rewards_mean {help_text}" in text


def test_the_target_names_the_run_and_goes_away_with_a_process_that_ends_as_it_should(run):
    exporter = Exporter("actor-0", 0, run.path)
    name = run.path.name
    assert target_of(run, "actor-0")["labels"] == {
        "role": "actor-0",
        "run": name,
        "instance": f"{name}/actor-0",
    }
    assert [file.name for file in (run.path / "targets").iterdir()] == ["actor-0.json"]
    exporter.close()
    assert list((run.path / "targets").iterdir()) == []


@settings(max_examples=20, deadline=None)
@given(batches=st.lists(st.lists(st.floats(0, 4000), max_size=20), min_size=1, max_size=5))
def test_a_histogram_counts_each_value_in_every_bucket_that_reaches_it(tmp_path_factory, batches):
    exporter = Exporter("actor-0", 0, tmp_path_factory.mktemp("run"))
    for batch in batches:
        exporter.observe("group/judge_seconds", batch)
    values = [value for batch in batches for value in batch]
    (family,) = [f for f in exporter.collect() if f.name.endswith("judge_seconds")]
    samples = {(s.name.rpartition("_")[2], s.labels.get("le")): s.value for s in family.samples}
    for upper in BUCKETS["seconds"]:
        assert samples["bucket", floatToGoString(upper)] == sum(v <= upper for v in values)
    assert samples["bucket", "+Inf"] == samples["count", None] == len(values)
    assert samples["sum", None] == pytest.approx(sum(values))


def test_histograms_of_rewards_have_a_sum_too_and_no_value_spoils_it(run):
    exporter = Exporter("actor-0", 0, run.path)
    exporter.observe("completion/reward", [-1.03, 1.0, float("nan")])
    text = scrape(run, "actor-0")
    name = "asyncgrpo_actor_completion_reward"
    assert f'{name}_bucket{{le="-1.0",role="actor-0"}} 1.0' in text
    assert f'{name}_sum{{role="actor-0"}} -0.03' in text
    assert f'{name}_count{{role="actor-0"}} 2.0' in text


def test_times_of_steps_are_counted_and_not_replaced(run):
    exporter = Exporter("learner-1", 0, run.path)
    exporter.show({"step_seconds": 2.0})
    exporter.show({"step_seconds": 3.0})
    text = scrape(run, "learner-1")
    assert 'asyncgrpo_learner_step_seconds_sum{role="learner-1"} 5.0' in text
    assert 'asyncgrpo_learner_step_seconds_count{role="learner-1"} 2.0' in text


def test_a_lag_that_the_last_row_does_not_have_is_no_longer_shown(run):
    exporter = Exporter("learner-0", 0, run.path)
    exporter.show({"lag_4/tokens": 9, "eval/accuracy": 0.5})
    exporter.show({"step": 3})
    assert 'lag="4"' in scrape(run, "learner-0")
    exporter.show({"lag_1/tokens": 8})
    text = scrape(run, "learner-0")
    assert 'asyncgrpo_learner_lag_tokens{lag="1",role="learner-0"} 8.0' in text
    assert 'lag="4"' not in text
    assert "asyncgrpo_eval_accuracy_ratio" in text


def test_the_staleness_of_a_shard_is_the_age_of_every_token():
    groups = (make_group(make_lease(3), versions=[[4, 4, 5], [5]]),)
    shard = Shard(step=6, groups=groups, num_loss_tokens_global=4, num_completions_global=2)
    assert shard.staleness.tolist() == [2, 2, 1, 1]
    empty = Shard(step=6, groups=(), num_loss_tokens_global=4, num_completions_global=2)
    assert empty.staleness.tolist() == []


def test_what_other_libraries_keep_for_prometheus_is_served_beside_ours(run):
    theirs = Counter("vllm:generation_tokens", "as vLLM names its own")
    try:
        theirs.inc(5)
        Exporter("actor-0", 0, run.path).show({"swaps": 1})
        text = scrape(run, "actor-0")
    finally:
        REGISTRY.unregister(theirs)
    assert "vllm:generation_tokens_total 5.0" in text
    assert "process_resident_memory_bytes" in text
    assert 'asyncgrpo_actor_swaps_total{role="actor-0"} 1.0' in text


def test_healthz_says_who_it_is_and_how_long_its_loop_has_been_silent(run):
    exporter = Exporter("buffer", 0, run.path)
    exporter.told -= 60.0
    health = json.loads(scrape(run, "buffer", "healthz"))
    assert health["role"] == "buffer"
    assert 60.0 <= health["report_age_seconds"] < 90.0
    exporter.show({})
    assert json.loads(scrape(run, "buffer", "healthz"))["report_age_seconds"] < 30.0
    name = 'asyncgrpo_process_report_age_seconds{role="buffer"}'
    (age,) = re.findall(rf"{re.escape(name)} (\S+)", scrape(run, "buffer"))
    assert float(age) < 30.0


def test_evaluations_have_the_names_of_their_blocks_and_labels_for_prometheus(run):
    sampled = {**REPORT, "name": "sampled", "accuracy": 0.25, "pass_at_k": {"1": 0.25, "4": 0.75}}
    values = eval_metrics(REPORT) | eval_metrics(sampled)
    assert values["eval/accuracy"] == 0.5
    assert values["eval/truncated_share"] == 0.25
    assert values["eval/sampled/accuracy"] == 0.25
    assert values["eval/sampled/pass@4"] == 0.75
    Exporter("learner-0", 0, run.path).show({**values, "loss": 1.0})
    text = scrape(run, "learner-0")
    assert 'asyncgrpo_eval_accuracy_ratio{eval="held-out",role="learner-0"} 0.5' in text
    assert 'asyncgrpo_eval_accuracy_ratio{eval="sampled",role="learner-0"} 0.25' in text
    assert 'asyncgrpo_eval_pass_ratio{eval="sampled",k="4",role="learner-0"} 0.75' in text
    assert 'asyncgrpo_learner_loss_nats{role="learner-0"} 1.0' in text
    assert text.count("# TYPE asyncgrpo_eval_accuracy_ratio gauge") == 1
    with pytest.raises(KeyError, match="eval/sampled/median"):
        metric_of("eval/sampled/median")


def test_each_evaluation_is_one_line_of_its_file_however_often_it_is_told(run, recorder):
    sampled = {**REPORT, "name": "sampled", "pass_at_k": {"4": 0.75}}
    recorder.row(ROW, summary(evaluations=[REPORT]))
    recorder.row(ROW, summary(evaluations=[REPORT]))
    last = [{**report, "version": 1} for report in (REPORT, sampled)]
    recorder.finish([REPORT, sampled, *last], summary())
    rows = rows_of(run.path / "evals.jsonl")
    assert rows == [REPORT, sampled, *last]
    metrics = rows_of(run.path / "metrics.jsonl")
    assert [row["version"] for row in metrics] == [1, 1, 0, 1]
    assert metrics[2]["eval/sampled/pass@4"] == 0.75
    assert "eval/accuracy" not in metrics[2]
    assert (metrics[3]["eval/version"], metrics[3]["eval/sampled/version"]) == (1, 1)


@pytest.mark.parametrize(
    ("metrics_host", "host", "target"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("auto", "127.0.0.1", "127.0.0.1"),
        ("auto", "10.0.0.4", "127.0.0.1"),  # what this machine is on the way to the store
        ("127.0.0.1", "10.0.0.4", None),
    ],
)
def test_only_endpoints_that_prometheus_reaches_beside_the_launcher_are_targets(
    run, metrics_host, host, target
):
    rooms = {"launch": {"host": host}, "observe": {"metrics_host": metrics_host}}
    endpoints = replace(run.endpoints, store=("127.0.0.1", 9))
    run = replace(run, config=from_mapping(rooms), endpoints=endpoints)
    serve_metrics(run, "actor-0").show({"swaps": 3})
    roles = [path.stem for path in (run.path / "targets").glob("*.json")]
    found = [target_of(run, role)["targets"][0].split(":")[0] for role in roles]
    assert found == ([target] if target else [])


def test_the_endpoint_can_be_bound_and_announced_elsewhere(run):
    with hold_port("127.0.0.1") as held:  # else somebody may listen there
        Exporter("actor-0", port_of(held), run.path, "127.0.0.2").show({"swaps": 3})
        host, port = target_of(run, "actor-0")["targets"][0].split(":")
        assert host == "127.0.0.2"
        assert "asyncgrpo_actor_swaps_total" in scrape(run, "actor-0")
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


def test_a_name_outside_the_table_is_refused(run, recorder):
    with pytest.raises(KeyError, match="rewards/median"):
        Exporter("x", 0, run.path).show({"rewards/median": 1.0})
    with pytest.raises(KeyError, match="rewards/median"):
        recorder.row({**ROW, "rewards/median": 1.0}, summary())


def test_a_metrics_port_in_use_is_refused_with_the_setting(run):
    Exporter("one", 0, run.path)
    with pytest.raises(ConfigError, match=r"launch\.metrics_port"):
        Exporter("two", int(target_of(run, "one")["targets"][0].rpartition(":")[2]), run.path)


def test_a_row_joins_the_learner_the_actors_and_the_buffer(run, recorder):
    first = {"actor-0": counters(100, 1.0, 1.0), "actor-1": counters(50, 1.0, 1.0)}
    second = {"actor-0": counters(300, 4.0, 1.0), "actor-1": counters(10, 1.0, 0.0)}  # restarted
    recorder.row(ROW, summary(first, [REPORT]))
    recorder.row({**ROW, "step": 1, "grad_norm": float("inf")}, summary(second, [REPORT]))
    one, two = rows_of(run.path / "metrics.jsonl")
    assert one["tokens_generated"] == 150
    assert one["actor_idle_share"] == pytest.approx(0.5)
    assert one["rewards/generated_mean"] == pytest.approx(0.5)
    assert one["completions/generated_mean_length"] == pytest.approx(320 / (4 * 8))
    assert (one["eval/accuracy"], one["eval/version"]) == (0.5, 0)
    assert "eval/accuracy" not in two
    assert two["actor_idle_share"] == pytest.approx(0.0)
    assert two["grad_norm"] is None


@pytest.mark.parametrize(("role", "alone"), [("learner-0", False), ("serial", True)])
def test_the_learners_endpoint_leaves_others_counts_to_them_unless_it_is_alone(run, role, alone):
    begun(run, role).row(ROW, summary({"actor-0": counters(100, 1.0, 1.0)}))
    text = scrape(run, role)
    assert "asyncgrpo_learner_loss_nats" in text
    assert "asyncgrpo_run_actor_idle_ratio" in text
    for other in ("asyncgrpo_actor_generated_tokens", "asyncgrpo_buffer_arrived_groups"):
        assert (other in text) == alone


def test_tokens_per_second_and_the_total_are_of_what_arrived(run, monkeypatch):
    clock = iter([100.0, 104.0, 106.0, 107.0])
    monkeypatch.setattr("asyncgrpo.observe.recorder.time.time", lambda: next(clock))
    recorder = begun(run)
    row = {name: value for name, value in ROW.items() if name != "tokens_per_second"}
    recorder.row(row, summary({}))  # no actor has told its counters yet
    recorder.row(row, summary({}, tokens_arrived=480))
    recorder.finish([], summary({"actor-0": counters(150, 1.0, 1.0)}, tokens_arrived=500))
    rows = rows_of(run.path / "metrics.jsonl")
    assert [row["tokens_per_second"] for row in rows] == [80.0, 80.0]
    assert json.loads((run.path / "summary.json").read_text())["tokens_arrived"] == 500


def test_the_first_row_after_a_resume_has_no_rate_and_is_shown(run):
    row = {name: value for name, value in ROW.items() if name != "tokens_per_second"}
    begun(run).row({**row, "step": 0}, summary({}, tokens_arrived=480))
    again = begun(run, step=1)
    for step in (1, 2):
        again.row({**row, "step": step}, summary({}, tokens_arrived=500 + 20 * step))
    rates = [row["tokens_per_second"] for row in rows_of(run.path / "metrics.jsonl")]
    assert rates[1] is None
    assert rates[0] > 0 < rates[2]
    shown = {"staleness/mean": 0.0, "staleness/max": 0.0, "wait_seconds": 0.0, "train_seconds": 0.0}
    assert " - tok/s" in step_line({**row, **shown, "step": 1, "tokens_per_second": None}, 3)


def test_the_summary_says_how_many_groups_were_dropped_and_why(run, recorder):
    counts = {"groups_filtered_all_wrong": 3, "groups_filtered_empty_completion": 1}
    recorder.finish([], summary(**counts))
    dropped = "4 groups arrived, 3 filtered all_wrong, 1 filtered empty_completion"
    assert dropped in summary_of(run)


def test_the_error_rate_and_latency_of_rewards_are_those_since_the_last_row(run, recorder):
    for judged, errors, seconds in ((10, 5, 1.0), (30, 6, 3.0), (30, 6, 3.0)):
        judge = {"judged_groups": judged, "judge_errors": errors, "judge_seconds": seconds}
        recorder.row(ROW, summary({"actor-0": {**counters(judged, judged, 0.0), **judge}}))
    one, two, three = rows_of(run.path / "metrics.jsonl")
    assert (one["judge/error_rate"], one["judge/latency_seconds"]) == (0.5, 0.1)
    assert (two["judge/error_rate"], two["judge/latency_seconds"]) == (0.05, 0.1)
    assert "judge/error_rate" not in three
    assert three["judge_errors"] == 6


def test_the_summary_compares_before_and_after_and_is_shown_as_a_table(run, recorder):
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
    shown = summary_of(run)
    for part in ("task/add", "25.0%", "80.0%", "+55.0", "+40.0", "320 tokens arrived", "model"):
        assert part in shown
    assert "held-out accuracy, 4 prompts, greedy" in shown


def test_the_table_of_one_evaluation_says_how_it_was_sampled_and_shows_pass_at_k():
    sampled = {"name": "sampled", "num_samples": 8, "temperature": 0.6, "pass_at_k": {"8": 0.875}}
    shown = printed(lambda console: console.print(eval_table({**REPORT, **sampled})))
    assert "sampled accuracy, 4 prompts, 8 samples at temperature 0.6" in shown
    cells = [re.findall(r"[^│|┃\s]+", line) for line in shown.splitlines()]
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


def write_rows(run: RunDir, *rows: dict) -> None:
    text = "".join(json.dumps({**ROW, **row}) + "\n" for row in rows)
    (run.path / "metrics.jsonl").write_text(text)


def view(run: RunDir, *, once: bool = True, pause=lambda: None) -> str:
    """What `asyncgrpo top` prints elsewhere than on a terminal."""
    return printed(lambda console: follow(run.path, 4, console, once=once, pause=pause))


def test_the_view_has_groups_by_what_became_of_them_and_both_paces(run):
    leases = {"open": 3, "stored": 2, "taken": 4, "trained": 8, "filtered": 1, "failed": 1}
    leases |= {"expired": 2, "evicted": 3}
    row = {f"leases_{state}": count for state, count in leases.items()}
    write_rows(run, {**row, "step_seconds": 0.5, "tokens_per_second": 800.0})
    shown = view(run)
    assert "groups 8 done, 3 in flight, 6 buffered, 1 filtered, 6 failed" in shown
    assert "tokens/s 800 generated, 200 trained" in shown


@pytest.mark.parametrize(
    ("wait", "idle", "says"),
    [
        (0.4, 0.3, "the learner waits for actors (learner 80%, actors 30%)"),
        (0.1, 0.3, "actors wait for the learner (learner 20%, actors 30%)"),
        (0.04, 0.09, "nobody waits long (learner 8%, actors 9%)"),
    ],
)
def test_the_view_says_who_waits_for_whom(run, wait, idle, says):
    write_rows(run, {"step_seconds": 0.5, "wait_seconds": wait, "actor_idle_share": idle})
    assert says in view(run)


def test_the_view_of_a_resumed_run_forgets_points_that_are_made_again(run):
    progress = Progress(run.path, 9, Console(file=io.StringIO()))
    write_rows(run, *({"step": step, "rewards/mean": 9.0 + step} for step in range(5)))
    progress.read()
    again = [{"step": step, "rewards/mean": 0.5, "loss": 0.123456789} for step in range(3, 9)]
    kept = [{"step": step, "rewards/mean": 9.0 + step} for step in range(3)]
    write_rows(run, *kept, *again)  # longer than what was read: the file did not shrink
    progress.read()
    assert progress.rewards == [(0, 9.0), (1, 10.0), (2, 11.0), *((s, 0.5) for s in range(3, 9))]


def test_a_step_that_was_not_finite_is_shown_and_does_not_end_the_run(run):
    write_rows(run, {"loss": None, "objective/kl": None})
    out = io.StringIO()
    with Progress(run.path, 4, Console(file=out, width=200)) as progress:
        progress.tick()
    assert "loss -  kl -" in out.getvalue()
    assert "1/4 steps" in view(run)


def test_top_says_that_there_is_no_step_yet(run):
    assert view(run) == f"no step yet: see {run.path / 'logs'}\n"


def test_top_says_for_how_long_nothing_happened(run):
    write_rows(run, {"seconds": 3.0})
    assert "no step for" not in view(run)
    os.utime(run.path / "metrics.jsonl", (0, time.time() - 600))
    assert "3 s, about 9 s left; no step for 10 min" in view(run)


def test_top_follows_a_run_to_its_summary_and_tells_every_step_once(run, recorder):
    recorder.row(ROW, summary())
    turns = iter(
        [
            lambda: recorder.row({**ROW, "step": 1, "version": 2}, summary()),
            lambda: (
                recorder.row({**ROW, "step": 2, "version": 3}, summary()),
                recorder.finish([REPORT], summary()),
            ),
            lambda: None,
        ]
    )
    shown = view(run, once=False, pause=lambda: next(turns)())
    order = ("1/4 steps", "step 1 (2/4)", "step 2 (3/4)", "3 steps in", "faults        none")
    assert [shown.count(part) for part in order] == [1] * len(order)
    assert sorted(order, key=shown.index) == list(order)
    assert next(turns, None) is None


@pytest.mark.parametrize("options", [[], ["--once"]])
def test_top_of_a_finished_run_is_its_summary(run, recorder, options):
    recorder.row(ROW, summary())
    recorder.finish([REPORT], summary())
    result = CliRunner().invoke(app, ["top", str(run.path), *options])
    assert result.exit_code == 0
    assert "held-out accuracy, 4 prompts" in result.output
    assert "step 0" not in result.output


def test_top_refuses_a_folder_without_a_run(tmp_path):
    result = CliRunner().invoke(app, ["top", str(tmp_path)])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.exit_code == 2
    assert "is not a run directory" in str(result.exception)


def test_ctrl_c_ends_top_as_asked(run, monkeypatch):
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("asyncgrpo.observe.progress.time.sleep", interrupted)
    result = CliRunner().invoke(app, ["top", str(run.path)])
    assert (result.exit_code, result.exception) == (0, None)


def test_the_summary_has_reward_and_faults_of_all_lives(run):
    rewards = [0.0] * 10 + [0.5] * 5 + [1.0] * 10
    evictions = [0, 2, 2, 0, 1] + [1] * 20  # begun anew after the third
    rows = zip(rewards, evictions, strict=True)
    write_rows(
        run,
        *(
            {"step": step, "seconds": 1.0, "rewards/mean": reward, "publish/evictions": evicted}
            for step, (reward, evicted) in enumerate(rows)
        ),
    )
    begun(run, step=25).finish([], summary())
    (run.path / "logs").mkdir()
    log = "10:00:01 restarted actor-0 (pid 7)\n10:00:02 actor-1 joined\n"
    (run.path / "logs" / "launcher.log").write_text(log + log)
    shown = summary_of(run)
    found = re.search(r"reward +(\S+) (\S+) (\S+) \(first, last 10 steps\)", shown)
    assert found is not None
    assert found.groups() == ("+0.000", "▁" * 10 + "▅" * 5 + "█" * 10, "+1.000")
    assert "faults        actor-0 restarted 2 times, 3 publish evictions\n" in shown
    assert f"model         {run.model_path}" in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(119, "119 s"), (120, "2 min"), (7199, "120 min"), (9000, "2.5 h")]
)
def test_durations_are_in_the_unit_that_fits(seconds, text):
    assert duration(seconds) == text


def test_the_phase_of_a_run_follows_the_bends_of_its_reward_not_the_number_of_steps():
    bends, levels = [0, 500, 2000, 6000], [0.2, 0.7, 0.85, 0.88]
    curve = np.interp(range(6000), bends, levels)
    for scale in (1, 20):
        phases = {at: phase(curve[:at:scale].tolist()) for at in (500, 1200, 2000, 4000, 6000)}
        assert list(phases.values()) == ["rising fast", "rising", "rising", "flat", "flat"]
    assert phase([1.0] * 20) == phase([float(-step) for step in range(20)]) == "flat"
    assert phase([0.0] * 9) == ""


@pytest.mark.parametrize("steps", [20, 200])
def test_the_phase_takes_no_noise_for_a_rise(steps):
    chance = np.random.default_rng(0)
    noise = chance.normal(0, 0.1, (200, steps))
    assert sum(phase(row.tolist()) != "flat" for row in noise) < 15
    rise = np.linspace(0, 0.5, steps)
    assert sum(phase((row + rise).tolist()) == "flat" for row in noise) < 30


def test_sparklines_rise_with_the_share():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([-2.0, 0.0, 2.0], -2.0, 2.0) == "▁▅█"
    assert sparkline([1.0, 1.0], 1.0, 1.0) == "▁▁"
    assert sparkline([]) == ""


@given(st.lists(st.floats(0, 1), min_size=31, max_size=200))
def test_a_long_sparkline_is_bounded_and_covers_everything(shares):
    assert len(sparkline(shares)) == 30
    assert "█" in sparkline([*shares[:-7], *[1.0] * 7])


def test_a_resumed_run_takes_back_rows_that_are_made_again(run, recorder):
    nothing = {"metrics": {}, "actors": {}, "evaluations": []}
    for step in range(5):
        recorder.row({"step": step, "version": step + 1, "tokens_trained": 10.0}, nothing)
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "ver', encoding="utf-8")
    evals = "".join(json.dumps({**REPORT, "version": v}) + "\n" for v in (0, 3, 4))
    (run.path / "evals.jsonl").write_text(evals + '{"name": "hel')
    again = begun(run, step=3)
    assert [report["version"] for report in rows_of(run.path / "evals.jsonl")] == [0, 3]
    again.row({"step": 3, "version": 4, "tokens_trained": 1.0}, nothing)
    rows = rows_of(path)
    assert [(row["step"], row["tokens_trained"]) for row in rows] == [
        *((step, 10.0) for step in range(3)),
        (3, 1.0),
    ]
    assert rows[3]["seconds"] >= rows[2]["seconds"]
    again.finish([], nothing)
    assert json.loads((run.path / "summary.json").read_text())["tokens_trained"] == 31.0


def test_an_evaluation_of_the_version_gone_back_to_is_in_the_first_row_again(run, recorder):
    for step, version in ((0, 1), (1, None), (2, 2), (3, 4)):
        told = [] if version is None else [{**REPORT, "version": version}]
        recorder.row({**ROW, "step": step, "version": step + 1}, summary(evaluations=told))
    again = begun(run, step=2)  # only the learner is new: the buffer tells no report twice
    for step in (2, 3):
        again.row({**ROW, "step": step, "version": step + 1}, summary())
    again.finish([{**REPORT, "version": v} for v in (1, 2, 4)], summary())
    rows = rows_of(run.path / "metrics.jsonl")
    shown = [(row["step"], row.get("eval/version")) for row in rows]
    assert shown == [(0, 1), (1, None), (2, 2), (3, None), (3, 4)]
