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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asyncgrpo.config import Config
from asyncgrpo.errors import AsyncGRPOError, WeightsError
from asyncgrpo.protocols import NamedTensors
from asyncgrpo.weights.inbox import EngineInbox, Inbox
from asyncgrpo.wire.codec import Packet
from asyncgrpo.wire.keys import Keys
from asyncgrpo.wire.sockets import DealerClient

log = logging.getLogger(__name__)
POLL_SECONDS, ALIVE_SECONDS = 0.003, 3.0


class CollectiveReceiver:
    """A protocols.WeightReceiver over ZeroMQ and a process group."""

    def __init__(
        self,
        config: Config,
        actor: str,
        address: str,
        keys: Keys | None = None,
        inbox: Inbox | EngineInbox | None = None,
    ) -> None:
        """inbox: where weights arrive if not in this process."""
        has_children = config.actor.tensor_parallel > 1  # who load the weights
        self._inbox = inbox or Inbox(config.weights, for_children=has_children)
        self._actor, self._address, self._keys = actor, address, keys
        self._is_member = False
        self._received: int | None = None  # version that is here, not yet compared
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
        return None if self._staged is None else (self._staged, self._inbox.tensors)

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
        if self._is_member and now - self._alive_at > ALIVE_SECONDS:
            self._alive_at = now
            client.tell(Packet(kind="alive", fields={"actor": self._actor}))

    def _join(self, client: DealerClient) -> None:
        fields = {"actor": self._actor, "ranks": self._inbox.num_ranks}
        client.post(Packet(kind="join", fields=fields))

    def _on_joined(self, client: DealerClient, packet: Packet) -> None:
        self._inbox.prepare(packet.fields)
        self._is_member = True
        self._on_sleep(client, packet)

    def _on_offer(self, client: DealerClient, packet: Packet) -> None:
        can = not self._busy and self._staged is None and self._is_member
        fields = {"actor": self._actor, "round": packet.fields["round"]}
        client.tell(Packet(kind="ready" if can else "later", fields=fields))
        if not can and not self._busy:
            self._outbox.put(Packet(kind="free", fields={"actor": self._actor}))

    def _on_go(self, client: DealerClient, packet: Packet) -> None:
        self._arrive(self._inbox.receive, packet)

    def _on_sent(self, client: DealerClient, packet: Packet) -> None:
        fields = packet.fields
        if "path" in fields:
            self._arrive(self._inbox.read, packet)
        if self._received != fields["version"]:
            return  # a part of it did not arrive
        self._received = None
        if self._digests == fields["digests"]:
            self._staged = fields["version"]
        else:  # never shown to the engine; the learner names the tensors and rejects this actor
            self.loaded(fields["version"], 0.0, [])

    def _arrive(self, take: Callable[[Mapping[str, Any]], list[int]], packet: Packet) -> None:
        version, start = packet.fields["version"], time.perf_counter()
        try:
            self._digests = take(packet.fields)
        except WeightsError as error:
            log.warning("version %d did not arrive: %s", version, error)
            return
        self._received, self._copy_seconds = version, time.perf_counter() - start

    def _on_sleep(self, client: DealerClient, packet: Packet) -> None:
        self._wants_sleep, self._said_asleep = packet.fields["asleep"], False

    def _on_rejoin(self, client: DealerClient, packet: Packet) -> None:
        log.warning("evicted from publishing; joining again")
        self._on_sleep(client, packet)  # of another learner than the one that said so, maybe
        self._join(client)

    def _on_reject(self, client: DealerClient, packet: Packet) -> None:
        raise WeightsError(packet.fields["reason"])
