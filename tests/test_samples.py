"""The traj commands as a user types them, on hand-made runs; what they print, write and refuse."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import make_run, rows_of
from typer.testing import CliRunner

from asyncgrpo.cli import app
from asyncgrpo.observe.samples import Samples


@pytest.fixture
def traj(asyncgrpo):
    """Runs one `asyncgrpo traj` command; returns (exit code, stdout, stderr)."""
    return partial(asyncgrpo, "traj")


def row(step: int, group: int, sample: int, completion: str, score: float, **more: Any) -> dict:
    return {
        **dict(step=step, group=group, sample=sample, status="trained", reason=""),
        **dict(prompt_id=f"p{group}", data_source="sums", answer=f"{group + 1}"),
        "prompt": [{"role": "user", "content": f"{group} + 1?"}],
        **dict(completion=completion, reward=score - 0.1, reward_parts={"task": score}),
        **dict(advantage=score / 2, num_prompt_tokens=4, num_tokens=len(completion)),
        **dict(finish_reason="stop", version_min=0, version_max=step, staleness=step),
        **dict(masked_share=0.0, lease_id=f"t{step}{group}", actor="actor-0"),
        **more,
    }


STEPS = {
    0: [
        row(0, 0, 0, "eins", 1.0),
        row(0, 0, 1, "two", -1.0),
        row(0, 1, 0, "2", 1.0, data_source="other"),
        row(0, 1, 1, "3", -1.0, finish_reason="length"),
        row(0, 2, 0, "no", -1.0, status="filtered", reason="all_wrong", advantage=None),
        row(0, 2, 1, "non", -1.0, status="filtered", reason="all_wrong", advantage=None),
    ],
    3: [
        row(3, 0, 0, "1", 1.0),
        row(3, 0, 1, "1", 1.0),
        row(3, 1, 0, "3", -1.0),
        row(3, 1, 1, "答案 \x1b[31m🙂\n" + "x" * 900, -1.0, masked_share=0.25),
        row(3, 7, 0, "8", 1.0, reward_parts={"task": 1.0, "style": None}),
        row(3, 7, 1, "9", 0.5),
    ],
    4: [row(4, 8, 0, "late", 1.0, status="evicted", reason="stale", advantage=None)],
}


def write_run(folder: Path, steps: dict[int, list[dict]], **rooms: Any) -> Path:
    (make_run(folder, **rooms).path / "trajectories").mkdir()
    for step, rows in steps.items():
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows)
        (folder / "trajectories" / f"step_{step}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run", STEPS)


def test_show_prints_the_first_groups_of_the_last_step_that_was_trained(run, traj):
    code, out, err = traj("show", run)
    assert (code, err) == (0, "")
    lines = out.split("\n")
    assert lines[:6] == [
        "step 3: 6 trained",
        "",
        "[user] 0 + 1?",
        "answer 1 · sums · p0 · group 0 trained",
        "#0 reward +0.900 (task +1.000)  advantage +0.500  1 tokens, stop  staleness 3",
        "    1",
    ]
    assert "#1 reward -1.100 (task -1.000)  advantage -0.500" in out
    assert "staleness 3  25% masked" in out
    assert "p7" not in out
    assert "4 of 6 answers in 3 groups; choose others with --best N" in out


def test_long_texts_are_cut_with_their_rest_counted_unless_full_and_escapes_are_harmless(run, traj):
    _, out, _ = traj("show", run)
    assert "    答案 \\x1b[31m🙂\n    " + "x" * 10 in out
    assert "\x1b" not in out
    text = STEPS[3][3]["completion"]
    assert f"x … [{len(text) - 800} more characters: --full]" in out
    assert "x" * 900 not in out
    _, out, _ = traj("show", run, "--full")
    assert "x" * 900 in out
    assert "more characters" not in out


def samples_in(out: str) -> list[tuple[str, str]]:
    """(prompt id, sample) of each shown answer."""
    found, prompt = [], ""
    for line in out.split("\n"):
        if line.startswith("answer "):
            prompt = line.split(" · ")[2]
        if line.startswith("#"):
            found.append((prompt, line.split()[0]))
    return found


def test_best_and_worst_choose_by_reward_with_ties_in_order_and_random_the_same_again(run, traj):
    assert samples_in(traj("show", run, "--step", 3, "--best", 4)[1]) == [
        *(("p0", "#0"), ("p0", "#1"), ("p7", "#0"), ("p7", "#1"))
    ]
    assert samples_in(traj("show", run, "--step", 3, "--worst", 3)[1]) == [
        *(("p1", "#0"), ("p1", "#1"), ("p7", "#1"))
    ]
    drawn, again = (samples_in(traj("show", run, "--random", 3)[1]) for _ in range(2))
    assert drawn == again == sorted(set(drawn))
    assert len(drawn) == 3
    assert len(samples_in(traj("show", run, "--random", 99)[1])) == 6


def test_show_can_be_limited_to_a_source_or_to_what_was_dropped(run, traj):
    assert samples_in(traj("show", run, "--step", 0, "--source", "other")[1]) == [("p1", "#0")]
    code, out, _ = traj("show", run, "--status", "filtered")
    assert code == 0
    assert out.startswith("step 0: 4 trained, 2 filtered all_wrong\n")
    assert "group 2 filtered all_wrong" in out
    assert "#0 reward -1.100 (task -1.000)  advantage -  2 tokens, stop  staleness 0\n    no" in out
    assert samples_in(traj("show", run, "--status", "all")[1]) == [("p8", "#0")]
    code, _, err = traj("show", run, "--step", 4)
    assert code == 2
    assert "no answer has status trained; there are 1 evicted stale; data_source sums" in err
    assert traj("show", run, "--source", "x")[0] == 2


def test_a_score_that_does_not_apply_and_an_empty_answer_are_shown_as_such(tmp_path, traj):
    parts = {"task": 1.0, "style": None}
    run = write_run(tmp_path / "run", {0: [row(0, 0, 0, "", 1.0, reward_parts=parts)]})
    _, out, _ = traj("show", run)
    assert "(task +1.000, style -)" in out
    assert "\n    (empty)\n" in out


def table(out: str) -> dict[str, dict[str, str]]:
    head, *lines = out.strip().split("\n")
    names = head.split()
    cells = (line.strip().split(maxsplit=len(names) - 1) for line in lines)
    return {line[0]: dict(zip(names, line, strict=True)) for line in cells}


def test_stats_counts_and_averages_each_step_and_all_of_them(run, traj):
    code, out, err = traj("stats", run)
    assert (code, err) == (0, "")
    found = table(out)
    assert list(found) == ["0", "3", "4", "all"]
    assert found["0"] == {
        **dict(step="0", answers="4", correct="50.0%", reward="-0.100", std="1.000"),
        **dict(tokens="2.2", p95="4", truncated="25.0%", duplicate="0.0%", stale="0.00", max="0"),
        "ended": "4 trained, 2 filtered all_wrong",
    }
    assert (found["3"]["duplicate"], found["3"]["correct"]) == ("16.7%", "66.7%")
    assert found["4"]["answers"] == "0"
    assert found["4"]["reward"] == found["4"]["max"] == "-"
    rewards = [each["reward"] for step in (0, 3) for each in STEPS[step][: 4 + step]]
    assert found["all"]["answers"] == "10"
    assert found["all"]["reward"] == f"{statistics.fmean(rewards):+.3f}"
    assert found["all"]["std"] == f"{statistics.pstdev(rewards):.3f}"
    assert found["all"]["stale"] == "1.80"
    assert found["all"]["ended"] == "10 trained, 2 filtered all_wrong, 1 evicted stale"


def test_stats_folds_no_number_where_there_is_little_room(run):
    narrow = CliRunner().invoke(app, ["traj", "stats", str(run)], env={"COLUMNS": "40"})
    assert table(narrow.output)["0"]["reward"] == "-0.100"


def test_stats_takes_a_range_and_the_runs_own_bound_for_correct(tmp_path, traj):
    run = write_run(tmp_path / "run", STEPS, reward={"correct_above": 0.5})
    found = table(traj("stats", run, "--steps", "1:4")[1])
    assert list(found) == ["3", "all"]
    assert found["all"]["correct"] == "50.0%"


@pytest.mark.parametrize(
    ("lengths", "p95"), [(range(1, 101), 95), (range(1, 21), 19), ([7], 7), ([1, 9], 9)]
)
def test_p95_is_a_length_that_95_of_100_answers_do_not_exceed(tmp_path, lengths, p95):
    rows = [row(0, 0, i, str(i), 1.0, num_tokens=n) for i, n in enumerate(lengths)]
    samples = Samples(write_run(tmp_path / "run", {0: rows}))
    assert samples.statistics(rows)["p95"] == p95


def test_diff_shows_answers_of_both_with_the_largest_change_first(run, traj):
    code, out, _ = traj("diff", run, 0, 3)
    assert code == 0
    assert out.startswith("2 prompts occur in both: 1 better, 1 worse, 0 the same")
    assert "mean reward +0.000" in out.split("\n")[0]
    first, second = out.split("[user] ")[1:]
    assert first.startswith("0 + 1?\nanswer 1 · sums · p0 · mean reward +1.000\n")
    assert second.startswith("1 + 1?\nanswer 2 · other · p1 · mean reward -1.000\n")
    assert first.split("\n")[2:7] == [
        "left  step 0: 2 trained",
        "    1x +0.900 eins",
        "    1x -1.100 two",
        "right  step 3: 2 trained",
        "    2x +0.900 1",
    ]


def test_diff_orders_by_size_of_change_and_compares_ranges_and_other_runs(tmp_path, run, traj):
    steps = {
        5: [row(5, 0, 0, "a", -1.0), row(5, 1, 0, "b", 0.9)],
        6: [row(6, 1, 1, "c", 0.9), row(6, 2, 0, "d", -1.0)],
    }
    other = write_run(tmp_path / "other", steps)
    code, out, _ = traj("diff", run, "0:1", "5:", "--other", other)
    assert code == 0
    assert out.startswith("3 prompts occur in both: 1 better, 1 worse, 1 the same")
    heads = [line for line in out.split("\n") if line.startswith("answer ")]
    assert [head.rpartition(" ")[2] for head in heads] == ["-1.000", "+0.900", "+0.000"]
    assert "step 0:1: 2 filtered all_wrong" in out


def test_diff_says_when_no_prompt_occurs_in_both(run, traj):
    code, out, _ = traj("diff", run, 3, 4)
    assert code == 1
    assert out == f"no prompt occurs both in 3 of {run} and in 4 of {run}\n"


def test_the_same_id_with_another_text_is_another_prompt(tmp_path, run, traj):
    renamed = [{**each, "prompt": [{"role": "user", "content": "?"}]} for each in STEPS[0]]
    other = write_run(tmp_path / "other", {0: renamed})
    assert traj("diff", run, 0, 0, "--other", other)[0] == 1


def test_export_writes_the_trained_rows_as_they_are(tmp_path, run, traj):
    out = tmp_path / "new" / "rows.jsonl"
    code, said, _ = traj("export", run, "--out", out)
    assert (code, said) == (0, f"{out}: 10 records\n")
    assert rows_of(out) == [*STEPS[0][:4], *STEPS[3]]
    assert "答案" in out.read_text(encoding="utf-8")
    traj("export", run, "--out", out, "--status", "all", "--steps", "0:2")
    assert rows_of(out) == STEPS[0]


def test_export_makes_records_for_fine_tuning_from_the_best_of_each_group(tmp_path, run, traj):
    out = tmp_path / "sft.jsonl"
    traj("export", run, "--out", out, "--best", 1, "--as", "messages", "--steps", "3")
    records = rows_of(out)
    assert [record["messages"][-1]["content"] for record in records] == ["1", "3", "8"]
    assert records[0] == {
        "messages": [
            {"role": "user", "content": "0 + 1?"},
            {"role": "assistant", "content": "1"},
        ],
        **dict(prompt_id="p0", data_source="sums", reward=0.9),
    }


def test_exported_csv_reads_back_with_lists_and_objects_as_json(tmp_path, run, traj):
    out = tmp_path / "rows.csv"
    assert traj("export", run, "--out", out, "--steps", 3)[0] == 0
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [each["completion"] for each in rows] == [each["completion"] for each in STEPS[3]]
    assert json.loads(rows[4]["reward_parts"]) == {"task": 1.0, "style": None}
    assert json.loads(rows[0]["prompt"]) == STEPS[3][0]["prompt"]


def test_exported_parquet_holds_the_rows(tmp_path, run, traj):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "rows.parquet"
    assert traj("export", run, "--out", out, "--steps", 0)[0] == 0
    assert parquet.read_table(out).to_pylist() == STEPS[0][:4]


def test_parquet_without_its_package_is_refused_with_the_remedy(tmp_path, run, traj, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = traj("export", run, "--out", tmp_path / "rows.parquet")
    assert code == 2
    assert "needs the package pyarrow" in err
    assert "pip install 'asyncgrpo[data]', or use JSONL" in err


PARTIAL = json.dumps({n: v for n, v in STEPS[3][0].items() if n != "reward"}).encode()


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "gro', b'{"answer": "\xe7\xad', b"[1]", b"{}", PARTIAL]
)
@pytest.mark.parametrize("command", ["show", "stats", "diff"])
def test_a_torn_last_line_is_left_out_and_said_once(run, traj, command, torn, caplog):
    path = run / "trajectories" / "step_3.jsonl"
    expected = traj(command, run, *([0, 3] if command == "diff" else []))
    path.write_bytes(path.read_bytes() + torn)
    assert traj(command, run, *([0, 3] if command == "diff" else [])) == expected
    assert caplog.messages == [f"{path}:7 is not a whole row (the run goes on, or was killed)"]


def test_a_step_without_a_file_is_refused_with_the_nearest(run, traj):
    for command in (("show", "--step", 2), ("stats", "--steps", "2:3"), ("diff", 2, 0)):
        code, out, err = traj(command[0], run, *command[1:])
        assert (code, out) == (2, "")
        assert "the nearest is 3, there are 3 from 0 to 4" in err


REFUSED = {
    "show --best 1 --worst 1": "give one of --best, --worst and --random",
    "show --best 0": "Invalid value for '--best'",
    "show --random -3": "Invalid value for '--random'",
    "show --status lost": "'lost' is not one of",
    "show --step x": "Invalid value for '--step'",
    "stats --steps 1-2": "steps '1-2' must be like 5, or a range like 0:5",
    "stats --steps 9:2": "has no trajectories of step 9:2; the nearest is 4",
    "diff 0 one": "steps 'one' must be like 5",
    "diff 0 1 --other nowhere": "nowhere is not a run directory",
    "export": "Missing option",
    "export --out y.xlsx": "'xlsx' is not one of jsonl, csv, parquet; take one",
    "export --out x --best 0": "Invalid value for '--best'",
    "export --out /dev/null/x": "/dev/null/x cannot be written",
}


@pytest.mark.parametrize("words", REFUSED)
def test_nonsense_is_refused_with_the_value_and_what_is_allowed(run, traj, words):
    command, *arguments = words.split()
    code, out, err = traj(command, run, *arguments)
    assert (code, out) == (2, "")
    assert REFUSED[words] in " ".join(err.split())


def test_what_is_no_run_directory_or_has_no_rows_is_refused(tmp_path, run, traj):
    for path in (tmp_path, tmp_path / "nowhere", run / "trajectories" / "step_0.jsonl"):
        code, _, err = traj("show", path)
        assert code == 2
        assert f"{path} is not a run directory" in err
    code, _, err = traj("stats", write_run(tmp_path / "young", {}))
    assert code == 2
    assert "holds no step_<k>.jsonl: no group has ended yet" in err


@pytest.mark.parametrize("name", ["config.json", "endpoints.json"])
@pytest.mark.parametrize("text", ['{"run": {', "[]", '{"store": 3}'])
def test_a_run_directory_with_a_broken_file_is_refused_with_its_name(run, traj, name, text):
    if (name, text) == ("config.json", '{"store": 3}'):
        text = '"x"'
    (run / name).write_text(text)
    code, _, err = traj("show", run)
    assert code == 2
    assert f"{run / name} is not {'whole' if name == 'endpoints.json' else 'valid JSON'}" in err


def test_a_step_without_a_whole_row_is_refused(run, traj):
    (run / "trajectories" / "step_3.jsonl").write_text("")
    code, out, err = traj("show", run, "--step", 3)
    assert (code, out) == (2, "")
    assert "there is not one whole row" in err


def test_an_export_never_overwrites_the_runs_own_files(run, traj):
    own = run / "trajectories" / "step_0.jsonl"
    before = own.read_bytes()
    code, _, err = traj("export", run, "--out", own)
    assert code == 2
    assert "the run's own trajectories/" in err
    assert own.read_bytes() == before
