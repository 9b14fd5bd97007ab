"""Carries functions that have no importable name to other processes: of scripts and notebooks.

A packed file is code, as a .py file is: run directories of strangers are not to be run.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from asyncgrpo.errors import RewardError

PACKED = ".pkl"
Function = Callable[..., Any]


def importable_name(function: Function) -> str | None:
    """ "module:function" when importing it elsewhere gives the same function, else None."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    found: Any = sys.modules.get(str(module))
    if module == "__main__" or not name or getattr(found, "__spec__", None) is None:
        return None
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is function else None


def own_name(function: Function) -> str:
    """The name of a function, of a partial's function, or of an object's class."""
    named = getattr(function, "func", function)
    return getattr(named, "__name__", type(named).__name__).strip("<>")


def pack(functions: Mapping[str, Function]) -> bytes:
    """The functions with all they refer to: globals, closures, instances, other functions.

    What importable modules define goes by name. RewardError for what cannot be copied.
    """
    import cloudpickle

    for name, function in functions.items():
        try:
            cloudpickle.dumps(function)
        except Exception as error:  # pickling calls code of the user's objects
            raise RewardError(
                f"reward function {name!r} cannot be copied to the reward workers "
                f"({type(error).__name__}: {error}); let it make files, locks and clients itself "
                "when it is called, or put it in a module and pass 'my_module:function'"
            ) from error
    packed: bytes = cloudpickle.dumps(dict(functions))  # at once: they share their globals
    return packed


def unpack(path: Path) -> SimpleNamespace:
    """The functions of a packed file as attributes; raises whatever unpickling raises."""
    return SimpleNamespace(**pickle.loads(path.read_bytes()))
