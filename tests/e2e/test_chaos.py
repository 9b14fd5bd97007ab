"""At least five minutes of kills and stops across all roles of a run with real engines."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import load_script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(2400)
def test_a_run_under_attack_learns_and_loses_nothing_and_counts_nothing_twice(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    chaos = load_script(SCRIPT)
    found = chaos.main(["--minutes", "5", "--seed", "0", "--run-dir", str(tmp_path / "run")])
    assert set(found["faults"]) == set(chaos.FAULTS)
    assert sum(found["faults"].values()) >= 15
    assert (found["exit_code"], found["audit_exit_code"]) == (0, 0)
    assert (found["groups_lost"], found["groups_trained_twice"]) == (0, 0)
    assert found["accuracy_after"] > found["accuracy_before"] + 0.1
    assert found["orphans"] == []
