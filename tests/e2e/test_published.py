"""What the real engine computes after each publish is what the learner computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from asyncgrpo.config import from_mapping
from asyncgrpo.launch.preflight import own_port
from asyncgrpo.learner.update import PolicyUpdater
from asyncgrpo.weights.sender import CollectiveSender

pytestmark = pytest.mark.engine
SCRIPT = Path(__file__).with_name("probe_process.py")
# float32: measured 4e-6 at most. A wrong tensor moves the log-probs by tenths.
VOCAB, TOLERANCE, VERSIONS = 96, 2e-5, 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
ADAPTER = {"lora": {"r": 4, "publish": "adapter"}}


@pytest.mark.parametrize(
    ("kind", "tied", "learner", "only_changed", "processes", "transport"),
    [
        (Qwen3Config, True, {}, False, 1, "gloo"),
        (Qwen3Config, False, {"lora": {"r": 4, "targets": ["q_proj"]}}, True, 1, "gloo"),
        (Qwen3Config, True, ADAPTER, False, 1, "gloo"),
        (Qwen2Config, True, {"parallel": "fsdp"}, False, 1, "gloo"),
        (Qwen2Config, True, {}, False, 2, "disk"),
        (LlamaConfig, False, {}, False, 1, "gloo"),
        (LlamaConfig, False, ADAPTER, False, 2, "gloo"),
        (LlamaConfig, True, {"lora": {"r": 4, "targets": ["q_proj"]}}, True, 2, "gloo in-engine"),
        (Qwen3Config, False, ADAPTER, False, 2, "gloo in-engine"),
    ],
    ids=[
        "qwen3-tied",
        "qwen3-untied-lora-only-changed",
        "qwen3-tied-adapter",
        "qwen2-tied-fsdp",
        "qwen2-tied-parallel-disk",
        "llama-untied",
        "llama-untied-adapter-parallel",
        "llama-tied-lora-only-changed-parallel-in-engine",
        "qwen3-untied-adapter-parallel-in-engine",
    ],
)
def test_the_engine_computes_after_each_publish_as_the_learner_does(
    kind, tied, learner, only_changed, processes, transport, tmp_path
):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(kind(tie_word_embeddings=tied, **SIZES))
    model.float().save_pretrained(tmp_path)
    settings = {
        "model": {"path": str(tmp_path)},
        "learner": learner,
        "weights": {"only_changed": only_changed, "bucket_bytes": 1024},
        "actor": {"tensor_parallel": processes},
    }
    config = from_mapping(settings)
    updater = PolicyUpdater(config)
    address = f"tcp://127.0.0.1:{own_port()}"
    store, folder = ("127.0.0.1", own_port()), tmp_path / "sent"
    transport, *where = transport.split()
    sender = CollectiveSender(config, address, store, transport=transport, folder=folder)
    command = [sys.executable, str(SCRIPT), str(tmp_path), address, json.dumps(settings), *where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as actor:
        try:
            for version in range(VERSIONS):
                sender.release()
                with torch.no_grad():
                    for weight in updater._policy.parameters():
                        if weight.requires_grad:
                            part = weight.to_local() if isinstance(weight, DTensor) else weight
                            part.add_(torch.randn_like(part) * 0.1)
                sender.publish(version, updater.weights(), updater.canary_logprobs())
                sender.wait_for_actors(1, 240)
                row = json.loads(actor.stdout.readline())
                assert row["version"] == version
                whole = row["prompt"] + row["token_ids"]
                starts = [whole[:end] for end in range(len(row["prompt"]), len(whole))]
                table = updater._plain_head.next_logprobs(starts)
                own = table[torch.arange(len(starts)), row["token_ids"]]
                assert (own - torch.tensor(row["logprobs"])).abs().max() < TOLERANCE
            assert sender.metrics()["publish/proofs"] == VERSIONS
            assert (sender.metrics().get("publish/bytes_saved", 0) > 0) == only_changed
        finally:
            actor.kill()
            sender.close()
            if dist.is_initialized():
                dist.destroy_process_group()
