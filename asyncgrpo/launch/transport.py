"""How the weights travel from the learner to the actors, by where these are."""

from __future__ import annotations

from collections.abc import Mapping

from asyncgrpo.config import Config
from asyncgrpo.errors import ConfigError


def choose_transport(config: Config, gpus: Mapping[str, str]) -> tuple[str, str]:
    """weights.transport with "auto" resolved, and the reason.

    gpus: role -> GPU, {} for a CPU run. ConfigError: it cannot work where the roles are.
    """
    asked = config.weights.transport
    best, reason = _fastest(config, gpus)
    if asked == "auto":
        return best, reason
    if asked in ("nccl", "cuda_ipc") and asked != best:
        raise ConfigError(
            f"weights.transport={asked!r} needs {_NEEDS[asked]}, but {reason}; set "
            f"weights.transport = {best!r} (or 'auto')"
        )
    return asked, "as weights.transport says"


_NEEDS = {
    "nccl": "CUDA, and one GPU for each actor and one for the learner's rank 0",
    "cuda_ipc": "CUDA, and all actors on the GPU of the learner's rank 0",
}


def _fastest(config: Config, gpus: Mapping[str, str]) -> tuple[str, str]:
    if not gpus:
        return "gloo", "launch.gpus=0 is a CPU run"
    if (count := config.actor.tensor_parallel) > 1:
        return "gloo", f"the {count} GPUs of an actor take their parts from the host's memory"
    ends = [gpus["learner-0"], *(gpus[f"actor-{i}"] for i in range(config.launch.actors))]
    if len(set(ends)) == len(ends):
        return "nccl", "each actor and the learner's rank 0 has a GPU of its own"
    if len(set(ends)) == 1:
        return "cuda_ipc", f"actors and the learner's rank 0 share GPU {ends[0]}"
    return "gloo", "some actors share a GPU (NCCL refuses that), others have another one"
