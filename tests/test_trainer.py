"""The Python face: what a Trainer makes of objects, what it refuses, that it equals `launch`."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import reward_functions
from fakes import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_run import BY_THE_CLOCK

from asyncgrpo import Trainer, TrainResult
from asyncgrpo.config import from_mapping
from asyncgrpo.data.files import as_jsonl, read_rows
from asyncgrpo.data.tiny import build_untrained
from asyncgrpo.errors import ConfigError, DataError, ModelError, RewardError, RunError
from asyncgrpo.imports import find_function

ROOT = Path(__file__).parent.parent
ROWS = [{"prompt": f"Say {word}", "answer": word} for word in ("ja", "nein", "vielleicht", "好")]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def right(completions, answer, **columns):
    return [float(text == truth) for text, truth in zip(completions, answer, strict=True)]


def test_settings_come_as_a_dict_a_config_a_file_or_not_at_all(tmp_path):
    raw = {"run": {"max_steps": 7}, "num_generations": 4}
    (tmp_path / "my.toml").write_text("num_generations = 4\n[run]\nmax_steps = 7\n")
    for given_as in (raw, from_mapping(raw), "my.toml", tmp_path / "my.toml"):
        config = Trainer(given_as, actors=3, learners=1, run_dir="out").config
        assert (config.run.max_steps, config.algo.group_size) == (7, 4)
        assert (config.launch.actors, config.launch.learners) == (3, 1)
        assert config.run.dir == str(tmp_path / "out")
    for text in ('{"run": ', '["run"]'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match=r"bad.json is not valid JSON"):
            Trainer("bad.json")
    defaults = Trainer(run_dir="out").config
    assert (
        defaults.model_dump() == from_mapping({"run": {"dir": str(tmp_path / "out")}}).model_dump()
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (5, "config=5 must be a Config, a dict of dicts, or the path of a file"),
        ([1], r"config=\[1\] must be a Config"),
        ({"buffer": "x"}, "buffer='x' is not allowed: it must be a section"),
        ({"algo": [1]}, r"algo=\[1\] is not allowed: it must be a section"),
        ({"algo": [1], "num_generations": 4}, "algo"),
    ],
)
def test_what_is_no_settings_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(config)


def test_reward_functions_take_the_place_of_those_in_the_settings():
    config = {"reward": {"functions": [{"use": "exact"}], "correct_above": 0.5}}
    rewards = [right, {"use": reward_functions.vowels, "weight": 0.5}, "length_penalty"]
    reward = Trainer(config, reward_funcs=rewards).config.reward
    assert [(f.label, f.weight) for f in reward.functions] == [
        ("right", 1.0),
        ("vowels", 0.5),
        ("length_penalty", 1.0),
    ]
    assert reward.functions[1].use == "reward_functions:vowels"
    assert reward.correct_above == 0.5
    assert [f.use for f in Trainer(config).config.reward.functions] == ["exact"]
    assert [f.use for f in Trainer(reward_funcs="exact").config.reward.functions] == ["exact"]


def test_two_lambdas_need_names():
    two = [lambda completions: [0.0 for _ in completions] for _ in range(2)]
    with pytest.raises(ConfigError, match="two are called 'lambda'; give one of them another"):
        Trainer(reward_funcs=two)
    named = Trainer(reward_funcs=[two[0], {"use": two[1], "name": "v1.1"}]).config
    assert [f.label for f in named.reward.functions] == ["lambda", "v1.1"]
    assert named.reward.functions[1].use.endswith("/reward_funcs.pkl:v1_1")


def test_names_that_differ_only_in_signs_stay_two_functions(tmp_path):
    names = ("a.b", "a:b", "a_b", "a b")
    rewards = [
        {"use": lambda completions, n=n: [float(n)] * len(completions), "name": name}
        for n, name in enumerate(names)
    ]
    trainer = Trainer({"run": {"dir": "out"}}, reward_funcs=rewards)
    trainer._write_files()
    functions = trainer.config.reward.functions
    assert [f.label for f in functions] == list(names)
    found = [find_function(f.use, "reward", RewardError)(["x"]) for f in functions]
    assert found == [[0.0], [1.0], [2.0], [3.0]]


def test_trainers_of_one_second_have_directories_of_their_own(tmp_path):
    made = [Trainer().run_dir for _ in range(3)]
    assert len(set(made)) == 3
    assert {path.parent for path in made} == {tmp_path / "runs"}
    assert not (tmp_path / "runs").exists()


def test_a_run_directory_that_cannot_be_made_is_refused_and_another_fit_may_follow(tmp_path):
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"longer than a path may be here; give a shorter"):
            Trainer(run_dir=tmp_path / ("x" * 300)).fit()
    assert list(tmp_path.iterdir()) == []


def test_a_training_set_without_an_evaluation_set_means_no_evaluation():
    assert Trainer(train_dataset=ROWS).config.data.eval is None
    assert Trainer(Trainer().config, train_dataset=ROWS).config.data.eval is None
    asked = Trainer({"data": {"eval": "tasks"}}, train_dataset=ROWS).config
    assert asked.data.eval == "tasks"
    assert Trainer().config.data.eval == "tasks"
    paths = Trainer(train_dataset="a.jsonl", eval_dataset=Path("b.jsonl")).config.data
    assert (paths.train, paths.eval) == ("a.jsonl", "b.jsonl")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40)
@given(rows=st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), min_size=1))
def test_rows_in_memory_are_read_back_as_they_were_and_in_their_order(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text(as_jsonl(iter(rows), "train_dataset"), encoding="utf-8")
    assert [row for _, row in read_rows(file)] == rows


def test_text_stays_readable():
    assert "好 🙂" in as_jsonl([{"answer": "好 🙂"}], "train_dataset")


def test_a_dataset_gives_the_rows_that_its_saved_folder_gives(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "day": datetime.date(2024, 1, place + 1)} for place, row in enumerate(ROWS)]
    dataset = datasets.Dataset.from_list(rows).select([2, 0, 3]).with_format("numpy")
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "rows.jsonl").write_text(as_jsonl(dataset, "train_dataset"), encoding="utf-8")
    saved, written = ([row for _, row in read_rows(p)] for p in ("saved", "rows.jsonl"))
    assert saved == written
    assert [row["answer"] for row in written] == ["vielleicht", "ja", "好"]
    assert written[0]["day"] == "2024-01-03"


class Frame:
    """A table that, like a DataFrame, gives its column names when it is gone through."""

    def __iter__(self):
        return iter(["prompt", "answer"])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([*ROWS, {"prompt": "x", "when": datetime.date.min}], "row 4: column 'when' .*date"),
        ([{"prompt": b"x"}], "row 0: column 'prompt' holds b'x' .bytes., which JSON cannot hold"),
        ([{"prompt": "x", "n": [np.int64(3)]}], "row 0: column 'n' .*int64.* a number"),
        ([{"prompt": "x", "n": "\ud800"}], "row 0: column 'n' .*surrogates"),
        ([ROWS[0], {3: "x"}], "row 1 is .* not a dict with text as keys"),
        (["a", "b"], "row 0 is 'a' .str., not a dict"),
        (Frame(), r"row 0 is 'prompt'.*df.to_dict\('records'\)"),
        ({"train": ROWS, "test": ROWS}, "row 0 is 'train'.*one split of a DatasetDict"),
        (7, "row 0 is 7 .int."),
    ],
)
def test_what_is_no_data_set_is_refused_with_its_place(dataset, message):
    with pytest.raises(DataError, match=f"^train_dataset {message}"):
        Trainer(train_dataset=dataset)


def wrong_count(completions):
    return [1.0]


REFUSED = [
    ({"reward_funcs": [wrong_count]}, RewardError, "'wrong_count' returned 1 values for 2"),
    ({"reward_funcs": ["exakt"]}, RewardError, "did you mean 'exact'"),
    ({"train_dataset": [{"text": "?"}]}, DataError, "train_dataset.jsonl:1 has no prompt"),
    ({"train_dataset": []}, DataError, "train_dataset.jsonl holds no records"),
    ({"config": {"model": {"path": "/none"}}}, ModelError, "'/none' does not exist"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), REFUSED, ids=lambda value: str(value)[:30]
)
def test_a_run_that_cannot_work_is_refused_and_leaves_nothing(tmp_path, arguments, error, message):
    trainer = Trainer(**arguments, run_dir=tmp_path / "run")
    with pytest.raises(error, match=message):
        trainer.fit()
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_is_used_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="already holds a run; give another --run-dir"):
        Trainer(train_dataset=ROWS, run_dir=tmp_path).fit()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "mine").touch()
    with pytest.raises(RewardError):
        Trainer(reward_funcs=[wrong_count], train_dataset=ROWS, run_dir=tmp_path).fit()
    assert (tmp_path / "mine").exists()


def test_another_thread_than_the_main_one_is_refused_before_anything_is_written(tmp_path):
    errors = []

    def fit():
        try:
            Trainer(run_dir=tmp_path / "run").fit()
        except RunError as error:
            errors.append(str(error))

    thread = threading.Thread(target=fit)
    thread.start()
    thread.join()
    assert errors == ["a run that is not serial must start in the main thread of its process"]
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_trains_when_it_is_imported_is_no_endless_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "loop.py").write_text(
        "from asyncgrpo import Trainer\n"
        "def f(completions):\n    return [0.0 for _ in completions]\n"
        "Trainer(reward_funcs=['loop.py:f'], run_dir='run').fit()\n"
    )
    with pytest.raises(RewardError, match=r"loop.py raised ConfigError: fit\(\) is called while"):
        find_function("loop.py:f", "reward", RewardError)
    assert not (tmp_path / "run").exists()


SETTINGS = {
    "run": {"max_steps": 8, "seed": 3},
    "data": {"max_prompt_tokens": 32},
    "sampling": {"max_completion_tokens": 8},
    "actor": {"engine": "toy", "concurrency": 8},
    "buffer": {"groups_per_step": 2, "max_staleness": 2},
    "algo": {"group_size": 4, "drop_uniform_groups": False},
    "learner": {"lr": 3e-3},
    "eval": {"every": 3, "num_prompts": 4},
    "launch": {"grace_seconds": 3.0},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(build_untrained(tmp_path_factory.mktemp("model") / "untrained", True, 5))


def command_line(folder: Path, model: str) -> Path:
    """The same run by `asyncgrpo launch --serial`, from files."""
    for name in ("train", "eval"):
        write_jsonl(folder / f"{name}_dataset.jsonl", *ROWS)
    data = {"train": "train_dataset.jsonl", "eval": "eval_dataset.jsonl"}
    settings = {
        **SETTINGS,
        "model": {"path": model},
        "data": {**SETTINGS["data"], **data},
        "reward": {"functions": [{"use": "reward_functions:vowels"}]},
    }
    (folder / "by_cli.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "asyncgrpo.cli", "launch", "--serial"]
    command += ["--config", "by_cli.json", "--run-dir", "by_cli"]
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    subprocess.run(command, cwd=folder, env={**os.environ, **paths}, check=True, timeout=600)
    return folder / "by_cli"


def exact_rows(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what clocks say, and what actors report once a second."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{n: v for n, v in json.loads(line).items() if n not in BY_THE_CLOCK} for line in lines]


@pytest.mark.slow
def test_serial_runs_equal_the_command_line_to_the_last_bit(tmp_path, model):
    """From objects, in a running event loop; and again from its config.json, in a thread."""
    by_cli = command_line(tmp_path, model)

    def vowels(completions):
        return reward_functions.vowels(None, completions)

    async def in_a_notebook() -> TrainResult:
        return Trainer(
            {**SETTINGS, "model": {"path": model}},
            reward_funcs=[vowels],
            train_dataset=ROWS,
            eval_dataset=ROWS,
            run_dir="by_trainer",
        ).fit(serial=True)

    async def in_a_thread() -> TrainResult:
        again = Trainer("by_trainer/config.json", run_dir="again")
        return await asyncio.to_thread(again.fit, serial=True)

    results = [asyncio.run(in_a_notebook()), asyncio.run(in_a_thread())]
    expected = exact_rows(by_cli)
    assert sum("loss" in row for row in expected) == 8
    weights = load_file(by_cli / "model" / "model.safetensors")
    for result in results:
        assert exact_rows(result.run_dir) == expected
        trained = load_file(result.model_path / "model.safetensors")
        assert all((trained[name] == weights[name]).all() for name in weights)
        assert len(list(result.metrics())) == len(expected)
        summary = json.loads((by_cli / "summary.json").read_text())
        assert result.accuracies == (
            summary["before"]["accuracy"],
            summary["after"]["accuracy"],
        )
        with pytest.raises(ConfigError, match="each Trainer makes one run"):
            Trainer(run_dir=result.run_dir).fit(serial=True)
    start = load_file(Path(model) / "model.safetensors")
    assert any((start[name] != weights[name]).any() for name in weights)
    assert (tmp_path / "by_trainer" / "train_dataset.jsonl").read_text().count("好") == 2


SCRIPT = """
import asyncio, json, sys
from asyncgrpo import Trainer
import beside

VOWELS = set("aeiou")

def vowels(completions, **columns):
    return [beside.SCALE * sum(letter in VOWELS for letter in text.lower()) for text in completions]

rows = [{"prompt": f"Say {n}", "answer": str(n)} for n in range(20)]
trainer = Trainer(json.load(open(sys.argv[1])), reward_funcs=[vowels, beside.size],
                  train_dataset=rows, run_dir=sys.argv[2], actors=2, learners=1)

async def main():
    return trainer.fit()

try:
    result = asyncio.run(main()) if "loop" in sys.argv else trainer.fit()
    print("ended with", result.accuracies, sum("loss" in row for row in result.metrics()))
except KeyboardInterrupt:
    print("interrupted")
"""


def script(folder: Path, model: str, max_steps: int, *arguments: str) -> subprocess.Popen[str]:
    """A user's script with a module beside it, started from somewhere else."""
    (folder / "user").mkdir()
    (folder / "user" / "train.py").write_text(SCRIPT)
    (folder / "user" / "beside.py").write_text(
        "SCALE = 1 / 16\ndef size(completion):\n    return float(len(completion))\n"
    )
    settings = {**SETTINGS, "model": {"path": model}, "run": {"max_steps": max_steps}}
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [sys.executable, "user/train.py", "settings.json", "run", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_script_trains_with_processes_and_its_own_reward_without_a_main_guard(tmp_path, model):
    process = script(tmp_path, model, 3)
    shown, _ = process.communicate(timeout=600)
    assert process.returncode == 0, shown
    assert "ended with None 3" in shown
    assert "step 2 (3/3)" in shown
    assert shown.count("run directory") == 1  # nobody imported the script and began anew
    rows = [
        json.loads(line)
        for path in (tmp_path / "run" / "trajectories").glob("step_*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(rows) == 3 * 2 * 4
    for row in rows:
        vowels = sum(letter in "aeiou" for letter in row["completion"].lower())
        assert row["reward_parts"] == {"vowels": vowels / 16, "size": len(row["completion"])}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["plain", "loop"])
def test_ctrl_c_ends_all_processes_and_then_raises_keyboard_interrupt(tmp_path, model, where):
    process = script(tmp_path, model, 5000, where)
    rows = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 240
    while not (rows.exists() and len(rows.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "never trained"
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=600)
    assert "SIGINT: stopping" in shown
    assert shown.splitlines()[-1] == "interrupted", shown
    assert [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert len(started) >= 4


@pytest.mark.engine
def test_the_example_trains_with_the_real_engine(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "trainer_tiny.py"), "4"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 steps: held-out accuracy" in done.stdout
