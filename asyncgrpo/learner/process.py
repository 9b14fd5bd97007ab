"""A learner rank's process: wires its model, the buffer and (on rank 0) the weights to one loop."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from asyncgrpo.config import Config
from asyncgrpo.errors import EXIT_DONE, EXIT_INTERRUPTED
from asyncgrpo.launch.memory_report import memory_explained
from asyncgrpo.learner import ranks
from asyncgrpo.learner.loop import Learner
from asyncgrpo.learner.update import PolicyUpdater
from asyncgrpo.observe.exporter import serve_metrics
from asyncgrpo.observe.recorder import RunRecorder
from asyncgrpo.rundir import RunDir, leave
from asyncgrpo.weights.sender import CollectiveSender
from asyncgrpo.wire.keys import read_keys
from asyncgrpo.wire.sockets import DealerClient

log = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1  # of Linux


def longest_wait(config: Config) -> float:
    """Seconds that rank 0 may let the others wait: for a batch, the actors, evaluations."""
    evaluation = max((block.timeout_seconds for block in config.evals), default=0.0)
    return config.buffer.take_timeout_seconds + config.launch.start_timeout_seconds + 2 * evaluation


def run_learner(run: RunDir, stopping: Callable[[], bool]) -> NoReturn:
    """Trains to the end as the rank that torchrun's environment names, and ends the process."""
    start = time.perf_counter()
    # kill -9 of a torchrun that somebody started by hand leaves nobody else to end its ranks
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    name = f"learner-{rank}"
    cores = run.endpoints.cores.get(name)
    if cores:
        os.sched_setaffinity(0, cores)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if world_size > 1:
        dist.init_process_group(
            ranks.backend(), timeout=timedelta(seconds=longest_wait(run.config))
        )
    transformers_logging.disable_progress_bar()
    sender = recorder = None
    exporter = serve_metrics(run, name)
    if rank == 0:
        keys = read_keys(run, "server")
        at = run.endpoints
        sender = CollectiveSender(
            run.config,
            at.weights,
            at.store,
            keys,
            transport=at.transport,
            folder=run.path / "weights",
        )
        recorder = RunRecorder(run, exporter)
    with memory_explained(run.config, name):
        updater = PolicyUpdater(run.config, run_dir=run.path)
        learner = Learner(
            run.config,
            updater=updater,
            client=DealerClient(run.endpoints.buffer, name, "the buffer", read_keys(run, "client")),
            sender=sender,
            recorder=recorder,
            exporter=exporter,
            stopping=stopping,
        )
        log.info("rank %d of %d ready after %.1f s", rank, world_size, time.perf_counter() - start)
        is_done = learner.run()
    if sender is not None:
        sender.close()
    exporter.close()
    leave(EXIT_DONE if is_done else EXIT_INTERRUPTED)
