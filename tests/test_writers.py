"""Rows for TensorBoard and Weights & Biases: what arrives there, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import make_run, rows_of

from asyncgrpo.config import from_mapping
from asyncgrpo.errors import ConfigError
from asyncgrpo.observe.exporter import Exporter
from asyncgrpo.observe.recorder import RunRecorder
from asyncgrpo.observe.writers import WRITERS, check_writers

NOTHING = {"metrics": {}, "actors": {}, "evaluations": []}
ROWS = [{"step": 0, "rewards/mean": 0.25, "loss": 0.5}, {"step": 1, "rewards/mean": 0.75}]


def recorded(path: Path, writer: str) -> list[dict]:
    """Two rows through the recorder; what metrics.jsonl holds of them."""
    run = make_run(path, observe={"report_to": [writer]})
    recorder = RunRecorder(run, Exporter("learner-0", 0, path))
    recorder.begin(0)
    for row in ROWS:
        recorder.row(row, NOTHING)
    recorder.finish([], {})
    return rows_of(path / "metrics.jsonl")


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_gets_every_number_of_metrics_jsonl_under_the_same_name(tmp_path):
    rows = recorded(tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {name for row in rows for name in row}
    points = [(event.step, event.value) for event in events.Scalars("rewards/mean")]
    assert points == [(0, 0.25), (1, 0.75)]


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_hides_steps_that_a_resumed_run_makes_again(tmp_path):
    run = make_run(tmp_path, observe={"report_to": ["tensorboard"]})
    for start, stop, loss in ((0, 5, 1.0), (3, 4, 2.0)):
        recorder = RunRecorder(run, Exporter("learner-0", 0, tmp_path))
        recorder.begin(start)
        for step in range(start, stop):
            recorder.row({"step": step, "loss": loss}, NOTHING)
        recorder.finish([], {})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(p.step, p.value) for p in points] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]


@pytest.fixture
def wandb_mode(monkeypatch):
    """Sets the mode; wandb keeps it for the whole process otherwise."""
    yield lambda mode: monkeypatch.setenv("WANDB_MODE", mode)
    import wandb

    wandb.teardown()


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: seven bytes, then LevelDB's log format."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_gets_every_number_of_metrics_jsonl_under_the_same_name(tmp_path, wandb_mode):
    wandb_mode("offline")
    rows = recorded(tmp_path, "wandb")
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process writes the file to the end

    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    records = [Record.FromString(data) for data in log_records(file.read_bytes())]
    history = [
        {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in r.history.item
        }
        for r in records
        if r.HasField("history")
    ]
    assert [{n: v for n, v in row.items() if n[0] != "_"} for row in history] == rows
    assert [row["_step"] for row in history] == [0, 1]


@pytest.mark.filterwarnings("ignore")
def test_wandb_without_a_login_is_refused_with_the_way_out(tmp_path, wandb_mode, monkeypatch):
    wandb_mode("online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="WANDB_MODE=offline"):
        recorded(tmp_path, "wandb")


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_that_is_not_installed_is_refused_with_its_extra(name, monkeypatch):
    monkeypatch.setattr("asyncgrpo.observe.writers.find_spec", lambda package: None)
    config = from_mapping({"observe": {"report_to": [name]}})
    with pytest.raises(ConfigError, match=rf"pip install 'asyncgrpo\[{name}\]'"):
        check_writers(config)
    check_writers(from_mapping({}))
