"""`asyncgrpo algo`: every name with formula and source; details and settings of one."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from asyncgrpo.algorithms import MODULES, PRESETS, catalogue
from asyncgrpo.cli import app
from asyncgrpo.errors import ConfigError


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["algo", *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    return result.output


def test_the_list_has_every_name_with_its_formula_and_source() -> None:
    output = shown("list")
    for kind in MODULES:
        for name, entry in catalogue(kind).items():
            assert f"  {name} " in output
            assert entry.source in output
            assert all(line in output for line in entry.formula.splitlines())
    assert all(f"  {name} " in output for name in PRESETS)


def test_one_entry_shows_its_defaults_use_and_staleness() -> None:
    output = shown("show", "icepop")
    assert "algo.correction = icepop" in output
    assert "keep low <= w <= high" in output
    assert "arXiv 2510.18855" in output
    assert "algo.icepop.high  default 5.0" in output
    assert "staleness up to" in output


def test_a_name_of_two_kinds_shows_both() -> None:
    output = shown("show", "dr_grpo")
    assert "algo.advantage = dr_grpo" in output
    assert "algo.aggregation = dr_grpo" in output


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_shows_the_keys_that_it_sets(name: str) -> None:
    output = shown("show", name)
    assert f"algo.preset = {name}" in output
    for key, value in PRESETS[name].items():
        assert [f"algo.{key}", str(value)] in [line.split() for line in output.splitlines()]


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    for wrong, right in (("icepo", "icepop"), ("ppo", "ppo_clip"), ("dpao", "dapo")):
        result = CliRunner().invoke(app, ["algo", "show", wrong])
        assert isinstance(result.exception, ConfigError)
        with pytest.raises(ConfigError, match=f"did you mean '{right}'"):
            raise result.exception
