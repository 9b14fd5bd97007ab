"""Shared set-up: no hub access, few threads, one small model."""

from __future__ import annotations

import os
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
