"""Finds reward functions by name or import path, and checks their options."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from asyncgrpo.errors import RewardError
from asyncgrpo.imports import find_function
from asyncgrpo.rewards.builtin import BUILTINS
from asyncgrpo.rewards.function import BoundFunction, Parameters
from asyncgrpo.settings.reward import RewardFunction, Scope


def find(function: RewardFunction) -> BoundFunction:
    """The function that a setting names; RewardError says what is missing and what to do."""
    call = _find(function.use)
    scope, options = function.scope, function.options
    return bind(function.label, call, function.weight, scope=scope, options=options)


def bind(
    label: str,
    call: Callable[..., Any],
    weight: float = 1.0,
    *,
    scope: Scope | None = None,
    options: Mapping[str, Any] | None = None,
) -> BoundFunction:
    """Makes a reward function of any callable whose arguments can be passed by name.

    scope None: "sample" when it has a parameter `completion` or `response`, else "group".
    """
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"reward function {label!r}: its arguments cannot be read ({error}); wrap it in a "
            "def f(prompts, completions, **columns)"
        ) from None
    unnamed = [p for p in parameters.values() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    if unnamed:
        raise RewardError(
            f"reward function {label!r}: parameter {unnamed[0].name!r} is positional-only, but "
            "arguments are passed by name; remove the '/' from its definition"
        )
    chosen = _options(label, call, parameters, options or {})
    is_sample = "completion" in parameters or "response" in parameters
    return BoundFunction(
        label=label,
        weight=weight,
        call=call,
        parameters={name: p for name, p in parameters.items() if name not in chosen},
        options=chosen,
        scope=scope or ("sample" if is_sample else "group"),
    )


def nearest(name: str, names: Iterable[str]) -> str:
    """ "did you mean 'x'? " or nothing."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}? " if near else ""


def _options(
    label: str, call: Callable[..., Any], parameters: Parameters, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Checked options. Of a built-in judge all of them, so that no column can take their place."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    names = [n for n, p in parameters.items() if p.kind is keyword or p.default is not p.empty]
    for name in given:
        if name not in names:
            raise RewardError(
                f"reward function {label!r} has no option {name!r}; {nearest(name, names)}"
                f"options are parameters with a default or after a *: {', '.join(names) or 'none'}"
            )
    if call not in BUILTINS.values():
        return dict(given)
    hints = get_type_hints(call, include_extras=True)
    fields: dict[str, Any] = {
        n: (
            hints[n],
            ... if parameters[n].default is parameters[n].empty else parameters[n].default,
        )
        for n in names
    }
    try:
        model = create_model("Options", __config__=ConfigDict(extra="forbid"), **fields)(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise RewardError(
            f"reward function {label!r}: options.{first['loc'][0]}"
            + ("" if first["type"] == "missing" else f"={first['input']!r}")
            + f" is not allowed: {first['msg']}"
        ) from None
    return {name: getattr(model, name) for name in names}


def _find(use: str) -> Callable[..., Any]:
    if ":" in use:
        return find_function(use, "reward", RewardError)
    if use not in BUILTINS:
        raise RewardError(
            f"there is no built-in reward {use!r}; {nearest(use, BUILTINS)}built in are: "
            f"{', '.join(BUILTINS)}; write your own as 'package.module:function' or "
            "'file.py:function'"
        )
    return BUILTINS[use]
