"""Which judges a record has, from its data_source: a pure function of settings and record."""

from __future__ import annotations

from collections.abc import Mapping

from asyncgrpo.errors import RewardError
from asyncgrpo.rewards.builtin import BUILTINS
from asyncgrpo.rewards.finding import nearest
from asyncgrpo.settings.reward import RewardFunction, RewardSettings
from asyncgrpo.types import Prompt

DEFAULT = "default"


def functions_for(settings: RewardSettings, prompt: Prompt) -> tuple[RewardFunction, ...]:
    """The judges of the record's data_source, then reward.functions; the first decides "correct".

    A data_source column such as {"a": 0.7, "b": 0.3} names routes or built-in judges with weights.
    It can name no import path: data files must not choose what code runs. RewardError when
    reward.routes are set and none of them fits.
    """
    named = prompt.columns.get("data_source")
    if isinstance(named, Mapping):
        judges = [f for name in named for f in _named(settings, name, float(named[name]))]
    elif settings.routes:
        judges = list(_route(settings, prompt.data_source))
    else:
        judges = []
    functions = (*judges, *settings.functions)
    if not functions:
        raise RewardError(
            f"data_source {prompt.data_source!r} has no reward: reward.functions and reward.routes "
            "are empty; set one of them"
        )
    labels = [function.label for function in functions]
    for label in labels:
        if labels.count(label) > 1:
            raise RewardError(
                f"data_source {prompt.data_source!r} has two rewards called {label!r}; give one of "
                "them another `name` in reward.functions or reward.routes"
            )
    return functions


def _route(settings: RewardSettings, source: str) -> tuple[RewardFunction, ...]:
    found = settings.routes.get(source) or settings.routes.get(DEFAULT)
    if found is None:
        raise RewardError(
            f"data_source {source!r} has no judge; {nearest(source, settings.routes)}reward.routes "
            f"has: {', '.join(settings.routes)}; add it there, or add a route {DEFAULT!r}"
        )
    return found


def _named(settings: RewardSettings, name: str, weight: float) -> list[RewardFunction]:
    """One judge that a record names, its weight applied; it is called as the record calls it."""
    if name not in settings.routes and name not in BUILTINS:
        known = [*settings.routes, *BUILTINS]
        raise RewardError(
            f"a record's data_source names the judge {name!r}, which is no route and not built in; "
            f"{nearest(name, known)}add it to reward.routes (there are: {', '.join(known)})"
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
