"""Which prompt stands at which position of the training stream, and which are held out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from asyncgrpo.config import Config
from asyncgrpo.data.records import read_jsonl
from asyncgrpo.data.streams import EpochStream, Stream
from asyncgrpo.data.tasks import TaskSource
from asyncgrpo.errors import ConfigError, DataError
from asyncgrpo.types import Prompt

log = logging.getLogger(__name__)
TASKS = "tasks"


class PromptSource:
    """A training stream and a fixed held-out set. Seekable: asking changes nothing."""

    def __init__(self, train: Stream, held_out: Sequence[Prompt] = ()) -> None:
        self._train, self._held_out = train, tuple(held_out)

    @classmethod
    def from_prompts(
        cls,
        train: Sequence[Prompt],
        held_out: Sequence[Prompt] = (),
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
    ) -> PromptSource:
        """A source over prompts in memory; epochs None repeats them endlessly.

        Raises DataError when train is empty or two prompts of one list share a prompt_id. A
        held-out prompt that is trained on as well is allowed, with a warning in the log.
        """
        _check_ids(train, "training")
        _check_ids(held_out, "held-out")
        if not train:
            raise DataError("there are no training prompts; give at least one")
        _warn_of_overlap(train, held_out)
        return cls(EpochStream(train, seed=seed, shuffle=shuffle, epochs=epochs), held_out)

    def get(self, position: int) -> Prompt | None:
        """The training prompt at a position >= 0; None when the epochs are over."""
        return self._train.get(position)

    def held_out(self, num: int) -> tuple[Prompt, ...]:
        """The first `num` held-out prompts, or all when there are fewer."""
        return self._held_out[:num]


def open_prompts(config: Config) -> PromptSource:
    """The source that `data` describes: generated tasks or JSONL files, for each of both parts.

    Raises DataError for a bad file, ConfigError for bad tasks or data.epochs without a file.
    """
    data, seed = config.data, config.run.seed
    evaluates_tasks = data.eval == TASKS
    tasks = TaskSource(data.tasks, seed, config.eval.num_prompts if evaluates_tasks else 0)
    has_file = data.eval not in (None, "", "none", TASKS)
    held_out = read_jsonl(str(data.eval)) if has_file else tasks.held_out()
    if data.train != TASKS:
        train = read_jsonl(data.train)
        return PromptSource.from_prompts(train, held_out, seed, data.shuffle, data.epochs)
    if data.epochs is not None:
        raise ConfigError(
            f"data.epochs={data.epochs} needs a file in data.train: generated tasks never end; "
            "leave data.epochs out and set run.max_steps"
        )
    return PromptSource(tasks, held_out)


def _check_ids(prompts: Sequence[Prompt], part: str) -> None:
    for prompt_id, count in Counter(prompt.prompt_id for prompt in prompts).most_common(1):
        if count > 1:
            raise DataError(
                f"{count} {part} prompts have the prompt_id {prompt_id!r}; give each its own"
            )


def _warn_of_overlap(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    seen = {_text(prompt) for prompt in train}
    shared = sum(_text(prompt) in seen for prompt in held_out)
    if shared:
        log.warning(
            "%d of %d held-out prompts are training prompts too: their accuracy says nothing "
            "about new prompts; use another file in data.eval",
            shared,
            len(held_out),
        )


def _text(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in prompt.messages)
