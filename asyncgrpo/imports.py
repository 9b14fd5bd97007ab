"""Finds a user's function by name, or carries it to other processes; says what is wrong with it.

| name                      | where                                                            |
|---------------------------|------------------------------------------------------------------|
| package.module:function   | a module on sys.path, or in the present folder                   |
| path/to/file.py:function  | that file; it may import what lies beside it                     |
| path/to/file.pkl:function | functions without an importable name, of scripts and notebooks   |

A packed file is code, as a .py file is: run directories of strangers are not to be run.
"""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from asyncgrpo.errors import BadInput, RewardError
from asyncgrpo.hints import did_you_mean

Function = Callable[..., Any]
PACKED = ".pkl"
PATH = "ASYNCGRPO_PATH"  # the launcher's sys.path: its processes import what it can import


def find_function(use: str, what: str, error: type[BadInput]) -> Function:
    """The function that `use` names; `what` ("reward", "loss") begins the message of an error."""
    place, _, name = use.rpartition(":")
    if not place or not name:
        raise error(
            f"{what} {use!r} must look like 'package.module:function' or 'file.py:function'"
        )
    found: Any = _import(place, f"{what} {use!r}", error)
    for part in name.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(found) if not name.startswith("_")]
            has = did_you_mean(part, names) or f"it has: {', '.join(names[:10]) or 'nothing'}"
            raise error(f"{what} {use!r}: {part!r} is not defined there; {has.strip()}")
        found = getattr(found, part)
    if not callable(found):
        raise error(
            f"{what} {use!r} is {shown(found)} ({type(found).__name__}), not a function; name a "
            "function of that module"
        )
    return found


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


def last_place(error: BaseException) -> str:
    """file:line where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"


def described(error: BaseException) -> str:
    """An error's type and text."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # a user's error may be unable to say anything
        return f"{type(error).__name__} (its text cannot be shown)"


def is_interrupt(error: BaseException) -> bool:
    """It is Ctrl-C, which reaches the main thread alone, and no fault of the user's code."""
    in_main = threading.current_thread() is threading.main_thread()
    return isinstance(error, KeyboardInterrupt) and in_main


def shown(value: object) -> str:
    """A short repr; the type's name for what has none."""
    try:
        text = repr(value)
    except Exception:  # a user's object, or a number with too many digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else text[:57] + "..."


def _import(place: str, who: str, error: type[BadInput]) -> Any:
    inherited = os.environ.get(PATH, "").split(os.pathsep)
    # The present folder as `python -m` does: users keep code beside the config.
    sys.path[:0] = [p for p in (os.getcwd(), *inherited) if p and p not in sys.path]
    file = Path(place).expanduser().resolve() if place.endswith((".py", PACKED)) else None
    if file is not None and not file.is_file():
        raise error(f"{who}: there is no file {file}; give its path from {os.getcwd()}")
    try:
        return _load(file, file.stat().st_mtime_ns) if file else importlib.import_module(place)
    except ModuleNotFoundError as missing:
        raise error(
            f"{who}: there is no module {missing.name!r}; install it, or start from the "
            f"folder that holds it (now {os.getcwd()})"
        ) from missing
    except BaseException as broken:  # a user's module may raise anything, also SystemExit
        if is_interrupt(broken):
            raise
        remedy = "repair the module"
        if place.endswith(PACKED):
            remedy = "it needs the Python and the packages that it was packed with"
        raise error(
            f"{who}: importing {place} raised {described(broken)} at {last_place(broken)}; {remedy}"
        ) from broken


@functools.cache
def _load(file: Path, changed: int) -> Any:
    """Loaded once, and again when the file has changed: a notebook's process lives long."""
    if file.suffix == PACKED:
        return SimpleNamespace(**pickle.loads(file.read_bytes()))
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    module = sys.modules[str(file)] = ModuleType(str(file))
    module.__file__ = str(file)
    SourceFileLoader(str(file), str(file)).exec_module(module)
    return module
