"""Names of other trainers: each is taken as what it means, refused, or said not to be needed."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peer_cases import EQUAL

from asyncgrpo.aliases import by_name, entries
from asyncgrpo.config import Config, from_mapping
from asyncgrpo.errors import ConfigError
from asyncgrpo.learner.schedule import learning_rate
from asyncgrpo.settings.algo import AlgoSettings

# What a name means that is only called otherwise: foreign setting -> ours.
CALLED: dict[str, tuple[Any, str, Any]] = {
    "num_generations": (6, "algo.group_size", 6),
    "prompt_repeat_k": (5, "algo.group_size", 5),
    "global_batch_size": (64, "buffer.groups_per_step", 64),
    "max_prompt_length": (512, "data.max_prompt_tokens", 512),
    "max_completion_length": (300, "sampling.max_completion_tokens", 300),
    "max_new_tokens": (256, "sampling.max_completion_tokens", 256),
    "max_response_length": (1024, "sampling.max_completion_tokens", 1024),
    "beta": (0.04, "algo.kl_coef", 0.04),
    "kl_coef": (0.05, "algo.kl_coef", 0.05),
    "kl_loss_coef": (0.001, "algo.kl_coef", 0.001),
    "kl_estimator": ("k2", "algo.kl", "k2"),
    "kl_loss_type": ("low_var_kl", "algo.kl", "k3"),
    "cliprange_low": (0.1, "algo.clip_low", 0.1),
    "cliprange_high": (0.3, "algo.clip_high", 0.3),
    "epsilon_high": (0.3, "algo.clip_high", 0.3),
    "temperature": (0.9, "sampling.temperature", 0.9),
    "top_p": (0.95, "sampling.top_p", 0.95),
    "top_k": (50, "sampling.top_k", 50),
    "log_completions": (True, "observe.trajectories", True),
    "report_to": ("wandb", "observe.report_to", ("wandb",)),
    "pack_max_length": (32768, "learner.max_tokens_per_microbatch", 32768),
    "num_generations_eval": (1, "eval.num_samples", 1),
    "evaluate_step": (5, "eval.every", 5),
    "eval_steps": (5, "eval.every", 5),
    "learning_rate": (1e-6, "learner.lr", 1e-6),
    "lr_scheduler_type": ("cosine", "learner.schedule", "cosine"),
    "lr_type": ("linear", "learner.schedule", "linear"),
    "gradient_checkpointing": (True, "learner.checkpoint_activations", 1),
    "torch_compile": (True, "learner.compile", True),
    "cpu_offload": (True, "learner.cpu_offload", True),
    "cast_lm_head_to_fp32": (True, "learner.float32_head", True),
    "max_grad_norm": (0.1, "learner.max_grad_norm", 0.1),
    "bf16": (True, "model.dtype", "bfloat16"),
    "dtype": ("bfloat16", "model.dtype", "bfloat16"),
    "seed": (42, "run.seed", 42),
    "max_steps": (30, "run.max_steps", 30),
    "output_dir": ("out", "run.dir", "out"),
    "num_iterations": (2, "algo.passes", 2),
    "optimizer_steps": (4, "algo.minibatches", 4),
    "num_train_epochs": (3.0, "data.epochs", 3),
    "total_epochs": (15, "data.epochs", 15),
    "mask_truncated_completions": (True, "algo.mask_truncated", True),
    "scale_rewards": ("batch", "algo.advantage", "batch_std"),
    "multi_objective_aggregation": (
        "normalize_then_sum",
        "algo.reward_combination",
        "normalise_each",
    ),
    "adam_beta2": (0.99, "learner.betas", (0.9, 0.99)),
    "generation_batch_size": (64, "buffer.groups_per_step", 8),
    "delta": (2.0, "algo.dual_clip", 2.0),
    "sync_weights_interval": (2, "weights.publish_every", 2),
}
# Settings without which a value of CALLED would contradict the others.
NEEDS: dict[str, dict[str, Any]] = {
    "delta": {"algo": {"minibatches": 2}},
    "torch_compile": {"launch": {"gpus": 4}},
    "cpu_offload": {"launch": {"gpus": 4}, "learner": {"parallel": "fsdp"}},
}


def refusal(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        from_mapping(settings)
    return str(caught.value)


def value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        found = getattr(config, part)
        config = found[0] if isinstance(found, tuple) and part == "eval" else found
    return config


@pytest.mark.parametrize("name", CALLED)
def test_a_name_of_another_trainer_is_taken_as_ours_with_a_notice(name, caplog):
    value, key, ours = CALLED[name]
    with caplog.at_level(logging.WARNING):
        config = from_mapping({**NEEDS.get(name, {}), name: value})
    assert value_at(config, key) == ours
    assert f"{name}={value!r}: taken as " in caplog.text


def test_a_foreign_name_is_taken_in_any_room_but_a_name_of_ours_only_at_the_top():
    for room in ("algo", "learner", "sampling"):
        assert from_mapping({room: {"num_generations": 4}}).algo.group_size == 4
    assert "unknown setting buffer.lr; did you mean learner.lr?" in refusal(buffer={"lr": 1})
    assert "unknown setting sampling.seed" in refusal(sampling={"seed": 4})


@pytest.mark.peer
def test_every_field_of_the_released_grpo_config_has_a_row():
    from trl import GRPOConfig

    fields = {field.name for field in dataclasses.fields(GRPOConfig)}
    known = {name for entry in entries() for name in entry.trl}
    assert fields - known == set()


def test_every_key_of_the_table_is_a_setting():
    config = Config()
    for entry in entries():
        for key in entry.ours:
            value_at(config, key)


@pytest.mark.peer
@pytest.mark.parametrize("name", EQUAL)
def test_settings_under_which_our_loss_equals_that_of_trl_are_translated_into_each_other(name):
    """tests/test_peer_trl.py holds the two losses equal; here the one gives the other."""
    ours, theirs = EQUAL[name]
    expected = AlgoSettings(**ours)
    if expected.correction == ("none",):
        theirs = {**theirs, "vllm_importance_sampling_correction": False}
    found = from_mapping({"algo": {"minibatches": 2}, "epsilon": 0.2, **theirs}).algo
    same = {"loss", "aggregation", "cispo", "gspo", "sapo", "vespo", "icepop", "opsm"}
    same |= {"tis_sequence", "correction_cap", "dual_clip", "entropy_coef"}
    if expected.loss == "ppo_clip":
        same |= {"clip_low", "clip_high"}
    assert found.model_dump(include=same) == expected.model_dump(include=same)
    if expected.loss != "ppo_clip":
        assert found.correction == ("bypass",)  # also where p is not mu, which trl ignores
    elif name not in ("bypass", "opsm"):  # there trl has a proximal policy that is the behaviour's
        other_names = {("tis",): ("decoupled",)}
        assert found.correction == other_names.get(expected.correction, expected.correction)


def test_epsilon_alone_bounds_both_sides_as_it_does_in_trl():
    assert from_mapping({"epsilon": 0.1}).algo.clip_high == 0.1
    assert from_mapping({"clip_range": 0.1}).algo.clip_high == 0.1
    assert from_mapping({"epsilon": 0.1, "algo": {"clip_high": 0.4}}).algo.clip_high == 0.4
    assert from_mapping({"cliprange_low": 0.1}).algo.clip_high == AlgoSettings().clip_high


@given(
    size=st.integers(1, 16),
    parts=st.integers(1, 8),
    times=st.integers(1, 4),
    learners=st.integers(1, 4),
)
def test_a_batch_of_trl_has_as_many_completions_and_updates_here(size, parts, times, learners):
    completions, steps = size * learners * parts * times, parts * times
    settings = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": parts,
        "num_generations": 2,
        "launch": {"learners": learners},
    }
    if completions % 2:
        said = "is not a multiple of algo.group_size=2" if completions > 1 else "equal to 2"
        assert said in refusal(**settings, steps_per_generation=steps)
    elif completions // 2 // learners >= times:
        for whole in ({"steps_per_generation": steps}, {"generation_batch_size": completions}):
            config = from_mapping({**settings, **whole})
            assert config.buffer.groups_per_step * 2 == completions
            assert config.algo.minibatches == times


def test_the_batch_arithmetic_is_shown_when_it_does_not_work_out():
    assert "only together with per_device_train_batch_size" in refusal(
        gradient_accumulation_steps=4
    )
    message = refusal(per_device_train_batch_size=4, generation_batch_size=20)
    assert "20 completions is no multiple of 4 per device x 2 launch.learners" in message


def test_a_warmup_ratio_is_a_share_of_the_steps_and_stands_alone():
    for ratio, steps in ((0.1, 5), (0, 0), (1, 45)):
        config = from_mapping({"warmup_ratio": ratio, "max_steps": 45})
        told = [learning_rate(step, config.learner, 45) for step in range(45)]
        assert sum(rate < config.learner.lr for rate in told) == max(steps - 1, 0)
    assert from_mapping({"lr": 1e-5, "lr_min": 1e-6}).learner.min_lr_ratio == pytest.approx(0.1)
    both = {"learner": {"warmup_steps": 10}, "warmup_ratio": 0.1}
    assert "warmup_ratio=0.1, but learner.warmup_steps=10: keep one" in refusal(**both)


def test_a_reference_is_synced_only_when_it_is_asked_for(caplog):
    synced = {"sync_ref_model": True, "ref_model_sync_steps": 64, "beta": 0.1}
    reference = from_mapping(synced).algo.reference
    assert (reference.sync_every, reference.mix_alpha) == (64, 0.6)
    with caplog.at_level(logging.WARNING):
        never = from_mapping({**synced, "sync_ref_model": False}).algo.reference
    assert never.sync_every == 0
    assert "sync_ref_model=False, ref_model_sync_steps=64: changes nothing here" in caplog.text


def test_reward_weights_are_those_of_the_functions_in_their_order():
    functions = [{"use": "tag"}, {"use": "m:f", "options": {"x": 1}}]
    settings = {"reward": {"functions": functions}, "reward_weights": [0.7, 0.3]}
    assert [f.weight for f in from_mapping(settings).reward.functions] == [0.7, 0.3]
    assert functions == [{"use": "tag"}, {"use": "m:f", "options": {"x": 1}}]
    assert "3 numbers for 2 functions (tag, m:f)" in refusal(
        **{**settings, "reward_weights": [1, 2, 3]}
    )
    functions[0]["weight"] = 2
    assert "tag has the weight 2 already" in refusal(**settings)


def test_what_is_left_out_of_a_pair_or_band_is_the_default_of_trl():
    assert from_mapping({"adam_beta1": 0.8}).learner.betas == (0.8, 0.999)
    vespo = from_mapping({"loss_type": "vespo", "vespo_k_pos": 1.0}).algo.vespo
    assert (vespo.positive, vespo.negative) == ((1.0, 3.0), (3.0, 2.0))
    masked = {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_cap": 1.5}
    icepop = from_mapping(masked).algo
    assert icepop.correction == ("icepop",)
    assert (icepop.icepop.low < 1e-6, icepop.icepop.high) == (True, 1.5)


def test_no_kl_loss_is_a_coefficient_of_zero_whatever_the_coefficient_says():
    assert from_mapping({"use_kl_loss": False, "kl_loss_coef": 0.1}).algo.kl_coef == 0
    assert from_mapping({"use_kl_loss": True}).algo.kl_coef == 0.001


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"algo": {"num_generations": 4, "group_size": 8}},
            "group_size would be 4, but is 8; keep",
        ),
        ({"num_generations": 4, "prompt_repeat_k": 5}, "algo.group_size would be 5, but is 4;"),
        ({"num_generations": 4, "algo": {"num_generations": 5}}, "set twice, to 4 and to 5"),
        ({"optimizer_steps": 4, "per_device_train_batch_size": 8}, "but is 1 by per_device_train"),
        ({"beta": 0.1, "kl_loss_coef": 0.2}, "algo.kl_coef would be 0.2, but is 0.1"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, "is not offered; use"),
        ({"loss_type": "cispo", "algo": {"correction": "tis"}}, "but is 'tis'; keep one of them"),
    ],
)
def test_names_that_contradict_each_other_are_refused(settings, parts):
    assert parts in refusal(**settings)


def test_names_that_agree_are_taken():
    settings = {"num_generations": 4, "prompt_repeat_k": 4, "algo": {"group_size": 4}}
    assert from_mapping(settings).algo.group_size == 4


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("min_p", 0.1, "samples with sampling.temperature"),
        ("repetition_penalty", 1.1, "leave it out"),
        ("top_entropy_quantile", 0.2, "leave it out"),
        ("optim", "adafactor", "the optimizer is AdamW"),
        ("trust_remote_code", True, "code of their own"),
        ("resume_from_checkpoint", "x", "launch --resume"),
        ("expert_parallel_size", 2, "experts and sequences are not dealt"),
        ("batch_size", 8, "say the unit"),
        ("vllm_importance_sampling_mode", "sequence_mask", "geometric_mask"),
        ("lr_scheduler_type", "polynomial", "'constant', 'linear' or 'cosine'"),
        ("loss_type", "luspo", "there is no loss 'luspo'"),
        ("loss_type", ["grpo"], "a wrong type of value"),
        ("vllm_importance_sampling_clip_min", 0.5, "with clip_min for token_mask alone"),
        ("num_train_epochs", 0.5, "data.epochs=0.5 is not allowed: Input should be a valid int"),
        ("num_train_epochs", "many", "data.epochs='many' is not allowed"),
        ("learning_rate", "fast", "valid number"),
        ("reward_weights", 1.0, "a wrong type of value"),
    ],
)
def test_what_would_change_the_learning_and_is_not_offered_is_refused(name, value, remedy):
    assert remedy in refusal(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("min_p", 0), ("repetition_penalty", 1.0), ("optim", "adamw_torch"), ("fp16", False)],
)
def test_what_is_not_offered_may_be_said_to_be_off(name, value, caplog):
    with caplog.at_level(logging.WARNING):
        assert from_mapping({name: value}) == Config()
    assert f"{name}: off here too" in caplog.text


def test_names_that_are_not_needed_are_said_to_be_so_and_secrets_are_not_shown(caplog):
    with caplog.at_level(logging.WARNING):
        config = from_mapping({"use_vllm": True, "save_steps": 100, "hub_token": "hf_secret"})
    assert config == Config()
    assert "use_vllm: not needed here (the engine is always vLLM" in caplog.text
    assert "save_steps: not offered yet (checkpoints" in caplog.text
    assert "secret" not in caplog.text


def test_an_alias_of_a_table_that_is_a_list_is_refused_with_the_place():
    assert "eval is no table; set it there" in refusal(eval=[{"every": 3}], evaluate_step=3)


def test_the_settings_that_are_read_are_left_as_they_were():
    raw = {"algo": {"cispo": {"floor": 0.5}}, "loss_type": "cispo", "epsilon_high": 4.0}
    config = from_mapping(raw)
    assert (config.algo.cispo.cap, config.algo.cispo.floor) == (4.0, 0.5)
    assert raw == {"algo": {"cispo": {"floor": 0.5}}, "loss_type": "cispo", "epsilon_high": 4.0}


def test_no_name_has_two_rows():
    names = [name for entry in entries() for name in entry.names]
    assert len(names) == len(set(names)) == len(by_name())
