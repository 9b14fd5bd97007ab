"""Shared set-up: no hub access, few threads, one small model; commands as a user types them."""

from __future__ import annotations

import gc
import io
import os
import sys
from functools import cache
from pathlib import Path

import pytest
import typer.main
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Otherwise each call of a command builds all commands anew.
typer.main.get_command = cache(typer.main.get_command)


def pytest_configure(config: pytest.Config) -> None:
    """The fast suite draws fewer examples; `make test` draws as many as ever.

    All but `pytest -m gpu` is about CPUs, also where there are GPUs.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
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


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's architecture with random weights."""
    from asyncgrpo.data.tiny import build_untrained

    return build_untrained(tmp_path_factory.mktemp("model") / "tiny", True, 5)


@pytest.fixture
def asyncgrpo(monkeypatch, capfd):
    """Runs one command in this process; returns (exit code, stdout, stderr)."""
    from asyncgrpo import cli

    def run(*arguments: object, lines: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["asyncgrpo", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capfd.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run
