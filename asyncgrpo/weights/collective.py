"""Process groups of our own for weights: gloo on CPU, NCCL on CUDA, apart from the learner's.

Each change of membership makes a new generation of the group on the same store. Rank 0 is the
learner, ranks 1.. are the actors of this generation. torch neither encrypts nor authenticates any
of this: what came is compared with what the learner says over its own, protected connection.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from asyncgrpo.errors import WeightsError
from asyncgrpo.wire.address import own_address

RETIRED_SECONDS = 60.0
LISTEN_BACKLOG = 1024
_retired: deque[tuple[float, object]] = deque()


def open_store(host: str, port: int, *, is_master: bool, timeout_seconds: float) -> Any:
    """The key-value store where the members of a group find each other."""
    listening: dict[str, Any] = {}
    if is_master:  # bound here: left to itself, torch listens on all addresses
        listener = socket.create_server((host, port), backlog=LISTEN_BACKLOG)
        listening["master_listen_fd"] = listener.detach()
    return dist.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        is_master=is_master,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        **listening,
    )


def choose_backend(setting: str) -> str:
    """Resolves "auto": NCCL where CUDA is, gloo elsewhere; WeightsError when it cannot work."""
    if setting == "auto":
        return "nccl" if torch.cuda.is_available() else "gloo"
    if setting == "nccl" and not torch.cuda.is_available():
        raise WeightsError("weights.backend='nccl' needs CUDA, which is not here; use 'gloo'")
    return setting


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGroup:
    """One generation of the broadcast group."""

    generation: int
    handle: Any

    def broadcast(self, buckets: Iterable[torch.Tensor]) -> None:
        """Sends (rank 0) or receives all buckets; WeightsError when a member is lost."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            for bucket in buckets:
                self.handle.broadcast([bucket], options).wait()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError as error:
            raise WeightsError(f"broadcast of generation {self.generation}: {error}") from error


def open_group(
    store: Any, *, backend: str, generation: int, rank: int, world_size: int, seconds: float
) -> WeightGroup:
    """Joins a generation; blocks until all its members did, `seconds` at most."""
    prefixed = dist.PrefixStore(f"weights-{generation}", store)  # type: ignore[attr-defined]
    timeout = timedelta(seconds=seconds)
    try:
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            handle: Any = dist.ProcessGroupNCCL(prefixed, rank, world_size, options)
        else:
            gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            gloo._timeout = timeout
            address = own_address(store.host, store.port)
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
            handle = dist.ProcessGroupGloo(prefixed, rank, world_size, gloo)
    except (RuntimeError, OSError) as error:  # OSError: no way to the store's host now
        raise WeightsError(f"group of generation {generation} did not form: {error}") from error
    return WeightGroup(generation=generation, handle=handle)


def retire(group: WeightGroup | None) -> None:
    """Keeps a group that is no longer used alive for a while, then lets it go.

    Its destructor joins the group's own thread while it holds the interpreter lock; if that thread
    is just releasing a tensor it waits for the same lock, and the process hangs (seen in torch
    2.13). A minute later the thread is idle.
    """
    now = time.monotonic()
    if group is not None:
        _retired.append((now, group))
    while _retired and now - _retired[0][0] > RETIRED_SECONDS:
        _retired.popleft()
