"""Opens what `data` describes: the training stream and the held-out prompts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from asyncgrpo.config import Config, DataSettings, SourceSettings, TemplateSettings
from asyncgrpo.data.files import source_name
from asyncgrpo.data.records import read_prompts
from asyncgrpo.data.streams import EpochStream, MixedStream, Part, Stream, resample
from asyncgrpo.data.tasks import TaskSource
from asyncgrpo.data.templates import with_template
from asyncgrpo.errors import ConfigError, DataError
from asyncgrpo.types import Prompt

log = logging.getLogger(__name__)
TASKS = "tasks"
SURVEYED = 10_000  # prompts of an endless stream that stand for all of it


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

    def epoch(self, position: int) -> int | None:
        """Which pass over the data a position is in; None for generated tasks."""
        return self._train.epoch(position)

    def held_out(self, num: int) -> tuple[Prompt, ...]:
        """The first `num` held-out prompts, or all when there are fewer."""
        return self._held_out[:num]

    def survey(self) -> Iterator[Prompt]:
        """What a run can meet: the training prompts (of an endless stream the first SURVEYED),
        then the held-out ones.
        """
        yield from self._train.prompts()
        yield from self._held_out


def open_prompts(config: Config) -> PromptSource:
    """The source that `data` describes: generated tasks or records, for each of both parts.

    Raises DataError for bad data, ConfigError for bad tasks, data.epochs without records, or two
    tables of one name.
    """
    data, seed = config.data, config.run.seed
    tasks = TaskSource(data.tasks, seed, config.eval.num_prompts if data.eval == TASKS else 0)
    held_out = _held_out(data, tasks)
    if isinstance(data.train, tuple):
        return PromptSource(_mixed(data.train, data, seed, held_out), held_out)
    if data.train != TASKS:
        train = read_prompts(data.train, data.template)
        return PromptSource.from_prompts(train, held_out, seed, data.shuffle, data.epochs)
    if data.epochs is not None:
        raise ConfigError(
            f"data.epochs={data.epochs} needs a file in data.train: generated tasks never end; "
            "leave data.epochs out and set run.max_steps"
        )
    return PromptSource(TemplatedStream(tasks, data.template), held_out)


@dataclass(frozen=True, slots=True)
class TemplatedStream:
    """A stream whose prompts are put into a template."""

    stream: TaskSource
    template: TemplateSettings

    def get(self, position: int) -> Prompt | None:
        """The prompt at a position >= 0, in its template; None past the end."""
        prompt = self.stream.get(position)
        return prompt and with_template(prompt, self.template)

    def epoch(self, position: int) -> None:
        """Generated tasks never repeat."""

    def prompts(self) -> Iterator[Prompt]:
        """The first SURVEYED prompts."""
        return (prompt for i in range(SURVEYED) if (prompt := self.get(i)) is not None)


def _held_out(data: DataSettings, tasks: TaskSource) -> tuple[Prompt, ...]:
    if data.eval in (None, "", "none", TASKS):
        return tuple(with_template(prompt, data.template) for prompt in tasks.held_out())
    return read_prompts(str(data.eval), data.template)


def _mixed(
    sources: Sequence[SourceSettings], data: DataSettings, seed: int, held_out: Sequence[Prompt]
) -> MixedStream:
    parts: list[Part] = []
    everything: list[Prompt] = []
    for name, source in _by_name(sources).items():
        prompts = read_prompts(source.path, source.template or data.template, name)
        everything += prompts
        chosen = [prompts[i] for i in resample(len(prompts), source.sample_ratio, seed, name)]
        stream = EpochStream(chosen, seed=f"{seed}:{name}", shuffle=data.shuffle, epochs=None)
        parts.append(Part(stream=stream, size=len(chosen), weight=source.weight))
    _warn_of_overlap(everything, held_out)
    return MixedStream(parts, seed=seed, epochs=data.epochs)


def _by_name(sources: Sequence[SourceSettings]) -> dict[str, SourceSettings]:
    named: dict[str, SourceSettings] = {}
    for source in sources:
        name = source.name or source_name(source.path)
        if name in named:
            raise ConfigError(
                f"data.train: two tables are called {name!r} ({named[name].path} and "
                f"{source.path}); give one of them another name"
            )
        named[name] = source
    return named


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
