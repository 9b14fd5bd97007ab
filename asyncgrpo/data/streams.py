"""Which prompt stands at which position: one list in epochs, or several mixed in exact shares.

In a mix, position k goes to the source that is furthest behind its share of the first k + 1
positions (the largest remainder). So no source is ever a whole position ahead of its share, and
after each full round of the weights (3 : 1 has rounds of 4) all shares are exact. A source that
has given its last prompt leaves, and the others go on among themselves.
"""

from __future__ import annotations

import itertools
import math
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

from asyncgrpo.types import Prompt


class EpochStream:
    """A list of prompts, each exactly once per epoch, in an order made from (seed, epoch).

    epochs None repeats them endlessly.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int | str = 0,
        shuffle: bool = True,
        epochs: int | None = None,
    ) -> None:
        self._prompts, self._seed = tuple(prompts), seed
        self._shuffle, self._epochs = shuffle, epochs
        self._epoch, self._order = -1, list(range(len(self._prompts)))  # the last one asked for

    def get(self, position: int) -> Prompt | None:
        """The prompt at a position >= 0; None when the epochs are over."""
        epoch, place = divmod(position, len(self._prompts))
        if self._epochs is not None and epoch >= self._epochs:
            return None
        if self._shuffle and epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._prompts)))
            random.Random(f"{self._seed}:epoch {epoch}").shuffle(self._order)
        return self._prompts[self._order[place]]

    def epoch(self, position: int) -> int:
        """How often all prompts came before this position."""
        return position // len(self._prompts)

    def prompts(self) -> Sequence[Prompt]:
        """All prompts, in the order they were given."""
        return self._prompts


class MixedStream:
    """Several streams as one. Seekable: the prompt at a position depends on nothing asked before.

    Positions are planned up to the furthest one asked for: less than a microsecond per source each.
    """

    def __init__(
        self,
        streams: Sequence[EpochStream],
        weights: Sequence[float | None],
        *,
        seed: int,
        epochs: int | None,
    ) -> None:
        """weights, None: of its size, so that each epoch of the mix holds every prompt once.

        The streams are endless; `epochs` ends each of them.
        """
        self._streams = streams
        sizes = [len(stream.prompts()) for stream in streams]
        shares = [size if w is None else w for size, w in zip(sizes, weights, strict=True)]
        quotas = [None if epochs is None else size * epochs for size in sizes]
        self._turns = _turns(_whole(shares), quotas, random.Random(f"{seed}:mix"))
        self._sources, self._ordinals = array("L"), array("Q")  # planned so far, by position

    def get(self, position: int) -> Prompt | None:
        """The prompt at a position >= 0; None when every source has given all it has."""
        turn = self._turn(position)
        return None if turn is None else turn[0].get(turn[1])

    def epoch(self, position: int) -> int | None:
        """The pass over the source whose turn it is."""
        turn = self._turn(position)
        return None if turn is None else turn[0].epoch(turn[1])

    def prompts(self) -> Iterable[Prompt]:
        """All prompts of every source."""
        return itertools.chain.from_iterable(stream.prompts() for stream in self._streams)

    def _turn(self, position: int) -> tuple[EpochStream, int] | None:
        """Whose turn it is, and how many it had before; None past the last turn."""
        missing = max(0, position + 1 - len(self._sources))
        for source, ordinal in itertools.islice(self._turns, missing):
            self._sources.append(source)
            self._ordinals.append(ordinal)
        if position >= len(self._sources):
            return None
        return self._streams[self._sources[position]], self._ordinals[position]


def _turns(
    weights: Sequence[int], quotas: Sequence[int | None], chance: random.Random
) -> Iterator[tuple[int, int]]:
    """Sources, each with how many turns it had before; a quota is how many it has in all."""
    live = list(range(len(weights)))
    rank, given = list(live), [0] * len(weights)
    chance.shuffle(rank)  # decides ties
    while live:  # shares are counted anew when a source leaves
        total, since = sum(weights[i] for i in live), [0] * len(weights)
        for now in itertools.count(1):
            source = max(live, key=lambda i: (weights[i] * now - since[i] * total, -rank[i]))
            yield source, given[source]
            given[source] += 1
            since[source] += 1
            if given[source] == quotas[source]:
                live.remove(source)
                break


def resample(count: int, ratio: float, seed: int, name: str) -> list[int]:
    """Which of `count` prompts a sample_ratio keeps, in order: 0.5 half of them, 2 each twice.

    Whole multiples take every prompt so often; the rest is drawn by seed. At least one is kept.
    """
    total = max(1, round(count * ratio))
    copies, rest = divmod(total, count)
    drawn = random.Random(f"{seed}:sample {name}").sample(range(count), rest)
    return sorted([*list(range(count)) * copies, *drawn])


def _whole(weights: Sequence[float]) -> list[int]:
    """The weights as whole numbers in the same proportions: exact, nothing drifts."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    return [int(weight * scale) for weight in exact]
