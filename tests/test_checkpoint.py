"""Checkpoints: a step's own state, whole or not at all, for any number of ranks."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_case
import pytest
import torch
from learner_case import make_groups, on_ranks, part_of, shard_of, weights_of
from transformers import AutoConfig, AutoModelForCausalLM

from asyncgrpo.config import Config
from asyncgrpo.errors import CheckpointError, ModelError
from asyncgrpo.launch.model_folder import check_same_model
from asyncgrpo.learner.saved import find_damage, newest, saved, step_of
from asyncgrpo.learner.update import PolicyUpdater
from asyncgrpo.types import Shard

Weights = dict[str, torch.Tensor]
WITH_REFERENCE = {
    "kl_coef": 0.1,
    "kl_target": 0.01,
    "kl_horizon": 100,
    "reference": {"sync_every": 2, "mix_alpha": 0.5},
}


@pytest.fixture(scope="module")
def shard(folder: Path) -> Shard:
    return shard_of(make_groups(folder))


def settings(folder: Path, **rooms: Any) -> Config:
    """Any step may train on the same groups."""
    buffer = {"groups_per_step": 6, "max_staleness": 20}
    return learner_case.settings(folder, buffer=buffer, **rooms)


def train(updater: PolicyUpdater, shard: Shard, first: int, last: int) -> list[dict[str, float]]:
    return [updater.update(replace(shard, step=step)) for step in range(first, last)]


def assert_same(one: Weights, two: Weights, atol: float = 0) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=atol)


@pytest.mark.parametrize("algo", [{}, WITH_REFERENCE], ids=["plain", "with a reference"])
def test_a_restored_learner_goes_on_bit_for_bit(folder, shard, tmp_path, algo):
    config = settings(folder, algo=algo)
    whole = PolicyUpdater(config, run_dir=tmp_path)
    assert whole.restore() == 0
    train(whole, shard, 6, 9)
    whole.checkpoint(9)
    rows = train(whole, shard, 9, 12)
    whole.save()
    again = PolicyUpdater(config, run_dir=tmp_path)
    assert again.restore() == 9
    assert train(again, shard, 9, 12) == rows
    assert_same(weights_of(whole), weights_of(again))


def test_a_checkpoint_holds_its_own_step_though_training_goes_on(folder, shard, tmp_path):
    updater = PolicyUpdater(settings(folder), run_dir=tmp_path)
    train(updater, shard, 6, 7)
    before = weights_of(updater)
    updater.checkpoint(7)
    train(updater, shard, 7, 10)
    updater.save()
    again = PolicyUpdater(settings(folder), run_dir=tmp_path)
    again.restore()
    assert_same(before, weights_of(again))


def test_the_newest_and_every_nth_checkpoint_stay(folder, shard, tmp_path):
    config = settings(folder, checkpoint={"keep_last": 2, "keep_every": 6})
    updater = PolicyUpdater(config, run_dir=tmp_path)
    for step in range(2, 15, 2):
        updater.checkpoint(step)
    updater.save()
    assert [step_of(path) for path in saved(tmp_path / "checkpoints")] == [6, 12, 14]


def test_covered_is_the_oldest_checkpoint_that_may_have_to_serve(folder, tmp_path):
    updater = PolicyUpdater(settings(folder), run_dir=tmp_path)
    found = []
    for step in (3, 5, 6, 9):
        updater.checkpoint(step)
        updater.save()
        found.append(updater.checkpoints.covered)
    assert found == [0, 0, 5, 6]  # with checkpoint.keep_last = 2
    (tmp_path / "checkpoints" / "step_9" / "rng_0.pt").unlink()
    again = PolicyUpdater(settings(folder), run_dir=tmp_path)
    assert (again.restore(), again.checkpoints.covered) == (6, 0)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: flip_a_bit(path / "__0_0.distcp"), "__0_0.distcp has other contents"),
        (lambda path: (path / "rng_0.pt").unlink(), "rng_0.pt is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    folder, shard, tmp_path, caplog, damage, what
):
    updater = PolicyUpdater(settings(folder), run_dir=tmp_path)
    for step in (3, 5):
        updater.checkpoint(step)
    updater.save()
    damage(tmp_path / "checkpoints" / "step_5")
    with caplog.at_level(logging.ERROR):
        assert PolicyUpdater(settings(folder), run_dir=tmp_path).restore() == 3
    assert "step_5 is damaged and left out: " + what in caplog.text


def test_what_a_killed_save_left_behind_is_no_checkpoint_and_is_replaced(folder, shard, tmp_path):
    updater = PolicyUpdater(settings(folder), run_dir=tmp_path)
    updater.checkpoint(4)
    updater.save()
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(checkpoints / "step_4", checkpoints / ".step_6.part")
    (checkpoints / ".step_6.part" / "manifest.json").unlink()
    (checkpoints / ".step_6.part" / "rest").write_text("of another life")
    found = newest(checkpoints)
    assert found is not None
    assert found.name == "step_4"
    updater.checkpoint(6)
    updater.save()
    assert find_damage(checkpoints / "step_6") == ""
    assert not (checkpoints / "step_6" / "rest").exists()


def test_a_checkpoint_that_cannot_be_written_is_an_error_that_says_where(folder, tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    updater = PolicyUpdater(settings(folder), run_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"step_4.part could not be written.*--resume"):
        updater.checkpoint(4)


def resume(rank: int, count: int, config: Config, run: Path, shard: Shard) -> None:
    """A rank that restores, trains two steps, saves a checkpoint and its weights."""
    updater = PolicyUpdater(config, run_dir=run)
    first = updater.restore()
    for step in range(first, first + 2):
        updater.update(part_of(shard, rank, count, step))
    updater.checkpoint(first + 2)
    updater.save()
    if rank == 0:
        torch.save(weights_of(updater), run / f"weights_{first + 2}")


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_other_numbers_of_ranks(folder, shard, tmp_path):
    # adam_eps: a step must not depend on the sign of a gradient that is zero but for rounding
    config = settings(folder, learner={"lr": 1e-3, "adam_eps": 1e-3})
    for name, counts in {"alone": (1, 1, 1), "changing": (2, 1, 3)}.items():
        run_dir = tmp_path / name
        run_dir.mkdir()
        for count in counts:
            on_ranks(count, resume, config, run_dir, shard)
        assert [step_of(path) for path in saved(run_dir / "checkpoints")] == [4, 6]
    for step in (2, 4, 6):
        one, two = (torch.load(tmp_path / n / f"weights_{step}") for n in ("alone", "changing"))
        assert_same(one, two, atol=1e-5)
    manifest: dict[str, Any] = json.loads(
        (tmp_path / "changing" / "checkpoints" / "step_6" / "manifest.json").read_text()
    )
    assert (manifest["step"], manifest["ranks"]) == (6, 3)
    assert {"rng_0.pt", "rng_1.pt", "rng_2.pt"} < set(manifest["files"])


def test_a_checkpoint_of_another_model_is_refused_with_the_size_that_differs(
    folder, shard, tmp_path
):
    updater = PolicyUpdater(settings(folder), run_dir=tmp_path)
    train(updater, shard, 6, 7)
    updater.checkpoint(7)
    updater.save()
    config = AutoConfig.from_pretrained(folder, hidden_size=64)
    other = tmp_path / "other"
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    check_same_model(tmp_path, str(folder))
    width = updater._policy.config.hidden_size
    with pytest.raises(ModelError, match=rf"step_7 is of .* hidden_size was {width}, .* has 64;"):
        check_same_model(tmp_path, str(other))
    with pytest.raises(CheckpointError, match=r"step_7 does not fit this model .*: Size mismatch"):
        PolicyUpdater(settings(other), run_dir=tmp_path).restore()
