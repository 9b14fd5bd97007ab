"""Asynchronous GRPO: vLLM actors, a staleness-bounded buffer, a DDP learner."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
_HOMES = {
    "Config": "asyncgrpo.config",
    "Trainer": "asyncgrpo.trainer",
    "TrainResult": "asyncgrpo.trainer",
    "Prompt": "asyncgrpo.types",
    "Group": "asyncgrpo.types",
    "Completion": "asyncgrpo.types",
}
__all__ = ["Completion", "Config", "Group", "Prompt", "TrainResult", "Trainer"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `import asyncgrpo` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'asyncgrpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
