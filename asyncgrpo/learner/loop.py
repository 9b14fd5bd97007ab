"""The learner loop: take a shard, update, publish, tell; once per step on every rank.

Consumes: shards and evaluation reports (buffer).
Produces: optimizer updates, published weights (rank 0), rows of metrics (rank 0).
Waits for: the batch of the next step; the buffer answers when enough groups have arrived.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from asyncgrpo.config import Config
from asyncgrpo.errors import DataError
from asyncgrpo.learner import ranks
from asyncgrpo.learner.update import PolicyUpdater
from asyncgrpo.observe.exporter import Exporter
from asyncgrpo.observe.recorder import RunRecorder
from asyncgrpo.protocols import Client, WeightSender
from asyncgrpo.settings.reward import EvalSettings
from asyncgrpo.wire.codec import Packet, shard_from

log = logging.getLogger(__name__)
STOP_SECONDS = 1.0
CALL_SECONDS = 60.0  # for answers that the buffer gives at once
OWN_TIMES = ("wait_seconds", "train_seconds", "step_seconds")  # in which ranks differ


class Learner:
    """One rank. `sender` and `recorder` exist on rank 0 only."""

    def __init__(
        self,
        config: Config,
        *,
        updater: PolicyUpdater,
        client: Client,
        sender: WeightSender | None,
        recorder: RunRecorder | None,
        exporter: Exporter,
        stopping: Callable[[], bool] = lambda: False,
        add_to_checkpoint: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """exporter: gets what a rank alone knows. stopping: whether the run is to end early.

        add_to_checkpoint: puts more files into the folder of each.
        """
        self._config, self._updater, self._client = config, updater, client
        self._sender, self._recorder, self._exporter = sender, recorder, exporter
        self._stopping, self._add_to_checkpoint = stopping, add_to_checkpoint
        self._is_sharded = config.learner.parallel == "fsdp"
        self._sleeps = config.actor.sleep
        self._asked_to_stop = float("-inf")  # when
        self._published = -1
        self._evals = config.evals
        longest = max((block.timeout_seconds for block in self._evals), default=0.0)
        self._eval_seconds = longest + CALL_SECONDS

    def run(self) -> bool:
        """All steps, with an evaluation before, in between and after; from the newest checkpoint.

        False when it was stopped early: then the last step is saved and can be gone on from.
        DataError at the end when the prompts were used up before the first step.
        """
        version = self._updater.restore()
        self._client.call(Packet(kind="begin", fields={"step": version}), CALL_SECONDS)
        if self._recorder is not None:
            self._recorder.begin(version)
        self._publish(version, is_first=True)
        if version == 0:
            self._evaluate(0, self._evals)
        self._updater.weights().help()
        publish_every = self._config.weights.publish_every
        for step in range(version, self._config.run.max_steps):
            start = time.perf_counter()
            answer = self._take(step)
            if answer.kind == "stopped":
                return self._stop(version)
            if answer.kind == "exhausted":
                log.info("the prompts are used up after %d steps", step)
                break
            shard = shard_from(answer)
            taken = time.perf_counter()
            row = self._updater.update(shard, self._release)
            row["train_seconds"] = time.perf_counter() - taken
            row["wait_seconds"] = taken - start
            version = step + 1
            if version % publish_every == 0:
                self._publish(version)
                last = version - publish_every
                due = [b for b in self._evals if b.every and version // b.every > last // b.every]
                self._evaluate(version, due)
                self._updater.weights().help()
            row["step_seconds"] = time.perf_counter() - start
            row.update(step=step, version=version)
            self._exporter.observe("token_staleness", shard.staleness)
            self._tell(step, row)
            every = self._config.checkpoint.every
            if every and version % every == 0:
                self._updater.checkpoint(version, self._add_to_checkpoint)
            self._updater.export(version)
        self._finish(version)
        if version == 0 and self._recorder is not None:  # a rank that fails early ends the others
            raise DataError(
                "nothing was trained: the prompts are used up, and fewer groups are left than "
                f"launch.learners and algo.minibatches need ({self._config.min_groups}); look at "
                "what was filtered or failed (`asyncgrpo traj stats`), give more data or "
                "data.epochs, or set algo.drop_uniform_groups = false"
            )
        return True

    def _take(self, step: int) -> Packet:
        """The answer to "take": a shard, exhausted, or stopped."""
        fields = {"step": step, "rank": ranks.rank(), "world_size": ranks.world_size()}
        seconds = self._config.buffer.take_timeout_seconds
        packet = Packet(kind="take", fields=fields)
        self._pass_on_stop()
        if self._sender is None:  # until rank 0 has its shard; then there is one for every rank
            self._updater.weights().help()
        answer = self._client.call(packet, seconds, meanwhile=self._while_waiting)
        if self._sender is not None and (self._is_sharded or self._sleeps):
            if answer.kind == "shard":  # else they do not change any more
                self._sender.release()
            self._updater.weights().help()
        if self._sleeps:
            ranks.meet()
        return answer

    def _while_waiting(self) -> None:
        """An actor that joins now gets weights: the batch may need it."""
        self._pass_on_stop()
        if self._sender is not None:
            self._sender.serve()

    def _pass_on_stop(self) -> None:
        """The buffer, which all ranks ask for their shards, decides after which step they stop.

        Said again and again: a buffer that was restarted does not know it.
        """
        now = time.monotonic()
        if self._stopping() and now - self._asked_to_stop > STOP_SECONDS:
            self._asked_to_stop = now
            self._client.post(Packet(kind="stop"))

    def _stop(self, version: int) -> bool:
        log.info("stopping after %d steps", version)
        self._updater.checkpoint(version, self._add_to_checkpoint)
        self._updater.save()
        return False

    def _publish(self, version: int, *, is_first: bool = False) -> None:
        """Then the other ranks are to `help`."""
        canaries, weights = self._updater.canary_logprobs(), self._updater.weights()
        if self._sleeps:  # then engines wake
            ranks.meet()
        if self._sender is not None:
            self._sender.publish(version, weights, canaries)
            if is_first:
                self._sender.wait_for_actors(
                    self._config.launch.actors, self._config.launch.start_timeout_seconds
                )
        self._published = version

    def _release(self) -> None:
        if self._sender is not None:
            self._sender.release()

    def _tell(self, step: int, row: dict[str, float]) -> None:
        if self._sender is None or self._recorder is None:
            self._exporter.show({name: row[name] for name in OWN_TIMES})
            return
        covered = self._updater.checkpoints.covered
        advantages = self._updater.advantages.tobytes()
        fields = {"step": step, "world_size": ranks.world_size(), "covered": covered}
        packet = Packet(kind="trained", fields={**fields, "advantages": advantages})
        summary = self._client.call(packet, CALL_SECONDS).fields
        self._recorder.row({**row, **self._sender.metrics()}, summary)

    def _evaluate(self, version: int, blocks: Sequence[EvalSettings]) -> None:
        """Asks the actors to answer the held-out prompts with this version; waits for a start."""
        names = [block.name for block in blocks]
        if self._sender is None or not names:
            return
        fields = {"version": version, "blocks": names}
        packet = Packet(kind="evaluate", fields=fields)
        self._client.call(packet, self._eval_seconds, self._sender.serve)

    def _finish(self, version: int) -> None:
        self._updater.save()
        if self._published != version:
            self._publish(version)
        if self._sender is None or self._recorder is None:
            self._updater.weights().help()
            return
        self._sender.settle(self._eval_seconds)
        self._evaluate(version, self._evals)
        answer = self._client.call(Packet(kind="results"), self._eval_seconds, self._sender.serve)
        self._updater.weights().help()
        summary = self._client.call(Packet(kind="summary"), CALL_SECONDS).fields
        self._recorder.finish(answer.fields["reports"], summary)
