"""Reward workers: processes that score finished groups, so that a slow judge never stalls.

Consumes: submit(job). Produces: done() -> scored or failed jobs. A worker that is too slow or
dies is replaced; its job is tried once more, then it fails with the reason, or scores what
reward.on_error says.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from asyncgrpo.errors import RewardError
from asyncgrpo.rewards.function import time_limit
from asyncgrpo.rewards.registry import Scores, load_rewards, lost_scores
from asyncgrpo.settings.reward import RewardSettings
from asyncgrpo.types import Prompt

Settings = Mapping[str, RewardSettings]  # by block, as in Config.rewards
START_SECONDS = 60.0  # more for the first score of a worker: its imports


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Texts of one group to be scored."""

    lease_id: str
    prompt: Prompt
    texts: tuple[str, ...]
    block: str = ""  # the evaluation whose reward scores them; "" = training's

    def lost(self, settings: Settings) -> Scores | None:
        """What reward.on_error gives it without scores."""
        return lost_scores(settings[self.block], self.prompt, len(self.texts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Scores, or why there are none; both when reward.on_error gives the failed calls a score.

    `contract` tells a broken function from a lost worker.
    """

    lease_id: str
    scores: Scores | None
    error: str = ""
    contract: bool = False
    seconds: float = 0.0


class InlineJudge:
    """Scores in the caller's process, in its main thread with a time limit: for `--serial`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._rewards = {block: load_rewards(its) for block, its in settings.items()}
        self._verdicts: list[Verdict] = []

    def submit(self, job: Job) -> None:
        """Queues a group."""
        limit = time_limit("the reward", self._settings[""].timeout_seconds)
        self._verdicts.append(self.verdict(job, limit))

    def done(self) -> list[Verdict]:
        """Verdicts since the last call; never waits."""
        verdicts, self._verdicts = self._verdicts, []
        return verdicts

    def close(self) -> None:
        """Ends its workers, if it has any."""

    def verdict(self, job: Job, limit: AbstractContextManager[None]) -> Verdict:
        """Scores a group at once."""
        start, scores = time.perf_counter(), None
        try:
            with limit:
                scores = self._rewards[job.block].score(job.prompt, job.texts)
            error = scores.errors[0] if scores.errors else ""
        except RewardError as failure:
            scores, error = job.lost(self._settings), str(failure)
        return Verdict(
            lease_id=job.lease_id,
            scores=scores,
            error=error,
            contract=bool(error),
            seconds=time.perf_counter() - start,
        )


def _work(pipe: Connection, settings: Settings) -> None:
    """The worker's main loop; it ends when the actor's end of the pipe is gone."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm sends it to the actor's children, too
    judge = InlineJudge(settings)
    with suppress(OSError):
        pipe.send(None)  # ready: the time of a score counts from here
    while True:
        try:
            job = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        pipe.send(judge.verdict(job, nullcontext()))  # the pool keeps the time


class _Worker:
    """One process, and the job it works on."""

    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.is_ready, self.is_retry, self.since = False, False, 0.0

    def give(self, job: Job, is_retry: bool) -> None:
        self.job, self.is_retry, self.since = job, is_retry, time.monotonic()
        with suppress(OSError):  # it died idle: the pool finds out
            self.pipe.send(job)

    def said(self) -> Verdict | None:
        """What it has to say about its job, if anything; OSError or EOFError when it is dead."""
        if not self.pipe.poll():
            return None
        verdict: Verdict | None = self.pipe.recv()
        if verdict is None:
            self.is_ready, self.since = True, time.monotonic()
        return verdict

    def end(self) -> None:
        self.process.kill()
        self.process.join(1.0)
        self.pipe.close()


class JudgePool:
    """As InlineJudge, over `reward.workers` processes, each with one job at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._timeout_seconds = settings[""].timeout_seconds
        self._workers = [_Worker(settings) for _ in range(settings[""].workers)]
        self._queue: deque[tuple[Job, bool]] = deque()  # with whether it was tried before

    def submit(self, job: Job) -> None:
        self._queue.append((job, False))
        self._feed()

    def done(self) -> list[Verdict]:
        verdicts = []
        for index, worker in enumerate(self._workers):
            if (job := worker.job) is None:
                continue
            reason = ""
            try:
                if verdict := worker.said():
                    verdicts.append(verdict)
                    worker.job = None
                    continue
            except (EOFError, OSError):
                reason = "the reward worker died"
            seconds, limit = time.monotonic() - worker.since, self._timeout_seconds
            late = f"no score within reward.timeout_seconds={limit:g}"
            if not worker.is_ready:
                limit += START_SECONDS
                late = f"the reward worker was not ready within {limit:g} s: the imports hang"
            if seconds > limit:
                reason = reason or late
            if not reason:
                continue
            worker.end()
            self._workers[index] = _Worker(self._settings)
            if not worker.is_retry:
                self._queue.appendleft((job, True))
                continue
            lost = job.lost(self._settings)
            verdicts.append(
                Verdict(lease_id=job.lease_id, scores=lost, error=reason, seconds=seconds)
            )
        self._feed()
        return verdicts

    def close(self) -> None:
        for worker in self._workers:
            worker.end()

    def _feed(self) -> None:
        for worker in self._workers:
            if worker.job is None and self._queue:
                worker.give(*self._queue.popleft())


Judge = InlineJudge | JudgePool
