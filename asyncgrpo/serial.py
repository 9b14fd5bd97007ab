"""All roles in one process in a fixed order (`--serial`): the same parts, exactly repeatable.

While the learner waits for a batch, the actor takes turns until the buffer answers. Packets go
through the same codec as between processes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial

from asyncgrpo.actor.judge import InlineJudge
from asyncgrpo.actor.loop import ActorLoop
from asyncgrpo.actor.process import load_tokenizer, load_toy_engine, stop_token_ids
from asyncgrpo.buffer.core import BufferCore, Replies
from asyncgrpo.buffer.ledger import Ledger
from asyncgrpo.data.prompts import PromptSource, open_prompts
from asyncgrpo.errors import PeerTimeout, WireError
from asyncgrpo.learner.loop import Learner
from asyncgrpo.learner.update import PolicyUpdater
from asyncgrpo.observe.exporter import Exporter
from asyncgrpo.observe.recorder import RunRecorder
from asyncgrpo.observe.trajectories import TrajectoryWriter
from asyncgrpo.rundir import RunDir
from asyncgrpo.weights.local import LocalLink
from asyncgrpo.wire.codec import Packet, decode, encode


class Hub:
    """Carries packets between local clients and a buffer core."""

    def __init__(self, core: BufferCore, ledger: Ledger, clock: Callable[[], float]) -> None:
        self._core, self._ledger, self._clock = core, ledger, clock
        self._inboxes: dict[str, deque[Packet]] = {}

    def inbox(self, peer: str) -> deque[Packet]:
        """Packets for one peer, oldest first."""
        return self._inboxes.setdefault(peer, deque())

    def send(self, peer: str, packet: Packet) -> None:
        """Hands a packet to the core and delivers whatever comes back."""
        self._deliver(self._core.handle(peer, decode(encode(packet)), self._clock()))

    def tick(self) -> None:
        """Lets time pass for the core."""
        self._deliver(self._core.tick(self._clock()))

    def _deliver(self, replies: Replies) -> None:
        self._ledger.commit()
        for peer, packet in replies:
            self.inbox(peer).append(decode(encode(packet)))


class LocalClient:
    """A protocols.Client on a Hub. `others` lets the other roles take a turn."""

    def __init__(self, hub: Hub, name: str, others: Callable[[], None]) -> None:
        self._hub, self._name, self._others = hub, name, others
        self._last_id = 0

    def post(self, packet: Packet) -> int:
        self._last_id += 1
        self._hub.send(
            self._name,
            Packet(
                kind=packet.kind,
                request_id=self._last_id,
                fields=packet.fields,
                arrays=packet.arrays,
            ),
        )
        return self._last_id

    def poll(self, timeout_seconds: float) -> list[Packet]:
        self._hub.tick()
        inbox = self._hub.inbox(self._name)
        arrived = list(inbox)
        inbox.clear()
        for packet in arrived:
            if packet.kind == "refused":
                raise WireError(f"the buffer refused: {packet.fields.get('reason')}")
        return arrived

    def call(
        self,
        packet: Packet,
        timeout_seconds: float,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Packet:
        request = self.post(packet)
        end = time.monotonic() + timeout_seconds
        while time.monotonic() < end:
            for answer in self.poll(0.0):
                if answer.request_id == request:
                    return answer
            meanwhile()
            self._others()
        raise PeerTimeout("the buffer", packet.kind, timeout_seconds)


def run_serial(run: RunDir, prompts: PromptSource | None = None) -> None:
    """Trains to the end in this process, with the toy engine."""
    config = run.config
    samples = TrajectoryWriter(run.path, config)
    ledger = Ledger(run.path)
    core = BufferCore(
        config,
        prompts or open_prompts(config),
        samples,
        ledger,
        time.monotonic(),
        rewind=partial(samples.rewind, state=ledger.state),
    )
    hub, link = Hub(core, ledger, time.monotonic), LocalLink(config)
    tokenizer = load_tokenizer(config.model.path)
    updater = PolicyUpdater(config, save_to=run.model_path, run_dir=run.path)
    exporter = Exporter("serial", 0, run.path)
    actor = ActorLoop(
        "actor-0",
        config,
        engine=load_toy_engine(config, stop_token_ids(config, tokenizer)),
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        client=LocalClient(hub, "actor-0", lambda: None),
        receiver=link,
        judge=InlineJudge(config.rewards),
        observe=exporter.observe,
    )
    learner = Learner(
        config,
        rank=0,
        world_size=1,
        updater=updater,
        client=LocalClient(hub, "learner-0", lambda: actor.tick(0.0)),
        sender=link,
        recorder=RunRecorder(run, exporter),
        observe=exporter.observe,
    )
    learner.run()
    ledger.close()
