"""Where weights arrive: in the actor's process, or in each process of its engine.

With NCCL all processes of an engine are members of the broadcast group, and what comes stays on
their GPUs; the actor passes on what the learner says, and compares what they say.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from asyncgrpo.errors import EngineError, WeightsError
from asyncgrpo.protocols import NamedTensors
from asyncgrpo.settings.learner import WeightSettings
from asyncgrpo.weights.collective import (
    ON_DEVICE,
    WeightGroup,
    open_bucket,
    open_group,
    open_store,
    retire,
)
from asyncgrpo.weights.disk import open_version
from asyncgrpo.weights.flat import Digester, FlatWeights, Manifest

Fields = Mapping[str, Any]  # of a packet of the learner
UNLIKE = -1  # no digest
_served: list[Inbox] = []  # the one of this process of an engine


class Inbox:
    """Takes part in broadcasts, or opens files, and holds the newest version that came."""

    num_ranks = 1  # members of the group

    def __init__(self, settings: WeightSettings, *, for_children: bool = False) -> None:
        """for_children: other processes of this user load what comes."""
        self._settings, self._for_children = settings, for_children
        self._manifest: Manifest | None = None
        self._flat: FlatWeights | None = None
        self._transport, self._bucket_bytes, self._life = "", 0, ""
        self._opened: tuple[torch.Tensor, ...] = ()  # the learner's buckets, on a shared GPU
        self._store: Any = None
        self._group: WeightGroup | None = None

    @property
    def tensors(self) -> NamedTensors:
        """What came last."""
        assert self._flat is not None, "nothing came"
        return self._flat

    def prepare(self, joined: Fields) -> None:
        """Makes room for what this learner will send."""
        manifest = Manifest.from_fields(joined["manifest"])
        self._transport, self._bucket_bytes = joined["transport"], joined["bucket_bytes"]
        if self._manifest != manifest and self._transport != "disk":
            if self._for_children:
                self._flat = FlatWeights.for_children(manifest)
            else:
                self._flat = FlatWeights(
                    manifest, "cuda" if self._transport in ON_DEVICE else "cpu"
                )
        self._manifest = manifest
        self._opened = tuple(map(open_bucket, joined.get("shared", ())))
        if self._life != joined["life"]:
            self._life = joined["life"]
            self._leave_group()
            host, port = joined["store"]
            seconds = self._settings.transfer_timeout_seconds
            self._store = open_store(host, port, is_master=False, timeout_seconds=seconds)

    def receive(self, go: Fields) -> list[int]:
        """The digests of what came in a broadcast; WeightsError when a part did not."""
        assert self._flat is not None, "go comes after joined"
        digester = Digester(self._flat.manifest, go["seed"])
        try:
            if self._group is None or self._group.generation != go["generation"]:
                self._leave_group()
                self._group = open_group(
                    self._store,
                    transport=self._transport,
                    generation=go["generation"],
                    rank=go["rank"],
                    world_size=go["world_size"],
                    seconds=self._settings.transfer_timeout_seconds,
                    opened=self._opened,
                )
            pieces, wanted = self._flat.bytes.split(self._bucket_bytes), go["buckets"]
            if wanted is None:
                self._group.broadcast(pieces, digester.add)
            else:
                self._group.broadcast([pieces[n] for n in wanted], lambda piece: None)
                digester.add(self._flat.bytes)
        except WeightsError:
            self._leave_group()
            raise
        return digester.values

    def read(self, sent: Fields) -> list[int]:
        """The digests of what is in a file; WeightsError when it is not whole."""
        assert self._manifest is not None, "sent comes after joined"
        self._flat = open_version(sent["path"], self._manifest)
        return self._flat.digests(sent["seed"])

    def _leave_group(self) -> None:
        retire(self._group)
        self._group = None

    def serve(self, pipe: Connection, device: torch.device) -> None:
        """Does what the EngineInbox at the other end asks for, until that is gone."""
        _served[:] = [self]
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        with pipe, suppress(EOFError):
            while True:
                method, fields = pipe.recv()
                try:
                    pipe.send(getattr(self, method)(fields))
                except WeightsError as error:
                    pipe.send(error)


class InEngine:
    """Names the weights in the inbox of whatever process of an engine unpickles it."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        raise EngineError("these weights are in the processes of the engine")

    def __reduce__(self) -> tuple[Any, ...]:
        return _tensors_here, ()


def _tensors_here() -> NamedTensors:
    return _served[0].tensors


class EngineInbox:
    """The Inboxes in all processes of an engine as one."""

    def __init__(self, pipes: Sequence[Connection], seconds: float) -> None:
        """seconds: that a process may take to do one thing."""
        self._pipes, self._seconds = pipes, seconds
        self.num_ranks = len(pipes)
        self.tensors: NamedTensors = InEngine()

    def prepare(self, joined: Fields) -> None:
        """As Inbox's, everywhere."""
        self._ask("prepare", [joined] * self.num_ranks)

    def receive(self, go: Fields) -> list[int]:
        """As Inbox's; UNLIKE for each tensor of which not all processes got the same bytes."""
        ranks = range(go["rank"], go["rank"] + self.num_ranks)
        return self._same("receive", [{**go, "rank": rank} for rank in ranks])

    def read(self, sent: Fields) -> list[int]:
        """As Inbox's."""
        return self._same("read", [sent] * self.num_ranks)

    def _same(self, method: str, each: Sequence[Fields]) -> list[int]:
        digests = zip(*self._ask(method, each), strict=True)
        return [first if {first, *rest} == {first} else UNLIKE for first, *rest in digests]

    def _ask(self, method: str, each: Sequence[Fields]) -> list[Any]:
        end = time.monotonic() + self._seconds
        try:
            for pipe, fields in zip(self._pipes, each, strict=True):
                pipe.send((method, fields))
            late = [not pipe.poll(max(0.0, end - time.monotonic())) for pipe in self._pipes]
            if any(late):
                raise EngineError(
                    f"process {late.index(True)} of the engine did not {method} weights within "
                    f"{self._seconds:g} s"
                )
            answers = [pipe.recv() for pipe in self._pipes]
        except (OSError, EOFError) as error:
            raise EngineError(f"a process of the engine is gone: {error}") from error
        for answer in answers:
            if isinstance(answer, WeightsError):
                raise answer
        return answers
