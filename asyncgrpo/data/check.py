"""Finds in a data set what would hurt a run: all of it, not only the first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

from asyncgrpo.config import Config
from asyncgrpo.data.files import Located, source_name
from asyncgrpo.data.records import answer_of, prompts_from_rows
from asyncgrpo.errors import DataError, RewardError
from asyncgrpo.rewards.finding import functions_for
from asyncgrpo.settings.data import DataSettings
from asyncgrpo.types import Prompt

Finding = tuple[str, str]  # where, what
SAMPLED = 200  # prompts of a set that are measured, unless none of them fits
TELLING_SHARE = 0.01  # of too long prompts


def findings(
    rows: Iterable[Located],
    file: str,
    config: Config,
    count_tokens: Callable[[Prompt], int] = lambda prompt: 0,
) -> Iterator[Finding]:
    """What is wrong with the rows of a file, in their order."""
    name, template = source_name(file), config.data.template_of(file)
    limit = config.data.max_prompt_tokens
    seen: dict[str, str] = {}  # question -> where it stood first
    for where, row in rows:
        try:
            (prompt,) = prompts_from_rows([(where, row)], name, template)
            answer_of(dict(prompt.columns), where, template.answer_field)
            first = seen.setdefault(repr(prompt.messages), where)
            if first != where:
                yield where, f"the same prompt as {first}"
            functions_for(config.reward, prompt)
        except (DataError, RewardError) as error:  # the text of most begins with the place
            yield where, str(error).removeprefix(where).lstrip(": ")
            continue
        if (num_tokens := count_tokens(prompt)) > limit:
            yield where, f"too long: {num_tokens} tokens; data.max_prompt_tokens is {limit}"


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
