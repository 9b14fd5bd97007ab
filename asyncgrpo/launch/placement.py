"""Which cores actors and learner ranks get, and how weights travel from where to where they sit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

from asyncgrpo.config import Config
from asyncgrpo.errors import ConfigError

Cores = tuple[int, ...]
TRANSPORT_NEEDS = {
    "nccl": "CUDA, and GPUs of their own for each actor and for the learner's rank 0",
    "cuda_ipc": "CUDA, and all actors on the GPU of the learner's rank 0",
}


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
    mine = {name: cores[i * width : (i + 1) * width] for i, name in enumerate(actors)}
    # Neighbouring cores for each rank; the first ones get what does not divide.
    rest = cores[num_actors * width :]
    size, left = divmod(len(rest), num_learners)
    starts = [rank * size + min(rank, left) for rank in range(num_learners + 1)]
    return mine | {name: rest[starts[i] : starts[i + 1]] for i, name in enumerate(learners)}


def core_sharers(assignment: Mapping[str, Cores]) -> dict[int, list[str]]:
    """Core -> the names on it, for cores that more than one uses."""
    users: dict[int, list[str]] = {}
    for name, cores in assignment.items():
        for core in cores:
            users.setdefault(core, []).append(name)
    return {core: names for core, names in sorted(users.items()) if len(names) > 1}


def choose_transport(config: Config, gpus: Mapping[str, str]) -> tuple[str, str]:
    """weights.transport with "auto" resolved, and the reason.

    gpus: role -> GPU, {} for a CPU run. ConfigError: it cannot work where the roles are.
    """
    asked, (possible, reason) = config.weights.transport, _possible_transports(config, gpus)
    if asked == "auto":
        return possible[0], reason
    if asked in TRANSPORT_NEEDS and asked not in possible:
        raise ConfigError(
            f"weights.transport={asked!r} needs {TRANSPORT_NEEDS[asked]}, but {reason}; set "
            f"weights.transport = {possible[0]!r} (or 'auto')"
        )
    return asked, "as weights.transport says"


def _share_cores(cores: Cores, actors: Sequence[str], learners: Sequence[str]) -> dict[str, Cores]:
    for_actors = max(1, len(cores) * len(actors) // (len(actors) + len(learners)))
    first, rest = cores[:for_actors], cores[for_actors:] or cores
    pairs = [*zip(actors, cycle(first), strict=False), *zip(learners, cycle(rest), strict=False)]
    return {name: (core,) for name, core in pairs}


def _possible_transports(config: Config, gpus: Mapping[str, str]) -> tuple[Sequence[str], str]:
    """Those that the placement allows beside gloo and disk, the best one first, and the reason."""
    if not gpus:
        return ["gloo"], "launch.gpus=0 is a CPU run"
    if (count := config.actor.tensor_parallel) > 1:
        if config.launch.share_gpus:
            return ["gloo"], f"launch.share_gpus lets actors of {count} GPUs share them"
        why = f"the {count} GPUs of an actor take their parts from one copy in host memory"
        return ["gloo", "nccl"], why
    ends = [gpus["learner-0"], *(gpus[f"actor-{i}"] for i in range(config.launch.actors))]
    if len(set(ends)) == len(ends):
        return ["nccl"], "each actor and the learner's rank 0 has a GPU of its own"
    if len(set(ends)) == 1:
        return ["cuda_ipc"], f"actors and the learner's rank 0 share GPU {ends[0]}"
    return ["gloo"], "some actors share a GPU (NCCL refuses that), others have another one"
