"""The learner's side of publishing: a thread that offers, broadcasts and checks proofs.

Consumes: calls of the learner loop; join, ready, later, free, loaded, asleep of actors.
Produces: offer, go, sent, sleep, reject to the actors; a broadcast over the group, or a file.
Waits for: answers until a deadline; then it goes on without the late ones.

The thread sends; where ranks hold parts of the weights the learner loop does, from within its
calls, with the help of the other ranks.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from asyncgrpo.config import Config
from asyncgrpo.errors import PeerTimeout, WeightsError, WireError
from asyncgrpo.protocols import SentTensors
from asyncgrpo.types import Float32
from asyncgrpo.weights.handshake import Handshake
from asyncgrpo.weights.outbox import Outbox
from asyncgrpo.weights.proof import check_proof
from asyncgrpo.wire.codec import Packet
from asyncgrpo.wire.keys import Keys
from asyncgrpo.wire.schema import WEIGHTS_REQUESTS, check_fields
from asyncgrpo.wire.sockets import Server

log = logging.getLogger(__name__)
POLL_SECONDS = 0.003


class CollectiveSender:
    """A protocols.WeightSender over ZeroMQ (who and when) and a process group (the bytes)."""

    def __init__(
        self,
        config: Config,
        address: str,
        store: tuple[str, int],
        keys: Keys | None = None,
        *,
        transport: str = "gloo",
        folder: Path | None = None,
    ) -> None:
        """transport: weights.transport, "auto" resolved. folder: where "disk" writes versions."""
        self._config, self._settings = config, config.weights
        self._server = Server(address, keys)
        self._outbox = Outbox(config, store, transport, folder)
        # Gathering is for the loop's own thread, which runs all other collectives of the learner.
        self._loop_sends = config.learner.parallel == "fsdp" and self._outbox.reads_later
        self._asleep, self._sleepers = False, set[str]()  # told to engines; peers who did it
        self._handshake = Handshake(
            ready_timeout_seconds=self._settings.ready_timeout_seconds,
            loaded_timeout_seconds=self._settings.loaded_timeout_seconds,
        )
        self._canary_logprobs: dict[int, Float32] = {}  # by version
        self._life = uuid.uuid4().hex  # actors find out that this is another learner
        self._published_at = 0.0
        self._blocked_seconds = 0.0  # the learner's, in `release` since the last publish
        self._waiting_joins: list[tuple[str, Packet]] = []
        counted = ("evictions", "rounds", "proofs", "rejections")
        self._metrics = {f"publish/{name}": 0.0 for name in counted}
        self._changed = threading.Condition()
        self._socket = threading.Lock()  # taken last; ZeroMQ allows one thread at a time
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="weights-sender", daemon=True)
        self._thread.start()

    # -- called by the learner loop ---------------------------------------------------------

    def publish(self, version: int, tensors: SentTensors, canary_logprobs: Float32) -> None:
        with self._changed:
            start = time.perf_counter()
            self._wait(lambda: self._handshake.round is None, "end of a broadcast")
            if self._asleep:
                self._tell_sleep(False)
            owed = {m.pending for m in self._handshake.members.values()} | {version}
            known = {**self._canary_logprobs, version: canary_logprobs}
            self._canary_logprobs = {v: values for v, values in known.items() if v in owed}
            self._outbox.take(version, tensors, owed)
            self._handshake.publish(version)
            self._published_at = time.perf_counter()
            if self._loop_sends or not self._settings.overlap:
                self._wait(self._handshake.at_rest, "end of a broadcast")
            blocked = self._blocked_seconds + time.perf_counter() - start
            self._metrics["publish/blocked_seconds"], self._blocked_seconds = blocked, 0.0

    def release(self) -> None:
        """Waits until nobody reads the learner's parameters, and lets nobody until `publish`."""
        sleeps = self._config.actor.sleep and not self._asleep
        if not self._outbox.reads_later and not sleeps:
            return
        start = time.perf_counter()
        with self._changed:
            self._wait(self._handshake.at_rest, "end of a broadcast")
            self._handshake.hold()
            self._outbox.release()
            self._blocked_seconds += time.perf_counter() - start
            if sleeps:
                self._put_to_sleep()

    def _put_to_sleep(self) -> None:
        """Waits until engines sleep, with their proofs made; who joins is told to sleep, too."""
        start, members = time.perf_counter(), self._handshake.members.values
        seconds = self._settings.loaded_timeout_seconds  # the first time it pins host memory
        self._tell_sleep(True)
        try:
            self._wait(lambda: self._sleepers >= {m.peer for m in members()}, "sleep", seconds)
        except PeerTimeout:
            awake = [member.name for member in members() if member.peer not in self._sleepers]
            log.warning("training goes on beside %s, awake after %g s", ", ".join(awake), seconds)
        self._metrics["publish/sleep_seconds"] = time.perf_counter() - start

    def _tell_sleep(self, asleep: bool) -> None:
        self._asleep, self._sleepers = asleep, set()
        for member in list(self._handshake.members.values()):
            if not self._push(member.peer, Packet(kind="sleep", fields={"asleep": asleep})):
                self._evict(member.name, "its connection is gone")

    def serve(self) -> None:
        """Sends to actors that are late or new, if that is for the caller to do."""
        with self._changed:
            if self._loop_sends and self._handshake.decided():
                self._broadcast()

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
            return {**self._metrics, **self._outbox.metrics, **refused, **actors}

    def close(self) -> None:
        self._stop.set()
        self._thread.join(self._settings.transfer_timeout_seconds)
        self._outbox.leave_group()
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
        end = time.monotonic() + limit

        def is_over() -> bool:
            to_send = self._loop_sends and self._handshake.decided()
            return self._failure is not None or to_send or done()

        while self._changed.wait_for(is_over, end - time.monotonic()):
            if self._failure is not None:
                message = f"the weights sender stopped: {self._failure}"
                raise WeightsError(message) from self._failure
            if done():
                return
            self._broadcast()
        raise PeerTimeout("actors " + ", ".join(self._handshake.members), what, limit)

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                with self._socket:
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
                self._push(peer, Packet(kind="refused", fields={"reason": str(error)}))
                continue
            getattr(self, f"_on_{packet.kind}")(peer, packet)
        for name in self._handshake.overdue(time.monotonic()):
            self._evict(name, "missed its deadline")
        self._welcome()
        offered = self._handshake.open_round(time.monotonic())
        if offered is not None:
            self._offer()
        if self._handshake.decided() and not self._loop_sends:
            self._broadcast()

    def _on_join(self, peer: str, packet: Packet) -> None:
        self._waiting_joins.append((peer, packet))

    def _welcome(self) -> None:
        """Lets actors in once there is something to hold."""
        if not self._outbox.is_filled:
            return
        for peer, packet in self._waiting_joins:
            name = packet.fields["actor"]
            self._handshake.join(name, peer, packet.fields["ranks"])
            fields = {**self._outbox.joined(), "life": self._life, "asleep": self._asleep}
            answer = Packet(kind="joined", request_id=packet.request_id, fields=fields)
            self._server.answer(peer, answer)
            log.info("%s joined", name)
        self._waiting_joins = []

    def _on_ready(self, peer: str, packet: Packet) -> None:
        if not self._handshake.answer(packet.fields["actor"], packet.fields["round"], ready=True):
            self._on_alive(peer, packet)

    def _on_later(self, peer: str, packet: Packet) -> None:
        self._handshake.answer(packet.fields["actor"], packet.fields["round"], ready=False)

    def _on_free(self, peer: str, packet: Packet) -> None:
        self._handshake.free(packet.fields["actor"])

    def _on_asleep(self, peer: str, packet: Packet) -> None:
        self._sleepers.add(peer)

    def _on_alive(self, peer: str, packet: Packet) -> None:
        """From who may not know that it was evicted."""
        if packet.fields["actor"] not in self._handshake.members:
            self._push(peer, Packet(kind="rejoin", fields={"asleep": self._asleep}))

    def _on_loaded(self, peer: str, packet: Packet) -> None:
        fields = packet.fields
        actor, version = fields["actor"], fields["version"]
        member = self._handshake.members.get(actor)
        if member is None or member.peer != peer or member.pending != version:
            self._on_alive(peer, packet)
            return
        self._check(peer, packet)
        self._handshake.loaded(actor, version)
        self._metrics["publish/stall_seconds"] = fields["stall_seconds"]
        self._metrics["publish/copy_seconds"] = fields["copy_seconds"]
        self._metrics["publish/live_seconds"] = time.perf_counter() - self._published_at

    def _check(self, peer: str, packet: Packet) -> None:
        version = packet.fields["version"]
        try:
            self._metrics["publish/canary_difference"] = check_proof(
                packet.fields,
                version=version,
                wrong_tensors=self._outbox.differing(version, packet.fields["digests"]),
                logprobs=self._canary_logprobs[version],
                tolerance=self._config.canary_tolerance,
            )
            self._metrics["publish/proofs"] += 1
        except WeightsError as error:
            self._metrics["publish/rejections"] += 1
            self._push(peer, Packet(kind="reject", fields={"reason": str(error)}))
            self._evict(packet.fields["actor"], str(error))

    def _evict(self, name: str, reason: str) -> None:
        if self._handshake.evict(name) is not None:
            self._metrics["publish/evictions"] += 1
            log.warning("%s is evicted from publishing: %s", name, reason)

    def _push(self, peer: str, packet: Packet) -> bool:
        """False when the peer's connection is gone."""
        with self._socket:
            return self._server.push(peer, packet)

    def _offer(self) -> None:
        offered = self._handshake.round
        assert offered is not None, "no round is open"
        fields = {"round": offered.number, "version": offered.version}
        for name in sorted(offered.asked):
            peer = self._handshake.members[name].peer
            if not self._push(peer, Packet(kind="offer", fields=fields)):
                self._evict(name, "its connection is gone")

    def _broadcast(self) -> None:
        assert self._handshake.round is not None, "nothing to send"
        version, names = self._handshake.round.version, sorted(self._handshake.round.ready)
        sent = False
        if names:
            start = time.perf_counter()
            try:
                members = [self._handshake.members[name] for name in names]
                self._outbox.send(version, members, self._push)
                packet = Packet(kind="sent", fields=self._outbox.sent(version))
                for member in members:
                    self._push(member.peer, packet)
                sent = True
                self._metrics["publish/broadcast_seconds"] = time.perf_counter() - start
                self._metrics["publish/rounds"] += 1
            except WeightsError as error:
                log.warning("publish of version %d to %s failed: %s", version, names, error)
        self._handshake.close_round(time.monotonic(), sent=sent)
