"""ZeroMQ, and the only place that imports it: a ROUTER server and DEALER clients.

A client numbers its requests and repeats those that stay unanswered; the server remembers the
last answers per client, so a request takes effect once, however often it arrives. With keys, both
sides prove theirs before a message passes. What is no message is counted and gets no answer: its
honest sender repeats it.
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import zmq

from asyncgrpo.errors import ConfigError, PeerTimeout, SchemaMismatch, WireError
from asyncgrpo.wire.codec import (
    MAX_ANSWER_FRAME_BYTES,
    MAX_REQUEST_FRAME_BYTES,
    Packet,
    decode,
    encode,
)
from asyncgrpo.wire.keys import Keys

log = logging.getLogger(__name__)
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS, RECONNECT_MS = 1000, 10_000, 50
RESEND_SECONDS = 3.0
REMEMBERED_ANSWERS, REMEMBERED_OF_ALL = 256, 1 << 15  # of a peer, and of all
# then the server's owner has its turn and answers, however much peers send: some 8 groups of 4k
MESSAGES_PER_TURN, BYTES_PER_TURN = 256, 1 << 19
UNREAD_REQUESTS, UNREAD_ANSWERS = 64, 4096  # per peer; beyond it waits, or counts as gone
NOTE_SECONDS = 1.0  # between two remarks on refused messages: a flood must not fill the log
DOMAIN = "asyncgrpo"
NOBLOCK, SNDMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)  # its own numbers take longer to combine


def _prepare(socket: zmq.Socket[bytes], max_frame_bytes: int, keys: Keys | None) -> None:
    socket.linger = 0  # never hang at exit for a peer that is gone
    socket.sndhwm = socket.rcvhwm = 0  # nobody blocks; credits bound what is under way
    socket.maxmsgsize = max_frame_bytes  # who announces more is cut off before it is allocated
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    if keys:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)


def _admit_only(client_key: bytes, context: zmq.Context[zmq.Socket[bytes]]) -> Any:
    from zmq.auth.thread import ThreadAuthenticator  # with asyncio: only where it is used

    doorkeeper = ThreadAuthenticator(context)
    only = SimpleNamespace(callback=lambda domain, key: key == client_key)
    doorkeeper.configure_curve_callback(DOMAIN, only)
    doorkeeper.start()
    return doorkeeper


class Server:
    """A bound ROUTER. Peers are named by their identity, e.g. "actor-0.17" (name.incarnation)."""

    def __init__(self, address: str, keys: Keys | None = None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()  # each with its own keys
        self._doorkeeper = _admit_only(keys.other, self._context) if keys else None
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        _prepare(self._socket, MAX_REQUEST_FRAME_BYTES, keys)
        self._socket.rcvhwm, self._socket.sndhwm = UNREAD_REQUESTS, UNREAD_ANSWERS
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a lost peer says so
        if keys:
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN.encode())
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without doorkeeper nobody enters
        # by peer and request; None: being worked on
        self._answers: OrderedDict[tuple[str, int], Packet | None] = OrderedDict()
        self.num_refused = 0  # messages that were no message, or a request that makes no sense
        self._noted_at = 0.0
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"cannot listen on {address}: {error}; choose another port in [launch] or 0 for any"
            ) from None

    def receive(self, timeout_seconds: float) -> list[tuple[str, Packet]]:
        """New requests of all peers, in fair turns; garbage is counted, repeats are re-answered."""
        requests: list[tuple[str, Packet]] = []
        wait_ms = max(0, int(timeout_seconds * 1000))
        left = BYTES_PER_TURN if self._socket.poll(wait_ms) else 0
        for _ in range(MESSAGES_PER_TURN):
            if left <= 0:
                break
            try:
                peer, *frames = self._socket.recv_multipart(NOBLOCK)
            except zmq.Again:
                break
            left -= sum(map(len, frames))
            name = peer.decode("utf-8", "replace")
            try:
                packet = decode(frames, MAX_REQUEST_FRAME_BYTES)
            except WireError as error:
                self._refuse(name, error)
                continue
            if not self._answered_before(name, packet):
                requests.append((name, packet))
        return requests

    def answer(self, peer: str, packet: Packet) -> bool:
        """Answers the request packet.request_id; small answers are remembered for a repeat.

        False when the peer's connection is gone.
        """
        if packet.frames:  # large; such requests (take) are idempotent in the buffer itself
            self._answers.pop((peer, packet.request_id), None)
        else:
            self._answers[peer, packet.request_id] = packet
        return self.push(peer, packet)

    def push(self, peer: str, packet: Packet) -> bool:
        """Sends without being asked; False when the peer is gone, or reads nothing any more."""
        self.num_refused += packet.kind == "refused"
        *first, last = [peer.encode(), *encode(packet)]
        try:
            for frame in first:
                self._socket.send(frame, NOBLOCK | SNDMORE)
            self._socket.send(last, NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def close(self) -> None:
        """Frees the address."""
        self._socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.stop()
        self._context.term()

    def _refuse(self, peer: str, error: WireError) -> None:
        """Counts; only another version is told, and not more often than the log: no amplifier."""
        self.num_refused += 1
        now = time.monotonic()
        if now - self._noted_at < NOTE_SECONDS:
            return
        self._noted_at = now
        log.warning("refused from %.40r: %s (%d messages so far)", peer, error, self.num_refused)
        if isinstance(error, SchemaMismatch):
            self.push(peer, Packet(kind="refused", fields={"reason": str(error)}))

    def _answered_before(self, peer: str, packet: Packet) -> bool:
        if packet.request_id == 0:
            return False
        request = peer, packet.request_id
        if request not in self._answers:
            self._answers[request] = None
            self._answers.pop((peer, packet.request_id - REMEMBERED_ANSWERS), None)
            while len(self._answers) > REMEMBERED_OF_ALL:
                self._answers.popitem(last=False)
            return False
        if (known := self._answers[request]) is not None:
            self.push(peer, known)
        return True


class DealerClient:
    """A protocols.Client over a DEALER socket. `name` is the role, e.g. "actor-0"."""

    def __init__(
        self,
        address: str,
        name: str,
        peer: str,
        keys: Keys | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity = f"{name}.{os.getpid()}"
        self._peer, self._clock = f"{peer} at {address}", clock
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        _prepare(self._socket, MAX_ANSWER_FRAME_BYTES, keys)
        self._socket.setsockopt(zmq.IDENTITY, self.identity.encode())
        if keys:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.other)
        self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.connect(address)
        self._unanswered: dict[int, tuple[float, Packet]] = {}
        self._held_back: list[Packet] = []
        self._last_id = 0

    def post(self, packet: Packet) -> int:
        self._last_id += 1
        numbered = replace(packet, request_id=self._last_id)
        self._send(numbered)
        self._unanswered[self._last_id] = (self._clock(), numbered)
        return self._last_id

    def tell(self, packet: Packet) -> None:
        """Sends something that needs no answer and is not repeated."""
        self._send(packet)

    def poll(self, timeout_seconds: float) -> list[Packet]:
        arrived, self._held_back = self._held_back, []
        wait_ms = 0 if arrived else max(0, int(timeout_seconds * 1000))
        while self._socket.poll(wait_ms):
            wait_ms = 0
            try:
                packet = decode(self._socket.recv_multipart())
            except SchemaMismatch:
                raise
            except WireError as error:
                log.warning("ignored from %s: %s", self._peer, error)
                continue  # what it answered is asked again
            if packet.request_id and self._unanswered.pop(packet.request_id, None) is None:
                continue  # a second answer to a repeated request
            if packet.kind == "refused":
                raise WireError(f"{self._peer} refused: {packet.fields.get('reason')}")
            arrived.append(packet)
        self._resend()
        return arrived

    def call(
        self,
        packet: Packet,
        timeout_seconds: float,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Packet:
        request = self.post(packet)
        end = self._clock() + timeout_seconds
        others: list[Packet] = []
        answer: Packet | None = None
        while answer is None and (left := end - self._clock()) > 0:
            for arrived in self.poll(min(left, 0.5)):
                if arrived.request_id == request:
                    answer = arrived
                else:
                    others.append(arrived)
            if answer is None:
                meanwhile()
        self._held_back = others
        if answer is None:
            del self._unanswered[request]
            raise PeerTimeout(self._peer, packet.kind, timeout_seconds)
        return answer

    def close(self) -> None:
        self._socket.close()

    def _resend(self) -> None:
        now = self._clock()
        for request, (sent, packet) in self._unanswered.items():
            if now - sent > RESEND_SECONDS:
                self._unanswered[request] = (now, packet)
                self._send(packet)

    def _send(self, packet: Packet) -> None:
        frames = encode(packet, MAX_REQUEST_FRAME_BYTES)
        with suppress(zmq.Again):  # no connection, for our keys were refused: never wait for one
            self._socket.send_multipart(frames, zmq.NOBLOCK)
