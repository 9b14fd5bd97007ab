"""An actor that answers one probe with each version it loads; run by test_published.py.

usage: probe_process.py MODEL_FOLDER WEIGHTS_ADDRESS SETTINGS [in-engine]
in-engine: weights arrive in each process of the engine, as they do with NCCL.
Prints {"version", "prompt", "token_ids", "logprobs"} as JSON, a line for each version.
"""

from __future__ import annotations

import json
import os
import sys
import time

from asyncgrpo.launch.plan import VLLM_ENVIRONMENT

os.environ.update(
    VLLM_ENVIRONMENT,
    TORCHDYNAMO_DISABLE="1",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    GLOO_SOCKET_IFNAME="lo",
)

from asyncgrpo.actor.vllm_engine import VllmEngine
from asyncgrpo.config import from_mapping
from asyncgrpo.types import Completion, Sampling
from asyncgrpo.weights.proof import CANARY_SAMPLING, canary_prompts
from asyncgrpo.weights.receiver import CollectiveReceiver

VOCAB, NUM_TOKENS = 96, 24
PROBE = [(5 + 17 * place) % VOCAB for place in range(12)]
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_completion_tokens=NUM_TOKENS)


def answers(
    engine: VllmEngine, prompts: list[list[int]], sampling: Sampling, version: int
) -> list[Completion]:
    for row, prompt in enumerate(prompts):
        engine.add(f"{version}-{row:02}", prompt, sampling, 1, seed=row)
    done = []
    while engine.num_requests:
        done += engine.step()
    return [each.completions[0] for each in sorted(done, key=lambda each: each.lease_id)]


def main(folder: str, address: str, settings: str, *where: str) -> None:
    lengths = {"sampling": {"max_completion_tokens": NUM_TOKENS}, "data": {"max_prompt_tokens": 24}}
    config = from_mapping({**lengths, **json.loads(settings)})
    engine = VllmEngine(config, folder, 1, stop_token_ids=[])
    inbox = engine.open_inbox() if where else None
    receiver = CollectiveReceiver(config, "actor-0", address, inbox=inbox)
    while True:
        receiver.check()
        staged = receiver.staged()
        if staged is None:
            time.sleep(0.001)
            continue
        version, tensors = staged
        engine.load_weights(version, tensors)
        canaries = answers(engine, canary_prompts(VOCAB), CANARY_SAMPLING, version)
        pairs = [(int(c.token_ids[0]), float(c.behavior_logprobs[0])) for c in canaries]
        receiver.loaded(version, 0.0, pairs)
        (probe,) = answers(engine, [PROBE], SAMPLING, version)
        row = {"version": version, "prompt": PROBE, "token_ids": probe.token_ids.tolist()}
        row["logprobs"] = probe.behavior_logprobs.tolist()
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
