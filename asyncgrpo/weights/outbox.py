"""Where weights leave the learner: read as pieces of two buckets, sent to a group or to a file.

They are read from the learner's own parameters while they stand still, from take to release; where
they change before the next publish there is one copy in host memory.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from asyncgrpo.config import Config
from asyncgrpo.errors import WeightsError
from asyncgrpo.protocols import SentTensors
from asyncgrpo.weights.collective import (
    ON_DEVICE,
    SideStream,
    WeightGroup,
    open_group,
    open_store,
    retire,
    share_bucket,
)
from asyncgrpo.weights.disk import prune, write_version
from asyncgrpo.weights.flat import ALIGNMENT, Digester, FlatWeights, Manifest, differing
from asyncgrpo.weights.handshake import Member
from asyncgrpo.wire.codec import Packet

SEED_BITS = 62


class Outbox:
    """The newest weights, and what was sent of earlier ones."""

    def __init__(
        self, config: Config, store: tuple[str, int], transport: str, folder: Path | None
    ) -> None:
        """store: where the group meets; it is opened here. folder: for the transport "disk"."""
        self._settings, self._dtype = config.weights, config.model.dtype
        self._transport, self._folder = transport, folder
        if transport == "disk" and folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # versions of an earlier life
        # Else they are read in `take`, to a file or a copy.
        self.reads_later = transport != "disk" and self._settings.publish_every == 1
        self._bucket_bytes = self._settings.bucket_bytes // ALIGNMENT * ALIGNMENT
        seconds = self._settings.transfer_timeout_seconds
        self._store_address = store
        self._store = open_store(*store, is_master=True, timeout_seconds=seconds)
        self._manifest = Manifest(names=(), shapes=(), dtype=self._dtype)  # not known yet
        self._staging: list[torch.Tensor] = []
        self._copy: FlatWeights | None = None
        self._tensors: SentTensors = ()
        self._stream = SideStream()
        self._file = ""
        self._seeds: dict[int, int] = {}  # version -> what its digests are made with
        self._digests: dict[int, list[int]] = {}  # known once all bytes were read
        self._bucket_seed = secrets.randbits(SEED_BITS)
        self._sent: tuple[int, list[int]] = (-1, [])  # last version tried, digests of its buckets
        self._group: WeightGroup | None = None
        self._peers: tuple[str, ...] = ()  # its other members
        self._generation = 0
        self.metrics: dict[str, float] = {}

    @property
    def is_filled(self) -> bool:
        """Whether there ever was something to send."""
        return bool(self._manifest.names)

    def take(self, version: int, tensors: SentTensors, owed: Collection[int | None]) -> None:
        """Makes the weights of a version readable. owed: versions that are still to be proven."""
        if not self.is_filled:
            self._manifest = Manifest.of(tensors, self._dtype)
            device = "cuda" if self._transport in ON_DEVICE else "cpu"
            size = min(self._bucket_bytes, max(self._manifest.num_bytes, ALIGNMENT))
            self._staging = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]
        seeds = {**self._seeds, version: secrets.randbits(SEED_BITS)}
        self._seeds = {v: seed for v, seed in seeds.items() if v in owed}
        self._digests = {v: d for v, d in self._digests.items() if v in owed and v != version}
        if self._transport == "disk":
            assert self._folder is not None, "the disk needs a folder"
            place = self._folder / f"v{version}"
            pieces = self._manifest.pieces(tensors, self._staging)
            with self._digesting(version) as add:
                self._file = str(write_version(place, self._manifest, pieces, add))
            prune(self._folder, self._seeds)
        elif self.reads_later:
            self._tensors = tensors
        else:
            self._copy = self._copy or FlatWeights(self._manifest)
            self._copy.fill(tensors)
            self._tensors = list(self._copy.views())
        self._stream.mark()

    def release(self) -> None:
        """The learner's parameters are not read any more."""
        self._tensors = ()

    def joined(self) -> dict[str, Any]:
        """What a new member must know, for its Inbox."""
        fields = {
            "manifest": self._manifest.as_fields(),
            "store": list(self._store_address),
            "transport": self._transport,
            "bucket_bytes": self._bucket_bytes,
        }
        if self._transport == "cuda_ipc":  # exported anew for each: opening one uses it up
            fields["shared"] = [share_bucket(bucket) for bucket in self._staging]
        return fields

    def send(
        self, version: int, members: Sequence[Member], push: Callable[[str, Packet], bool]
    ) -> None:
        """Broadcasts to members; WeightsError when one was lost. push: tells a peer to come."""
        if self._transport == "disk":
            return
        with self._stream.used():
            wanted = self._find_changes(version, members) if self._settings.only_changed else None
            try:
                group = self._form_group(version, members, push, wanted)
                pieces = self._manifest.pieces(self._tensors, self._staging, wanted)
                if wanted is None:
                    with self._digesting(version) as add:
                        group.broadcast(pieces, add)
                else:
                    group.broadcast(pieces, lambda piece: None)
            except WeightsError:
                self.leave_group()
                raise

    def sent(self, version: int) -> dict[str, Any]:
        """What members compare with what came, or where it lies."""
        fields: dict[str, Any] = {"version": version, "digests": self._digests[version]}
        if self._transport == "disk":
            fields |= {"seed": self._seeds[version], "path": self._file}
        return fields

    def differing(self, version: int, digests: list[int]) -> list[str]:
        """Names of the tensors of which a member got something else."""
        return differing(self._manifest, self._digests[version], digests)

    def leave_group(self) -> None:
        """Whoever still waits in a broadcast fails at once."""
        retire(self._group)
        self._group, self._peers = None, ()

    @contextmanager
    def _digesting(self, version: int) -> Iterator[Callable[[torch.Tensor], None]]:
        """A function that takes each piece; at the end the version's digests are known."""
        digester = Digester(self._manifest, self._seeds[version])
        yield digester.add
        values = digester.values
        former = self._digests.setdefault(version, values)
        assert former == values, "weights changed before their release"
        self.metrics["publish/digest_seconds"] = digester.seconds
        self.metrics["publish/bytes"] = float(self._manifest.num_bytes)

    def _find_changes(self, version: int, members: Sequence[Member]) -> list[int]:
        """Numbers of the buckets that members lack; digests of all are made on the way.

        Who proved the last version that was sent has its bytes: a later broadcast, even one that
        failed, would have put another version in its place.
        """
        held, former = self._sent
        buckets = self._manifest.buckets(self._bucket_bytes)
        digester = Digester(buckets, self._bucket_seed)
        with self._digesting(version) as add:
            for piece in self._manifest.pieces(self._tensors, self._staging):
                add(piece)
                digester.add(piece)
        values = digester.values
        self._sent = version, values
        wanted = list(range(len(buckets.names)))
        if former and all(member.held == held for member in members):
            wanted = [n for n in wanted if values[n] != former[n]]
        size = sum(buckets.shapes[n][0] for n in wanted)
        self.metrics["publish/bytes"] = float(size)
        self.metrics["publish/bytes_saved"] = float(self._manifest.num_bytes - size)
        return wanted

    def _form_group(
        self,
        version: int,
        members: Sequence[Member],
        push: Callable[[str, Packet], bool],
        wanted: list[int] | None,
    ) -> WeightGroup:
        """Tells the members their ranks, and makes a new group if they are not the last ones."""
        peers = tuple(member.peer for member in members)
        world_size = 1 + sum(member.ranks for member in members)
        self._generation += peers != self._peers
        rank = 1
        for member in members:
            fields = {
                "version": version,
                "generation": self._generation,
                "rank": rank,  # of its first process
                "world_size": world_size,
                "seed": self._seeds[version],
                "buckets": wanted,
            }
            push(member.peer, Packet(kind="go", fields=fields))
            rank += member.ranks
        if self._group is None or peers != self._peers:
            self.leave_group()
            self._group = open_group(
                self._store,
                transport=self._transport,
                generation=self._generation,
                rank=0,
                world_size=world_size,
                seconds=self._settings.ready_timeout_seconds,
            )
            self._peers = peers
        return self._group
