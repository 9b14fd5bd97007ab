"""LoRA: what is trained, published, kept and saved, against plain float64 sums and plain models."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import learner_case
import numpy as np
import pytest
import torch
from golden.test_serial import rows
from learner_case import STEP, logprobs, make_groups, on_ranks, part_of, shard_of, token_log
from peft import PeftModel
from rich.console import Console
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from asyncgrpo.config import Config, from_mapping, load_config
from asyncgrpo.data.tiny import build_untrained
from asyncgrpo.errors import ConfigError
from asyncgrpo.launch import preflight
from asyncgrpo.launch.memory_report import check_targets
from asyncgrpo.launch.preflight import check_resumable, missing_extra, own_port
from asyncgrpo.launch.session import Session
from asyncgrpo.learner.model import PolicyHead
from asyncgrpo.learner.update import PolicyUpdater
from asyncgrpo.rundir import Endpoints, RunDir
from asyncgrpo.serial import run_serial
from asyncgrpo.settings.learner import LoraSettings
from asyncgrpo.types import Shard
from asyncgrpo.weights.local import LocalLink
from asyncgrpo.weights.proof import canary_prompts
from asyncgrpo.weights.sender import CollectiveSender

Weights = dict[str, torch.Tensor]
R, ALPHA = 4, 10


@pytest.fixture(scope="module")
def shard(folder: Path) -> Shard:
    return shard_of(make_groups(folder))


def settings(folder: Path, lora: dict[str, Any] | None = None, **rooms: Any) -> Config:
    lora = {"r": R, "alpha": ALPHA, **(lora or {})}
    learner = {"lora": lora, **rooms.pop("learner", {})}
    rooms.setdefault("buffer", {"groups_per_step": 6, "max_staleness": 6})
    return learner_case.settings(folder, learner=learner, **rooms)


def trained(config: Config, shard: Shard, updates: int = 2, **where: Path) -> PolicyUpdater:
    updater = PolicyUpdater(config, **where)
    for _ in range(updates):
        updater.update(shard)
    return updater


def base_of(folder: Path) -> Weights:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def copied(updater: PolicyUpdater) -> Weights:
    return {name: tensor.clone() for name, tensor in updater.weights()}


def adapter_of(updater: PolicyUpdater) -> Weights:
    return updater._state()["model"]


def test_before_the_first_update_the_base_is_published_bit_for_bit(folder):
    updater, base = PolicyUpdater(settings(folder, {"dropout": 0.5})), base_of(folder)
    published = copied(updater)
    assert not any(module.training for module in updater._policy.modules())
    assert list(published) == list(base)
    assert all(torch.equal(published[name], base[name]) for name in base)


def test_published_weights_are_the_base_plus_alpha_over_r_b_a(folder, shard):
    updater = trained(settings(folder), shard)
    adapter, base, published = adapter_of(updater), base_of(folder), copied(updater)
    layers = {name.rpartition(".lora_")[0] for name in adapter}
    assert len(adapter) == 2 * len(layers)
    for name, tensor in base.items():
        expected = tensor.double()
        if (layer := name.removesuffix(".weight")) in layers:
            a, b = (adapter[f"{layer}.lora_{m}.default.weight"].double() for m in "AB")
            assert a.shape[0] == b.shape[1] == R
            assert not torch.equal(published[name], tensor)
            expected = expected + ALPHA / R * b @ a
        torch.testing.assert_close(published[name].double(), expected, rtol=0, atol=1e-7)
    kinds = {layer.rpartition(".")[2] for layer in layers}
    assert kinds == {f"{k}_proj" for k in ("q", "k", "v", "o", "gate", "up", "down")}


def test_an_adapter_is_published_as_peft_saves_it_and_proven_apart_from_the_base(folder, shard):
    lora = {"publish": "adapter", "r": 8}
    updater = trained(settings(folder, lora, actor={"engine": "vllm"}), shard)
    saved = updater._adapter._peft.state_dict()
    expected = {
        name.removeprefix("base_model.model.").replace(".default.", "."): tensor
        for name, tensor in saved.items()
        if ".lora_" in name
    }
    published = copied(updater)
    assert list(published) == list(expected)
    assert all(torch.equal(published[name], expected[name]) for name in expected)
    for table, whole in [(updater.canary_logprobs(), False), (merged_canaries(updater), True)]:
        own = updater._plain_head.next_logprobs(canary_prompts(updater.vocab_size)).numpy()
        assert (np.abs(table - own).max() > 0) == whole  # merged rounds differently
        np.testing.assert_allclose(table, own, atol=1e-5)


def merged_canaries(updater: PolicyUpdater) -> np.ndarray:
    with updater._adapter.merged():
        return updater._plain_head.next_logprobs(canary_prompts(updater.vocab_size)).numpy()


def test_a_serial_run_refuses_to_publish_an_adapter(folder):
    config = settings(folder, {"publish": "adapter"}, actor={"engine": "vllm"})
    with pytest.raises(
        ConfigError, match=r"'adapter' needs .*the toy engine, also that of --serial"
    ):
        Session(config).run_serially()


def test_publishing_changes_no_weight_and_makes_one_at_a_time(folder, shard):
    updater = trained(settings(folder), shard)
    weights = updater.weights()
    before = {name: tensor.clone() for name, tensor in updater._policy.named_parameters()}
    first, second = copied(updater), {name: tensor.clone() for name, tensor in weights}
    updater.canary_logprobs()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, tensor in updater._policy.named_parameters():
        assert torch.equal(tensor, before[name])


class Here:
    """The sender of other processes, with nobody there."""

    def __init__(self, config: Config) -> None:
        address, store = f"tcp://127.0.0.1:{own_port()}", ("127.0.0.1", own_port())
        self._sender = CollectiveSender(config, address, store)

    def publish(self, *what: Any) -> None:
        self._sender.publish(*what)
        self._sender.close()

    def staged(self) -> Any:
        return self._sender._handshake.newest, self._sender._outbox._tensors


@pytest.mark.parametrize("kind", [LocalLink, Here])
def test_publishing_holds_one_merged_weight_at_a_time(folder, shard, kind):
    updater = trained(settings(folder), shard)
    own = {tensor.data_ptr() for tensor in updater._policy.parameters()}
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    counts = []

    class Watched:
        def __iter__(self):
            for name, tensor in updater.weights():
                if tensor.data_ptr() not in own:
                    alive.add(tensor)
                counts.append(len(alive))
                yield name, tensor

    link = kind(updater._config)
    link.publish(2, Watched(), updater.canary_logprobs())
    assert 0 < max(counts) <= 2  # the last one lives until the next is there
    version, views = link.staged()
    assert version == 2
    assert all(torch.equal(view, copied(updater)[name]) for name, view in views)


def test_canaries_are_computed_with_the_published_weights(folder, shard, tmp_path):
    updater = trained(settings(folder), shard, run_dir=tmp_path)
    updater.save()
    plain = PolicyUpdater(learner_case.settings(tmp_path / "model"))
    np.testing.assert_array_equal(updater.canary_logprobs(), plain.canary_logprobs())
    apart = PolicyHead(updater._policy).next_logprobs(canary_prompts(updater.vocab_size)).numpy()
    np.testing.assert_allclose(apart, updater.canary_logprobs(), atol=1e-5)


def test_only_the_adapter_has_gradients_and_optimizer_state(folder, shard):
    updater, seen = PolicyUpdater(settings(folder)), set()
    named = list(updater._policy.named_parameters())
    updater.update(shard, lambda: seen.update(n for n, w in named if w.grad is not None))
    assert seen == {name for name, _ in named if ".lora_" in name}
    assert not any(weight.grad is not None for _, weight in named), "kept to the next update"
    sizes = [p.numel() for group in updater._optimizer.param_groups for p in group["params"]]
    assert sum(sizes) == sum(tensor.numel() for tensor in adapter_of(updater).values())
    assert sum(sizes) < sum(tensor.numel() for tensor in base_of(folder).values()) / 5


def test_targets_choose_the_layers(folder, shard):
    updater = trained(settings(folder, {"targets": ["q_proj", "down_proj"]}), shard)
    published, base = copied(updater), base_of(folder)
    changed = {name.split(".")[-2] for name in base if not torch.equal(published[name], base[name])}
    assert changed == {"q_proj", "down_proj"}


def test_without_a_path_the_base_is_the_reference(folder, shard, tmp_path):
    algo = {"kl_coef": 0.1}
    config = settings(folder, algo=algo, observe={"token_log": True})
    updater = PolicyUpdater(config, run_dir=tmp_path)
    assert updater.update(shard)["objective/kl_ref"] == 0.0
    for _ in range(2):
        kl = updater.update(shard)["objective/kl_ref"]
    assert kl > 1e-4
    found, base = token_log(tmp_path), AutoModelForCausalLM.from_pretrained(folder)
    for lease, group in enumerate(shard.groups):
        for sample, completion in enumerate(group.completions):
            chosen = (found["lease"] == lease) & (found["sample"] == sample)
            expected = logprobs(base, group.prompt_token_ids, completion.token_ids)
            np.testing.assert_allclose(found["ref_logprob"][chosen], expected, atol=1e-5)


@pytest.mark.parametrize(("seed", "first"), [(5, 0.0), (6, 1.0)])
def test_a_reference_with_a_path_is_that_model(folder, shard, tmp_path, seed, first):
    path = str(build_untrained(tmp_path / "other", True, seed))
    algo = {"kl_coef": 0.1, "reference": {"path": path}}
    kl = PolicyUpdater(settings(folder, algo=algo)).update(shard)["objective/kl_ref"]
    assert (kl > first) if first else (kl == 0.0)


def test_dropout_acts_in_updates_alone(folder, shard):
    config = settings(folder, {"dropout": 0.5}, algo={"passes": 2})
    updater, without = trained(config, shard), trained(settings(folder, algo={"passes": 2}), shard)
    assert not torch.equal(
        *(copied(u)["model.layers.0.mlp.up_proj.weight"] for u in (updater, without))
    )
    np.testing.assert_array_equal(updater.canary_logprobs(), updater.canary_logprobs())
    prompts = canary_prompts(updater.vocab_size)
    assert torch.equal(*(PolicyHead(updater._policy).next_logprobs(prompts) for _ in range(2)))


@pytest.mark.parametrize("save_merged", [True, False])
def test_the_saved_model_loads_plainly_and_the_adapter_with_peft(
    folder, shard, tmp_path, save_merged
):
    model = tmp_path / "model"
    updater = trained(settings(folder, {"save_merged": save_merged}), shard, run_dir=tmp_path)
    updater.save()
    prompts = canary_prompts(updater.vocab_size)
    expected = PolicyHead(updater._policy).next_logprobs(prompts)
    loaded = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), model / "adapter")
    ]
    assert (model / "config.json").exists() == save_merged
    if save_merged:
        loaded.append(AutoModelForCausalLM.from_pretrained(model))
        assert not [name for name in dict(loaded[1].named_parameters()) if "lora" in name]
        assert {p.name for p in folder.glob("*.json")} <= {p.name for p in model.glob("*.json")}
    for one in loaded:
        with torch.no_grad():
            found = one.eval()(input_ids=torch.tensor(prompts)).logits[:, -1].log_softmax(-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_checkpoint_is_small_and_goes_on_bit_for_bit(folder, shard, tmp_path):
    def again(updater: PolicyUpdater) -> list[dict[str, float]]:
        return [updater.update(shard) for _ in range(2)]

    config = settings(folder, {"dropout": 0.1}, algo={"kl_coef": 0.1})
    updater = trained(config, shard, run_dir=tmp_path)
    updater.checkpoint(STEP)
    expected = again(updater)
    updater.save()
    restored = PolicyUpdater(config, run_dir=tmp_path)
    assert restored.restore() == STEP
    assert again(restored) == expected
    first, second = copied(updater), copied(restored)
    assert all(torch.equal(first[name], second[name]) for name in first)
    held = FileSystemReader(tmp_path / "checkpoints" / f"step_{STEP}").read_metadata()
    tensors = [name for name, what in held.state_dict_metadata.items() if hasattr(what, "size")]
    assert len(tensors) == 4 * len(adapter_of(updater))  # with Adam's two moments and step
    assert all(".lora_" in name for name in tensors)


def learn(rank: int, count: int, config: Config, shard: Shard, out: Path) -> None:
    updater = PolicyUpdater(config)
    for _ in range(2):
        updater.update(part_of(shard, rank, count))
    torch.save(copied(updater), out / f"rank_{rank}")


@pytest.mark.slow
def test_two_ranks_train_the_same_adapter_as_one(folder, shard, tmp_path):
    # adam_eps: a step must not depend on the sign of a gradient that is zero but for rounding
    learner = {"lr": 1e-3, "adam_eps": 1e-3}
    config = settings(folder, learner=learner, algo={"kl_coef": 0.1})
    on_ranks(2, learn, config, shard, tmp_path)
    one, two = (torch.load(tmp_path / f"rank_{rank}") for rank in range(2))
    alone = copied(trained(config, shard))
    assert not torch.equal(
        alone["model.layers.0.mlp.up_proj.weight"],
        base_of(folder)["model.layers.0.mlp.up_proj.weight"],
    )
    for name, tensor in alone.items():
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_serial_run_learns_and_its_model_is_the_learners(folder, tmp_path):
    config = from_mapping(
        {
            "run": {"max_steps": 20, "seed": 3},
            "model": {"path": str(folder)},
            "data": {"max_prompt_tokens": 32, "eval": "none"},
            "sampling": {"max_completion_tokens": 8},
            "reward": {"functions": [{"use": "reward_functions:vowels"}]},
            "actor": {"engine": "toy", "concurrency": 10},
            "buffer": {"groups_per_step": 4, "max_staleness": 2},
            "algo": {"group_size": 4, "drop_uniform_groups": False},
            "learner": {"lr": 3e-2, "lora": {"r": R}},
            "launch": {"actors": 1, "learners": 1},
        }
    )
    endpoints = Endpoints(buffer="", weights="", store=("", 0))
    run = RunDir(path=tmp_path / "run", config=config, endpoints=endpoints)
    run.path.mkdir()
    run.write()
    run_serial(run)
    rewards = [row["rewards/mean"] for row in rows(run)]
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 0.4
    assert rows(run)[0]["ess"] == pytest.approx(1.0, abs=1e-6)  # merged there, apart here
    assert (run.model_path / "adapter" / "adapter_model.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(run.model_path)


@pytest.mark.parametrize(
    ("rooms", "said"),
    [
        (
            {"learner": {"lora": {"quantize": "4bit"}}},
            "learner.lora.quantize='4bit' needs CUDA, but launch.gpus=0 is a CPU run",
        ),
        (
            {"learner": {"lora": {}}, "algo": {"kl_coef": 0.1, "reference": {"sync_every": 5}}},
            "algo.reference.sync_every=5 with learner.lora: an adapter has no weights",
        ),
        (
            {"learner": {"lora": {"publish": "adapter"}}, "actor": {"engine": "toy"}},
            "learner.lora.publish='adapter' needs actor.engine = 'vllm'",
        ),
        (
            {
                "learner": {"lora": {"publish": "adapter", "quantize": "4bit"}},
                "launch": {"gpus": 4},
            },
            "learner.lora.publish='adapter' with learner.lora.quantize='4bit': engines would add",
        ),
        (
            {"learner": {"lora": {"publish": "adapter", "r": 513}}},
            "learner.lora.r=513 must be <= 512, vLLM's limit, with learner.lora.publish='adapter'",
        ),
        ({"learner": {"lora": {"rank": 8}}}, "unknown setting learner.lora.rank"),
        ({"learner": {"lora": {"r": 0}}}, "learner.lora.r=0 is not allowed"),
        ({"learner": {"lora": {"targets": []}}}, "learner.lora.targets"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(rooms, said):
    with pytest.raises(ConfigError) as error:
        from_mapping(rooms)
    assert said in str(error.value)


@pytest.mark.parametrize("wrong", ["q_prjo", "lm_head", "embed_tokens"])
def test_unknown_targets_are_refused_with_the_names_that_exist(folder, wrong):
    names = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    told = rf"targets: '{wrong}' cannot .*{names}"
    with pytest.raises(ConfigError, match=told):
        check_targets(str(folder), ["q_proj", wrong])


def test_nothing_is_started_for_unknown_targets(folder, tmp_path):
    config = settings(folder, {"targets": ["qkv"]}, run={"dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match="targets: 'qkv' cannot be adapted"):
        Session(config, Console(quiet=True)).run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lora", [None, {"r": 8}])
def test_a_run_goes_on_with_the_same_adapter_only(tmp_path, lora):
    before = from_mapping({"learner": {"lora": {"r": 4}}})
    (tmp_path / "config.json").write_text(before.model_dump_json())
    assert check_resumable(tmp_path, before) == 0
    with pytest.raises(ConfigError, match=r"learner.lora=.* cannot change within a run"):
        check_resumable(tmp_path, from_mapping({"learner": {"lora": lora}}))


def test_a_setting_of_an_adapter_can_be_added_to_settings_without_one(tmp_path):
    (tmp_path / "config.json").write_text(Config().model_dump_json())
    config = load_config(tmp_path / "config.json", ["learner.lora.r=8"])
    assert config.learner.lora == LoraSettings(r=8)


def test_missing_extra_are_named_with_the_extra_that_brings_them(monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    lora = from_mapping({"learner": {"lora": {}}})
    both = from_mapping({"learner": {"lora": {"quantize": "4bit"}}, "launch": {"gpus": 2}})
    fused = from_mapping(
        {"learner": {"fused_head": True, "dtype": "bfloat16"}, "launch": {"gpus": 2}}
    )
    assert missing_extra(Config()) == ""
    assert missing_extra(fused) == (
        "learner.fused_head needs liger_kernel and cutlass: pip install 'asyncgrpo[liger]'"
    )
    assert missing_extra(lora).endswith("needs peft: pip install 'asyncgrpo[lora]'")
    assert missing_extra(both).endswith("peft and bitsandbytes: pip install 'asyncgrpo[qlora]'")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_4bit_base_trains_publishes_and_saves_in_full_precision(folder, shard, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = settings(folder, {"quantize": "4bit"}, launch={"learners": 1, "gpus": 1})
    updater = PolicyUpdater(config, run_dir=tmp_path)
    before, base = copied(updater), base_of(folder)
    assert {name: t.shape for name, t in before.items()} == {n: t.shape for n, t in base.items()}
    for name, tensor in base.items():  # NF4 keeps about a digit
        assert (before[name].cpu() - tensor).abs().max() <= 0.2 * tensor.abs().max()
    updater.update(shard)
    updater.save()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, tensor in updater.weights():
        assert torch.equal(saved.get_parameter(name), tensor.cpu())
    assert not torch.equal(
        before["model.layers.0.mlp.up_proj.weight"],
        copied(updater)["model.layers.0.mlp.up_proj.weight"],
    )
