"""Which functions score a record: by its data_source, by name or import path; their options."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from pydantic import ValidationError, create_model

from asyncgrpo.errors import RewardError
from asyncgrpo.hints import did_you_mean
from asyncgrpo.imports import find_function
from asyncgrpo.rewards.builtin import BUILTINS
from asyncgrpo.rewards.function import BoundFunction, Parameters
from asyncgrpo.settings.reward import RewardFunction, RewardSettings, Scope
from asyncgrpo.types import Prompt

DEFAULT = "default"  # the route of all other sources


def functions_for(settings: RewardSettings, prompt: Prompt) -> tuple[RewardFunction, ...]:
    """The judges of the record's data_source, then reward.functions; the first decides "correct".

    A data_source column such as {"a": 0.7, "b": 0.3} names routes or built-in judges with weights.
    It can name no import path: data files must not choose what code runs. RewardError when
    reward.routes are set and none of them fits.
    """
    functions = settings.functions
    named = prompt.columns.get("data_source")
    if isinstance(named, Mapping):
        judges = (f for name in named for f in _named(settings, name, float(named[name])))
        functions = (*judges, *functions)
    elif settings.routes:
        functions = (*_route(settings, prompt.data_source), *functions)
    if not functions:
        raise RewardError(
            f"data_source {prompt.data_source!r} has no reward: reward.functions and reward.routes "
            "are empty; set one of them"
        )
    ((label, count),) = Counter(function.label for function in functions).most_common(1)
    if count > 1:
        raise RewardError(
            f"data_source {prompt.data_source!r} has two rewards called {label!r}; give one of "
            "them another `name` in reward.functions or reward.routes"
        )
    return functions


def _route(settings: RewardSettings, source: str) -> tuple[RewardFunction, ...]:
    found = settings.routes.get(source) or settings.routes.get(DEFAULT)
    if found is None:
        raise RewardError(
            f"data_source {source!r} has no judge; {did_you_mean(source, settings.routes)}"
            f"reward.routes has: {', '.join(settings.routes)}; add it there, or add a route "
            f"{DEFAULT!r}"
        )
    return found


def _named(settings: RewardSettings, name: str, weight: float) -> list[RewardFunction]:
    """One judge that a record names, its weight applied; it is called as the record calls it."""
    if name not in settings.routes and name not in BUILTINS:
        known = [*settings.routes, *BUILTINS]
        raise RewardError(
            f"a record's data_source names the judge {name!r}, which is no route and not built in; "
            f"{did_you_mean(name, known)}add it to reward.routes (there are: {', '.join(known)})"
        )
    found = settings.routes.get(name) or (RewardFunction(use=name),)
    return [
        judge.model_copy(
            update={
                "weight": judge.weight * weight,
                "name": name if len(found) == 1 else f"{name}/{judge.label}",
            }
        )
        for judge in found
    ]


def find(function: RewardFunction) -> BoundFunction:
    """The function that a setting names; RewardError says what is missing and what to do."""
    use, scope, options = function.use, function.scope, function.options
    if ":" in use:
        call = find_function(use, "reward", RewardError)
    elif use in BUILTINS:
        call = BUILTINS[use]
    else:
        raise RewardError(
            f"there is no built-in reward {use!r}; {did_you_mean(use, BUILTINS)}built in are: "
            f"{', '.join(BUILTINS)}; write your own as 'package.module:function' or "
            "'file.py:function'"
        )
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


def _options(
    label: str, call: Callable[..., Any], parameters: Parameters, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Checked options. Of a built-in judge all of them, so that no column can take their place."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    names = [n for n, p in parameters.items() if p.kind is keyword or p.default is not p.empty]
    for name in given:
        if name not in names:
            raise RewardError(
                f"reward function {label!r} has no option {name!r}; {did_you_mean(name, names)}"
                f"options are parameters with a default or after a *: {', '.join(names) or 'none'}"
            )
    if call not in BUILTINS.values():
        return dict(given)
    hints = get_type_hints(call, include_extras=True)
    defaults = {
        n: ... if (d := parameters[n].default) is inspect.Parameter.empty else d for n in names
    }
    fields: dict[str, Any] = {n: (hints[n], defaults[n]) for n in names}
    try:
        model = create_model("Options", **fields)(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise RewardError(
            f"reward function {label!r}: options.{first['loc'][0]}"
            + ("" if first["type"] == "missing" else f"={first['input']!r}")
            + f" is not allowed: {first['msg']}"
        ) from None
    return {name: getattr(model, name) for name in names}
