"""What the real engine computes after each publish is what the learner computes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from asyncgrpo.config import from_mapping
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("kind", "tied", "lora", "processes", "transport"),
    [
        (Qwen3Config, True, None, 1, "gloo"),
        (Qwen3Config, False, "merged", 1, "gloo"),
        (Qwen3Config, True, "adapter", 1, "gloo"),
        (Qwen2Config, True, None, 1, "gloo"),
        (Qwen2Config, True, None, 2, "disk"),
        (LlamaConfig, False, None, 1, "gloo"),
        (LlamaConfig, False, "adapter", 2, "gloo"),
    ],
    ids=[
        "qwen3-tied",
        "qwen3-untied-lora",
        "qwen3-tied-adapter",
        "qwen2-tied",
        "qwen2-tied-parallel-disk",
        "llama-untied",
        "llama-untied-adapter-parallel",
    ],
)
def test_the_engine_computes_after_each_publish_as_the_learner_does(
    kind, tied, lora, processes, transport, tmp_path
):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(kind(tie_word_embeddings=tied, **SIZES))
    model.float().save_pretrained(tmp_path)
    settings = {
        "model": {"path": str(tmp_path)},
        "learner": {"lora": {"r": 4, "publish": lora}} if lora else {},
        "actor": {"tensor_parallel": processes},
    }
    config = from_mapping(settings)
    updater = PolicyUpdater(config)
    address = f"tcp://127.0.0.1:{free_port()}"
    store, folder = ("127.0.0.1", free_port()), tmp_path / "sent"
    sender = CollectiveSender(config, address, store, transport=transport, folder=folder)
    command = [sys.executable, str(SCRIPT), str(tmp_path), address, json.dumps(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as actor:
        try:
            for version in range(VERSIONS):
                sender.release()
                with torch.no_grad():
                    for weight in updater._policy.parameters():
                        if weight.requires_grad:
                            weight.add_(torch.randn_like(weight) * 0.1)
                sender.publish(version, updater.weights(), updater.canary_logprobs())
                sender.wait_for_actors(1, 60)
                row = json.loads(actor.stdout.readline())
                assert row["version"] == version
                whole = row["prompt"] + row["token_ids"]
                starts = [whole[:end] for end in range(len(row["prompt"]), len(whole))]
                table = updater._plain_head.next_logprobs(starts)
                own = table[torch.arange(len(starts)), row["token_ids"]]
                assert (own - torch.tensor(row["logprobs"])).abs().max() < TOLERANCE
            assert sender.metrics()["publish/proofs"] == VERSIONS
        finally:
            actor.kill()
            sender.close()
