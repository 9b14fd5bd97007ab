"""Imports go down the floors only, and heavy packages stay out of the light rooms."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "asyncgrpo"
FLOORS = {
    5: (
        *("cli", "chat", "trainer", "serial", "evaluate_model", "replay", "launch"),
        *("data.commands", "rewards.commands", "observe.commands", "buffer.commands"),
    ),
    4: (
        "actor.loop",
        "actor.process",
        "actor.judge",
        "buffer.server",
        "buffer.audit",
        "learner.loop",
        "learner.process",
        "learner.commands",
        "learner.update",
        "learner.prepare",
        "observe.recorder",
        "observe.progress",
        "weights.sender",
        "weights.receiver",
    ),
    3: (
        "wire.sockets",
        "wire.keys",
        "buffer.ledger",
        "actor.vllm_engine",
        "actor.vllm_worker",
        "actor.toy_engine",
        "learner.model",
        "learner.attention",
        "learner.lora",
        "learner.parallel",
        "learner.torchrun",
        "weights.flat",
        "weights.disk",
        "weights.local",
        "weights.inbox",
        "weights.outbox",
        "weights.collective",
        "observe.exporter",
        "data.tiny",
        "data.warmstart",
    ),
    2: (
        "data",
        "rewards",
        "actor.concurrency",
        "wire.address",
        "wire.codec",
        "wire.schema",
        "buffer",
        "learner",
        "weights",
        "evaluate",
        "reference",
        "rundir",
        "observe",
        "launch.memory",
        "launch.memory_report",
    ),
    1: ("config", "settings", "aliases", "algorithms", "protocols", "observe.metrics"),
    0: ("errors", "types", "hints", "imports", "rows", "settings.room", "staleness"),
}
STRANGERS = ("actor", "buffer", "learner")
HEAVY = {
    "torch": (
        *("learner", "weights", "data.tiny"),
        *("actor.toy_engine", "actor.vllm_engine", "actor.vllm_worker"),
    ),
    "vllm": ("actor.vllm_engine", "actor.vllm_worker"),
    "transformers": ("learner", "data.tiny"),
    "zmq": ("wire.sockets", "wire.keys"),
    "sqlite3": ("buffer.ledger",),
    "peft": ("learner.lora",),
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def floor(module: str) -> int:
    """The floor of the longest matching name."""
    matches = [
        (len(name), number)
        for number, names in FLOORS.items()
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    return max(matches)[1]


@cache
def imports(path: Path, *, at_import: bool) -> set[str]:
    """Modules that a file imports; at_import: only those that importing it really loads."""
    tree = ast.parse(path.read_text())
    found, pending = set(), list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


def own(names: set[str]) -> set[str]:
    stripped = {name.removeprefix("asyncgrpo.") for name in names if name.startswith("asyncgrpo.")}
    return {name for name in stripped if name in MODULES}


def test_imports_go_down_only():
    for module, path in MODULES.items():
        for other in own(imports(path, at_import=True)):
            if other.split(".")[0] == module.split(".")[0] or not floor(module):
                continue  # within one room
            assert floor(other) <= floor(module), f"{module} imports {other}"


def test_actor_buffer_and_learner_never_import_each_other():
    for module, path in MODULES.items():
        others = {other.split(".")[0] for other in own(imports(path, at_import=False))}
        room = module.split(".")[0]
        if room in STRANGERS:
            assert not others & (set(STRANGERS) - {room}), f"{module} imports {others}"


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_stay_in_their_rooms(package):
    for module, path in MODULES.items():
        if module == "data.warmstart" or module.startswith(HEAVY[package]):
            continue
        loaded = {name.split(".")[0] for name in imports(path, at_import=True)}
        assert package not in loaded, f"{module} loads {package}"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["cli", "buffer.server", "launch.session", "wire.sockets"])
def test_light_processes_never_load_torch_nor_readers_of_data(module):
    heavy = {"torch", "transformers", "vllm", "datasets", "pyarrow", "pandas"}
    assert not heavy & loaded_by(f"import asyncgrpo.{module}")


def test_help_answers_in_half_a_second(tmp_path):
    """As from its second call on, when its code is compiled; cores that are shared take longer."""
    command = [sys.executable, "-m", "asyncgrpo.cli", "--help"]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds = []
    for _ in range(5):
        before = os.times()  # of the cores: other processes may hold them
        subprocess.run(command, env=environment, capture_output=True, check=True)
        after = os.times()
        used = after.children_user - before.children_user
        seconds.append(used + after.children_system - before.children_system)
    assert min(seconds) < 1.0
