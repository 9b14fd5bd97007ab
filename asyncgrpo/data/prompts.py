"""Opens what `data` describes: the training stream and the held-out prompts."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence

from asyncgrpo.config import TASKS, Config
from asyncgrpo.data.files import source_name
from asyncgrpo.data.records import read_prompts
from asyncgrpo.data.streams import EpochStream, MixedStream, resample
from asyncgrpo.data.tasks import TaskSource
from asyncgrpo.errors import ConfigError
from asyncgrpo.settings.data import DataSettings, SourceSettings
from asyncgrpo.settings.reward import HELD_OUT
from asyncgrpo.types import Prompt

log = logging.getLogger(__name__)
Stream = EpochStream | MixedStream | TaskSource
HeldOut = Mapping[str, Sequence[Prompt]]  # evaluation block -> its prompts


class PromptSource:
    """A training stream and fixed held-out sets. Seekable: asking changes nothing."""

    def __init__(self, train: Stream, held_out: HeldOut) -> None:
        self._train, self._held_out = train, held_out

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
        prompts (of an endless stream enough to stand for all).
        """
        return self._held_out[block] if block else self._train.prompts()


def open_prompts(config: Config) -> PromptSource:
    """The source that `data` describes: generated tasks or records, for each of both parts.

    Raises DataError for bad data, ConfigError for bad tasks, data.epochs without records, or two
    tables of one name. A held-out prompt that is trained on as well is warned about.
    """
    data, seed = config.data, config.run.seed
    tasks, held_out = _tasks(config), held_out_sets(config)
    if data.train == TASKS:
        if data.epochs is not None:
            raise ConfigError(
                f"data.epochs={data.epochs} needs a file in data.train: generated tasks never "
                "end; leave data.epochs out and set run.max_steps"
            )
        return PromptSource(tasks, held_out)
    train: EpochStream | MixedStream
    if isinstance(data.train, str):
        prompts = read_prompts(data.train, data.template)
        train = EpochStream(prompts, seed=seed, shuffle=data.shuffle, epochs=data.epochs)
    else:
        train = _mixed(data.train, data, seed)
    _warn_of_overlap(train.prompts(), held_out)
    return PromptSource(train, held_out)


def held_out_sets(config: Config) -> dict[str, tuple[Prompt, ...]]:
    """Evaluation block -> its prompts, at most its num_prompts. DataError as in `open_prompts`.

    Of more records, those of a sample by run.seed and the block's name, in their order. A file
    that is a table of data.train has that table's template.
    """
    sets: dict[str, tuple[Prompt, ...]] = {}
    files: dict[str, tuple[Prompt, ...]] = {}  # each is read once
    for block in config.evals:
        path = str(block.data)
        if path == TASKS:
            sets[block.name] = _tasks(config).held_out()[: block.num_prompts]
            continue
        if path not in files:
            files[path] = read_prompts(path, config.data.template_of(path))
        prompts, chance = files[path], random.Random(f"{config.run.seed}:eval {block.name}")
        places = chance.sample(range(len(prompts)), min(block.num_prompts, len(prompts)))
        sets[block.name] = tuple(prompts[place] for place in sorted(places))
    return sets


def _tasks(config: Config) -> TaskSource:
    data = config.data
    return TaskSource(data.tasks, config.run.seed, config.num_held_out_tasks, data.template)


def _mixed(sources: Sequence[SourceSettings], data: DataSettings, seed: int) -> MixedStream:
    streams: dict[str, EpochStream] = {}
    for source in sources:
        name = source.name or source_name(source.path)
        if name in streams:
            raise ConfigError(
                f"data.train: two tables are called {name!r} (one of them is {source.path}); give "
                "one of them another name"
            )
        prompts = read_prompts(source.path, source.template or data.template, name)
        chosen = [prompts[i] for i in resample(len(prompts), source.sample_ratio, seed, name)]
        streams[name] = EpochStream(chosen, seed=f"{seed}:{name}", shuffle=data.shuffle)
    weights = [source.weight for source in sources]
    return MixedStream([*streams.values()], weights, seed=seed, epochs=data.epochs)


def _warn_of_overlap(train: Iterable[Prompt], held_out: HeldOut) -> None:
    seen = {repr(prompt.messages) for prompt in train}
    for block, prompts in held_out.items():
        if shared := sum(repr(prompt.messages) in seen for prompt in prompts):
            log.warning(
                "%s: %d of %d held-out prompts are training prompts too: their accuracy says "
                "nothing about new prompts; use another file in data.eval",
                *(block, shared, len(prompts)),
            )
