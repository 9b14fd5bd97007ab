"""The learner's side of publishing: a thread that offers, broadcasts and checks proofs.

Consumes: publish() of the learner loop; join, ready, later, free, loaded of the actors.
Produces: offer, go, reject to the actors; a broadcast over the group.
Waits for: answers until a deadline; then it goes on without the late ones.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
import uuid
from typing import Any

from asyncgrpo.config import Config
from asyncgrpo.errors import PeerTimeout, WeightsError, WireError
from asyncgrpo.protocols import NamedTensors
from asyncgrpo.types import Float32
from asyncgrpo.weights.collective import (
    WeightGroup,
    choose_backend,
    open_group,
    open_store,
    retire,
)
from asyncgrpo.weights.flat import FlatWeights, Manifest, differing
from asyncgrpo.weights.handshake import Handshake
from asyncgrpo.weights.proof import check_proof
from asyncgrpo.wire.codec import Packet
from asyncgrpo.wire.keys import Keys
from asyncgrpo.wire.schema import WEIGHTS_REQUESTS, check_fields
from asyncgrpo.wire.sockets import Server

log = logging.getLogger(__name__)
POLL_SECONDS = 0.003
SEED_BITS = 62


class CollectiveSender:
    """A protocols.WeightSender over ZeroMQ (who and when) and a process group (the bytes)."""

    def __init__(
        self, config: Config, address: str, store: tuple[str, int], keys: Keys | None = None
    ) -> None:
        self._config, self._store_address = config, store
        self._settings = config.weights
        self._server = Server(address, keys)
        self._backend = choose_backend(self._settings.backend)
        timeout = self._settings.transfer_timeout_seconds
        self._store = open_store(*store, is_master=True, timeout_seconds=timeout)
        self._handshake = Handshake(
            ready_timeout_seconds=self._settings.ready_timeout_seconds,
            loaded_timeout_seconds=self._settings.loaded_timeout_seconds,
        )
        self._flat: FlatWeights | None = None
        # version -> (what digests are made with, digests, canaries) that must come back
        self._proofs: dict[int, tuple[int, list[int], Float32]] = {}
        self._group: WeightGroup | None = None
        self._group_peers: tuple[str, ...] = ()
        self._generation = 0
        self._life = uuid.uuid4().hex  # actors find out that this is another learner
        self._published_at = 0.0
        self._waiting_joins: list[tuple[str, Packet]] = []
        counted = ("evictions", "rounds", "proofs", "rejections")
        self._metrics = {f"publish/{name}": 0.0 for name in counted}
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="weights-sender", daemon=True)
        self._thread.start()

    # -- called by the learner loop ---------------------------------------------------------

    def publish(self, version: int, tensors: NamedTensors, canary_logprobs: Float32) -> None:
        with self._changed:
            self._wait(lambda: self._handshake.round is None, "end of a broadcast")
            start = time.perf_counter()
            if self._flat is None:
                manifest = Manifest.of(tensors, self._config.model.dtype)
                device = "cuda" if self._backend == "nccl" else "cpu"
                self._flat = FlatWeights(manifest, device)
            self._flat.fill(tensors)
            self._remember(version, canary_logprobs)
            self._handshake.newest = version
            self._published_at = time.perf_counter()
            self._metrics["publish/flatten_seconds"] = self._published_at - start
            self._metrics["publish/bytes"] = float(len(self._flat.bytes))

    def _remember(self, version: int, canary_logprobs: Float32) -> None:
        assert self._flat is not None, "nothing was published"
        seed = secrets.randbits(SEED_BITS)
        self._proofs[version] = (seed, self._flat.digests(seed), canary_logprobs)
        owed = {m.pending for m in self._handshake.members.values()} | {version}
        self._proofs = {v: proof for v, proof in self._proofs.items() if v in owed}

    def wait_for_actors(self, count: int, timeout_seconds: float) -> None:
        def proven() -> int:
            members = self._handshake.members.values()
            return sum(member.held == self._handshake.newest for member in members)

        with self._changed:
            try:
                self._wait(lambda: proven() >= count, f"{count} actors to load", timeout_seconds)
            except PeerTimeout:
                if not proven():
                    raise
                log.warning("only %d of %d actors are ready; starting", proven(), count)

    def settle(self, timeout_seconds: float) -> None:
        with self._changed:
            self._wait(self._handshake.settled, "proof of the newest weights", timeout_seconds)

    def metrics(self) -> dict[str, float]:
        with self._changed:
            refused = {"publish/refused_messages": float(self._server.num_refused)}
            actors = {"publish/actors": float(len(self._handshake.members))}
            return {**self._metrics, **refused, **actors}

    def close(self) -> None:
        self._stop.set()
        self._thread.join(self._settings.transfer_timeout_seconds)
        retire(self._group)
        self._server.close()

    def _wait(self, done: Any, what: str, seconds: float | None = None) -> None:
        """Waits on the condition; each part of a round has its own deadline, so this ends."""
        limit = seconds or sum(
            (
                self._settings.ready_timeout_seconds * 2,
                self._settings.transfer_timeout_seconds,
                self._settings.loaded_timeout_seconds,
            )
        )
        if not self._changed.wait_for(lambda: self._failure is not None or done(), limit):
            raise PeerTimeout("actors " + ", ".join(self._handshake.members), what, limit)
        if self._failure is not None:
            raise WeightsError(f"the weights sender stopped: {self._failure}") from self._failure

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                packets = self._server.receive(POLL_SECONDS)
                with self._changed:
                    self._turn(packets)
                    self._changed.notify_all()
        except Exception as error:
            log.exception("weights sender stopped")
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _turn(self, packets: list[tuple[str, Packet]]) -> None:
        for peer, packet in packets:
            try:
                check_fields(packet.kind, packet.fields, WEIGHTS_REQUESTS)
            except WireError as error:
                self._server.push(peer, Packet(kind="refused", fields={"reason": str(error)}))
                continue
            getattr(self, f"_on_{packet.kind}")(peer, packet)
        for name in self._handshake.overdue(time.monotonic()):
            self._evict(name, "missed its deadline")
        self._welcome()
        offered = self._handshake.open_round(time.monotonic())
        if offered is not None:
            self._offer()
        if self._handshake.decided():
            self._broadcast()

    def _on_join(self, peer: str, packet: Packet) -> None:
        self._waiting_joins.append((peer, packet))

    def _welcome(self) -> None:
        """Lets actors in once there is something to hold."""
        if self._flat is None:
            return
        for peer, packet in self._waiting_joins:
            name = packet.fields["actor"]
            self._handshake.join(name, peer)
            fields = {
                "manifest": self._flat.manifest.as_fields(),
                "store": list(self._store_address),
                "backend": self._backend,
                "life": self._life,
                "bucket_bytes": self._settings.bucket_bytes,
            }
            answer = Packet(kind="joined", request_id=packet.request_id, fields=fields)
            self._server.answer(peer, answer)
            log.info("%s joined", name)
        self._waiting_joins = []

    def _on_ready(self, peer: str, packet: Packet) -> None:
        if not self._handshake.answer(packet.fields["actor"], packet.fields["round"], ready=True):
            self._ask_to_rejoin(peer, packet)

    def _on_later(self, peer: str, packet: Packet) -> None:
        self._handshake.answer(packet.fields["actor"], packet.fields["round"], ready=False)

    def _on_alive(self, peer: str, packet: Packet) -> None:
        self._ask_to_rejoin(peer, packet)

    def _on_free(self, peer: str, packet: Packet) -> None:
        self._handshake.free(packet.fields["actor"])

    def _on_loaded(self, peer: str, packet: Packet) -> None:
        fields = packet.fields
        actor, version = fields["actor"], fields["version"]
        member = self._handshake.members.get(actor)
        if member is None or member.peer != peer or member.pending != version:
            self._ask_to_rejoin(peer, packet)
            return
        self._check(peer, packet)
        self._handshake.loaded(actor, version)
        self._metrics["publish/stall_seconds"] = fields["stall_seconds"]
        self._metrics["publish/copy_seconds"] = fields["copy_seconds"]
        self._metrics["publish/live_seconds"] = time.perf_counter() - self._published_at

    def _check(self, peer: str, packet: Packet) -> None:
        assert self._flat is not None, "nothing was published"
        _, digests, logprobs = self._proofs[packet.fields["version"]]
        wrong = differing(self._flat.manifest, digests, packet.fields["digests"])
        try:
            self._metrics["publish/canary_difference"] = check_proof(
                packet.fields,
                version=packet.fields["version"],
                wrong_tensors=wrong,
                logprobs=logprobs,
                tolerance=self._config.canary_tolerance,
            )
            self._metrics["publish/proofs"] += 1
        except WeightsError as error:
            self._metrics["publish/rejections"] += 1
            self._server.push(peer, Packet(kind="reject", fields={"reason": str(error)}))
            self._evict(packet.fields["actor"], str(error))

    def _ask_to_rejoin(self, peer: str, packet: Packet) -> None:
        if packet.fields["actor"] not in self._handshake.members:
            self._server.push(peer, Packet(kind="rejoin"))

    def _evict(self, name: str, reason: str) -> None:
        if self._handshake.evict(name) is not None:
            self._metrics["publish/evictions"] += 1
            log.warning("%s is evicted from publishing: %s", name, reason)

    def _offer(self) -> None:
        offered = self._handshake.round
        assert offered is not None, "no round is open"
        fields = {"round": offered.number, "version": offered.version}
        for name in sorted(offered.asked):
            peer = self._handshake.members[name].peer
            if not self._server.push(peer, Packet(kind="offer", fields=fields)):
                self._evict(name, "its connection is gone")

    def _broadcast(self) -> None:
        assert self._handshake.round is not None, "nothing to send"
        assert self._flat is not None, "nothing to send"
        number, version = self._handshake.round.number, self._handshake.round.version
        names = sorted(self._handshake.round.ready)
        sent = False
        if names:
            start = time.perf_counter()
            try:
                self._form_group(names, number, version)
                assert self._group is not None, "no group was formed"
                self._group.broadcast(self._flat.buckets(self._settings.bucket_bytes))
                sent = True
                self._metrics["publish/broadcast_seconds"] = time.perf_counter() - start
                self._metrics["publish/rounds"] += 1
            except WeightsError as error:
                log.warning("publish of version %d to %s failed: %s", version, names, error)
                retire(self._group)
                self._group, self._group_peers = None, ()
        self._handshake.close_round(time.monotonic(), sent=sent)

    def _form_group(self, names: list[str], number: int, version: int) -> None:
        """Tells the members their ranks, and makes a new group if they are not the last ones."""
        peers = tuple(self._handshake.members[name].peer for name in names)
        fresh = peers != self._group_peers or self._group is None
        self._generation += fresh
        seed, digests, _ = self._proofs[version]
        for rank, peer in enumerate(peers, start=1):
            fields = {
                "round": number,
                "version": version,
                "generation": self._generation,
                "rank": rank,
                "world_size": len(peers) + 1,
                "seed": seed,
                "digests": digests,
            }
            self._server.push(peer, Packet(kind="go", fields=fields))
        if fresh:
            retire(self._group)
            self._group = open_group(
                self._store,
                backend=self._backend,
                generation=self._generation,
                rank=0,
                world_size=len(peers) + 1,
                seconds=self._settings.ready_timeout_seconds,
            )
            self._group_peers = peers
