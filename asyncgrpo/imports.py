"""Finds a user's `package.module:function`, and says what is wrong when it is not there."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from asyncgrpo.errors import BadInput


def find_function(use: str, what: str, error: type[BadInput]) -> Callable[..., Any]:
    """The function that `use` names; `what` ("reward", "loss") begins the message of an error."""
    module_name, _, name = use.partition(":")
    if not module_name or not name:
        raise error(f"{what} {use!r} must look like 'package.module:function'")
    found: Any = _import(module_name, f"{what} {use!r}", error)
    for part in name.split("."):
        if not hasattr(found, part):
            raise error(f"{what} {use!r}: {part!r} is not defined there; {_nearest(part, found)}")
        found = getattr(found, part)
    if not callable(found):
        raise error(
            f"{what} {use!r} is {shown(found)} ({type(found).__name__}), not a function; name a "
            "function of that module"
        )
    return found


def last_place(error: BaseException) -> str:
    """file:line where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"


def shown(value: object) -> str:
    """A short repr."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _import(module_name: str, who: str, error: type[BadInput]) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: users keep code beside the config
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        raise error(
            f"{who}: there is no module {missing.name!r}; install it, or start from the "
            f"folder that holds it (now {os.getcwd()})"
        ) from missing
    except Exception as broken:  # a user's module may raise anything
        raise error(
            f"{who}: importing {module_name} raised {type(broken).__name__}: {broken} at "
            f"{last_place(broken)}; repair the module"
        ) from broken


def _nearest(part: str, home: object) -> str:
    names = [name for name in dir(home) if not name.startswith("_")]
    near = difflib.get_close_matches(part, names, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(names[:10]) or 'nothing'}"
