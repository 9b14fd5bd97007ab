"""Settings of the training data: where records come from and what is put around them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from asyncgrpo.settings.room import TABLES, TEXT, Room


class TaskSettings(Room):
    """Generated verifiable tasks (data.train = "tasks"); weights choose how often each is drawn."""

    kinds: dict[str, float] = Field(
        default={
            "add": 2.0,
            "sort": 1.2,
            "palindrome": 1.5,
            "reverse": 0.8,
            "expression": 1.0,
            "check": 2.0,
        },
        description="kind -> weight; kinds are listed in asyncgrpo/data/tasks.py",
    )
    max_operand: int = Field(20, ge=1, description="largest operand of add and sub")
    sequence_min: int = Field(3, ge=1, description="fewest items of sort and check")
    sequence_max: int = Field(6, ge=1, description="most items of sort and check")
    letters: int = Field(12, ge=2, le=26, description="alphabet size of palindrome and reverse")
    modulus: int = Field(4, ge=2, le=10, description="check: sum modulo this")
    long_tail: float = Field(
        0.0,
        ge=0,
        le=5,
        description="0 = uniform sizes; else sigma of lognormal item counts (median 6)",
    )


class FewShot(Room):
    """One worked exchange that stands before the question."""

    user: str = Field(..., min_length=1, description="its question")
    assistant: str = Field(..., min_length=1, description="the answer to follow")


class TemplateSettings(Room):
    """What is put around a record's question; the model's own chat template follows."""

    system: str = Field("", description="system prompt; takes the place of the record's own")
    few_shot: tuple[FewShot, ...] = Field((), description="exchanges before the question")
    user_field: str = Field("", description="column with the question; default: found by its name")
    answer_field: str = Field("", description="column with the truth; default: found by its name")
    suffix: str = Field("", description="instruction after the question; never added twice")


class SourceSettings(Room):
    """One of several training sets."""

    path: str = Field(..., min_length=1, description="file, glob, folder or hub name")
    name: str = Field("", description="part of the prompt ids; default: the file's name")
    weight: float | None = Field(None, gt=0, description="share in the mix; default: its size")
    sample_ratio: float = Field(
        1.0, gt=0, le=1000, description="0.1: a tenth of its prompts; 2: each twice"
    )
    template: TemplateSettings | None = Field(None, description="default: data.template")


def _kind_of_train(value: object) -> str:
    return TEXT if isinstance(value, str) else TABLES


Train = Annotated[
    Annotated[str, Field(min_length=1), Tag(TEXT)]
    | Annotated[tuple[SourceSettings, ...], Tag(TABLES)],
    Discriminator(_kind_of_train),
]


class DataSettings(Room):
    train: Train = Field(
        "tasks", description="'tasks' (generated), a file, glob, folder or hub name, or tables"
    )
    eval: str | None = Field(
        "tasks", description="held-out prompts: 'tasks', a file, glob, folder or hub name, or none"
    )
    tasks: TaskSettings = TaskSettings()
    template: TemplateSettings = TemplateSettings()
    chat_template: bool = Field(True, description="false: plain text, without the model's template")
    shuffle: bool = Field(True, description="shuffle files anew each epoch, by run.seed")
    epochs: int | None = Field(None, ge=1, description="stop after so many epochs; none = endless")
    max_prompt_tokens: int = Field(256, ge=1, description="what longer prompts are measured by")
    overlong_prompt: Literal["drop", "truncate_left", "error"] = Field(
        "drop", description="drop and count it, keep its last max_prompt_tokens tokens, or stop"
    )

    def template_of(self, path: str) -> TemplateSettings:
        """The template of the table in train that has this path, else the one for all."""
        tables = () if isinstance(self.train, str) else self.train
        own = [table.template for table in tables if table.path == path and table.template]
        return own[0] if own else self.template

    @model_validator(mode="after")
    def _weights_for_all_or_none(self) -> DataSettings:
        weights = [] if isinstance(self.train, str) else [source.weight for source in self.train]
        if not isinstance(self.train, str) and not weights:
            raise ValueError("train=[] holds no table; give at least one with a path")
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError(f"train: the weights are {weights}; give one to all tables, or none")
        return self
