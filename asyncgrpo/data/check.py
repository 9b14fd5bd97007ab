"""Finds in a data set what would hurt a run: all of it, not only the first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

from asyncgrpo.config import Config
from asyncgrpo.data.files import Located, Row, source_name
from asyncgrpo.data.records import answer_of, messages_of, prompts_from_rows, source_of
from asyncgrpo.errors import DataError, RewardError
from asyncgrpo.rewards.finding import functions_for
from asyncgrpo.settings.data import DataSettings, TemplateSettings
from asyncgrpo.types import Prompt

Finding = tuple[str, str, str]  # where, what kind, details
SAMPLED = 200  # prompts of a set that are measured, unless none of them fits
TELLING_SHARE = 0.01  # of too long prompts


def findings(
    rows: Iterable[Located],
    file: str,
    config: Config,
    count_tokens: Callable[[Prompt], int] = lambda prompt: 0,
) -> Iterator[Finding]:
    """Everything wrong with the rows of a file, in their order."""
    name, template = source_name(file), config.data.template_of(file)
    limit = config.data.max_prompt_tokens
    seen: dict[str, str] = {}  # question -> where it stood first
    for where, row in rows:
        errors = (
            [("bad JSON", row)] if isinstance(row, DataError) else _errors(row, where, template)
        )
        for kind, error in errors:  # its text begins with the place
            yield where, kind, str(error).removeprefix(where).lstrip(": ")
        if errors:
            continue
        (prompt,) = prompts_from_rows([(where, row)], name, template)
        first = seen.setdefault(repr(prompt.messages), where)
        if first != where:
            yield where, "duplicate", f"the same prompt as {first}"
        try:
            functions_for(config.reward, prompt)
        except RewardError as error:
            yield where, "data_source", str(error)
        if (num_tokens := count_tokens(prompt)) > limit:
            yield where, "too long", f"{num_tokens} tokens; data.max_prompt_tokens is {limit}"


def _errors(row: Row, where: str, template: TemplateSettings) -> list[tuple[str, DataError]]:
    readers: dict[str, Callable[[], object]] = {
        "prompt": lambda: messages_of(row, where, template.user_field),
        "answer": lambda: answer_of(row, where, template.answer_field),
        "data_source": lambda: source_of(row, where, "any"),
    }
    errors = []
    for kind, read in readers.items():
        try:
            read()
        except DataError as error:
            errors.append((kind, error))
    return errors


def length_warning(
    prompts: Sequence[Prompt], count_tokens: Callable[[Prompt], int], data: DataSettings, name: str
) -> str | None:
    """What is to be said of prompts over data.max_prompt_tokens in a set, by a sample of it.

    DataError when not one prompt of the set fits.
    """
    limit = data.max_prompt_tokens
    if data.overlong_prompt == "truncate_left" or not prompts:
        return None
    lengths = [count_tokens(prompt) for prompt in prompts[:: -(-len(prompts) // SAMPLED)]]
    if min(lengths) > limit:
        lengths = [count_tokens(prompt) for prompt in prompts]
        if min(lengths) > limit:
            shortest, median = min(lengths), round(statistics.median(lengths))
            raise DataError(
                f"data.max_prompt_tokens={limit}: all {len(lengths)} prompts of {name} are longer; "
                f"the shortest has {shortest} tokens, the median is {median}; set "
                f"data.max_prompt_tokens to {max(lengths)} to keep all, or shorten the prompts"
            )
    share = sum(length > limit for length in lengths) / len(lengths)
    if share <= TELLING_SHARE:
        return None
    does = {"drop": "are dropped", "error": "stop the run"}[data.overlong_prompt]
    return (
        f"{name}: {share:.0%} of the prompts are longer than data.max_prompt_tokens={limit} and "
        f"{does} (the longest measured has {max(lengths)} tokens); raise it to keep them"
    )
