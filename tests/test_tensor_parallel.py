"""Engines over several GPUs: who gets which, what is refused, what each must hold."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from asyncgrpo.cli import app
from asyncgrpo.config import Config, from_mapping
from asyncgrpo.errors import ConfigError, ModelError
from asyncgrpo.launch.memory import actor_lines
from asyncgrpo.launch.memory_report import MemoryReport, model_shape
from asyncgrpo.launch.model_folder import check_tensor_parallel
from asyncgrpo.launch.plan import Host, Plan, lone_actor, make_plan
from asyncgrpo.rundir import Endpoints
from asyncgrpo.weights.flat import FlatWeights, Manifest

DOORS = Endpoints(buffer="", weights="", store=("", 3))
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 151936,
}


def settings(width: int, actors: int = 1, learners: int = 1, **launch: Any) -> Config:
    launch |= {"actors": actors, "learners": learners}
    return from_mapping({"actor": {"tensor_parallel": width}, "launch": launch})


def plan_of(config: Config, num_gpus: int = 0, num_cores: int = 4) -> Plan:
    host = Host(cores=tuple(range(num_cores)), gpu_ids=tuple(map(str, range(num_gpus))))
    return make_plan(config, host, DOORS, Path("/r"))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_every_process_of_an_engine_has_a_gpu_of_its_own(width, actors, learners) -> None:
    count = width * actors + learners
    config = settings(width, actors, learners, gpus=count)
    specs = [spec for spec in plan_of(config, count).specs if spec.role != "buffer"]
    given_gpus = [gpu for spec in specs for gpu in spec.gpus]
    assert sorted(given_gpus, key=int) == [str(gpu) for gpu in range(count)]
    for spec in specs:
        assert len(spec.gpus) == (width if spec.role == "actor" else learners)
        assert spec.environment["CUDA_VISIBLE_DEVICES"] == ",".join(spec.gpus)
    with pytest.raises(ConfigError, match=rf" = {count}, but launch.gpus={count - 1}|must be <="):
        plan_of(settings(width, actors, learners, gpus=count - 1), count)


def test_an_engine_on_shared_gpus_has_as_many_different_ones() -> None:
    specs = plan_of(settings(2, 3, 2, gpus=4, share_gpus=True), 4).specs
    assert all(len(set(spec.gpus)) == 2 for spec in specs if spec.role != "buffer")


def test_an_engine_larger_than_all_gpus_is_refused_with_both_numbers() -> None:
    for config in (settings(4, gpus=2), settings(4, gpus=2, share_gpus=True)):
        with pytest.raises(ConfigError, match=r"tensor_parallel=4 must be <= launch.gpus=2"):
            plan_of(config, 2)


def test_an_engine_of_several_gpus_takes_weights_from_host_memory_or_by_nccl() -> None:
    plan = plan_of(settings(2, gpus=3), 3)
    assert plan.endpoints.transport == "gloo"
    assert "2 GPUs of an actor take their parts" in plan.transport_reason
    asked = {"weights": {"transport": "nccl"}, "actor": {"tensor_parallel": 2}}
    assert plan_of(from_mapping({**asked, "launch": {"gpus": 6}}), 6).endpoints.transport == "nccl"
    shared = from_mapping({**asked, "launch": {"gpus": 6, "share_gpus": True}})
    with pytest.raises(ConfigError, match="'nccl' needs CUDA, and GPUs of their own for each"):
        plan_of(shared, 6)


def test_processes_of_a_cpu_engine_are_bound_to_cores_of_their_own() -> None:
    roomy = plan_of(settings(2), num_cores=3)
    assert roomy.endpoints.cores == {"actor-0": (0, 1), "learner-0": (2,)}
    assert roomy.specs[-1].environment["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
    assert roomy.warnings == ()
    wide = from_mapping({"actor": {"tensor_parallel": 2, "threads": 2}})
    alone = lone_actor(wide, Host(cores=(1, 3, 5, 7, 9)))
    assert alone.environment["VLLM_CPU_OMP_THREADS_BIND"] == "1,3|5,7"
    tight = plan_of(settings(2), num_cores=2)
    assert tight.specs[-1].environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    (warning,) = tight.warnings
    assert warning.startswith(
        "actor.threads=1 x actor.tensor_parallel=2, but each actor gets 1 of 2 cores, so"
    )


def test_a_lone_engine_takes_its_gpus() -> None:
    host = Host(cores=(0,), gpu_ids=("3", "5", "7"))
    spec = lone_actor(settings(2, 4, gpus=8), host)
    assert spec.environment["CUDA_VISIBLE_DEVICES"] == "3,5"


def model_folder(folder: Path, **changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps({**SHAPE, **changes}))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "good", "bad"),
    [
        ({}, (1, 2), (3, 4, 7, 14, 28)),  # 7 and 14 do not divide the vocabulary
        ({"num_attention_heads": 16}, (1, 2, 4, 8, 16), (3, 32)),
        (
            {"num_attention_heads": 12, "intermediate_size": 96, "vocab_size": 190},
            (1, 2, 4, 6, 12),
            (8,),
        ),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3, "intermediate_size": 96},
            (1,),
            (2, 3),
        ),
        ({"num_attention_heads": 16, "intermediate_size": 4866}, (2,), (4,)),
        ({"num_attention_heads": 16, "num_key_value_heads": None}, (4, 16), (3,)),
    ],
)
def test_a_model_is_dealt_only_where_its_heads_and_sizes_divide(changes, good, bad, tmp_path):
    folder = model_folder(tmp_path, **changes)
    for size in good:
        check_tensor_parallel(folder, size)
    for size in bad:
        with pytest.raises(ModelError, match=rf"actor.tensor_parallel={size} must divide"):
            check_tensor_parallel(folder, size)


def test_the_refusal_names_the_sizes_and_what_is_allowed(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    with pytest.raises(
        ModelError,
        match=r"attention heads \(14\), .* \(4864\) .* \(151936\) of .*/config.json, .* key-value "
        r"heads \(2\) .* set it to one of 1, 2$",
    ):
        check_tensor_parallel(folder, 4)
    with pytest.raises(ModelError, match=r"of the embedded model, .* set it to one of 1, 2, 4$"):
        check_tensor_parallel("tiny", 3)
    check_tensor_parallel("Qwen/Qwen3-0.6B-that-is-not-here", 3)


@pytest.mark.parametrize("command", ["launch", "eval --model tiny --data tasks", "plan memory"])
def test_what_cannot_be_dealt_is_refused_before_anything_starts(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*command.split(), "--set", "actor.tensor_parallel=3"])
    assert isinstance(result.exception, ModelError)
    assert str(result.exception).startswith("actor.tensor_parallel=3 must divide")
    assert not any(tmp_path.iterdir())


def test_the_toy_engine_is_one_process() -> None:
    with pytest.raises(
        ConfigError, match=r"tensor_parallel=2 needs actor.engine = 'vllm' \(the toy"
    ):
        from_mapping({"actor": {"engine": "toy", "tensor_parallel": 2}})


def test_the_estimate_deals_weights_and_keys_over_the_gpus_of_an_engine(tmp_path: Path) -> None:
    shape = model_shape(model_folder(tmp_path, num_attention_heads=16, head_dim=64))

    def held(width: int, gpus: int) -> dict[str, float]:
        config = settings(width, gpus=gpus)
        return {what: size for what, size, _ in actor_lines(config, shape)}

    alone, dealt = held(1, 2), held(4, 5)
    for what in ("weights", "KV cache"):
        assert dealt[what] == alone[what] / 4
    assert dealt["logits"] == alone["logits"]
    on_cpu, both = held(1, 0), held(2, 0)
    assert both["weights"] == on_cpu["weights"]
    assert both["process"] == 3 * on_cpu["process"]
    # Four processes have a key-value head each, though the model has two.
    assert shape.kv_bytes(settings(4)) == 2 * shape.kv_bytes(settings(2))


def test_the_estimate_shows_every_gpu_of_an_engine(tmp_path: Path) -> None:
    config = settings(2, gpus=3)
    model = config.model.model_copy(update={"path": model_folder(tmp_path)})
    text = MemoryReport(config.model_copy(update={"model": model})).all_devices(None)
    assert "GPU 0, GPU 1\n" in text
    assert "actor-0, actor-0.1   weights" in text


def test_weights_for_other_processes_travel_as_the_name_of_their_memory() -> None:
    manifest = Manifest(names=("a", "b"), shapes=((3,), (2, 50_000)), dtype="float32")
    flat = FlatWeights.for_children(manifest)
    flat.fill([("a", torch.arange(3.0)), ("b", torch.full((2, 50_000), 0.5))])
    name = pickle.dumps(flat)
    assert len(name) < 500
    theirs = dict(pickle.loads(name))
    assert theirs["a"].tolist() == [0, 1, 2]
    theirs["b"].zero_()  # stays with them
    assert float(dict(flat)["b"].sum()) == 50_000
    with pytest.raises(AssertionError, match="only weights in a file"):
        pickle.dumps(FlatWeights(manifest))
