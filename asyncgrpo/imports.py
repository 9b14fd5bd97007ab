"""Finds a user's function by name, and says what is wrong when it is not there.

| name                      | where                                                            |
|---------------------------|------------------------------------------------------------------|
| package.module:function   | a module on sys.path, or in the present folder                   |
| path/to/file.py:function  | that file; it may import what lies beside it                     |
| path/to/file.pkl:function | functions that the Python trainer packed (packing.py)            |
"""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from asyncgrpo.errors import BadInput
from asyncgrpo.packing import PACKED, unpack

PATH = "ASYNCGRPO_PATH"  # the launcher's sys.path: its processes import what it can import


def find_function(use: str, what: str, error: type[BadInput]) -> Callable[..., Any]:
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
            has = nearest(part, names) or f"it has: {', '.join(names[:10]) or 'nothing'}"
            raise error(f"{what} {use!r}: {part!r} is not defined there; {has.strip()}")
        found = getattr(found, part)
    if not callable(found):
        raise error(
            f"{what} {use!r} is {shown(found)} ({type(found).__name__}), not a function; name a "
            "function of that module"
        )
    return found


def nearest(name: str, names: Iterable[str]) -> str:
    """ "did you mean 'x'? " or nothing."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}? " if near else ""


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
        return unpack(file)
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    module = sys.modules[str(file)] = ModuleType(str(file))
    module.__file__ = str(file)
    SourceFileLoader(str(file), str(file)).exec_module(module)
    return module
