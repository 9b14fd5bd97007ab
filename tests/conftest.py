"""Shared set-up: no hub access, few threads, commands without a process."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from functools import cache
from subprocess import CompletedProcess

import pytest
import typer.main
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Otherwise each call of a command builds all commands anew.
typer.main.get_command = cache(typer.main.get_command)


def pytest_configure(config: pytest.Config) -> None:
    """The fast suite draws fewer examples; `make test` draws as many as ever."""
    is_fast = "not slow" in config.option.markexpr
    settings.register_profile("asyncgrpo", deadline=None, max_examples=40 if is_fast else 100)
    settings.load_profile("asyncgrpo")


def pytest_sessionstart() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """What the imports left lives to the end: the collector need not look at it after each test."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., CompletedProcess[str]]:
    """Runs `asyncgrpo ARGUMENTS` in this process, which saves seconds of imports; but not `role`
    and `eval`, which end their process at once."""
    from asyncgrpo.cli import main

    def run(*arguments: str) -> CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["asyncgrpo", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return CompletedProcess(arguments, int(str(end.value.code)), *capsys.readouterr())

    return run
