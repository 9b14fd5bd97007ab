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
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection

from asyncgrpo.errors import RewardError
from asyncgrpo.rewards.function import time_limit
from asyncgrpo.rewards.registry import Scores, load_rewards, lost_scores
from asyncgrpo.settings.reward import RewardSettings
from asyncgrpo.types import Prompt

MAX_TRIES = 2
Settings = Mapping[str, RewardSettings]  # by block, as in Config.rewards


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
    while True:
        try:
            job = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        pipe.send(judge.verdict(job, nullcontext()))  # the pool keeps the time


class _Worker:
    """One process and the job it works on."""

    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.since = 0.0

    def give(self, job: Job, now: float) -> None:
        self.job, self.since = job, now
        self.pipe.send(job)

    def end(self) -> None:
        self.process.kill()
        self.process.join(1.0)
        self.pipe.close()


class JudgePool:
    """As InlineJudge, over `reward.workers` processes, each with one job at a time."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._timeout_seconds = settings[""].timeout_seconds
        self._workers = [_Worker(settings) for _ in range(settings[""].workers)]
        self._queue: deque[Job] = deque()
        self._tries: dict[str, int] = {}

    def submit(self, job: Job) -> None:
        self._queue.append(job)
        self._feed()

    def done(self) -> list[Verdict]:
        verdicts = []
        for index, worker in enumerate(self._workers):
            verdict = self._verdict_of(index, worker)
            if verdict is not None:
                self._tries.pop(verdict.lease_id, None)
                verdicts.append(verdict)
        self._feed()
        return verdicts

    def close(self) -> None:
        for worker in self._workers:
            worker.end()

    def _feed(self) -> None:
        for worker in self._workers:
            if worker.job is None and self._queue:
                try:
                    worker.give(self._queue.popleft(), self._clock())
                except OSError:
                    worker.since = self._clock()  # it died idle; _verdict_of replaces it

    def _verdict_of(self, index: int, worker: _Worker) -> Verdict | None:
        if worker.job is None:
            return None
        try:
            if worker.pipe.poll():
                verdict: Verdict = worker.pipe.recv()
                worker.job = None
                return verdict
        except (EOFError, OSError):
            return self._replace(index, worker, "the reward worker died")
        if self._clock() - worker.since > self._timeout_seconds:
            return self._replace(
                index,
                worker,
                f"no score within reward.timeout_seconds={self._timeout_seconds:g}",
            )
        return None

    def _replace(self, index: int, worker: _Worker, reason: str) -> Verdict | None:
        """Starts a new worker; the job is tried again, or fails when it had its tries."""
        job = worker.job
        assert job is not None, "only working workers are replaced"
        seconds = self._clock() - worker.since
        worker.end()
        self._workers[index] = _Worker(self._settings)
        self._tries[job.lease_id] = self._tries.get(job.lease_id, 0) + 1
        if self._tries[job.lease_id] < MAX_TRIES:
            self._queue.appendleft(job)
            return None
        scores = job.lost(self._settings)
        return Verdict(lease_id=job.lease_id, scores=scores, error=reason, seconds=seconds)


Judge = InlineJudge | JudgePool
