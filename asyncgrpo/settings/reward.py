"""Settings of what scores completions, and of the evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from asyncgrpo.settings.room import TABLE, TABLES, Room

HELD_OUT = "held-out"  # the evaluation that nobody gave a name
Scope = Literal["sample", "group"]


class RewardFunction(Room):
    use: str = Field(
        ..., description="built-in name, 'package.module:function' or 'file.py:function'"
    )
    weight: float = Field(1.0, description="its score counts so many times")
    name: str = Field("", description="name in metrics; default: the last part of `use`")
    scope: Scope | None = Field(
        None,
        description="group: called once with lists; sample: once per completion with plain values; "
        "default: sample when it has a parameter `completion` or `response`",
    )
    options: dict[str, Any] = Field({}, description="keyword arguments, such as extract='strict'")

    @property
    def label(self) -> str:
        return self.name or self.use.split(":")[-1].split(".")[-1]


def as_functions(route: Any) -> Any:
    """A route as a list of functions: it may be a name, {name: weight}, a table, or a list."""
    if isinstance(route, str):
        return [{"use": route}]
    if isinstance(route, Mapping):
        is_table = not route or "use" in route
        return [route] if is_table else [{"use": name, "weight": w} for name, w in route.items()]
    if isinstance(route, list | tuple):
        return [function for part in route for function in as_functions(part)]
    return [route]


Route = Annotated[tuple[RewardFunction, ...], BeforeValidator(as_functions), Field(min_length=1)]


class JudgeSettings(Room):
    """What completions are scored by, and which of them are correct."""

    functions: Annotated[tuple[RewardFunction, ...], BeforeValidator(as_functions)] = Field(
        (RewardFunction(use="task"), RewardFunction(use="length_penalty")),
        description="score every record; default: task and length_penalty, or none with routes",
    )
    routes: dict[str, Route] = Field(
        {},
        description="data_source -> judge: a name, {name: weight}, a table as in functions, or a "
        "list; 'default' is for all other sources",
    )
    correct_above: float = Field(
        0.0,
        description="a completion is correct when its first judge (of its route, else of "
        "functions) scores above this",
    )

    @model_validator(mode="before")
    @classmethod
    def _routes_replace_the_default_functions(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("routes") and "functions" not in raw:
            return {**raw, "functions": ()}
        return raw

    @model_validator(mode="after")
    def _distinct_labels(self) -> JudgeSettings:
        labels = [function.label for function in self.functions]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f"functions: two are called {label!r}; give one of them another `name`"
                )
        return self


class RewardSettings(JudgeSettings):
    workers: int = Field(1, ge=1, description="scoring processes beside each actor")
    timeout_seconds: float = Field(
        30.0,
        gt=0,
        description="per group; then the worker is replaced. Its start and imports have 60 s more",
    )
    on_error: Literal["drop_group", "zero", "value"] = Field(
        "drop_group",
        description="when a function raises, returns junk, hangs or dies: drop the group, or let "
        "the call score zero or error_value",
    )
    error_value: float | None = Field(None, description="with on_error = 'value'")
    max_error_rate: float = Field(
        0.25, ge=0, le=1, description="the run stops above this share of the last error_window"
    )
    error_window: int = Field(32, ge=1, description="groups that an actor scored last")

    @property
    def error_score(self) -> float | None:
        """What a failed call scores; None: its group is dropped."""
        return {"drop_group": None, "zero": 0.0, "value": self.error_value}[self.on_error]

    @model_validator(mode="after")
    def _error_value_belongs_to_value(self) -> RewardSettings:
        if (self.on_error == "value") != (self.error_value is not None):
            raise ValueError(
                f"on_error={self.on_error!r} with error_value={self.error_value}: set both "
                "on_error = 'value' and error_value, or neither"
            )
        return self


class EvalSampling(Room):
    temperature: float = Field(0.0, ge=0, le=10, description="0 = greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="1 = off")
    top_k: int = Field(0, ge=0, description="0 = off")
    max_completion_tokens: int | None = Field(None, ge=1, description="default: sampling's")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


class EvalSettings(Room):
    """One evaluation: which held-out prompts, how often, drawn and scored how."""

    name: str = Field(HELD_OUT, pattern=r"^[\w.-]+$", description="in evals.jsonl and metrics")
    data: str | None = Field(None, description="held-out prompts; default: data.eval")
    every: int = Field(10, ge=0, description="steps between evaluations; 0 = only before and after")
    num_prompts: int = Field(
        318, ge=1, description="held-out prompts, at most; of more records a sample by run.seed"
    )
    num_samples: int = Field(1, ge=1, description="completions per prompt")
    k: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_as_list)] = Field(
        (), description="a number or a list: pass@k, the chance that one of k samples is correct"
    )
    sampling: EvalSampling = EvalSampling()
    reward: JudgeSettings | None = Field(
        None, description="functions, routes and correct_above in place of those of [reward]"
    )
    timeout_seconds: float = Field(300.0, gt=0, description="of one evaluation")

    @model_validator(mode="after")
    def _samples_suffice(self) -> EvalSettings:
        if self.num_samples > 1 and not self.sampling.temperature:
            raise ValueError(
                f"num_samples={self.num_samples} with sampling.temperature=0: greedy completions "
                "of one prompt are all the same; set sampling.temperature above 0, or num_samples=1"
            )
        if max(self.k, default=1) > self.num_samples:
            raise ValueError(
                f"k={max(self.k)} must be <= num_samples={self.num_samples}: pass@k is estimated "
                f"from at least k samples; set num_samples >= {max(self.k)}"
            )
        return self


def _kind_of_eval(value: object) -> str:
    return TABLE if isinstance(value, Mapping | EvalSettings) else TABLES


if TYPE_CHECKING:
    EvalBlocks = tuple[EvalSettings, ...]
else:  # a single [eval] table is one block
    EvalBlocks = Annotated[
        Annotated[EvalSettings, Tag(TABLE)] | Annotated[tuple[EvalSettings, ...], Tag(TABLES)],
        Discriminator(_kind_of_eval),
        AfterValidator(lambda eval: eval if isinstance(eval, tuple) else (eval,)),
    ]
