"""What the end of a role means, how it tells why, and what is shown of its log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncgrpo.errors import BadInput, ConfigError, RoleFailed
from asyncgrpo.launch.child import LogTail
from asyncgrpo.launch.ends import (
    ERROR_FILE,
    describe_exit,
    failure,
    judge_exit,
    last_lines,
    read_error,
    record_error,
)


def test_the_end_of_each_role_means_what_the_table_says() -> None:
    table = {
        ("learner", 0, 0): "done",
        ("learner", 1, 0): "restart",
        ("learner", 1, 2): "fail",
        ("learner", 2, 0): "fail",
        ("buffer", 0, 0): "early",
        ("buffer", -9, 0): "restart",
        ("buffer", 1, 2): "fail",
        ("actor", 0, 0): "left",
        ("actor", 1, 0): "restart",
        ("actor", -9, 1): "restart",
        ("actor", -9, 2): "fail",
        ("actor", 2, 0): "fail",
    }
    for (role, code, restarts), verdict in table.items():
        assert judge_exit(role, code, restarts, max_restarts=2) == verdict, (role, code)


def test_exit_codes_are_told_in_words(tmp_path: Path) -> None:
    assert describe_exit(3) == "ended with exit code 3"
    assert describe_exit(-11) == "was ended by SIGSEGV"
    assert describe_exit(-40) == "was ended by signal 40"
    assert "out of memory" in describe_exit(-9)
    log = tmp_path / "a.log"
    log.write_text("error: no data\n")
    bare = failure("actor-0", 2, 0, tmp_path / "none", log)
    assert isinstance(bare, BadInput)
    assert str(bare) == f"actor-0 refused its input; last lines of {log}:\n  error: no data"


def test_the_first_recorded_error_counts_and_a_broken_record_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "learner.error.json"
    assert read_error(path) is None
    monkeypatch.delenv(ERROR_FILE, raising=False)
    record_error(ConfigError("nobody asked"))
    monkeypatch.setenv(ERROR_FILE, str(path))
    record_error(ConfigError("first"))
    record_error(RoleFailed("second"))
    assert json.loads(path.read_text()) == {"exit_code": 2, "message": "first"}
    path.unlink()
    record_error(ZeroDivisionError("by zero"))
    assert json.loads(path.read_text()) == {"exit_code": 3, "message": "ZeroDivisionError: by zero"}
    path.write_text('{"exit_code": 2, "mess')
    broken = read_error(path)
    assert broken is not None
    assert (broken.exit_code, broken.message) == (3, '{"exit_code": 2, "mess')


def test_the_lines_shown_of_a_dead_learner_end_before_torchruns_own_report(tmp_path: Path) -> None:
    report = "W1121 03:34 9 torch/distributed/elastic/multiprocessing/api.py:1] failed (exit 1)"
    log = tmp_path / "learner.log"
    for written, shown in (
        (["a", "ValueError: b", report, report, "c"], ["a", "ValueError: b"]),
        ([report, "c"], [report, "c"]),
        (["a", "b"], ["a", "b"]),
    ):
        log.write_text("\n".join(written))
        assert last_lines(log, 9) == shown


def test_a_tail_leaves_out_what_was_logged_before_the_run_went_on(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(b"an old failure\n")
    tail = LogTail(path)
    with path.open("ab") as file:
        file.write(b"new\n")
    assert tail.new_lines(at_end=True) == ["new"]


def test_a_tail_gives_whole_lines_once_and_the_rest_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    tail = LogTail(path)
    assert tail.new_lines() == []
    path.write_bytes(b"one\ntw")
    assert tail.new_lines() == ["one"]
    with path.open("ab") as file:
        file.write(b"o\r\n10%\r20%\n\xff\nlast")
    assert tail.new_lines() == ["two", "20%", "\ufffd"]
    assert tail.new_lines(at_end=True) == ["last"]
    assert tail.new_lines(at_end=True) == []
    assert last_lines(path, 2) == ["\ufffd", "last"]
    assert last_lines(tmp_path / "none", 2) == []
