"""A run whose processes are started one by one, as on several machines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from test_launch import SIX_STEPS, TESTS, assert_all_end

from asyncgrpo.data.tiny import build_untrained

pytestmark = pytest.mark.slow
OTHER = "127.0.0.2"  # this machine, too; nobody listens there unless he is told to


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "asyncgrpo.cli", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=TESTS, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def test_buffer_learner_and_actors_find_each_other_on_the_given_address(tmp_path: Path) -> None:
    model = build_untrained(tmp_path / "untrained", True, 5)
    run_dir = str(tmp_path / "run")
    settings = [f'launch.host="{OTHER}"', "actor.engine=toy", f"model.path={model}", *SIX_STEPS]
    settings.append("launch.grace_seconds=10")
    own = [word for setting in settings for word in ("--set", setting)]
    buffer = start("buffer", "--run-dir", run_dir, *own)
    others = []
    try:
        assert buffer.stdout is not None
        shown = [next(line for line in buffer.stdout if "then " in line), buffer.stdout.readline()]
        assert f"asyncgrpo learner --join {run_dir}" in shown[0]
        assert f"asyncgrpo actor --join {run_dir} --index 0" in shown[1]
        others = [start("actor", "--join", run_dir, "--index", index) for index in ("0", "1")]
        learner = start("learner", "--join", run_dir)
        others.append(learner)
        said, _ = learner.communicate(timeout=240)
        assert learner.returncode == 0, said
        for process in (*others[:2], buffer):  # nobody stops them: they end with the run
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0, said
            assert "without goodbye" not in said
    finally:
        for process in (*others, buffer):
            process.kill()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6
    assert f"tcp://{OTHER}:" in (tmp_path / "run" / "endpoints.json").read_text()
    assert not list((tmp_path / "run" / "targets").glob("*.json"))  # all ended as they should
    assert start("audit", run_dir).wait() == 0


def test_ranks_end_when_their_torchrun_is_killed(tmp_path: Path) -> None:
    model = build_untrained(tmp_path / "untrained", True, 5)
    run_dir = tmp_path / "run"
    settings = ["actor.engine=toy", f"model.path={model}", *SIX_STEPS]
    own = [word for setting in settings for word in ("--set", setting)]
    buffer = start("buffer", "--run-dir", str(run_dir), *own)
    try:
        assert buffer.stdout is not None
        assert any("asyncgrpo actor --join" in line for line in buffer.stdout)
        torchrun = start("learner", "--join", str(run_dir))
        assert torchrun.stdout is not None
        for _ in range(2):  # then they wait for an actor
            assert any("ready after" in line for line in torchrun.stdout)
        ranks = psutil.Process(torchrun.pid).children(recursive=True)
        torchrun.kill()
        assert len(ranks) >= 2
        assert_all_end(ranks)
    finally:
        buffer.kill()
