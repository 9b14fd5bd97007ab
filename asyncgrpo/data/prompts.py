"""Opens what `data` describes: the training stream and the held-out prompts."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from asyncgrpo.config import TASKS, Config
from asyncgrpo.data.files import source_name
from asyncgrpo.data.records import read_prompts
from asyncgrpo.data.streams import EpochStream, MixedStream, Part, Stream, resample
from asyncgrpo.data.tasks import TaskSource
from asyncgrpo.data.templates import with_template
from asyncgrpo.errors import ConfigError, DataError
from asyncgrpo.settings.data import DataSettings, SourceSettings, TemplateSettings
from asyncgrpo.settings.reward import HELD_OUT
from asyncgrpo.types import Prompt

log = logging.getLogger(__name__)
HeldOut = Mapping[str, Sequence[Prompt]]  # evaluation block -> its prompts
SURVEYED = 10_000  # prompts of an endless stream that stand for all of it


class PromptSource:
    """A training stream and fixed held-out sets. Seekable: asking changes nothing."""

    def __init__(self, train: Stream, held_out: HeldOut) -> None:
        self._train, self._held_out = train, held_out

    @classmethod
    def from_prompts(
        cls,
        train: Sequence[Prompt],
        held_out: Sequence[Prompt] | HeldOut = (),
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
    ) -> PromptSource:
        """A source over prompts in memory; epochs None repeats them endlessly.

        held_out: the prompts of each evaluation block, or those of the default one.

        Raises DataError when train is empty or two prompts of one list share a prompt_id. A
        held-out prompt that is trained on as well is allowed, with a warning in the log.
        """
        by_block = held_out if isinstance(held_out, Mapping) else {HELD_OUT: held_out}
        _check_ids(train, "training")
        for prompts in by_block.values():
            _check_ids(prompts, "held-out")
        if not train:
            raise DataError("there are no training prompts; give at least one")
        _warn_of_overlap(train, by_block)
        return cls(EpochStream(train, seed=seed, shuffle=shuffle, epochs=epochs), by_block)

    def get(self, position: int) -> Prompt | None:
        """The training prompt at a position >= 0; None when the epochs are over."""
        return self._train.get(position)

    def epoch(self, position: int) -> int | None:
        """Which pass over the data a position is in; None for generated tasks."""
        return self._train.epoch(position)

    def held_out(self, num: int, block: str = HELD_OUT) -> tuple[Prompt, ...]:
        """The first `num` held-out prompts of an evaluation block, or all when there are fewer."""
        return tuple(self._held_out.get(block, ())[:num])

    def survey(self, block: str = "") -> Iterable[Prompt]:
        """What a run can meet: the prompts of an evaluation block, or by default the training
        prompts (of an endless stream the first SURVEYED).
        """
        return self._held_out[block] if block else self._train.prompts()


def open_prompts(config: Config) -> PromptSource:
    """The source that `data` describes: generated tasks or records, for each of both parts.

    Raises DataError for bad data, ConfigError for bad tasks, data.epochs without records, or two
    tables of one name.
    """
    data, seed = config.data, config.run.seed
    tasks, held_out = TaskSource(data.tasks, seed, config.num_held_out_tasks), held_out_sets(config)
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


def held_out_sets(config: Config) -> dict[str, tuple[Prompt, ...]]:
    """Evaluation block -> its prompts, at most its num_prompts. DataError as in `open_prompts`.

    Of more records, those of a sample by run.seed and the block's name, in their order. A file
    that is a table of data.train has that table's template.
    """
    data, seed = config.data, config.run.seed
    tasks = TaskSource(data.tasks, seed, config.num_held_out_tasks).held_out()
    sets = {TASKS: tuple(with_template(prompt, data.template) for prompt in tasks)}
    for path in {str(block.data) for block in config.evals} - {TASKS}:
        sets[path] = read_prompts(path, data.template_of(path))
    return {
        block.name: sets[TASKS][: block.num_prompts]
        if block.data == TASKS
        else _sample(sets[str(block.data)], block.num_prompts, f"{seed}:eval {block.name}")
        for block in config.evals
    }


def _sample(prompts: Sequence[Prompt], num: int, seed: str) -> tuple[Prompt, ...]:
    """At most `num` prompts, in their order."""
    places = random.Random(seed).sample(range(len(prompts)), min(num, len(prompts)))
    return tuple(prompts[place] for place in sorted(places))


def _mixed(
    sources: Sequence[SourceSettings], data: DataSettings, seed: int, held_out: HeldOut
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


def _warn_of_overlap(train: Sequence[Prompt], held_out: HeldOut) -> None:
    seen = {_text(prompt) for prompt in train}
    for block, prompts in held_out.items():
        if shared := sum(_text(prompt) in seen for prompt in prompts):
            log.warning(
                "%s: %d of %d held-out prompts are training prompts too: their accuracy says "
                "nothing about new prompts; use another file in data.eval",
                block,
                shared,
                len(prompts),
            )


def _text(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in prompt.messages)
