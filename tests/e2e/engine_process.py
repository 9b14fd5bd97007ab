"""Drives one VllmEngine through live weight swaps; run by test_vllm_engine.py.

usage: engine_process.py MODEL_FOLDER OUT.json SETTINGS SEED [sleeps]
MODEL_FOLDER holds versions/<version>.safetensors; SETTINGS are JSON. Sequences of 40 tokens are in
flight while versions 0, 1, 2 are swapped in; "sleeps": the engine sleeps after each of these, and
with actor.sleep its memory must be free meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from asyncgrpo.launch.plan import VLLM_ENVIRONMENT

os.environ.update(
    VLLM_ENVIRONMENT,
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    GLOO_SOCKET_IFNAME="lo",
)

if not json.loads(sys.argv[3])["launch"]:  # a CPU run, as launch/plan.py does
    os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
from safetensors.torch import load_file

from asyncgrpo.actor.vllm_engine import VllmEngine
from asyncgrpo.config import from_mapping
from asyncgrpo.types import Sampling
from asyncgrpo.weights.flat import FlatWeights, Manifest
from asyncgrpo.weights.proof import CANARY_SAMPLING, canary_prompts

NUM_TOKENS, NUM_REQUESTS, STEPS_PER_VERSION, VOCAB = 40, 6, 13, 96


def described(sampled) -> dict:
    return {
        "lease_id": sampled.lease_id,
        "prompt": sampled.prompt_token_ids.tolist(),
        "completions": [
            {
                "token_ids": c.token_ids.tolist(),
                "logprobs": c.behavior_logprobs.tolist(),
                "versions": c.versions.tolist(),
                "finish_reason": c.finish_reason,
            }
            for c in sampled.completions
        ],
    }


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def nap(engine: VllmEngine, least: int) -> None:
    """Sleeps and wakes up; at least so many bytes must be free in between, and taken again."""
    before, requests = free_bytes(), engine.num_requests
    engine.sleep()
    during = free_bytes()
    assert during >= before + least, f"only {during - before} bytes were given away"
    engine.add("asleep", [1, 2, 3], CANARY_SAMPLING, 1, seed=0)  # a lease that was under way
    engine.wake()
    assert free_bytes() <= during - least, "it works without its memory"
    while engine.num_requests > requests:
        assert [sampled.lease_id for sampled in engine.step()] in ([], ["asleep"])


def main(folder: str, out: str, settings: str, seed: str, sleeps: str = "") -> None:
    config = from_mapping(
        {
            "sampling": {"max_completion_tokens": NUM_TOKENS, "temperature": 0.7},
            "data": {"max_prompt_tokens": 24},
            "algo": {"group_size": 4},
            **json.loads(settings),
        }
    )
    engine = VllmEngine(config, folder, int(seed), stop_token_ids=[])
    sampling = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_completion_tokens=NUM_TOKENS)
    finished = []
    for version in range(3):
        named = load_file(Path(folder) / f"versions/{version}.safetensors").items()
        weights = FlatWeights.for_children(Manifest.of(named, "float32"))
        weights.fill(named)
        engine.load_weights(version, weights)
        weights.bytes.zero_()  # the next version may arrive at once
        if sleeps and version:
            nap(engine, config.actor.kv_cache_bytes * config.actor.sleep)
        for row, prompt in enumerate(canary_prompts(VOCAB)):
            engine.add(f"canary-{version}-{row}", prompt, CANARY_SAMPLING, 1, seed=row)
        if version == 0:
            for i in range(NUM_REQUESTS):
                prompt = [(3 + 7 * i + 13 * j) % VOCAB for j in range(4 + i)]
                engine.add(f"t{i}", prompt, sampling, 4, seed=i)
        for _ in range(STEPS_PER_VERSION):
            finished += engine.step()
            share = engine.load.kv_share
            assert 0 < share < 1 or not engine.num_requests, f"KV cache in use: {share}"
    while engine.num_requests:
        finished += engine.step()
    Path(out).write_text(json.dumps([described(sampled) for sampled in finished]))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
