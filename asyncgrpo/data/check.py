"""Finds in a data set what would hurt a run: all of it, not only the first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from asyncgrpo.data.files import Located, Row
from asyncgrpo.data.records import AS_IT_IS, answer_of, messages_of, prompts_from_rows, source_of
from asyncgrpo.errors import DataError, RewardError
from asyncgrpo.settings.data import DataSettings, TemplateSettings
from asyncgrpo.types import Prompt

Finding = tuple[str, str, str]  # where, what kind, details
SAMPLED = 200  # prompts of a set that are measured, unless none of them fits
TELLING_SHARE = 0.01  # of too long prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Checker:
    """What records are held to.

    known_sources None: any data_source will do. judges: raises RewardError for a prompt that no
    reward of the settings can score.
    """

    template: TemplateSettings = AS_IT_IS
    known_sources: Collection[str] | None = None
    judges: Callable[[Prompt], object] = lambda prompt: None
    count_tokens: Callable[[Prompt], int] | None = None
    max_prompt_tokens: int = 0

    def findings(self, rows: Iterable[Located], name: str) -> Iterator[Finding]:
        """Everything wrong with the rows, in their order; `name` is the default data_source."""
        seen: dict[str, str] = {}  # question -> where it stood first
        for where, row in rows:
            errors = [("bad JSON", row)] if isinstance(row, DataError) else self._errors(row, where)
            for kind, error in errors:  # its text begins with the place
                yield where, kind, str(error).removeprefix(where).lstrip(": ")
            if not errors:
                (prompt,) = prompts_from_rows([(where, row)], name, self.template)
                first = seen.setdefault(repr(prompt.messages), where)
                if first != where:
                    yield where, "duplicate", f"the same prompt as {first}"
                yield from self._unfit(prompt, where)

    def _errors(self, row: Row, where: str) -> list[tuple[str, DataError]]:
        readers: dict[str, Callable[[], object]] = {
            "prompt": lambda: messages_of(row, where, self.template.user_field),
            "answer": lambda: answer_of(row, where, self.template.answer_field),
            "data_source": lambda: source_of(row, where, "any"),
        }
        errors = []
        for kind, read in readers.items():
            try:
                read()
            except DataError as error:
                errors.append((kind, error))
        return errors

    def _unfit(self, prompt: Prompt, where: str) -> Iterator[Finding]:
        source, known = prompt.data_source, self.known_sources
        if known is not None and source not in known:
            yield where, "data_source", f"{source!r} is unknown; known are: {', '.join(known)}"
        try:
            self.judges(prompt)
        except RewardError as error:
            yield where, "data_source", str(error)
        num_tokens = self.count_tokens(prompt) if self.count_tokens else 0
        if num_tokens > self.max_prompt_tokens:
            limit = f"data.max_prompt_tokens is {self.max_prompt_tokens}"
            yield where, "too long", f"{num_tokens} tokens; {limit}"


def length_warning(
    prompts: Sequence[Prompt], count_tokens: Callable[[Prompt], int], data: DataSettings, name: str
) -> str | None:
    """What is to be said of prompts over data.max_prompt_tokens in a set, by a sample of it.

    DataError when not one prompt of the set fits.
    """
    limit = data.max_prompt_tokens
    if data.overlong_prompt == "truncate_left":
        return None
    lengths = [count_tokens(prompt) for prompt in prompts[:: -(-len(prompts) // SAMPLED) or 1]]
    if lengths and min(lengths) > limit:
        lengths = [count_tokens(prompt) for prompt in prompts]
        if min(lengths) > limit:
            shortest, median = min(lengths), round(statistics.median(lengths))
            raise DataError(
                f"data.max_prompt_tokens={limit}: all {len(lengths)} prompts of {name} are longer; "
                f"the shortest has {shortest} tokens, the median is {median}; set "
                f"data.max_prompt_tokens to {max(lengths)} to keep all, or shorten the prompts"
            )
    share = sum(length > limit for length in lengths) / max(len(lengths), 1)
    does = {"drop": "are dropped", "error": "stop the run"}[data.overlong_prompt]
    return (
        f"{name}: {share:.0%} of the prompts are longer than data.max_prompt_tokens={limit} and "
        f"{does} (the longest measured has {max(lengths)} tokens); raise it to keep them"
        if share > TELLING_SHARE
        else None
    )
