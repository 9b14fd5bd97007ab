"""Hands the rows of metrics.jsonl to TensorBoard and Weights & Biases, which are optional."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import NamedTuple

from asyncgrpo.config import Config
from asyncgrpo.errors import ConfigError
from asyncgrpo.rundir import RunDir


class Writer(NamedTuple):
    """write takes rows under the names of observe/metrics.py; a step may come again with others."""

    write: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def _tensorboard(run: RunDir, step: int) -> Writer:
    from torch.utils.tensorboard import SummaryWriter

    # What a life before wrote from here on is hidden: it is made again.
    writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=step)

    def write(step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)

    return Writer(write, writer.close)


def _wandb(run: RunDir, step: int) -> Writer:
    import wandb

    config, folder, name = run.config.model_dump(mode="json"), str(run.path), run.path.name
    # Steps of a W&B run cannot be taken back: every life is a run of its own, in one group.
    life = f"{name}, from step {step}" if step else name
    try:
        there = wandb.init(project="asyncgrpo", group=name, name=life, dir=folder, config=config)
    except wandb.Error as error:
        raise ConfigError(
            f"observe.report_to has wandb, which refuses: {error}; call `wandb login`, or set "
            "WANDB_MODE=offline"
        ) from None
    return Writer(lambda step, row: there.log(dict(row), step=step), there.finish)


WRITERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def check_writers(config: Config) -> None:
    """ConfigError when a writer of observe.report_to is not installed."""
    for name in config.observe.report_to:
        if find_spec(name) is None:
            raise ConfigError(
                f"observe.report_to has {name}, which is not installed; "
                f"pip install 'asyncgrpo[{name}]', or leave it out"
            )


def open_writers(run: RunDir, step: int) -> list[Writer]:
    """Those that observe.report_to names, for a life of the run that begins at a step."""
    return [WRITERS[name](run, step) for name in run.config.observe.report_to]
