"""Process groups of our own for weights: gloo on CPU, NCCL on CUDA, apart from the learner's.

On a shared GPU gloo only says when a bucket is full: its bytes never leave the GPU (CUDA IPC).

Each change of membership makes a new generation of the group on the same store. Rank 0 is the
learner, ranks 1.. are the actors of this generation. torch neither encrypts nor authenticates any
of this: what came is compared with what the learner says over its own, protected connection.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from asyncgrpo.errors import WeightsError
from asyncgrpo.wire.address import own_address

ON_DEVICE = ("nccl", "cuda_ipc")  # transports whose buckets lie on the GPU
NUM_POSTED = 8  # buckets that an actor is ready to take while it looks at an earlier one
RETIRED_SECONDS = 60.0
CLOSING_TAG = 1
LISTEN_BACKLOG = 1024
BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"
_environment = threading.Lock()
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


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGroup:
    """One generation of the broadcast group."""

    generation: int
    handle: Any

    def broadcast(
        self, buckets: Iterable[torch.Tensor], then: Callable[[torch.Tensor], None]
    ) -> None:
        """Sends (rank 0) or receives all buckets; WeightsError when a member is lost.

        `then` gets each bucket, to be read only: while it is sent, or once it has come. Rank 0 asks
        for the next bucket when the one before the last is through.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        is_root = self.handle.rank() == 0
        waiting: deque[tuple[torch.Tensor, Any]] = deque()

        def end_one() -> None:
            bucket, work = waiting.popleft()
            work.wait()
            if not is_root:
                then(bucket)

        try:
            for bucket in buckets:
                waiting.append((bucket, self.handle.broadcast([bucket], options)))
                if is_root:
                    then(bucket)
                if len(waiting) > (1 if is_root else NUM_POSTED):
                    end_one()
            while waiting:
                end_one()
            _wait_for_copies()
        except RuntimeError as error:
            raise WeightsError(f"broadcast of generation {self.generation}: {error}") from error

    def close(self) -> None:
        """Closes the connections: whoever still waits for this member fails at once."""
        with suppress(RuntimeError):
            if self.handle.name() == "nccl":
                self.handle.abort()
                return
            # gloo has no other way than an operation that times out
            nothing = self.handle.recv_anysource([torch.zeros(1)], CLOSING_TAG)
            nothing.wait(timedelta(milliseconds=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedGroup(WeightGroup):
    """Members on one GPU: actors copy out of the learner's own two buckets."""

    opened: tuple[torch.Tensor, ...]  # the learner's buckets as this actor sees them; () there

    def broadcast(
        self, buckets: Iterable[torch.Tensor], then: Callable[[torch.Tensor], None]
    ) -> None:
        """As WeightGroup's. The learner fills one bucket while actors copy the other.

        All meet once per bucket: then it is filled, and everybody is done with the one before.
        """
        try:
            for number, bucket in enumerate(buckets):
                _wait_for_copies()
                self.handle.barrier().wait()
                if self.opened:
                    bucket.copy_(self.opened[number % len(self.opened)][: len(bucket)])
                then(bucket)
            _wait_for_copies()
            self.handle.barrier().wait()
        except RuntimeError as error:
            raise WeightsError(f"copy of generation {self.generation}: {error}") from error


def _wait_for_copies() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()


class SideStream:
    """On a GPU: what is sent waits for what was queued before `mark`, not for training after it."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._marked: torch.cuda.Event | None = None

    def mark(self) -> None:
        """Here the weights are complete."""
        if torch.cuda.is_initialized():
            self._marked = torch.cuda.current_stream().record_event()

    @contextmanager
    def used(self) -> Iterator[None]:
        """For all work of this thread; nothing on a CPU."""
        if self._marked is None:
            yield
            return
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_event(self._marked)
        with torch.cuda.stream(self._stream):
            yield


def share_bucket(bucket: torch.Tensor) -> list[Any]:
    """What one other process on this GPU needs to open the bucket: numbers and bytes."""
    return list(bucket.untyped_storage()._share_cuda_())


def open_bucket(handle: Sequence[Any]) -> torch.Tensor:
    """A bucket of another process, uint8; it must outlive this one."""
    _, *rest = handle  # its number of the GPU there; here it may have another
    storage = torch.UntypedStorage._new_shared_cuda(torch.cuda.current_device(), *rest)
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def open_group(
    store: Any,
    *,
    transport: str,
    generation: int,
    rank: int,
    world_size: int,
    seconds: float,
    opened: tuple[torch.Tensor, ...] = (),
) -> WeightGroup:
    """Joins a generation; blocks until all its members did, `seconds` at most.

    opened: on actors, with cuda_ipc, the learner's buckets.
    """
    prefixed = dist.PrefixStore(f"weights-{generation}", store)  # type: ignore[attr-defined]
    timeout = timedelta(seconds=seconds)
    try:
        if transport == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            # NCCL itself has no limit for members that do not come to its first operation.
            met = dist.PrefixStore("met", prefixed)  # type: ignore[attr-defined]
            met.set(str(rank), "here")
            met.wait([str(member) for member in range(world_size)], timeout)
            with _raising_waits():
                handle: Any = dist.ProcessGroupNCCL(prefixed, rank, world_size, options)
        else:
            gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            gloo._timeout = timeout
            address = own_address(store.host, store.port)
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
            handle = dist.ProcessGroupGloo(prefixed, rank, world_size, gloo)
    except (RuntimeError, OSError) as error:  # OSError: no way to the store's host now
        raise WeightsError(f"group of generation {generation} did not form: {error}") from error
    if transport == "cuda_ipc":
        return SharedGroup(generation=generation, handle=handle, opened=opened)
    return WeightGroup(generation=generation, handle=handle)


@contextmanager
def _raising_waits() -> Iterator[None]:
    """NCCL groups made here wait in `work.wait()` and raise there when a member is lost.

    Other groups only queue the wait on the GPU, and their watchdog ends the process (torch's
    ProcessGroupNCCL.cpp), which is right for the learner's own ranks.
    """
    with _environment:
        former = os.environ.get(BLOCKING_WAIT)
        os.environ[BLOCKING_WAIT] = "1"
        try:
            yield
        finally:
            del os.environ[BLOCKING_WAIT]
            if former is not None:
                os.environ[BLOCKING_WAIT] = former


def retire(group: WeightGroup | None) -> None:
    """Closes the connections of a group, and lets it go a while later.

    Members that still wait in a broadcast fail at once. The destructor joins the group's own thread
    while it holds the interpreter lock; if that thread is just releasing a tensor it waits for the
    same lock, and the process hangs (seen in torch 2.13). A minute later the thread is idle.
    """
    now = time.monotonic()
    if group is not None:
        group.close()
        _retired.append((now, group))
    while _retired and now - _retired[0][0] > RETIRED_SECONDS:
        _retired.popleft()
