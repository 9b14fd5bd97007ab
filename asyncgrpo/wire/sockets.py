"""ZeroMQ, and the only place that imports it: a ROUTER server and DEALER clients.

A client numbers its requests and repeats those that stay unanswered; the server remembers the
last answers per client, so a request takes effect once, however often it arrives.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable

import zmq

from asyncgrpo.errors import ConfigError, PeerTimeout, WireError
from asyncgrpo.wire.codec import Packet, decode, encode

HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS, RECONNECT_MS = 1000, 10_000, 50
RESEND_SECONDS = 3.0
REMEMBERED_ANSWERS = 256


def _prepare(socket: zmq.Socket[bytes]) -> None:
    socket.linger = 0  # never hang at exit for a peer that is gone
    socket.sndhwm = socket.rcvhwm = 0  # at a high-water mark ROUTER drops silently; credits bound
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


class Server:
    """A bound ROUTER. Peers are named by their identity, e.g. "actor-0.17" (name.incarnation)."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        _prepare(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a lost peer says so
        self._answers: dict[str, OrderedDict[int, Packet | None]] = {}
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"cannot listen on {address}: {error}; choose another port in [launch] or 0 for any"
            ) from None

    def receive(self, timeout_seconds: float) -> list[tuple[str, Packet]]:
        """New requests of all peers; garbage is refused to its sender, repeats are re-answered."""
        requests: list[tuple[str, Packet]] = []
        wait_ms = max(0, int(timeout_seconds * 1000))
        while self._socket.poll(wait_ms):
            wait_ms = 0
            peer, *frames = self._socket.recv_multipart()
            name = peer.decode("utf-8", "replace")
            try:
                packet = decode(frames)
            except WireError as error:
                self.push(name, Packet(kind="refused", fields={"reason": str(error)}))
                continue
            if not self._answered_before(name, packet):
                requests.append((name, packet))
        return requests

    def answer(self, peer: str, packet: Packet) -> bool:
        """Answers the request packet.request_id; small answers are remembered for a repeat.

        False when the peer's connection is gone.
        """
        answers = self._answers.setdefault(peer, OrderedDict())
        if packet.arrays:  # large; such requests (take) are idempotent in the buffer itself
            answers.pop(packet.request_id, None)
        else:
            answers[packet.request_id] = packet
        while len(answers) > REMEMBERED_ANSWERS:
            answers.popitem(last=False)
        return self.push(peer, packet)

    def push(self, peer: str, packet: Packet) -> bool:
        """Sends without being asked; False when the peer's connection is gone."""
        try:
            self._socket.send_multipart([peer.encode(), *encode(packet)])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def forget(self, peer: str) -> None:
        """Drops what is remembered of a peer that is gone for good."""
        self._answers.pop(peer, None)

    def close(self) -> None:
        self._socket.close()

    def _answered_before(self, peer: str, packet: Packet) -> bool:
        if packet.request_id == 0:
            return False
        answers = self._answers.setdefault(peer, OrderedDict())
        if packet.request_id not in answers:
            answers[packet.request_id] = None  # being worked on
            return False
        known = answers[packet.request_id]
        if known is not None:
            self.push(peer, known)
        return True


class DealerClient:
    """A protocols.Client over a DEALER socket. `name` is the role, e.g. "actor-0"."""

    def __init__(
        self, address: str, name: str, peer: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.identity = f"{name}.{os.getpid()}"
        self._peer, self._clock = f"{peer} at {address}", clock
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        _prepare(self._socket)
        self._socket.setsockopt(zmq.IDENTITY, self.identity.encode())
        self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.connect(address)
        self._unanswered: dict[int, tuple[float, Packet]] = {}
        self._held_back: list[Packet] = []
        self._last_id = 0

    def post(self, packet: Packet) -> int:
        self._last_id += 1
        numbered = Packet(
            kind=packet.kind, request_id=self._last_id, fields=packet.fields, arrays=packet.arrays
        )
        self._unanswered[self._last_id] = (self._clock(), numbered)
        self._socket.send_multipart(encode(numbered))
        return self._last_id

    def tell(self, packet: Packet) -> None:
        """Sends something that needs no answer and is not repeated."""
        self._socket.send_multipart(encode(packet))

    def poll(self, timeout_seconds: float) -> list[Packet]:
        arrived, self._held_back = self._held_back, []
        wait_ms = 0 if arrived else max(0, int(timeout_seconds * 1000))
        while self._socket.poll(wait_ms):
            wait_ms = 0
            packet = decode(self._socket.recv_multipart())
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
        while (left := end - self._clock()) > 0:
            for answer in self.poll(min(left, 0.5)):
                if answer.request_id == request:
                    self._held_back = others + self._held_back
                    return answer
                others.append(answer)
            meanwhile()
        self._unanswered.pop(request, None)
        self._held_back = others + self._held_back
        raise PeerTimeout(self._peer, packet.kind, timeout_seconds)

    def close(self) -> None:
        self._socket.close()

    def _resend(self) -> None:
        now = self._clock()
        for request, (sent, packet) in self._unanswered.items():
            if now - sent > RESEND_SECONDS:
                self._unanswered[request] = (now, packet)
                self._socket.send_multipart(encode(packet))
