"""Shared set-up: no hub access, few threads, one small model; commands as a user types them."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
