"""Functions that have no importable name reach other processes with all that they need."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import reward_functions

from asyncgrpo.errors import RewardError
from asyncgrpo.imports import find_function, importable_name, own_name, pack

SCRIPT = """
import functools, math, sys
from dataclasses import dataclass
from pathlib import Path
import beside
from asyncgrpo.imports import importable_name, pack

BONUS = 0.5
CALLS = []

@dataclass
class Judge:
    base: float
    def score(self, completions):
        return [self.base + BONUS for _ in completions]

def helper(text):
    CALLS.append(text)
    return math.sqrt(len(text)) + BONUS

def rooted(completions):
    return [helper(text) for text in completions]

def counted(completions):
    return [len(CALLS) for _ in completions]

def made(factor):
    return lambda completions: [factor * beside.one() for _ in completions]

async def later(completion):
    return len(completion)

functions = {
    "rooted": rooted, "counted": counted, "method": Judge(2.0).score, "closure": made(7),
    "partial": functools.partial(lambda completions, x: [x for _ in completions], x=3),
    "later": later,
}
assert not any(map(importable_name, functions.values()))
Path(sys.argv[1]).write_bytes(pack(functions))
"""
CALLER = """
import asyncio, sys
from asyncgrpo.errors import RewardError
from asyncgrpo.imports import find_function
for name in sys.argv[2:]:
    function = find_function(f"{sys.argv[1]}:{name}", "reward", RewardError)
    result = asyncio.run(function("four")) if name == "later" else function(completions=["four"])
    print(name, result)
"""


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **environment},
    )


@pytest.mark.parametrize("started_by", [["train.py"], ["-m", "train"]])
def test_functions_of_a_script_see_their_globals_in_another_process(tmp_path, started_by):
    scripts, elsewhere = tmp_path / "scripts", tmp_path / "elsewhere"
    scripts.mkdir()
    elsewhere.mkdir()
    (scripts / "train.py").write_text(SCRIPT)
    (scripts / "beside.py").write_text("def one():\n    return 1\n")
    file = tmp_path / "functions.pkl"
    packed = run(scripts, *started_by, str(file))
    assert packed.returncode == 0, packed.stderr

    names = ["rooted", "counted", "method", "closure", "partial", "later"]
    called = run(elsewhere, "-c", CALLER, str(file), *names, ASYNCGRPO_PATH=str(scripts))
    assert called.stdout.splitlines() == [
        "rooted [2.5]",
        "counted [1]",  # the functions go on sharing their globals
        "method [2.5]",
        "closure [7]",
        "partial [3]",
        "later 4",
    ], called.stderr

    lost = run(elsewhere, "-c", CALLER, str(file), "rooted")
    assert "there is no module 'beside'; install it, or start from the folder" in lost.stderr


def test_only_what_an_import_finds_again_goes_by_name():
    assert importable_name(reward_functions.vowels) == "reward_functions:vowels"
    assert importable_name(OrderedDict.fromkeys) is None  # a new bound method at each look
    assert importable_name(functools.partial(reward_functions.vowels)) is None

    def vowels(completions):
        return [0.0 for _ in completions]

    vowels.__module__, vowels.__qualname__ = "reward_functions", "vowels"  # not the same function
    assert importable_name(vowels) is None


def test_a_function_that_cannot_be_copied_is_refused_by_name():
    lock = threading.Lock()

    def guarded(completions):
        with lock:
            return [0.0 for _ in completions]

    with pytest.raises(RewardError, match=r"'guarded' cannot be copied .*lock.*when it is called"):
        pack({"fine": lambda completions: [], "guarded": guarded})


def test_names_are_those_that_a_user_knows():
    assert own_name(reward_functions.vowels) == "vowels"
    assert own_name(lambda completions: []) == "lambda"
    assert own_name(functools.partial(reward_functions.vowels)) == "vowels"
    assert own_name(functools.partial(functools.partial)) == "partial"

    class Judge:
        def __call__(self, completions):
            return []

    assert own_name(Judge()) == "Judge"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "rewards").mkdir()
    return tmp_path


def find(use: str):
    return find_function(use, "reward", RewardError)


def test_a_file_is_found_by_its_path_with_what_lies_beside_it(here):
    (here / "rewards" / "math.py").write_text(
        "from sibling_of_mine import TWO\nSEEN = []\n"
        "class Judge:\n    @staticmethod\n    def double(x):\n        return TWO * x\n"
        "def see(x):\n    SEEN.append(x)\n    return SEEN\n"
        "def read():\n    from pathlib import Path\n"
        "    return Path(__file__).with_name('words.txt').read_text()\n"
    )
    (here / "rewards" / "sibling_of_mine.py").write_text("TWO = 2\n")
    (here / "rewards" / "words.txt").write_text("ja nein")
    assert find("rewards/math.py:Judge.double")(4) == 8
    assert find("rewards/math.py:read")() == "ja nein"
    find("rewards/math.py:see")(1)
    assert find(f"{here}/rewards/../rewards/math.py:see")(2) == [1, 2]  # loaded once
    import math

    assert math.sqrt(4) == 2  # the module of that name is left alone


def test_a_file_that_has_changed_is_loaded_anew(here):
    file = here / "rewards" / "mine.py"
    file.write_text("def f():\n    return 1\n")
    assert find("rewards/mine.py:f")() == 1
    file.write_text("def f():\n    return 22\n")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert find("rewards/mine.py:f")() == 22


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("rewards/none.py:f", r"there is no file .*/rewards/none.py; give its path from"),
        ("rewards/bad.py:f", r"importing rewards/bad.py raised SyntaxError.*bad.py:1; repair"),
        ("rewards/good.py:corect", r"'corect' is not defined there; did you mean 'correct'"),
        ("rewards/good.py", r"no built-in reward|must look like .*'file.py:function'"),
        ("rewards/torn.pkl:f", r"raised UnpicklingError.*the packages that it was packed with"),
    ],
)
def test_a_file_that_cannot_give_the_function_is_refused_in_words(here, use, message):
    (here / "rewards" / "bad.py").write_text("def f(:\n")
    (here / "rewards" / "good.py").write_text("def correct():\n    return 1\n")
    (here / "rewards" / "torn.pkl").write_bytes(b"\x80\x05torn")
    with pytest.raises(RewardError, match=message):
        find(use)
