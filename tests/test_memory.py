"""The memory estimate against what torch really allocates, its command, and the end of memory."""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fakes import make_lease
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner

from asyncgrpo.actor import process as actor_process
from asyncgrpo.cli import app
from asyncgrpo.config import Config, from_mapping, load_config, preset_files
from asyncgrpo.data.tiny import build_untrained
from asyncgrpo.errors import AbsentModel, AsyncGRPOError, ConfigError, ModelError
from asyncgrpo.launch import memory_report
from asyncgrpo.launch.memory import GIB, learner_lines, row_tokens
from asyncgrpo.launch.memory_report import MemoryReport, model_shape
from asyncgrpo.learner import process as learner_process
from asyncgrpo.learner.loop import Learner
from asyncgrpo.learner.objective import objective
from asyncgrpo.learner.update import PolicyUpdater
from asyncgrpo.rundir import Endpoints, RunDir
from asyncgrpo.types import Completion, Completions, Group, Shard

PROMPT, COMPLETION, SIZE = 2, 126, 4  # nearly every token is in the loss: the worst case
QWEN_HALF_B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
QWEN_1_7B = QWEN_8B | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
# preset -> model, its parameters, GiB that the preset claims to fit, GiB by its comment
CLAIMS: dict[str, tuple[dict[str, Any], int, float, list[str]]] = {
    "gsm8k-qwen3-8b-8gpu": (QWEN_8B, 8_190_735_360, 80e9 / GIB, ["47.93", "47.91", "72.29"]),
    "math-long": (QWEN_1_7B, 1_720_574_976, 80e9 / GIB, ["39.60", "39.58", "67.80"]),
    "gsm8k-qwen2.5-0.5b-1gpu": (QWEN_HALF_B, 494_032_768, 24, ["19.85"]),
    "tags-zh": (QWEN_HALF_B, 494_032_768, 24, ["22.96"]),
    "lora-8gb": (QWEN_HALF_B, 494_032_768, 8, ["7.75"]),
}
ONE_SEQUENCE = {"max_tokens_per_microbatch": PROMPT + COMPLETION}  # weights are most of it
SMALL = {"parallel": "fsdp", "dtype": "bfloat16", "checkpoint_activations": "full"}
PLAIN_8GPU = (
    *("learner.parallel=ddp", "learner.dtype=float32", "learner.checkpoint_activations=none"),
    "learner.max_tokens_per_microbatch=2048",
)
DEEP = {
    "hidden_size": 64,
    "intermediate_size": 320,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """qwen3: tied, 284 tokens; llama: untied, 6000 tokens; qwen2: with biases, grouped heads.

    layers, ends: untied, most of the weights are in layers of five, or outside of them.
    """
    folder = tmp_path_factory.mktemp("models")
    found = {"qwen3": build_untrained(folder / "qwen3")}
    deep = DEEP | {"num_key_value_heads": 2, "head_dim": 24}
    wide = deep | {"hidden_size": 256, "head_dim": 64, "tie_word_embeddings": False}
    layers = Qwen3Config(**wide | {"intermediate_size": 1024}, vocab_size=300)
    ends = Qwen3Config(**wide | {"num_hidden_layers": 3}, vocab_size=6000)
    others = {
        "deep": Qwen3ForCausalLM(Qwen3Config(**deep, vocab_size=300)),
        "layers": Qwen3ForCausalLM(layers),
        "ends": Qwen3ForCausalLM(ends),
        "llama": LlamaForCausalLM(LlamaConfig(**DEEP, vocab_size=6000)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**DEEP, num_key_value_heads=2, vocab_size=3000)),
    }
    for name, model in others.items():
        model.save_pretrained(folder / name)
        found[name] = folder / name
    return found


@pytest.fixture(autouse=True)
def no_group() -> Iterator[None]:
    """The group that FSDP opens for a lone rank ends with the test."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def half_b(tmp_path: Path) -> Path:
    """A folder with nothing but the config.json of Qwen2.5-0.5B."""
    (tmp_path / "half-b").mkdir()
    (tmp_path / "half-b" / "config.json").write_text(json.dumps(QWEN_HALF_B))
    return tmp_path / "half-b"


def settings(path: Path, **rooms: dict[str, Any]) -> Config:
    return from_mapping(
        {
            "model": {"path": str(path)},
            "data": {"max_prompt_tokens": PROMPT},
            "sampling": {"max_completion_tokens": COMPLETION},
            "algo": {"group_size": SIZE, **rooms.pop("algo", {})},
            "buffer": {"groups_per_step": 4},
            "learner": {"max_tokens_per_microbatch": 1024, **rooms.pop("learner", {})},
            "launch": {"learners": 1, "actors": 1, **rooms.pop("launch", {})},
            **rooms,
        }
    )


def full_shard(count: int = 4) -> Shard:
    """Groups whose completions are all as long as they may be."""
    random, groups = np.random.default_rng(0), []
    for number in range(count):
        completions = tuple(
            Completion(
                token_ids=random.integers(3, 90, COMPLETION).astype(np.int32),
                behavior_logprobs=np.full(COMPLETION, -5, np.float32),
                versions=np.zeros(COMPLETION, np.int32),
                finish_reason="length",
            )
            for _ in range(SIZE)
        )
        rewards = random.normal(size=SIZE).astype(np.float32)
        groups.append(
            Group(
                lease=make_lease(number, group_size=SIZE),
                prompt_token_ids=random.integers(3, 90, PROMPT).astype(np.int32),
                completions=Completions.of(completions),
                rewards=rewards,
                reward_parts={"task": rewards},
                actor="actor-0",
            )
        )
    return Shard(
        step=0,
        groups=tuple(groups),
        num_loss_tokens_global=count * SIZE * COMPLETION,
        num_completions_global=count * SIZE,
    )


def measured_peak(updater: PolicyUpdater, shard: Shard) -> int:
    """Bytes of tensors at the worst moment of an update, weights and optimizer state included."""
    updater.update(shard)  # makes the optimizer's state
    held = [*updater._policy.parameters()]
    if updater._reference is not None:
        held += updater._reference.state().values()
    for state in updater._optimizer.state.values():
        held += [state["exp_avg"], state["exp_avg_sq"]]
    gc.collect()  # nor those of tests before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        updater.update(shard)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in held]
    unique = {tensor.data_ptr(): tensor.nbytes for tensor in own}
    return sum(unique.values()) + int(np.cumsum(changes).max())


def estimated(config: Config, *names: str) -> float:
    shape = model_shape(config.model.path)
    lines = {n: s for n, s, _ in learner_lines(config, shape, is_first=True)}
    assert set(names) <= set(lines)
    chosen = names or set(lines) - {"publishing", "process"}
    return sum(lines[name] for name in chosen)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the profiler: blocks older than it
@pytest.mark.parametrize(
    ("name", "rooms"),
    [
        ("qwen3", {"algo": {"kl_coef": 0.1}}),
        ("llama", {}),
        ("qwen2", {"learner": {"lora": {"r": 4}}}),
        ("deep", {"learner": {"checkpoint_activations": 2}}),
        ("deep", {"learner": {"checkpoint_activations": "full", "dtype": "bfloat16"}}),
        ("layers", {"learner": ONE_SEQUENCE | SMALL}),
        *(
            pytest.param(name, {"learner": learner}, marks=pytest.mark.slow)
            for name, learner in (
                ("llama", {"dtype": "bfloat16", "float32_head": True}),
                ("layers", ONE_SEQUENCE | {"dtype": "bfloat16"}),
                ("layers", ONE_SEQUENCE | {"parallel": "fsdp"}),
                ("ends", ONE_SEQUENCE | {"parallel": "fsdp"}),
                ("ends", ONE_SEQUENCE | {"parallel": "fsdp", "dtype": "bfloat16"}),
                ("ends", SMALL | {"lora": {"r": 4}}),
            )
        ),
        pytest.param("qwen3", {"learner": {"lora": {"r": 8}}}, marks=pytest.mark.slow),
        pytest.param("llama", {"learner": {"lora": {"r": 4}}}, marks=pytest.mark.slow),
        pytest.param(
            "qwen2", {"learner": {"lora": {"r": 4, "dropout": 0.1}}}, marks=pytest.mark.slow
        ),
        pytest.param(
            "qwen2", {"learner": {"max_tokens_per_microbatch": 512}}, marks=pytest.mark.slow
        ),
    ],
)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak_of_an_update(
    models: dict[str, Path], name: str, rooms: dict[str, Any]
) -> None:
    config = settings(models[name], **{key: dict(value) for key, value in rooms.items()})
    count = 1 if ONE_SEQUENCE.items() <= rooms.get("learner", {}).items() else 4
    peak = measured_peak(PolicyUpdater(config), full_shard(count))
    assert estimated(config) == pytest.approx(peak, rel=0.1)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "learner"),
    [
        ("deep", SMALL),
        *(
            pytest.param(name, learner, marks=pytest.mark.slow)
            for name in ("layers", "ends")
            for learner in (SMALL, {"parallel": "fsdp"}, SMALL | {"lora": {"r": 4}})
        ),
    ],
)
def test_the_estimate_is_within_a_tenth_of_what_the_first_of_four_ranks_allocates(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, learner: dict[str, Any]
) -> None:
    """Nothing is communicated, so numbers are wrong, but every buffer is allocated."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    monkeypatch.setattr(math, "isfinite", lambda _: True)
    config = settings(models[name], learner=ONE_SEQUENCE | learner, launch={"learners": 4})
    peak = measured_peak(PolicyUpdater(config), full_shard(1))
    assert estimated(config) == pytest.approx(peak, rel=0.1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_chunks_of_logits_are_not_the_peak_when_the_output_layer_is_trained(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncgrpo.learner.model.LOGITS_PER_CHUNK", 6000 * 20)
    config = settings(models["llama"])
    updater = PolicyUpdater(config)
    assert updater._head._chunk_tokens == 20
    assert estimated(config, "logits") == 4 * 6000 * 3 * 64
    assert estimated(config) == pytest.approx(measured_peak(updater, full_shard()), rel=0.1)


@pytest.mark.parametrize(
    ("on_gpu", "learner"),
    [
        (False, {}),
        (True, {}),
        (True, {"dtype": "bfloat16", "float32_head": True}),
        (True, {"dtype": "bfloat16", "parallel": "fsdp"}),
        (True, SMALL | {"checkpoint_activations": 2}),
    ],
)
@pytest.mark.parametrize("name", ["qwen2", "deep"])
def test_activations_are_what_autograd_keeps_with_the_scores_of_the_kernel_that_cuda_takes(
    models: dict[str, Path], name: str, on_gpu: bool, learner: dict[str, Any]
) -> None:
    config = settings(models[name], launch={"gpus": 2 * on_gpu}, learner=dict(learner))
    updater = PolicyUpdater(settings(models[name], learner=dict(learner)))
    (batch,) = updater._preparer.prepare(0, [full_shard(2).groups], 0.0)
    weights = {weight.data_ptr() for weight in updater._policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    has_scores = on_gpu and not learner  # in bfloat16 CUDA takes a kernel without
    kernel = sdpa_kernel(SDPBackend.MATH) if has_scores else nullcontext()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    updater._head._score = lambda hidden, targets: (hidden[:, 0].float(), hidden[:, 0].float())
    with kernel, hooks:
        logprobs, entropy = updater._head(batch.rows[0])
        objective(batch.inputs(0, logprobs, entropy, updater._config), config.algo, 0.0)
    sizes = [t.untyped_storage().nbytes() for p, t in kept.items() if p not in weights]
    rounded = ["rounded weights"] if "float32_head" in learner else []
    assert estimated(config, "activations", *rounded) == pytest.approx(sum(sizes), rel=0.05)
    assert ("attention scores" in MemoryReport(config).all_devices(None)) == has_scores


def test_the_sizes_of_a_known_model_are_right(half_b: Path) -> None:
    shape = model_shape(str(half_b))
    config = load_config("lora-8gb", [f"model.path={half_b}"])
    assert shape.parameters == 494_032_768  # "0.49B" on its model card
    assert shape.kv_bytes(config) == 12_288 * 640
    assert shape.chunk_tokens == 441
    assert estimated(config, "gradients") == 4 * 16 * 24 * (
        2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864)
    )
    text = MemoryReport(config).all_devices(8 * GIB)
    assert text.startswith("GPU 0: fits, 7.75 of 8.00 GiB\n")  # the preset's comment has the table


def test_ranks_and_a_reference_hold_copies_of_their_own(
    half_b: Path, models: dict[str, Path]
) -> None:
    def text(kl_coef: float = 0.1, **rooms: Any) -> str:
        algo = {"kl_coef": kl_coef, "reference": {"path": rooms.pop("path", None)}}
        return MemoryReport(settings(half_b, algo=algo, **rooms)).all_devices(None)

    config = settings(half_b, algo={"kl_coef": 0.1}, launch={"learners": 2})
    for name in ("weights", "gradients", "DDP buckets", "reference model"):
        assert estimated(config, name) == 4 * 494_032_768
    assert "DDP" not in text()
    assert "reference" not in text(kl_coef=0.0)
    assert "reference" not in text(learner={"lora": {}})  # its base serves
    assert re.search(r"reference model +0\.00 +4 bytes x 3\.32e", text(path=str(models["qwen3"])))


def test_ranks_of_a_copy_share_it_and_the_host_may_hold_it(half_b: Path) -> None:
    def config(**learner: Any) -> Config:
        learner = {"parallel": "fsdp", **learner}
        launch = {"learners": 4, "gpus": 8}
        return settings(half_b, algo={"kl_coef": 0.1}, learner=learner, launch=launch)

    names, whole = ("weights", "gradients", "reference model"), 4 * 494_032_768
    for name in names:
        assert estimated(config(), name) == whole / 4
        assert estimated(config(shard_ranks=2), name) == whole / 2
    assert estimated(config(), "optimizer") == 2 * whole / 4
    assert "DDP" not in MemoryReport(config()).all_devices(None)
    offloaded = config(cpu_offload=True)
    assert estimated(offloaded, *names, "optimizer") == 0
    text = MemoryReport(offloaded).all_devices(None)
    assert "4 bytes x 4.94e+08 / 4 ranks = 0.46 GiB of the host" in text
    eight = config(parallel="ddp", optimizer="adamw_8bit")
    assert estimated(eight, "optimizer") == 494_032_768 * 2 * (1 + 4 / 256)


@pytest.mark.parametrize("preset", CLAIMS)
def test_presets_for_gpus_fit_what_they_claim(preset: str, tmp_path: Path) -> None:
    model, parameters, claimed, totals = CLAIMS[preset]
    (tmp_path / "config.json").write_text(json.dumps(model))
    assert model_shape(str(tmp_path)).parameters == parameters
    report = MemoryReport(load_config(preset, [f"model.path={tmp_path}"]))
    assert report.fits(claimed * GIB)
    assert re.findall(r"^GPU.*fits, ([\d.]+) of", report.all_devices(80 * GIB), re.M) == totals


def test_every_preset_for_gpus_claims_a_size() -> None:
    assert {name for name in preset_files() if load_config(name).launch.gpus} == set(CLAIMS)


def test_4bit_weights_take_a_half_byte_and_their_scales(half_b: Path) -> None:
    plain = load_config("lora-8gb", [f"model.path={half_b}"])
    packed = load_config("lora-8gb", [f"model.path={half_b}", "learner.lora.quantize=4bit"])
    saved = estimated(plain, "weights") - estimated(packed, "weights")
    assert saved == pytest.approx(3.4375 * 357_826_560)  # see the preset's comment


def test_a_micro_batch_is_never_larger_than_what_a_rank_gets(models: dict[str, Path]) -> None:
    def tokens(**rooms: dict[str, Any]) -> int:
        return row_tokens(
            settings(models["qwen3"], learner={"max_tokens_per_microbatch": 9999}, **rooms)
        )

    assert tokens() == 4 * SIZE * (PROMPT + COMPLETION)
    assert tokens(launch={"learners": 3}) == 2 * SIZE * (PROMPT + COMPLETION)
    assert tokens(algo={"minibatches": 4}) == SIZE * (PROMPT + COMPLETION)


def plan(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", "memory", *map(str, arguments)])
    if isinstance(result.exception, AsyncGRPOError):
        raise result.exception
    return result.exit_code, result.output


def total(text: str) -> float:
    return float(re.search(r"([\d.]+) of", text)[1])


def test_advice_that_is_not_enough_says_so() -> None:
    code, text = plan("--config", "tiny", "--gpu-gib", 1)
    assert code == 1
    saved = sum(map(float, re.findall(r"saves ([\d.]+) GiB", text)))
    (left,) = map(float, re.findall(r"not enough, ([\d.]+) GiB stay", text))
    assert left == pytest.approx(total(text) - saved, abs=0.1)
    assert "not enough" not in plan("--config", "tiny", "--gpu-gib", 2.75)[1]


def test_what_fits_ends_with_0_and_what_does_not_with_1(half_b: Path) -> None:
    arguments = ("--config", "lora-8gb", "--set", f"model.path={half_b}", "--gpu-gib")
    assert plan(*arguments, 7.76)[0] == 0
    code, text = plan(*arguments, 7.74)
    assert code == 1
    assert text.startswith("GPU 0: does NOT fit, 7.75 of 7.74 GiB\n")
    assert "launch.share_gpus = false, with a GPU for each process" in text


@pytest.mark.parametrize(
    ("preset", "gib", "before", "settings"),
    [
        (
            "lora-8gb",
            4,
            (),
            (
                *("learner.checkpoint_activations", "actor.kv_cache_bytes", "actor.sleep"),
                *(
                    "learner.dtype",
                    "learner.optimizer",
                    "learner.lora.quantize",
                    "sampling.max_completion_tokens",
                ),
            ),
        ),
        (
            "gsm8k-qwen3-8b-8gpu",
            5,
            PLAIN_8GPU,
            (
                *("learner.max_tokens_per_microbatch", "learner.checkpoint_activations"),
                *("learner.parallel", "learner.dtype", "weights.transport", "learner.optimizer"),
                *("learner.lora.r", "sampling.max_completion_tokens"),
            ),
        ),
    ],
)
def test_each_remedy_saves_what_is_said(
    half_b: Path, preset: str, gib: int, before: tuple[str, ...], settings: tuple[str, ...]
) -> None:
    arguments = ["--config", preset, "--gpu-gib", gib, "--set", f"model.path={half_b}"]
    for setting in before:
        arguments += ["--set", setting]
    _, text = plan(*arguments)
    first = text.partition("\n\nGPU ")[0]
    found = re.findall(r"^  (\S+) = (\S+) +saves ([\d.]+) GiB", first, re.MULTILINE)
    assert tuple(setting for setting, _, _ in found) == settings
    for setting, value, saved in found:
        _, after = plan(*arguments, "--set", f"{setting}={value}")
        assert total(after) == pytest.approx(total(text) - float(saved), abs=0.011), setting


def test_an_engine_that_sleeps_and_a_learner_are_counted_one_at_a_time(half_b: Path) -> None:
    arguments = ["--config", "lora-8gb", "--set", f"model.path={half_b}", "--gpu-gib"]
    _, text = plan(*arguments, 4)
    (saved,) = re.findall(r"^  actor.sleep = True +saves ([\d.]+) GiB", text, re.MULTILINE)
    _, after = plan(*arguments, 4, "--set", "actor.sleep=true")
    assert total(after) == pytest.approx(total(text) - float(saved), abs=0.011)
    assert plan(*arguments, total(after) + 0.01, "--set", "actor.sleep=true")[0] == 0
    rows = re.findall(r"^ *(learner|actor)-0 +(\S+(?: \S+)?) +(-?\d+\.\d+) ", after, re.MULTILINE)
    held = {(role, what): float(size) for role, what, size in rows}
    stays = {"learner": {"weights", "optimizer", "process"}, "actor": {"CUDA graphs", "process"}}
    gone = {
        role: sum(size for (its, what), size in held.items() if its == role and what not in names)
        for role, names in stays.items()
    }
    turns = held["actor", "taking turns"]
    assert turns == pytest.approx(-min(gone["learner"], gone["actor"] - turns), abs=0.03)


@pytest.mark.slow
def test_a_remedy_goes_no_further_than_needed(half_b: Path) -> None:
    arguments = ["--set", f"model.path={half_b}", "--set", "launch.gpus=4"]
    arguments += ["--set", "learner.max_tokens_per_microbatch=8192", "--gpu-gib"]
    rooms = [16, 20]
    texts = [plan(*arguments, room)[1] for room in rooms]
    budgets = [int(re.search(r"microbatch = (\d+)", text)[1]) for text in texts]
    assert budgets[0] < budgets[1] < 8192
    for room, budget in zip(rooms, budgets, strict=True):
        fitting = f"learner.max_tokens_per_microbatch={budget}"
        assert plan(*arguments, room, "--set", fitting)[0] == 0
        larger = f"learner.max_tokens_per_microbatch={2 * budget}"
        assert plan(*arguments, room, "--set", larger)[0] == 1


def test_gpus_that_hold_the_same_share_a_table_and_only_one_rank_publishes(half_b: Path) -> None:
    arguments = ("--config", "gsm8k-qwen3-8b-8gpu", "--set", f"model.path={half_b}")
    text = plan(*arguments, "--gpu-gib", 80)[1]
    titles = re.findall(r"^GPU.*", text, re.MULTILINE)
    assert [title.partition(":")[0] for title in titles] == [
        "GPU 4",
        "GPU 5, GPU 6, GPU 7",
        "GPU 0, GPU 1, GPU 2, GPU 3",
    ]
    publishing = [
        line.split("publishing")[0].strip() for line in text.splitlines() if "publishing" in line
    ]
    assert publishing == ["learner-0", "actor-0, actor-1, actor-2, actor-3"]
    assert text.count("two buckets") == text.count("flat") == 1
    text = plan(*arguments, "--gpu-gib", 80, "--set", "weights.transport=gloo")[1]
    assert "publishing" not in text


def test_without_a_gpu_the_estimate_is_shown_without_a_verdict(
    half_b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, text = plan("--config", "lora-8gb", "--set", f"model.path={half_b}")
    assert code == 0
    assert text.startswith("GPU 0\n")
    assert text.endswith("no GPU is here to compare with; give --gpu-gib\n")


def test_a_cpu_run_is_compared_with_the_machine() -> None:
    code, text = plan()
    assert code == 0
    assert text.startswith("this machine (CPU run): fits")
    assert "CUDA" not in text


def test_models_that_are_not_here_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        AbsentModel, match="'Qwen/Nothing' is no folder and is not in the hub cache"
    ):
        plan("--set", "model.path=Qwen/Nothing")
    with pytest.raises(ModelError, match=r"has no config.json"):
        plan("--set", f"model.path={tmp_path}")


def test_a_kv_cache_that_holds_no_sequence_is_refused(half_b: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_bytes=1048576 must be >= 7864320"):
        plan(
            "--config",
            "lora-8gb",
            "--set",
            f"model.path={half_b}",
            "--set",
            "actor.kv_cache_bytes=1048576",
        )


def run_of(config: Config, tmp_path: Path) -> RunDir:
    endpoints = Endpoints(buffer="tcp://127.0.0.1:9", weights="", store=("", 0))
    return RunDir(path=tmp_path, config=config, endpoints=endpoints)


def out_of_memory(*arguments: Any, **options: Any) -> None:
    raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")


def test_a_learner_out_of_memory_says_its_peak_the_table_and_what_to_change(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(PolicyUpdater, "_step", out_of_memory)
    monkeypatch.setattr(Learner, "run", lambda learner: learner._updater.update(full_shard()))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * GIB)
    config = settings(models["qwen3"], launch={"learners": 2})
    with pytest.raises(ConfigError) as error:
        learner_process.run_learner(run_of(config, tmp_path), lambda: False)
    text = str(error.value)
    assert text.startswith("learner-1 ran out of memory: Tried to allocate 2.00 GiB\n")
    assert "measured peak of learner-1: 3.00 GiB" in text
    assert "optimizer" in text
    assert "learner.max_tokens_per_microbatch = 512" in text


def test_an_actor_out_of_memory_names_its_kv_cache(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor_process, "load_engine", out_of_memory)
    run = run_of(settings(models["qwen3"]), tmp_path)
    with pytest.raises(ConfigError, match=r"(?s)actor-0 ran out.*  actor.kv_cache_bytes = \d+"):
        actor_process.run_actor(run, 0, 0, lambda: False)


def test_other_errors_of_a_process_stay_what_they_are() -> None:
    with (
        pytest.raises(RuntimeError, match=r"^something else$"),
        memory_report.memory_explained(Config(), "x"),
    ):
        raise RuntimeError("something else")
