"""The learner loop: take a shard, update, publish, tell; once per step on every rank.

Consumes: shards and evaluation reports (buffer).
Produces: optimizer updates, published weights (rank 0), rows of metrics (rank 0).
Waits for: the batch of the next step; the buffer answers when enough groups have arrived.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from asyncgrpo.config import Config, EvalSettings
from asyncgrpo.protocols import Client, NamedTensors, WeightSender
from asyncgrpo.types import Float32, Int32, Shard
from asyncgrpo.wire.codec import Packet, shard_from

log = logging.getLogger(__name__)
CALL_SECONDS = 60.0  # for answers that the buffer gives at once
OWN_TIMES = ("wait_seconds", "train_seconds", "step_seconds")  # in which ranks differ


class Updater(Protocol):
    """One rank's model and optimizer (learner/update.py)."""

    def update(self, shard: Shard) -> dict[str, float]:
        """One optimizer update from this rank's shard; metrics of the whole batch."""

    def weights(self) -> NamedTensors:
        """Present weights by their Hugging Face names."""

    def canary_logprobs(self) -> Float32:
        """float32 [NUM_CANARIES, V]: own log-probs after the canary prompts."""

    def save(self) -> None:
        """Writes the model and its tokenizer for everyone to load."""


class Recorder(Protocol):
    """Where rank 0 writes what happened (observe/recorder.py)."""

    def row(self, row: Mapping[str, float], summary: Mapping[str, Any]) -> None:
        """One step's numbers, with the buffer's summary of everyone else's."""

    def finish(self, reports: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
        """The end of the run; reports: of all evaluations, by version."""


class Learner:
    """One rank. `sender` and `recorder` exist on rank 0 only."""

    def __init__(
        self,
        config: Config,
        *,
        rank: int,
        world_size: int,
        updater: Updater,
        client: Client,
        sender: WeightSender | None,
        recorder: Recorder | None,
        show: Callable[[Mapping[str, float]], None] = lambda row: None,
        observe: Callable[[str, Int32], None] = lambda name, values: None,
    ) -> None:
        """show, observe: get what a rank alone knows, for its metrics endpoint."""
        self._config, self._rank, self._world_size = config, rank, world_size
        self._updater, self._client = updater, client
        self._sender, self._recorder = sender, recorder
        self._show, self._observe = show, observe
        self._published = -1
        self._evals = config.evals
        self._evaluated: dict[str, int] = {}  # block -> version of its last evaluation
        longest = max((block.timeout_seconds for block in self._evals), default=0.0)
        self._eval_seconds = longest + CALL_SECONDS
        self._summary: Mapping[str, Any] = {}

    def run(self) -> None:
        """All steps, with an evaluation before, in between and after."""
        version = 0
        self._publish(0)
        self._evaluate(0, self._evals)
        for step in range(self._config.run.max_steps):
            start = time.perf_counter()
            shard = self._take(step)
            if shard is None:
                log.info("the prompts are used up after %d steps", step)
                break
            taken = time.perf_counter()
            row = self._updater.update(shard)
            row["train_seconds"] = time.perf_counter() - taken
            row["wait_seconds"] = taken - start
            version = step + 1
            if version % self._config.weights.publish_every == 0:
                self._publish(version)
                self._evaluate_now_and_then(version)
            row["step_seconds"] = time.perf_counter() - start
            row.update(step=step, version=version)
            self._observe("token_staleness", shard.staleness)
            self._tell(step, row)
        self._finish(version)

    def _take(self, step: int) -> Shard | None:
        fields = {"step": step, "rank": self._rank, "world_size": self._world_size}
        seconds = self._config.buffer.take_timeout_seconds
        answer = self._client.call(Packet(kind="take", fields=fields), seconds)
        return None if answer.kind == "exhausted" else shard_from(answer)

    def _publish(self, version: int) -> None:
        if self._sender is None:
            return
        self._sender.publish(version, self._updater.weights(), self._updater.canary_logprobs())
        self._published = version
        if version == 0:
            self._sender.wait_for_actors(
                self._config.launch.actors, self._config.launch.start_timeout_seconds
            )

    def _tell(self, step: int, row: dict[str, float]) -> None:
        if self._sender is None or self._recorder is None:
            self._show({name: row[name] for name in OWN_TIMES})
            return
        answer = self._client.call(Packet(kind="trained", fields={"step": step}), CALL_SECONDS)
        self._summary = answer.fields
        self._recorder.row({**row, **self._sender.metrics()}, self._summary)

    def _evaluate_now_and_then(self, version: int) -> None:
        due = [
            block
            for block in self._evals
            if block.every
            and version // block.every > self._evaluated.get(block.name, 0) // block.every
        ]
        self._evaluate(version, due)

    def _evaluate(self, version: int, blocks: Sequence[EvalSettings]) -> None:
        """Asks the actors to answer the held-out prompts with this version; does not wait."""
        names = [block.name for block in blocks]
        if self._sender is None or not names:
            return
        self._evaluated.update(dict.fromkeys(names, version))
        fields = {"version": version, "blocks": names}
        self._client.call(Packet(kind="evaluate", fields=fields), self._eval_seconds)

    def _finish(self, version: int) -> None:
        self._updater.save()
        if self._sender is None or self._recorder is None:
            return
        if self._published != version:
            self._publish(version)
        self._sender.settle(self._eval_seconds)
        self._evaluate(version, self._evals)
        answer = self._client.call(Packet(kind="results"), self._eval_seconds)
        self._recorder.finish(answer.fields["reports"], self._summary)
