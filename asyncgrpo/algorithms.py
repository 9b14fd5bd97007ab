"""The catalogue of algorithms: names, formulas and sources, read from the functions' docstrings.

One function is one algorithm: every public function of `learner/losses.py` is a loss, and so on.
The catalogue reads the source text, so that names can be checked without importing torch.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from asyncgrpo.errors import AlgorithmError, BadInput, ConfigError
from asyncgrpo.hints import did_you_mean
from asyncgrpo.imports import find_function, last_place

MODULES = {
    "advantage": "advantages",
    "loss": "losses",
    "correction": "corrections",
    "aggregation": "aggregation",
    "kl": "kl",
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "grpo": dict(advantage="grpo", aggregation="sequence_mean", clip_low=0.2, clip_high=0.2),
    "dapo": dict(advantage="grpo", aggregation="token_mean", clip_low=0.2, clip_high=0.28),
    "dr_grpo": dict(advantage="dr_grpo", aggregation="dr_grpo", clip_low=0.2, clip_high=0.2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """One entry. `settings` are keys below `algo.`; use and staleness may be empty."""

    kind: str
    name: str
    summary: str
    formula: str
    source: str
    settings: tuple[str, ...]
    use: str
    staleness: str


@cache
def catalogue(kind: str) -> Mapping[str, Algorithm]:
    """All built-in algorithms of a kind (see MODULES), by name, in the order of the file."""
    path = Path(__file__).parent / "learner" / f"{MODULES[kind]}.py"
    functions = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    return {node.name: _entry(kind, node.name, ast.get_docstring(node) or "") for node in functions}


def check_name(kind: str, name: str) -> None:
    """ValueError, with the nearest name, unless it is built in or looks like a user's function."""
    known = catalogue(kind)
    if name in known or ":" in name:
        return
    raise ValueError(
        f"there is no {kind} {name!r}; {did_you_mean(name, known)}built in are: "
        f"{', '.join(known)}; write your own as 'package.module:function'"
    )


@cache
def find(kind: str, name: str) -> Callable[..., Any]:
    """The function of an algorithm; ConfigError when a user's function cannot be found."""
    if ":" in name:
        return find_function(name, f"algo.{kind}", ConfigError)
    module = importlib.import_module(f"asyncgrpo.learner.{MODULES[kind]}")
    return getattr(module, name)


def call(kind: str, name: str, *arguments: Any) -> Any:
    """What the function of an algorithm returns; AlgorithmError when a user's own one raises."""
    try:
        return find(kind, name)(*arguments)
    except Exception as error:  # a user's function may raise anything
        if ":" not in name or isinstance(error, BadInput):
            raise
        raise AlgorithmError(
            f"algo.{kind} {name!r} raised {type(error).__name__}: {error} at {last_place(error)}; "
            "repair it; see asyncgrpo/learner/inputs.py and advantages.py for what it gets"
        ) from error


def _entry(kind: str, name: str, docstring: str) -> Algorithm:
    summary, _, rest = docstring.partition("\n\n")
    formula, *parts = re.split(r"^(Source|Settings|Use|Staleness): ", rest, flags=re.MULTILINE)
    about = dict(zip(parts[::2], (" ".join(text.split()) for text in parts[1::2]), strict=True))
    return Algorithm(
        kind=kind,
        name=name,
        summary=summary,
        formula="\n".join(line.strip() for line in formula.splitlines()).strip(),
        source=about.get("Source", ""),
        settings=tuple(about.get("Settings", "").split()),
        use=about.get("Use", ""),
        staleness=about.get("Staleness", ""),
    )
