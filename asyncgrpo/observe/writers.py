"""Hands the rows of metrics.jsonl to TensorBoard and Weights & Biases, which are optional."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Protocol

from asyncgrpo.config import Config
from asyncgrpo.errors import ConfigError
from asyncgrpo.rundir import RunDir


class Writer(Protocol):
    """Takes rows under the names of observe/metrics.py."""

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """One row; a step may come twice, with other names."""

    def close(self) -> None:
        """All rows are there."""


class TensorBoardWriter:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: RunDir) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"))
        self.close = self._writer.close

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)


class WandbWriter:
    """A run of the project asyncgrpo; WANDB_MODE=offline keeps it in RUN/wandb."""

    def __init__(self, run: RunDir) -> None:
        import wandb

        settings: dict[str, Any] = run.config.model_dump(mode="json")
        try:
            self._run = wandb.init(
                project="asyncgrpo", name=run.path.name, dir=str(run.path), config=settings
            )
        except wandb.Error as error:
            raise ConfigError(
                f"observe.report_to has wandb, which refuses: {error}; call `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from None
        self.close = self._run.finish

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=step)


WRITERS: Mapping[str, Callable[[RunDir], Writer]] = {
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
}


def check_writers(config: Config) -> None:
    """ConfigError when a writer of observe.report_to is not installed."""
    for name in config.observe.report_to:
        if find_spec(name) is None:
            raise ConfigError(
                f"observe.report_to has {name}, which is not installed; "
                f"pip install 'asyncgrpo[{name}]', or leave it out"
            )


def open_writers(run: RunDir) -> list[Writer]:
    """Those that observe.report_to names."""
    return [WRITERS[name](run) for name in run.config.observe.report_to]
