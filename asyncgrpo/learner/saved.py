"""Checkpoints as folders: which there are, whether they hold. No torch here."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FOLDER = "checkpoints"  # of a run
MODEL_SIZES = (  # of config.json, by which another model is known
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def saved(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step_*"), key=step_of)


def step_of(path: Path) -> int:
    """The number of updates in a checkpoint."""
    return int(path.name.removeprefix("step_"))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint without damage."""
    for path in reversed(saved(folder)):
        damage = find_damage(path)
        if not damage:
            return path
        log.error("checkpoint %s is damaged and left out: %s", path, damage)
    return None


def find_damage(path: Path) -> str:
    """What differs from the manifest; "" when nothing does."""
    try:
        files = read_manifest(path)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if checksum(path / name) != expected:
            return f"{name} has other contents than were written"
    return ""


def read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint."""
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def checksum(path: Path) -> str:
    """BLAKE2b of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
