"""vLLM's engine inside the actor's own process, stepped by the actor, with live weight swaps.

With tensor parallelism the scheduler stays here, and a process per GPU computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Listener
from typing import Any, get_args

import numpy as np
import torch
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from asyncgrpo.actor.concurrency import EngineLoad
from asyncgrpo.actor.vllm_worker import (
    ADAPTER_ID,
    open_inbox,
    replace_adapter,
    replace_weights,
)
from asyncgrpo.config import ENGINE_TOKENS, Config
from asyncgrpo.errors import EngineError, WeightsError
from asyncgrpo.protocols import NamedTensors
from asyncgrpo.types import Completion, FinishReason, Sampled, Sampling
from asyncgrpo.weights.inbox import EngineInbox

UNKNOWN = -2  # a version that no engine has; -1 are the weights of the model folder


class VllmEngine:
    """A protocols.Engine. The environment must be set before vllm is imported (launch/plan)."""

    def __init__(
        self, config: Config, model_path: str, seed: int, stop_token_ids: Sequence[int]
    ) -> None:
        self._lora = lora = config.learner.published_adapter
        ranks = get_args(MaxLoRARanks)
        is_wide = config.engine_tokens > ENGINE_TOKENS
        args = EngineArgs(
            model=model_path,
            dtype=config.model.dtype,
            # Sampling is seeded per engine: two actors must never draw the same samples, and
            # per-request seeds can kill the CPU engine.
            seed=seed,
            max_model_len=config.max_sequence_tokens,
            max_num_seqs=config.engine_sequences,
            # None: vLLM's default, which it fits to the model.
            max_num_batched_tokens=config.engine_tokens if is_wide else None,
            tensor_parallel_size=config.actor.tensor_parallel,
            kv_cache_memory_bytes=config.actor.kv_cache_bytes // config.actor.tensor_parallel,
            enable_sleep_mode=config.actor.sleep,
            enable_lora=lora is not None,
            max_lora_rank=min(rank for rank in ranks if not lora or rank >= lora.r),
            enforce_eager=not torch.cuda.is_available(),
            async_scheduling=False,  # else a batch is in flight at the swap, wrongly labelled
            enable_prefix_caching=False,  # else old keys and values could serve new requests
            skip_tokenizer_init=True,
            disable_log_stats=False,  # its own metrics, served by observe/exporter.py
            use_tqdm_on_load=False,
            logprobs_mode="processed_logprobs",  # of the distribution that is really sampled
        )
        if config.launch.share_gpus:  # beside a given KV cache this is only a check at the start
            args.gpu_memory_utilization = 0.01
        self._llm = LLMEngine.from_engine_args(args)
        self._adapter: LoRARequest | None = None  # that of all requests, once it is there
        self._stop_token_ids = list(stop_token_ids)
        self._weights, self._tensor_parallel = config.weights, config.actor.tensor_parallel
        self._kv_on_update = config.actor.kv_on_update
        self._version = -1
        self._llm.engine_core.set_weight_version(str(self._version))
        self._num_requests = 0

    @property
    def version(self) -> int:
        return self._version

    @property
    def num_requests(self) -> int:
        return self._num_requests

    @property
    def load(self) -> EngineLoad:
        client: Any = self._llm.engine_core  # in this process, see launch/plan
        scheduler = client.engine_core.scheduler
        preempted = sum(request.num_preemptions > 0 for request in scheduler.waiting)
        return EngineLoad(scheduler.kv_cache_manager.usage, preempted)

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: Sampling,
        num_completions: int,
        seed: int,
    ) -> None:
        params = SamplingParams(
            n=num_completions,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_completion_tokens,
            stop_token_ids=self._stop_token_ids,
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        try:
            prompt: Any = {"prompt_token_ids": list(prompt_token_ids)}
            self._llm.add_request(request_id, prompt, params, lora_request=self._adapter)
        except ValueError as error:
            raise EngineError(f"request {request_id} was refused: {error}") from error
        self._num_requests += 1

    def step(self) -> list[Sampled]:
        finished = [self._sampled(output) for output in self._llm.step() if output.finished]
        self._num_requests -= len(finished)
        return finished

    def open_inbox(self) -> EngineInbox:
        """Lets weights arrive in each process of the engine."""
        count = self._tensor_parallel
        with Listener(backlog=count) as door:  # a socket in a folder of this user alone
            opened = partial(open_inbox, address=door.address, settings=self._weights)
            self._llm.collective_rpc(opened, self._weights.loaded_timeout_seconds)
            pipes = [door.accept() for _ in range(count)]
        return EngineInbox(pipes, 2 * self._weights.transfer_timeout_seconds)

    def load_weights(self, version: int, tensors: NamedTensors) -> None:
        try:
            load = partial(replace_weights, tensors=tensors)
            if self._lora is not None:
                load = partial(replace_adapter, tensors=tensors, lora=self._lora)
                self._adapter = LoRARequest("policy", ADAPTER_ID, "in memory")
            self._llm.collective_rpc(load, self._weights.loaded_timeout_seconds)
        except Exception as error:  # the model may be half loaded now: fatal for this actor
            raise WeightsError(f"vLLM could not load version {version}: {error}") from error
        self._llm.engine_core.set_weight_version(str(version))
        self._version = version
        if self._kv_on_update == "recompute":
            self._llm.reset_prefix_cache(reset_running_requests=True)

    def sleep(self) -> None:
        self._llm.sleep(level=1, mode="keep")  # weights go to the host; requests stay in the queue

    def wake(self) -> None:
        self._llm.wake_up()  # sequences in flight are computed again up to where they were

    def _sampled(self, output: Any) -> Sampled:
        completions = sorted(output.outputs, key=lambda completion: completion.index)
        return Sampled(
            lease_id=output.request_id,
            prompt_token_ids=np.array(output.prompt_token_ids, dtype=np.int32),
            completions=tuple(_completion(completion) for completion in completions),
        )


def _completion(output: Any) -> Completion:
    token_ids = np.array(output.token_ids, dtype=np.int32)
    flat = output.logprobs  # the sampled token is the first entry of each position
    logprobs = np.array([flat.logprobs[i] for i in flat.start_indices], dtype=np.float32)
    versions = np.full(len(token_ids), UNKNOWN, dtype=np.int32)
    for span in output.weight_versions:
        versions[span.start : span.end] = int(span.version)
    if len(logprobs) != len(token_ids) or (versions == UNKNOWN).any():
        raise EngineError(
            f"vLLM returned {len(token_ids)} tokens with {len(logprobs)} log-probs and version "
            f"spans {output.weight_versions}; asyncgrpo supports vllm 0.32 and 0.33"
        )
    reasons: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
    return Completion(
        token_ids=token_ids,
        behavior_logprobs=logprobs,
        versions=versions,
        finish_reason=reasons.get(output.finish_reason, "abort"),
    )
