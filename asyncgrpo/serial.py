"""All roles in one process in a fixed order (`--serial`): the same parts, exactly repeatable.

While the learner waits for a batch, the actor takes turns until the buffer answers. Packets go
through the same codec as between processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from asyncgrpo.actor.judge import InlineJudge
from asyncgrpo.actor.loop import ActorLoop
from asyncgrpo.actor.process import load_tokenizer, load_toy_engine, stop_token_ids, vocab_size
from asyncgrpo.buffer.core import BufferCore, Replies
from asyncgrpo.buffer.ledger import FILE as LEDGER_FILE
from asyncgrpo.buffer.ledger import Ledger, put_back
from asyncgrpo.data.prompts import PromptSource, open_prompts
from asyncgrpo.errors import PeerTimeout, WireError
from asyncgrpo.learner.loop import Learner
from asyncgrpo.learner.saved import FOLDER, newest
from asyncgrpo.learner.update import PolicyUpdater
from asyncgrpo.observe.exporter import Exporter
from asyncgrpo.observe.recorder import RunRecorder
from asyncgrpo.observe.trajectories import TrajectoryWriter
from asyncgrpo.rundir import RunDir
from asyncgrpo.weights.local import LocalLink
from asyncgrpo.wire.codec import Packet, decode, encode


class LocalClient:
    """A protocols.Client of the buffer of Others; `turns`: what the other roles do meanwhile."""

    def __init__(self, others: Others, name: str, turns: Callable[[], None]) -> None:
        self._others, self._name, self._turns = others, name, turns
        self._last_id = 0

    def post(self, packet: Packet) -> int:
        self._last_id += 1
        self._others.send(self._name, replace(packet, request_id=self._last_id))
        return self._last_id

    def poll(self, timeout_seconds: float) -> list[Packet]:
        arrived = self._others.take(self._name)
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
            self._turns()
        raise PeerTimeout("the buffer", packet.kind, timeout_seconds)


class Others:
    """Buffer and actor: all of a serial run but the learner.

    They are made anew at each checkpoint, from the ledger, as they are when a run goes on: so a run
    that was stopped and one that was not make the same steps to the last bit.
    """

    def __init__(
        self, run: RunDir, prompts: PromptSource, observe: Callable[[str, Sequence[float]], None]
    ) -> None:
        self._run, self._prompts, self._observe = run, prompts, observe
        self._samples = TrajectoryWriter(run.path, run.config)
        self._ledger = Ledger(run.path)
        self._tokenizer = load_tokenizer(run.config.model.path)
        self.link = LocalLink(run.config)
        self._begin()
        self._samples.rewind(self._core.step, self._ledger.state)

    def _begin(self) -> None:
        config, tokenizer = self._run.config, self._tokenizer
        self._inboxes: dict[str, list[Packet]] = {}
        self._core = BufferCore(
            config,
            self._prompts,
            self._samples,
            self._ledger,
            time.monotonic(),
            rewind=partial(self._samples.rewind, state=self._ledger.state),
        )
        self.link.forget()
        self._actor = ActorLoop(
            "actor-0",
            config,
            engine=load_toy_engine(config, stop_token_ids(config, tokenizer)),
            tokenizer=tokenizer,
            vocab_size=vocab_size(config.model.path),
            client=LocalClient(self, "actor-0", lambda: None),
            receiver=self.link,
            judge=InlineJudge(config.rewards),
            observe=self._observe,
        )

    def send(self, peer: str, packet: Packet) -> None:
        """Hands a packet to the buffer and keeps whatever comes back."""
        self._keep(self._core.handle(peer, decode(encode(packet)), time.monotonic()))

    def take(self, peer: str) -> list[Packet]:
        """Lets time pass for the buffer; what it has for one peer, oldest first."""
        self._keep(self._core.tick(time.monotonic()))
        return self._inboxes.pop(peer, [])

    def _keep(self, replies: Replies) -> None:
        self._ledger.commit()
        for peer, packet in replies:
            self._inboxes.setdefault(peer, []).append(decode(encode(packet)))

    def take_turns(self) -> None:
        """One turn of the actor, while the learner waits."""
        self._actor.tick(0.0)

    def add_to_checkpoint(self, folder: Path) -> None:
        """Lets the actor finish what it is at, keeps the ledger, and begins anew."""
        self.send("serial", Packet(kind="stop"))
        while not self._actor.is_idle:
            self._actor.tick(0.0)
        self._ledger.copy_to(folder / LEDGER_FILE)
        self._begin()

    def close(self) -> None:
        """The ledger is complete."""
        self._ledger.close()


def run_serial(
    run: RunDir,
    prompts: PromptSource | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> bool:
    """Trains in this process, with the toy engine; goes on with the run directory's checkpoint.

    False when it was stopped early: then the last step is saved and can be gone on from.
    """
    config = run.config
    checkpoint = newest(run.path / FOLDER)
    if checkpoint is not None and (checkpoint / LEDGER_FILE).exists():
        put_back(checkpoint / LEDGER_FILE, run.path)
    exporter = Exporter("serial", 0, run.path)
    others = Others(run, prompts or open_prompts(config), exporter.observe)
    learner = Learner(
        config,
        updater=PolicyUpdater(config, run_dir=run.path),
        client=LocalClient(others, "learner-0", others.take_turns),
        sender=others.link,
        recorder=RunRecorder(run, exporter),
        exporter=exporter,
        stopping=stopping,
        add_to_checkpoint=others.add_to_checkpoint,
    )
    is_done = learner.run()
    others.close()
    return is_done
