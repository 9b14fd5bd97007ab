"""Which CPU core each actor and each learner rank gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

Cores = tuple[int, ...]


def assign_cores(
    cores: Cores, num_actors: int, num_learners: int, actor_threads: int
) -> dict[str, Cores]:
    """Name ("actor-0", "learner-1") -> its cores.

    With a core for everyone, each actor gets `actor_threads` cores (one, where so many are not
    there) and the learner ranks split the rest. Otherwise actors share the first part of the
    cores and learner ranks the other, in proportion to their numbers; one core is for all.
    """
    actors = [f"actor-{index}" for index in range(num_actors)]
    learners = [f"learner-{rank}" for rank in range(num_learners)]
    if num_actors + num_learners > len(cores):
        return _share_cores(cores, actors, learners)
    enough = num_actors * actor_threads + num_learners <= len(cores)
    width = actor_threads if enough else 1
    taken = num_actors * width
    mine = {name: cores[i * width : (i + 1) * width] for i, name in enumerate(actors)}
    return mine | _split_evenly(cores[taken:], learners)


def core_sharers(assignment: Mapping[str, Cores]) -> dict[int, list[str]]:
    """Core -> the names on it, for cores that more than one uses."""
    users: dict[int, list[str]] = {}
    for name, cores in assignment.items():
        for core in cores:
            users.setdefault(core, []).append(name)
    return {core: names for core, names in sorted(users.items()) if len(names) > 1}


def _share_cores(cores: Cores, actors: Sequence[str], learners: Sequence[str]) -> dict[str, Cores]:
    for_actors = max(1, len(cores) * len(actors) // (len(actors) + len(learners)))
    first, rest = cores[:for_actors], cores[for_actors:] or cores
    pairs = [*zip(actors, cycle(first), strict=False), *zip(learners, cycle(rest), strict=False)]
    return {name: (core,) for name, core in pairs}


def _split_evenly(cores: Cores, names: Sequence[str]) -> dict[str, Cores]:
    """Neighbouring cores for each name; the first ones get what does not divide."""
    size, left = divmod(len(cores), len(names))
    starts = [rank * size + min(rank, left) for rank in range(len(names) + 1)]
    return {name: cores[starts[rank] : starts[rank + 1]] for rank, name in enumerate(names)}
