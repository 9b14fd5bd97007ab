"""Every documented block works: settings load, Python runs, commands run here or elsewhere in CI.

A page is followed as a reader would: from its first block to its last, in one folder.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from fakes import load_script
from typer.testing import CliRunner

from asyncgrpo.cli import app
from asyncgrpo.config import from_mapping
from asyncgrpo.data.tiny import build_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
SAMPLE = ROOT / "asyncgrpo" / "data" / "gsm8k_sample"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"# ([\w.-]+\.(?:toml|py|jsonl))\b")
INLINE = re.compile(r"(?<![\w/])asyncgrpo (?:[a-z][\w-]*)[^`#\n]*")
# Not run here: what takes long, and which line of CI, or words of which test, run it.
ELSEWHERE = {
    "make demo": "asyncgrpo launch --config configs/tiny.toml --actors 2 --learners 2",
    "make test": "make test",
    "prometheus --config.file=grafana/prometheus.yml": (
        "e2e/test_prometheus.py",
        '"prometheus", f"--config.file=',
    ),
    "asyncgrpo traj diff RUN 0:5 50:60": ("test_samples.py", "def test_diff_shows_answers"),
    "asyncgrpo chat --model RUN/model --prompt Sort: 3 1 2 --expect 1 2 3": (
        "test_chat.py",
        '"--expect"',
    ),
    "asyncgrpo eval --model runs/DIR/model --data tasks": ("e2e/test_eval.py", '"--data", "tasks"'),
    "asyncgrpo eval --model DIR --data test.jsonl -k 8 --config my.toml --out rows.jsonl": (
        "e2e/test_eval.py",
        '"--out"',
    ),
    "asyncgrpo slurm submit --config tiny --actors 2 --learners 2 --nodes 2 --run-dir runs/second "
    "--time 2:00:00": ("slurm/test_cluster.py", '"slurm", "submit"'),
    'asyncgrpo buffer --config tiny --run-dir /shared/run --set launch.host="10.0.0.4"': (
        "e2e/test_by_hand.py",
        'start("buffer", "--run-dir"',
    ),
    "asyncgrpo learner --join /shared/run": ("e2e/test_by_hand.py", 'start("learner", "--join"'),
    "asyncgrpo actor --join /shared/run --index 0": (
        "e2e/test_by_hand.py",
        'start("actor", "--join"',
    ),
}


LONG = [pytest.mark.slow, pytest.mark.engine]


class Block(NamedTuple):
    place: str  # README.md:12
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(f"{page.name}:{line}", found[1], found[2])


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a bash block, comments left out and lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader stands: own data, a model, and what was downloaded."""
    for name in ("train", "test"):
        lines = (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:16]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        rows = [json.loads(line)["extra_info"] for line in lines]
        original = [{"question": row["question"], "answer": row["answer"]} for row in rows]
        (tmp_path / "DOWNLOADED").mkdir(exist_ok=True)
        (tmp_path / "DOWNLOADED" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, original)))
    for model in ("DIR", "models/Qwen2.5-0.5B-Instruct"):
        build_tokenizer().save_pretrained(tmp_path / model)
        (tmp_path / model / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
        (tmp_path / model / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=LONG if page.name == "README.md" else [])  # it trains
        for page in PAGES
    ],
    ids=lambda page: page.name,
)
def test_a_reader_can_follow_the_page(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if found := NAMED.match(block.text):
            (folder / found[1]).write_text(block.text, encoding="utf-8")
        follow(block, folder)


def follow(block: Block, folder: Path) -> None:
    if block.language == "toml":
        from_mapping(tomllib.loads(block.text))
    elif block.language == "python":
        done = subprocess.run(
            [sys.executable, "-c", block.text], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block.place}: {done.stderr}"
    elif block.language == "bash":
        for made in sorted(folder.glob("runs/*/summary.json")):  # by a Python block before
            (folder / "RUN").exists() or (folder / "RUN").symlink_to(made.parent)
        for words in commands(block.text):
            run(words, block.place)
    else:
        assert block.language == "", f"{block.place}: nothing tests {block.language!r} blocks"


def run(words: list[str], place: str) -> None:
    """Runs one documented command; a `> file` at its end is obeyed."""
    if " ".join(words) in ELSEWHERE:
        return
    assert words[0] == "asyncgrpo", f"{place}: who runs {' '.join(words)!r}? see ELSEWHERE"
    arguments, _, target = (" ".join(map(shlex.quote, words[1:]))).partition(" '>' ")
    called = shlex.split(arguments)
    if called[0] == "launch" and "--dry-run" not in called:
        called.append("--dry-run")
    result = CliRunner().invoke(app, called, input="2 + 3\n")  # chat reads lines
    assert result.exit_code == 0, f"{place}: {words}: {result.exception!r}\n{result.output}"
    assert result.stdout or target, f"{place}: {words} says nothing"
    if target:
        Path(target).write_text(result.stdout, encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_fence_is_seen(page: Path) -> None:
    fences = re.findall(r"^\s*(?:```|~~~)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(list(blocks(page)))


def test_commands_that_are_not_run_here_are_run_in_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command, where in ELSEWHERE.items():
        if isinstance(where, tuple):
            test, words = where
            assert words in (Path(__file__).parent / test).read_text(encoding="utf-8")
        else:
            assert where in ci
            assert f"\n{command.removeprefix('make ')}: " in makefile
    assert ELSEWHERE["make demo"] in makefile


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=lambda page: page.name)
def test_every_mentioned_command_and_option_exists(page: Path) -> None:
    text = FENCE.sub(lambda found: found[2] if found[1] in ("", "bash") else "", page.read_text())
    for mention in INLINE.findall(text.replace("\n   ", " ")):
        check_mention(mention.replace("[", " ").replace("]", " ").split()[1:], mention)


def check_mention(words: list[str], mention: str) -> None:
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands") and re.fullmatch(r"[a-z][\w-]*", words[0]):
        assert words[0] in command.commands, f"{mention!r}: no command {words[0]!r}"
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", " ".join(words)):
        assert option in {*known, "--help"}, f"{mention!r}: no option {option}"


def test_the_generated_parts_of_the_pages_are_up_to_date() -> None:
    generate = load_script(ROOT / "docs" / "generate.py")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert generate.renewed(text) == text, f"{page.name} is out of date; run make docs"
