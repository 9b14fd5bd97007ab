"""docs/expectations.md: every command, setting, metric, file and page that it names is there."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from asyncgrpo import Trainer
from asyncgrpo.algorithms import catalogue
from asyncgrpo.aliases import by_name
from asyncgrpo.cli import app
from asyncgrpo.config import Config, preset_files
from asyncgrpo.observe.metrics import metric_of
from asyncgrpo.reference import settings
from asyncgrpo.rewards.builtin import BUILTINS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "expectations.md"
# rows of each section in the list that the page answers
ROWS = {"001": 33, "000": 46, "002": 31, "003": 37, "004": 27, "D": 13, "E": 12}
ROOMS = "|".join(Config.model_fields)
KEYS = {key.replace("[]", "") for key in settings()}
OF_A_RUN = (  # written into the run directory
    *("RUN/model", "model/", "exports/", "RUN/config.json", "RUN/env.json", "metrics.jsonl"),
    *("summary.json", "RUN/trajectories/step_<k>.jsonl", "logs/<role>.log", "runs/<time>-<name>"),
    *("runs/latest", "reward_parts"),
)
OUTSIDE = ("CUDA_VISIBLE_DEVICES", "module:function")


class Row(NamedTuple):
    number: str
    shown: str
    status: str
    where: str


@cache
def commands() -> Any:
    return typer.main.get_command(app)


@cache
def rows() -> list[Row]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [Row(*cells) for cells in found if re.fullmatch(r"(\d{3}|D|E)\.\d+", cells[0])]


def names(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def command_of(words: list[str]) -> Any | None:
    """The command that the words call, options looked up; None when there is none."""
    command = commands()
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    options = {word for word in words if word.startswith("-")}
    is_whole = not hasattr(command, "commands") or not words
    return command if is_whole and options <= known else None


def is_there(name: str) -> bool:
    words = name.split()
    if words[0] in (group := commands()).commands:
        return command_of(words) is not None
    if name.startswith("--"):
        subs = [group, *group.commands.values()]
        subs += [sub for each in subs[1:] for sub in getattr(each, "commands", {}).values()]
        option = words[0]
        return option == "--help" or any(
            option in param.opts for sub in subs for param in sub.params
        )
    if re.match(rf"({ROOMS})\.\w", name):
        key = name.partition(" ")[0].partition("=")[0].replace("[]", "")
        return key in KEYS or any(known.startswith(f"{key}.") for known in KEYS)
    if name.startswith(("test_", "e2e/")):
        return (ROOT / "tests" / name).is_file()
    if name.endswith(".md"):
        return (ROOT / "docs" / name).is_file()
    return (
        name in (*OF_A_RUN, *OUTSIDE, *BUILTINS, *preset_files(), *by_name(), Trainer.__name__)
        or name in catalogue("advantage")
        or ("/" in name and (ROOT / name).exists())
        or is_metric(name)
    )


def is_metric(name: str) -> bool:
    try:
        metric_of(name)
    except (KeyError, ValueError):
        return False
    return True


def test_every_row_of_the_list_is_answered_once_in_its_order() -> None:
    expected = [f"{section}.{n}" for section, count in ROWS.items() for n in range(1, count + 1)]
    assert [row.number for row in rows()] == expected


def test_every_row_works_or_says_why_not() -> None:
    for row in rows():
        assert row.status in ("works", "different", "not yet"), row
        assert len(row.where) > 10, row


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.number)
def test_what_a_row_names_is_there(row: Row) -> None:
    for name in names(row.where):
        assert is_there(name), f"{row.number}: there is no {name!r}"
    pages = re.findall(r"\]\(([\w.]+)\)", row.where)
    assert all((PAGE.parent / page).is_file() for page in pages), pages


def test_made_up_names_are_not_there() -> None:
    for name in (
        *("algo.nonsense", "data nonsense", "eval --nonsense", "--nonsense", "test_nonsense.py"),
        *("nonsense.md", "eval/nonsense", "grafana/nonsense", "nonsense", "learner.lora.nonsense"),
    ):
        assert not is_there(name), name


def test_every_command_that_is_named_has_help() -> None:
    named = {tuple(name.split()) for row in rows() for name in names(row.where)}
    group = commands()
    called = set()
    for words in (list(name) for name in named):
        if words[0] in group.commands:
            subs = getattr(group.commands[words[0]], "commands", {})
            called.add((words[0], *(words[1:2] if words[1:] and words[1] in subs else [])))
    assert len(called) > 10
    for words in called:
        assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0, words
