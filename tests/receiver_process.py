"""An actor that holds two small matrices instead of a model; run by test_weights.py.

It says "live VERSION" when a version was swapped in, "error ..." when it was refused, and "asleep"
or "awake" when the learner takes or leaves the GPU.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from asyncgrpo.config import from_mapping
from asyncgrpo.errors import EngineError, WeightsError
from asyncgrpo.rundir import RunDir
from asyncgrpo.settings.learner import WeightSettings
from asyncgrpo.weights.collective import WeightGroup
from asyncgrpo.weights.inbox import EngineInbox, Fields, Inbox
from asyncgrpo.weights.proof import canary_prompts
from asyncgrpo.weights.receiver import CollectiveReceiver
from asyncgrpo.wire.keys import Keys, read_keys

VOCAB = 32
TRANSFER_SECONDS = 600.0  # no test waits for a broadcast to be given up


def logprobs(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 [canaries, VOCAB]: a one-layer language model of the last prompt token."""
    last = torch.tensor([prompt[-1] for prompt in canary_prompts(VOCAB)])
    return torch.log_softmax(weights["embed"][last] @ weights["head"].T, dim=-1)


def tampered(broadcast):
    """Somebody on the way changes one bit of every version but the first."""
    received = []

    def changed(group, buckets, then):
        pieces = list(buckets)
        received.append(pieces)

        def bad(bucket):
            if bucket is pieces[-1]:
                bucket[-1] ^= len(received) > 1
            then(bucket)

        broadcast(group, pieces, bad)

    return changed


def keys_of_the_environment() -> Keys | None:
    encrypted = "ASYNCGRPO_CLIENT_KEYS" in os.environ
    config = from_mapping({"launch": {"encrypt": encrypted}})
    return read_keys(RunDir(path=Path(), config=config, endpoints=None), "client")


class BrokenInbox(Inbox):
    """That of a process of an engine which ends, or of whose bytes some change."""

    def __init__(self, settings: WeightSettings, fault: str) -> None:
        super().__init__(settings)
        self._fault, self._count = fault, 0

    def receive(self, go: Fields) -> list[int]:
        digests = super().receive(go)
        self._count += 1
        if self._count > 1 and self._fault == "engine_ends":
            raise EOFError
        if self._count > 1 and self._fault == "engine_differs":
            digests[1] ^= 1
        return digests


def receive(
    name: str, address: str, fault: str, says: Connection, environment: dict[str, str]
) -> None:
    """The life of an actor, in a process of its own; fault: what goes wrong there, or "none"."""
    os.environ.update(environment)
    if fault == "die_in_broadcast":
        WeightGroup.broadcast = lambda group, buckets, then: os.kill(os.getpid(), signal.SIGKILL)
    if fault == "tampered":
        WeightGroup.broadcast = tampered(WeightGroup.broadcast)
    config = from_mapping({"weights": {"transfer_timeout_seconds": TRANSFER_SECONDS}})
    inbox, inboxes = None, []
    if fault.startswith("engine"):
        ends = [Pipe(), Pipe()]
        inboxes = [Inbox(config.weights), BrokenInbox(config.weights, fault)]
        for each, (_, theirs) in zip(inboxes, ends, strict=True):
            work = (theirs, torch.device("cpu"))
            threading.Thread(target=each.serve, args=work, daemon=True).start()
        inbox = EngineInbox([ours for ours, _ in ends], 120)
    receiver = CollectiveReceiver(config, name, address, keys_of_the_environment(), inbox)
    held: dict[str, torch.Tensor] = {}
    is_asleep = False
    while True:
        try:
            receiver.check()
        except (EngineError, WeightsError) as error:
            says.send(f"error {error}")
            return
        staged = receiver.staged()  # first: it came after the word to wake up
        wanted = receiver.wants_sleep(is_asleep)
        may_change = fault != "sleepless" and (staged is None or not wanted)
        if wanted != is_asleep and may_change:
            is_asleep = wanted
            says.send("asleep" if is_asleep else "awake")
        assert not (is_asleep and staged), "weights came while the engine sleeps"
        if staged is None:
            time.sleep(0.001)
            continue
        version, tensors = staged
        tensors = inboxes[version % 2].tensors if inboxes else tensors
        if fault == "stale_engine" and held:
            list(tensors)  # takes them, and goes on with the old ones
        else:
            held = {key: tensor.clone() for key, tensor in tensors}
        if fault == "bit_flip" and version > 0:
            receiver._digests[1] ^= 1
        tokens = logprobs(held).argmax(-1).tolist()
        values = logprobs(held)[range(len(tokens)), tokens].tolist()
        receiver.loaded(version, 0.0, list(zip(tokens, values, strict=True)))
        says.send(f"live {version}")
