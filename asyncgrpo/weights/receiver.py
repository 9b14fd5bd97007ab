"""The actor's side of publishing: a thread that receives into a staging buffer.

Consumes: offer, go, sent, sleep, reject, rejoin of the learner; calls of the actor loop.
Produces: join, ready, later, free, loaded, asleep; a complete version for staged().
Generation goes on meanwhile: the thread waits inside the broadcast without the interpreter lock.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from asyncgrpo.config import Config
from asyncgrpo.errors import AsyncGRPOError, WeightsError
from asyncgrpo.protocols import NamedTensors
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
from asyncgrpo.wire.codec import Packet
from asyncgrpo.wire.keys import Keys
from asyncgrpo.wire.sockets import DealerClient

log = logging.getLogger(__name__)
POLL_SECONDS, ALIVE_SECONDS = 0.003, 3.0


class CollectiveReceiver:
    """A protocols.WeightReceiver over ZeroMQ and a process group."""

    def __init__(self, config: Config, actor: str, address: str, keys: Keys | None = None) -> None:
        self._settings, self._actor = config.weights, actor
        self._has_children = config.actor.tensor_parallel > 1  # who load the weights
        self._address, self._keys = address, keys
        self._flat: FlatWeights | None = None
        self._store: Any = None
        self._life = ""  # of the learner
        self._transport, self._bucket_bytes = "gloo", 1 << 30  # the learner tells
        self._manifest: Manifest | None = None
        self._opened: tuple[torch.Tensor, ...] = ()  # the learner's buckets, on a shared GPU
        self._received: int | None = None  # version that is here, not yet compared
        self._group: WeightGroup | None = None
        self._staged: int | None = None  # version that waits in the buffer, or is being loaded
        self._digests: list[int] = []
        self._copy_seconds = 0.0
        self._busy = False
        self._wants_sleep = self._said_asleep = False
        self._alive_at = 0.0
        self._failure: Exception | None = None
        self._outbox: queue.SimpleQueue[Packet] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="weights-receiver", daemon=True).start()

    # -- called by the actor loop -------------------------------------------------------------

    def staged(self) -> tuple[int, NamedTensors] | None:
        if self._staged is None or self._flat is None:
            return None
        return self._staged, self._flat

    def loaded(
        self, version: int, stall_seconds: float, canaries: Sequence[tuple[int, float]]
    ) -> None:
        fields = {
            "actor": self._actor,
            "version": version,
            "digests": self._digests,
            "copy_seconds": self._copy_seconds,
            "stall_seconds": stall_seconds,
            "canary_tokens": [token for token, _ in canaries],
            "canary_logprobs": [logprob for _, logprob in canaries],
        }
        self._staged = None
        self._outbox.put(Packet(kind="loaded", fields=fields))

    def set_busy(self, busy: bool) -> None:
        if self._busy and not busy:
            self._outbox.put(Packet(kind="free", fields={"actor": self._actor}))
        self._busy = busy

    def wants_sleep(self, is_asleep: bool) -> bool:
        if is_asleep and self._wants_sleep and not self._said_asleep:
            self._said_asleep = True
            self._outbox.put(Packet(kind="asleep", fields={"actor": self._actor}))
        return self._wants_sleep

    def check(self) -> None:
        if self._failure is not None:
            raise WeightsError(f"{self._actor}: {self._failure}") from self._failure

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        client = DealerClient(self._address, self._actor, "the learner", self._keys)
        actions: dict[str, Callable[[DealerClient, Packet], None]] = {
            "joined": self._on_joined,
            "offer": self._on_offer,
            "go": self._on_go,
            "sent": self._on_sent,
            "sleep": self._on_sleep,
            "rejoin": self._on_rejoin,
            "reject": self._on_reject,
        }
        try:
            self._join(client)
            while True:
                for packet in client.poll(POLL_SECONDS):
                    actions[packet.kind](client, packet)
                while not self._outbox.empty():
                    client.tell(self._outbox.get())
                self._show_life(client)
        except Exception as error:
            if not isinstance(error, AsyncGRPOError):
                log.exception("weights receiver stopped")
            self._failure = error
        finally:
            client.close()

    def _show_life(self, client: DealerClient) -> None:
        """Lets the learner say "rejoin" to an actor that does not know that it was evicted."""
        now = time.monotonic()
        if self._manifest is not None and now - self._alive_at > ALIVE_SECONDS:
            self._alive_at = now
            client.tell(Packet(kind="alive", fields={"actor": self._actor}))

    def _join(self, client: DealerClient) -> None:
        client.post(Packet(kind="join", fields={"actor": self._actor}))

    def _on_joined(self, client: DealerClient, packet: Packet) -> None:
        manifest = Manifest.from_fields(packet.fields["manifest"])
        self._transport = packet.fields["transport"]
        self._bucket_bytes = packet.fields["bucket_bytes"]
        if self._manifest != manifest and self._transport != "disk":
            if self._has_children:
                self._flat = FlatWeights.for_children(manifest)
            else:
                device = "cuda" if self._transport in ON_DEVICE else "cpu"
                self._flat = FlatWeights(manifest, device)
        self._manifest = manifest
        self._on_sleep(client, packet)
        self._opened = tuple(map(open_bucket, packet.fields.get("shared", ())))
        if self._life != packet.fields["life"]:
            self._life = packet.fields["life"]
            retire(self._group)
            self._group = None
            host, port = packet.fields["store"]
            self._store = open_store(
                host,
                port,
                is_master=False,
                timeout_seconds=self._settings.transfer_timeout_seconds,
            )

    def _on_offer(self, client: DealerClient, packet: Packet) -> None:
        can = not self._busy and self._staged is None and self._manifest is not None
        fields = {"actor": self._actor, "round": packet.fields["round"]}
        client.tell(Packet(kind="ready" if can else "later", fields=fields))
        if not can and not self._busy:
            self._outbox.put(Packet(kind="free", fields={"actor": self._actor}))

    def _on_go(self, client: DealerClient, packet: Packet) -> None:
        assert self._flat is not None, "go comes after joined"
        fields = packet.fields
        digester = Digester(self._flat.manifest, fields["seed"])
        start = time.perf_counter()
        try:
            if self._group is None or self._group.generation != fields["generation"]:
                retire(self._group)
                self._group = None
                self._group = open_group(
                    self._store,
                    transport=self._transport,
                    generation=fields["generation"],
                    rank=fields["rank"],
                    world_size=fields["world_size"],
                    seconds=self._settings.transfer_timeout_seconds,
                    opened=self._opened,
                )
            pieces, wanted = self._flat.bytes.split(self._bucket_bytes), fields["buckets"]
            if wanted is None:
                self._group.broadcast(pieces, digester.add)
            else:
                self._group.broadcast([pieces[n] for n in wanted], lambda piece: None)
                digester.add(self._flat.bytes)
        except WeightsError as error:
            log.warning("version %d did not arrive: %s", fields["version"], error)
            retire(self._group)
            self._group = None
            return
        self._copy_seconds = time.perf_counter() - start
        self._digests, self._received = digester.values, fields["version"]

    def _on_sent(self, client: DealerClient, packet: Packet) -> None:
        fields = packet.fields
        if "path" in fields:
            self._read(fields["path"], fields["version"], fields["seed"])
        if self._received != fields["version"]:
            return  # a part of it did not arrive
        self._received = None
        if self._digests == fields["digests"]:
            self._staged = fields["version"]
        else:  # never shown to the engine; the learner names the tensors and rejects this actor
            self.loaded(fields["version"], 0.0, [])

    def _read(self, path: str, version: int, seed: int) -> None:
        assert self._manifest is not None, "sent comes after joined"
        start = time.perf_counter()
        try:
            self._flat = open_version(path, self._manifest)
        except WeightsError as error:
            log.warning("version %d did not arrive: %s", version, error)
            return
        self._digests, self._received = self._flat.digests(seed), version
        self._copy_seconds = time.perf_counter() - start

    def _on_sleep(self, client: DealerClient, packet: Packet) -> None:
        self._wants_sleep, self._said_asleep = packet.fields["asleep"], False

    def _on_rejoin(self, client: DealerClient, packet: Packet) -> None:
        log.warning("evicted from publishing; joining again")
        self._on_sleep(client, packet)  # of another learner than the one that said so, maybe
        self._join(client)

    def _on_reject(self, client: DealerClient, packet: Packet) -> None:
        raise WeightsError(packet.fields["reason"])
