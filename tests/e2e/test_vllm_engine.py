"""The real engine: log-probs and version stamps, exact to the token, across live weight swaps."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from asyncgrpo.weights.proof import canary_prompts

pytestmark = pytest.mark.engine
SCRIPT = Path(__file__).with_name("engine_process.py")
VOCAB, TEMPERATURE, TOLERANCE = 96, 0.7, 2e-5
RANK, ALPHA = 4, 12


def write_model(folder: Path, *, tied: bool, adapted: bool = False) -> None:
    """A random Qwen3 with three versions of its weights, or of an adapter."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).float()
    model.save_pretrained(folder)
    (folder / "versions").mkdir()  # vLLM loads every file that lies beside the model
    for version in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        named = {name: p.detach().clone() for name, p in model.named_parameters()}
        if adapted:
            shapes = {n: p.shape for n, p in named.items() if n.endswith("_proj.weight")}
            named = {
                name.replace("weight", f"lora_{kind}.weight"): torch.randn(size) * 0.1
                for name, (outputs, inputs) in shapes.items()
                for kind, size in {"A": (RANK, inputs), "B": (outputs, RANK)}.items()
            }
        save_file(named, folder / f"versions/{version}.safetensors")


@functools.cache
def run_engine(
    folder: Path, kv_on_update: str = "keep", seed: int = 1, processes: int = 1, sleeps: str = ""
) -> dict[str, dict]:
    out = folder / f"out-{kv_on_update}-{seed}-{processes}{sleeps}.json"
    actor = {"concurrency": 8, "kv_on_update": kv_on_update, "tensor_parallel": processes}
    on_gpu = {"gpus": 1, "share_gpus": True} if torch.cuda.is_available() else {}
    actor["sleep"] = bool(on_gpu and sleeps)
    lora = {"r": RANK, "alpha": ALPHA, "publish": "adapter"}
    learner = {"lora": lora} if folder.name.startswith("adapter") else {}
    settings = json.dumps({"actor": actor, "learner": learner, "launch": on_gpu})
    command = [sys.executable, str(SCRIPT), str(folder), str(out), settings, str(seed), sleeps]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {sampled["lease_id"]: sampled for sampled in json.loads(out.read_text())}


def versions_of(folder: Path) -> list[torch.nn.Module]:
    from safetensors.torch import load_file

    models = []
    for version in range(3):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        weights = load_file(folder / f"versions/{version}.safetensors")
        for name in [name for name in weights if ".lora_A." in name]:
            a, b = weights.pop(name), weights.pop(name.replace("lora_A", "lora_B"))
            target = name.replace("lora_A.", "")
            weights[target] = model.get_parameter(target) + ALPHA / RANK * b @ a
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"} or len(weights) == 14
        models.append(model)
    return models


@torch.no_grad()
def replay(models, prompt: list[int], completion: dict, *, keep: bool) -> torch.Tensor:
    """Log-probs of the completion: version a up to its last token, then b on a's KV cache."""
    ids = torch.tensor([prompt + completion["token_ids"]])
    past, done, parts = None, 0, []
    stamps = completion["versions"]
    start = 0
    while start < len(stamps):
        end = start
        while end < len(stamps) and stamps[end] == stamps[start]:
            end += 1
        if not keep:
            past, done = None, 0
        last = len(prompt) + end - 1
        out = models[stamps[start]](ids[:, done:last], past_key_values=past, use_cache=True)
        past, done = out.past_key_values, last
        logprobs = torch.log_softmax(out.logits[0].float() / TEMPERATURE, -1)[start - end :]
        targets = ids[0, len(prompt) + start : len(prompt) + end, None]
        parts.append(logprobs.gather(1, targets)[:, 0])
        start = end
    return torch.cat(parts)


@pytest.fixture(scope="module", params=["tied", "untied", "adapter"])
def model_folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_model(folder, tied=request.param == "tied", adapted=request.param == "adapter")
    return folder


def check_all(
    folder: Path,
    kv_on_update: str,
    processes: int = 1,
    sleeps: str = "",
    tolerance: float = TOLERANCE,
) -> None:
    sampled = run_engine(folder, kv_on_update, processes=processes, sleeps=sleeps)
    models = versions_of(folder)
    mixed = 0
    for name, group in sampled.items():
        if name.startswith(("canary-", "asleep")):
            continue
        for completion in group["completions"]:
            keep = kv_on_update == "keep" and not sleeps
            expected = replay(models, group["prompt"], completion, keep=keep)
            found = torch.tensor(completion["logprobs"])
            assert (found - expected).abs().max() < tolerance
            mixed += len(set(completion["versions"])) == 3
    assert mixed == 24  # all six groups of four crossed all three versions
    for version, model in enumerate(models):
        for row, prompt in enumerate(canary_prompts(VOCAB)):
            (canary,) = sampled[f"canary-{version}-{row}"]["completions"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt])).logits[0, -1].float()
            expected = torch.log_softmax(logits, -1)[canary["token_ids"][0]]
            assert abs(canary["logprobs"][0] - float(expected)) < tolerance


def test_mixed_sequences_replay_exactly_when_the_kv_cache_is_kept(model_folder):
    check_all(model_folder, "keep")


def test_mixed_sequences_replay_exactly_when_the_kv_cache_is_recomputed(model_folder):
    check_all(model_folder, "recompute")


def test_sequences_in_flight_go_on_where_they_were_when_the_engine_sleeps(model_folder):
    """On a CPU vLLM gives nothing away, but drops the KV cache and begins them again all the same.

    "asleep" takes a step of its own, in which the others make a token.
    """
    check_all(model_folder, "keep", sleeps="sleeps")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_engine_that_sleeps_gives_its_memory_away_and_goes_on_the_same(model_folder):
    check_all(model_folder, "keep", sleeps="sleeps", tolerance=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none")
@pytest.mark.parametrize("model_folder", ["tied", "adapter"], indirect=True)
def test_mixed_sequences_replay_exactly_on_an_engine_of_two_processes(model_folder):
    check_all(model_folder, "keep", processes=2)


@pytest.mark.parametrize("model_folder", ["tied"], indirect=True)
def test_two_actors_never_draw_the_same_samples_for_the_same_prompt(model_folder):
    one, other = run_engine(model_folder, seed=1), run_engine(model_folder, seed=2)
    for name in one:
        if name.startswith("t"):
            mine = [c["token_ids"] for c in one[name]["completions"]]
            theirs = [c["token_ids"] for c in other[name]["completions"]]
            assert not any(tokens in theirs for tokens in mine)
