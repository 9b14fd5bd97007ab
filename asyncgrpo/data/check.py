"""Finds in a data set what would hurt a run: all of it, not only the first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from asyncgrpo.config import TemplateSettings
from asyncgrpo.data.files import Located, Row
from asyncgrpo.data.records import (
    AS_IT_IS,
    answer_of,
    messages_of,
    prompts_from_rows,
    source_of,
)
from asyncgrpo.errors import DataError
from asyncgrpo.types import Prompt

CountTokens = Callable[[Prompt], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One finding."""

    where: str
    kind: str  # bad JSON, prompt, answer, data_source, duplicate, too long
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checker:
    """What records are held to. known_sources None: any data_source will do."""

    template: TemplateSettings = AS_IT_IS
    known_sources: Collection[str] | None = None
    count_tokens: CountTokens | None = None
    max_prompt_tokens: int = 0

    def problems(self, rows: Iterable[Located], name: str) -> Iterator[Problem]:
        """Everything wrong with the rows, in their order; `name` is the default data_source."""
        seen: dict[str, str] = {}  # question -> where it stood first
        for where, row in rows:
            if isinstance(row, DataError):
                yield _problem(where, "bad JSON", row)
                continue
            broken = list(self._broken(row, where, name))
            yield from broken
            if not broken:
                (prompt,) = prompts_from_rows([(where, row)], name, self.template)
                yield from self._unfit(prompt, where, seen)

    def _broken(self, row: Row, where: str, name: str) -> Iterator[Problem]:
        readers: dict[str, Callable[[], object]] = {
            "prompt": lambda: messages_of(row, where, self.template.user_field),
            "answer": lambda: answer_of(row, where, self.template.answer_field),
            "data_source": lambda: source_of(row, where, name),
        }
        for kind, read in readers.items():
            try:
                read()
            except DataError as error:
                yield _problem(where, kind, error)

    def _unfit(self, prompt: Prompt, where: str, seen: dict[str, str]) -> Iterator[Problem]:
        source, known = prompt.data_source, self.known_sources
        if known is not None and source not in known:
            detail = f"data_source {source!r} is unknown; known are: {', '.join(known)}"
            yield Problem(where=where, kind="data_source", detail=detail)
        first = seen.setdefault(repr(prompt.messages), where)
        if first != where:
            yield Problem(where=where, kind="duplicate", detail=f"the same prompt as {first}")
        num_tokens = self.count_tokens(prompt) if self.count_tokens else 0
        if num_tokens > self.max_prompt_tokens:
            detail = f"{num_tokens} tokens; data.max_prompt_tokens is {self.max_prompt_tokens}"
            yield Problem(where=where, kind="too long", detail=detail)


def _problem(where: str, kind: str, error: DataError) -> Problem:
    """A finding from an error, whose text begins with the place."""
    return Problem(where=where, kind=kind, detail=str(error).removeprefix(where).lstrip(": "))
