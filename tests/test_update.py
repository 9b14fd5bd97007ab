"""One learner step on a real small model: updates, reference, token log, faults, and ranks."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle_advantages
import oracle_corrections
import oracles
import pytest
import torch
from learner_case import (
    STEP,
    logprobs,
    make_groups,
    on_ranks,
    settings,
    shard_of,
    token_log,
    weights_of,
)
from transformers import AutoModelForCausalLM

from asyncgrpo.errors import AlgorithmError, RunError
from asyncgrpo.learner import update
from asyncgrpo.learner.schedule import adapted_coefficient
from asyncgrpo.learner.update import PolicyUpdater
from asyncgrpo.types import Completions, Group


def test_several_updates_keep_the_proximal_policy_of_the_start(
    folder: Path, tmp_path: Path
) -> None:
    config = settings(folder, algo={"passes": 2, "minibatches": 2}, observe={"token_log": True})
    groups = make_groups(folder)
    updater = PolicyUpdater(config, run_dir=tmp_path)
    metrics = updater.update(shard_of(groups))
    assert metrics["optimizer_steps"] == 4
    told = [value for group in groups for value in oracle_advantages.grpo(group.rewards.tolist())]
    np.testing.assert_allclose(updater.advantages, told, rtol=1e-4)  # in the order of the shard
    found = token_log(tmp_path)
    start = AutoModelForCausalLM.from_pretrained(folder)
    order = [group for part in (groups[0::2], groups[1::2]) for group in part]
    assert found["leases"].tolist() == [group.lease.lease_id for group in order]
    assert len(found["token_id"]) == sum(group.num_tokens for group in groups)
    moved = 0.0
    for lease, group in enumerate(order):
        for sample, completion in enumerate(group.completions):
            rows = (found["lease"] == lease) & (found["sample"] == sample)
            assert found["token_id"][rows].tolist() == completion.token_ids.tolist()
            assert found["version"][rows].tolist() == completion.versions.tolist()
            assert found["place"][rows].tolist() == list(range(rows.sum()))
            np.testing.assert_array_equal(
                found["behavior_logprob"][rows], completion.behavior_logprobs
            )
            expected = logprobs(start, group.prompt_token_ids, completion.token_ids)
            np.testing.assert_allclose(found["proximal_logprob"][rows], expected, atol=1e-4)
            moved = max(moved, float(np.abs(found["logprob"][rows] - expected).max()))
            weight = np.minimum(np.exp(expected - completion.behavior_logprobs), 2.0)
            np.testing.assert_allclose(found["weight"][rows], weight, rtol=1e-3)
        expected = oracle_advantages.grpo(group.rewards.tolist())
        for sample, value in enumerate(expected):
            rows = (found["lease"] == lease) & (found["sample"] == sample)
            np.testing.assert_allclose(found["advantage"][rows], value, rtol=1e-4)
    assert moved > 0.05  # the last update's pi is no longer p
    assert found["mask"].all()
    assert np.isnan(found["ref_logprob"]).all()


def test_the_first_of_several_updates_has_ratio_one(folder: Path) -> None:
    """With one pass over one minibatch nothing is clipped, with two the second may be."""
    groups = make_groups(folder)
    once = PolicyUpdater(settings(folder)).update(shard_of(groups))
    again = PolicyUpdater(settings(folder, algo={"passes": 4})).update(shard_of(groups))
    assert once["clip_low_share"] == once["clip_high_share"] == 0.0
    assert again["clip_low_share"] + again["clip_high_share"] > 0.0


def test_one_update_equals_adamw_on_the_gradient_of_the_formula(folder: Path) -> None:
    """Behaviour, weights, aggregation, clipping and AdamW redone by hand on plain forwards."""
    config = settings(folder)
    groups = make_groups(folder, count=3)
    updater = PolicyUpdater(config)
    metrics = updater.update(shard_of(groups))
    model = AutoModelForCausalLM.from_pretrained(folder)
    count = sum(group.num_tokens for group in groups)
    loss = torch.zeros((), dtype=torch.float64)
    for group in groups:
        values = oracle_advantages.grpo(group.rewards.tolist())
        for completion, advantage in zip(group.completions, values, strict=True):
            ids = np.concatenate([group.prompt_token_ids, completion.token_ids]).astype(np.int64)
            logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0].double()
            table = logits[len(group.prompt_token_ids) - 1 : -1].log_softmax(-1)
            chosen = table.gather(
                1, torch.from_numpy(completion.token_ids.astype(np.int64))[:, None]
            )
            now = chosen[:, 0]
            weight = (now.detach() - torch.from_numpy(completion.behavior_logprobs)).exp()
            ratio = (now - now.detach()).exp()
            loss = loss - (weight.clamp(max=2.0) * ratio * advantage).sum() / count
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0
    ).step()
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    mine = weights_of(updater)
    for name, tensor in model.named_parameters():
        # Adam's first step is lr in the direction of each gradient's sign: skip tiny gradients.
        clear = tensor.grad.abs() > 1e-6
        torch.testing.assert_close(mine[name][clear], tensor[clear], rtol=0, atol=1e-5)


def test_without_a_kl_coefficient_no_second_model_is_loaded(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(update, "Reference", lambda *args: pytest.fail("loaded"))
    metrics = PolicyUpdater(settings(folder)).update(shard_of(make_groups(folder)))
    assert "objective/kl_ref" not in metrics


def test_the_reference_stays_as_it_was_and_pulls_the_policy_back(folder: Path) -> None:
    groups = make_groups(folder)
    found = {}
    for coefficient in (1e-6, 3.0):
        updater = PolicyUpdater(settings(folder, algo={"kl_coef": coefficient}))
        rows = [updater.update(shard_of(groups)) for _ in range(6)]
        assert rows[0]["objective/kl_ref"] == pytest.approx(0.0, abs=1e-6)
        assert rows[-1]["objective/kl_coef"] == coefficient
        found[coefficient] = rows[-1]["objective/kl_ref"]
        start = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for name, tensor in updater._reference._head.policy.named_parameters():
            assert torch.equal(tensor, start[name])
            assert not tensor.requires_grad
    assert found[3.0] < 0.5 * found[1e-6]


@pytest.mark.parametrize(("alpha", "every"), [(1.0, 1), (0.9, 2)])
def test_the_reference_is_mixed_or_reset_every_n_steps(
    folder: Path, alpha: float, every: int
) -> None:
    room = {"sync_every": every, "mix_alpha": alpha}
    updater = PolicyUpdater(settings(folder, algo={"kl_coef": 0.01, "reference": room}))
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    groups = make_groups(folder)
    for step in range(every):
        metrics = updater.update(shard_of(groups, step=STEP + step + STEP % every))
    now = weights_of(updater)
    for name, tensor in updater._reference._head.policy.named_parameters():
        expected = alpha * now[name] + (1 - alpha) * before[name]
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)
    assert metrics["reference_syncs"] == 1


def test_the_loglinear_proximal_policy_lies_between_behaviour_and_present(
    folder: Path, tmp_path: Path
) -> None:
    algo = {"passes": 2, "proximal": "loglinear"}
    updater = PolicyUpdater(
        settings(folder, algo=algo, observe={"token_log": True}), run_dir=tmp_path
    )
    updater.update(shard_of(make_groups(folder)))
    found = token_log(tmp_path)
    tokens = {
        "behavior": found["behavior_logprob"],
        "logprobs": found["logprob"],
        "staleness": STEP - found["version"],
        "mask": found["mask"],
    }
    (expected,) = oracle_corrections.loglinear_proximal([tokens])
    np.testing.assert_allclose(found["proximal_logprob"], expected, atol=1e-5)


def test_the_spread_of_the_batch_is_that_of_all_its_rewards(folder: Path) -> None:
    groups = make_groups(folder)
    updater = PolicyUpdater(settings(folder, algo={"advantage": "batch_std"}))
    updater.update(shard_of(groups))
    expected = oracle_advantages.batch_std([group.rewards.tolist() for group in groups])
    np.testing.assert_allclose(updater.advantages, np.ravel(expected), rtol=1e-5)


def trained_with_kl_in(
    where: str, folder: Path, run: Path
) -> tuple[PolicyUpdater, list[Group], dict[str, np.ndarray], dict[tuple[int, int], np.ndarray]]:
    """After one update: the updater, its groups, the token log, and of each completion 0.7 times
    k3 of the start model against the behaviour log-probs."""
    config = settings(folder, algo={"kl_coef": 0.7, "kl_in": where}, observe={"token_log": True})
    groups, table = make_groups(folder), {}
    updater = PolicyUpdater(config, run_dir=run)
    updater.update(shard_of(groups))
    model = AutoModelForCausalLM.from_pretrained(folder)
    for g, group in enumerate(groups):
        for i, completion in enumerate(group.completions):
            sequence = {
                "logprobs": completion.behavior_logprobs.astype(np.float64),
                "ref": logprobs(model, group.prompt_token_ids, completion.token_ids),
                "mask": np.ones(len(completion.token_ids)),
                "advantage": 1.0,
            }
            table[g, i] = 0.7 * oracles.kl([sequence], "k3")[0]
    return updater, groups, token_log(run), table


def test_kl_in_the_reward_is_taken_from_each_completion_before_the_group_is_compared(
    folder: Path, tmp_path: Path
) -> None:
    updater, groups, found, kl = trained_with_kl_in("reward", folder, tmp_path)
    for g, group in enumerate(groups):
        rewards = [float(r) - kl[g, i].sum() for i, r in enumerate(group.rewards)]
        for i, value in enumerate(oracle_advantages.grpo(rewards)):
            assert updater.advantages[4 * g + i] == pytest.approx(value, rel=1e-3, abs=1e-4)
            rows = (found["lease"] == g) & (found["sample"] == i)
            np.testing.assert_allclose(found["advantage"][rows], value, rtol=1e-3, atol=1e-4)


def test_kl_in_the_reward_per_token_counts_from_each_token_to_the_end(
    folder: Path, tmp_path: Path
) -> None:
    updater, groups, found, kl = trained_with_kl_in("reward_token", folder, tmp_path)
    for g, group in enumerate(groups):
        for i, value in enumerate(oracle_advantages.grpo(group.rewards.tolist())):
            assert updater.advantages[4 * g + i] == pytest.approx(value, rel=1e-4)
            rows = (found["lease"] == g) & (found["sample"] == i)
            expected = value - kl[g, i][::-1].cumsum()[::-1]
            np.testing.assert_allclose(found["advantage"][rows], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kl", "factor"), [(0.1, 1.0), (0.105, 1.0005), (1.0, 1.002), (0.0, 0.998), (0.09, 0.999)]
)
def test_the_adaptive_coefficient_moves_towards_its_target(kl: float, factor: float) -> None:
    algo = settings(Path("x"), algo={"kl_coef": 1.0, "kl_target": 0.1, "kl_horizon": 1000}).algo
    assert adapted_coefficient(0.4, kl, 10, algo) == pytest.approx(0.4 * factor)


def test_the_learning_rate_shrinks_with_the_root_of_the_effective_sample_share(
    folder: Path,
) -> None:
    groups = make_groups(folder, noise=0.5)
    metrics = PolicyUpdater(settings(folder, learner={"ess_scaled_lr": True})).update(
        shard_of(groups)
    )
    assert 0 < metrics["ess"] < 0.9
    assert metrics["lr"] == pytest.approx(1e-2 * math.sqrt(metrics["ess"]))


def test_the_entropy_bonus_raises_entropy(folder: Path) -> None:
    groups = make_groups(folder)
    last = {}
    for coefficient in (0.0, 1.0):
        updater = PolicyUpdater(settings(folder, algo={"entropy_coef": coefficient}))
        last[coefficient] = [updater.update(shard_of(groups)) for _ in range(8)][-1]
    assert last[1.0]["objective/entropy"] > last[0.0]["objective/entropy"] + 0.01


def test_truncated_completions_are_counted_and_masked_when_wanted(folder: Path) -> None:
    groups = make_groups(folder)
    cut = sum(len(group.completions[0].token_ids) for group in groups)
    for mask in (False, True):
        updater = PolicyUpdater(settings(folder, algo={"mask_truncated": mask}))
        metrics = updater.update(shard_of(groups))
        assert metrics["truncated_share"] == 0.25
        assert metrics["tokens_trained"] == sum(g.num_tokens for g in groups) - cut * mask


@pytest.mark.parametrize(
    "algo",
    [{"kl_coef": 0.5, "kl_in": "reward"}, {"advantage": "batch_std"}, {"mask_truncated": True}],
    ids=str,
)
def test_parts_of_a_batch_may_have_no_groups_and_groups_no_loss(
    folder: Path, tmp_path: Path, algo: dict[str, Any]
) -> None:
    (group,) = make_groups(folder, count=1)
    cut = replace(
        group,
        completions=Completions.of([replace(c, finish_reason="length") for c in group.completions]),
    )
    config = settings(folder, algo={**algo, "minibatches": 2}, observe={"token_log": True})
    updater = PolicyUpdater(config, run_dir=tmp_path)
    assert updater.update(shard_of([cut]))["optimizer_steps"] == 2
    found = token_log(tmp_path)
    count = 0 if "mask_truncated" in algo else group.num_tokens
    assert {len(found[name]) for name in ("token_id", "logprob", "mask")} == {count}


def poisoned(inputs: Any, algo: Any) -> torch.Tensor:
    """NaN at every token of the third group's second completion (advantage 0.125)."""
    bad = inputs.advantages == 0.125
    return -inputs.ratio * torch.where(bad, float("nan"), inputs.advantages)


def infinite(inputs: Any, algo: Any) -> torch.Tensor:
    """Infinite where `poisoned` is NaN, with a finite gradient."""
    bad = inputs.advantages == 0.125
    return -inputs.ratio * inputs.advantages + torch.where(bad, float("inf"), 0.0)


def marked(group: Any, algo: Any) -> list[float]:
    return [0.125 if reward == 42.0 else 1.0 for reward in group.rewards]


@pytest.mark.parametrize(("loss", "value"), [("poisoned", "nan"), ("infinite", "inf")])
def test_an_update_that_is_not_finite_is_skipped_named_and_at_last_stops_the_run(
    folder: Path, caplog: pytest.LogCaptureFixture, loss: str, value: str
) -> None:
    algo = {
        "loss": f"test_update:{loss}",
        "advantage": "test_update:marked",
        "max_nonfinite": 1,
        "passes": 1,
    }
    groups = make_groups(folder)
    groups[2].rewards[1] = 42.0
    updater = PolicyUpdater(settings(folder, algo=algo))
    before = weights_of(updater)
    token = int(groups[2].completions[1].token_ids[0])
    named = rf"loss {value} at group t2, completion 1, token 0 \(id {token}\)"
    with caplog.at_level(logging.WARNING):
        metrics = updater.update(shard_of(groups))
    assert metrics["updates_skipped"] == 1
    assert "grad_norm" not in metrics
    assert "update skipped, weights unchanged (1 skipped, allowed are algo.max_nonfinite=1)" in (
        caplog.text
    )
    after = weights_of(updater)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(RunError, match=rf"at step 6: {named}.*2 skipped"):
        updater.update(shard_of(groups))


def test_nan_logprobs_of_the_engine_are_dropped_with_a_counter_and_never_trained(
    folder: Path,
) -> None:
    groups = make_groups(folder)
    groups[1].completions[2].behavior_logprobs[0] = float("nan")
    metrics = PolicyUpdater(settings(folder)).update(shard_of(groups))
    lost = len(groups[1].completions[2].token_ids)
    assert metrics["nonfinite_completions"] == 1
    assert metrics["tokens_masked"] == lost
    assert metrics["tokens_trained"] == sum(g.num_tokens for g in groups) - lost
    assert math.isfinite(metrics["grad_norm"])
    assert metrics["updates_skipped"] == 0


def raises_on_real_data(inputs: Any, algo: Any) -> torch.Tensor:
    return -inputs.ratio * inputs.advantages[: 4 if len(inputs.mask) == 4 else 3]


def test_a_users_function_that_breaks_on_real_data_is_named_with_the_step(folder: Path) -> None:
    config = settings(folder, algo={"loss": "test_update:raises_on_real_data"})
    message = "at step 6: algo.loss 'test_update:raises_on_real_data' raised RuntimeError: The size"
    with pytest.raises(AlgorithmError, match=message):
        PolicyUpdater(config).update(shard_of(make_groups(folder)))


ALGOS: list[dict[str, Any]] = [
    {"advantage": "batch_std", "correction": ["geometric_mask", "opsm", "decoupled"]},
    {"aggregation": "sequence_mean", "correction": ["m2po", "tis_sequence"]},
    {"aggregation": "dr_grpo", "advantage": "dr_grpo", "minibatches": 2, "passes": 2},
    {"loss": "gspo", "correction": "bypass", "kl_coef": 0.1, "entropy_coef": 0.01},
]


def train_rank(rank: int, world: int, folder: Path, out: Path) -> None:
    """Two steps per algorithm, groups dealt unevenly; rank 0 saves weights and metrics."""
    groups = make_groups(folder, count=7)
    shares = [groups] if world == 1 else [groups[:5], groups[5:]]
    found = []
    for algo in ALGOS:
        room = {"max_tokens_per_microbatch": 60 if rank else 1000, "lr": 1e-3, "adam_eps": 1e-3}
        config = settings(
            folder,
            algo=algo,
            learner={**room, "ess_scaled_lr": True},
            data={"max_prompt_tokens": 16},
        )
        updater = PolicyUpdater(config)
        mine, order = shares[rank], [0, 1, 2, 3, 4, 5, 6]
        if "minibatches" in algo and world == 1:
            # as the minibatches of two ranks together: [0, 2, 4] + [5] and [1, 3] + [6]
            order = [0, 1, 2, 3, 4, 6, 5]
            mine = [groups[i] for i in order]
        rows = [updater.update(shard_of(mine, groups)) for _ in range(2)]
        found.append((rows, weights_of(updater), updater.advantages.reshape(7, 4)[order].tolist()))
    if rank == 0:
        torch.save(found, out)


@pytest.mark.slow
def test_two_ranks_with_uneven_shards_train_like_one(folder: Path, tmp_path: Path) -> None:
    on_ranks(1, train_rank, folder, tmp_path / "one")
    on_ranks(2, train_rank, folder, tmp_path / "two")
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    for algo, (rows, weights, told), (other_rows, other_weights, other_told) in zip(
        ALGOS, one, two, strict=True
    ):
        np.testing.assert_allclose(other_told, told, rtol=1e-4, atol=1e-5)
        for row, other in zip(rows, other_rows, strict=True):
            assert row.keys() == other.keys(), algo
            for name, value in row.items():
                if name in ("padding_share", "rank_balance"):  # of the ranks themselves
                    continue
                assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (algo, name)
        for name, tensor in weights.items():
            torch.testing.assert_close(other_weights[name], tensor, rtol=0, atol=1e-5)
