"""Checkpoints of the learner: all it needs to go on after a finished step.

    checkpoints/step_<k>/            the state after k updates; complete once it has this name
      .metadata, __<rank>_<n>.distcp model, optimizer and reference (torch.distributed.checkpoint);
                                     they load into any number of ranks
      rng_<rank>.pt                  random number state of each rank
      ledger.sqlite                  of a serial run: the buffer at this step
      manifest.json                  step, counters, and a checksum of every other file

Saving goes on in a thread while the next step runs; what is written is the state of its own step.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from asyncgrpo.errors import CheckpointError
from asyncgrpo.learner import ranks
from asyncgrpo.learner.saved import MANIFEST, checksum, newest, read_manifest, saved, step_of
from asyncgrpo.settings.learner import CheckpointSettings

log = logging.getLogger(__name__)
# One rank needs no process group; torch warns about that at every save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
State = dict[str, Any]  # tensors by name, nested
AddFiles = Callable[[Path], None]  # the folder they go to


class Checkpoints:
    """The checkpoints of one run. Every rank calls `save`, `load` and `wait` at the same steps."""

    def __init__(
        self, folder: Path, settings: CheckpointSettings, sizes: Mapping[str, Any] | None = None
    ) -> None:
        """sizes: MODEL_SIZES of the model, to be found again."""
        self._folder, self._settings, self._sizes = folder, settings, sizes
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None  # what the writer is at
        self.covered = 0  # on rank 0: no learner will begin before this step any more

    @cached_property
    def _group(self) -> dist.ProcessGroup | None:
        """Its own: collectives of the saving thread must not meet those of training."""
        return dist.new_group(backend="gloo") if ranks.world_size() > 1 else None

    def save(
        self, step: int, state: State, counters: Mapping[str, float], add: AddFiles = lambda _: None
    ) -> None:
        """Begins to save a copy of the tensors. CheckpointError when the last save failed.

        add: puts more files into the checkpoint's folder (called on rank 0).
        """
        self.wait()
        draft = self._folder / f".step_{step}.part"
        try:
            if ranks.rank() == 0:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
                add(draft)
            if self._group is not None:
                dist.barrier(group=self._group)
            cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
            random = {"cpu": torch.get_rng_state(), "cuda": cuda}
            torch.save(random, draft / f"rng_{ranks.rank()}.pt")
            future = state_dict_saver.async_save(
                state, checkpoint_id=draft, process_group=self._group, no_dist=self._group is None
            )
        except OSError as error:
            raise _cannot_write(draft, error) from error
        self._pending = self._writer.submit(self._follow, future, step, draft, dict(counters))

    def wait(self) -> None:
        """Until the save under way, if any, is complete on this rank."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self) -> Path | None:
        """The newest checkpoint whose files are as they were written; the log names damaged ones.

        The same on every rank: rank 0 looks.
        """
        return ranks.from_first(newest(self._folder) if ranks.rank() == 0 else None)

    def load(self, path: Path, state: State) -> dict[str, float]:
        """Fills the tensors of `state` in place, sets random numbers; returns the counters.

        CheckpointError when they are not those of the checkpoint.
        """
        try:
            state_dict_loader.load(
                state, checkpoint_id=path, process_group=self._group, no_dist=self._group is None
            )
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise CheckpointError(
                f"{path} does not fit this model and its settings: {cause}; train with those that "
                "it was made with, or start a new run from its RUN/model"
            ) from error
        own = path / f"rng_{ranks.rank()}.pt"
        if own.exists():  # else there are more ranks than before
            random = torch.load(own, weights_only=True)
            torch.set_rng_state(random["cpu"])
            if random["cuda"]:
                torch.cuda.set_rng_state(random["cuda"][0])
        counters: dict[str, float] = read_manifest(path)["counters"]
        return counters

    def _follow(self, future: Any, step: int, draft: Path, counters: dict[str, float]) -> None:
        try:
            future.result()  # on rank 0: every rank has written
            if ranks.rank() == 0:
                self._complete(step, draft, counters)
        except Exception as error:
            raise _cannot_write(draft, error) from error

    def _complete(self, step: int, draft: Path, counters: dict[str, float]) -> None:
        files = {path.name: checksum(path) for path in sorted(draft.iterdir())}
        manifest = {
            "step": step,
            "ranks": ranks.world_size(),
            "model": self._sizes,
            "counters": counters,
            "torch": torch.__version__,
            "files": files,
        }
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for path in (*draft.iterdir(), draft):
            _to_disk(path)
        final = self._folder / f"step_{step}"
        shutil.rmtree(final, ignore_errors=True)  # of a life that was rolled back
        draft.rename(final)
        _to_disk(self._folder)
        log.info("checkpoint of step %d saved", step)
        every, number = saved(self._folder), self._settings.keep_last
        if len(every) > number:  # should the newest be found damaged, one before it serves
            self.covered = step_of(every[-number])
        for path in every[:-number]:
            if not self._settings.keep_every or step_of(path) % self._settings.keep_every:
                shutil.rmtree(path, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(draft: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {draft} could not be written: {error}; the one before is untouched: make "
        "room on the disk or set checkpoint.every = 0, then go on with --resume"
    )
