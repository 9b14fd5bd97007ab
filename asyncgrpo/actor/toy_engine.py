"""A slow, exactly repeatable engine in plain torch: for tests, `--serial` and debugging.

Each request has its own random generator, seeded by its lease, so what it samples does not
depend on what else is in flight. There is no KV cache: every step is a full forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from asyncgrpo.actor.concurrency import EngineLoad
from asyncgrpo.config import Config
from asyncgrpo.errors import EngineError, WeightsError
from asyncgrpo.protocols import NamedTensors
from asyncgrpo.types import Completion, FinishReason, Sampled, Sampling


@dataclass(slots=True, kw_only=True)
class _Sequence:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(slots=True, kw_only=True)
class _Request:
    prompt: list[int]
    sampling: Sampling
    generator: torch.Generator
    sequences: list[_Sequence]


class ToyEngine:
    """A protocols.Engine over a Hugging Face causal language model on the CPU."""

    def __init__(self, config: Config, model: Any, stop_token_ids: Sequence[int]) -> None:
        self._model = model.eval()
        self._longest = config.max_sequence_tokens
        self._stop_token_ids = frozenset(stop_token_ids)
        self._requests: dict[str, _Request] = {}
        self._version = -1
        self._asleep = False

    @property
    def version(self) -> int:
        return self._version

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(kv_share=0.0, preempted=0)

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: Sampling,
        num_completions: int,
        seed: int,
    ) -> None:
        if len(prompt_token_ids) + sampling.max_completion_tokens > self._longest:
            raise EngineError(f"request {request_id} is longer than {self._longest} tokens")
        if sampling.top_p < 1 or sampling.top_k > 0:
            raise EngineError("the toy engine has no top_p or top_k; set them to 1 and 0")
        self._requests[request_id] = _Request(
            prompt=list(prompt_token_ids),
            sampling=sampling,
            generator=torch.Generator().manual_seed(seed),
            sequences=[_Sequence() for _ in range(num_completions)],
        )

    @torch.no_grad()
    def step(self) -> list[Sampled]:
        assert not self._asleep, "an engine that sleeps has no weights"
        rows = [
            (request, sequence)
            for request in self._requests.values()
            for sequence in request.sequences
            if sequence.finish_reason is None
        ]
        if rows:
            for (request, sequence), logits in zip(rows, self._next_logits(rows), strict=True):
                self._extend(request, sequence, logits)
        return [self._finish(name) for name in list(self._requests) if self._is_done(name)]

    @torch.no_grad()
    def load_weights(self, version: int, tensors: NamedTensors) -> None:
        own = dict(self._model.named_parameters())
        for name, tensor in tensors:
            if name not in own or own[name].shape != tensor.shape:
                raise WeightsError(f"version {version}: no parameter {name} {tuple(tensor.shape)}")
            own.pop(name).copy_(tensor)
        if own:
            raise WeightsError(f"version {version} lacks {', '.join(own)}")
        self._version = version

    def sleep(self) -> None:
        self._asleep = True

    def wake(self) -> None:
        self._asleep = False

    def _next_logits(self, rows: list[tuple[_Request, _Sequence]]) -> torch.Tensor:
        """float32 [rows, V]; right padding is harmless: attention is causal."""
        texts = [request.prompt + sequence.token_ids for request, sequence in rows]
        input_ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
        for row, text in enumerate(texts):
            input_ids[row, : len(text)] = torch.tensor(text)
        hidden = self._model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        last = torch.tensor([len(text) - 1 for text in texts])
        return self._model.lm_head(hidden[torch.arange(len(texts)), last]).float()

    def _extend(self, request: _Request, sequence: _Sequence, logits: torch.Tensor) -> None:
        sampling = request.sampling
        greedy = sampling.temperature == 0
        logprobs = torch.log_softmax(logits if greedy else logits / sampling.temperature, dim=-1)
        if greedy:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(logprobs.exp(), 1, generator=request.generator))
        sequence.token_ids.append(token)
        sequence.logprobs.append(float(logprobs[token]))
        sequence.versions.append(self._version)
        if token in self._stop_token_ids:
            sequence.finish_reason = "stop"
        elif len(sequence.token_ids) >= sampling.max_completion_tokens:
            sequence.finish_reason = "length"

    def _is_done(self, name: str) -> bool:
        return all(s.finish_reason is not None for s in self._requests[name].sequences)

    def _finish(self, name: str) -> Sampled:
        request = self._requests.pop(name)
        completions = tuple(
            Completion(
                token_ids=np.array(sequence.token_ids, dtype=np.int32),
                behavior_logprobs=np.array(sequence.logprobs, dtype=np.float32),
                versions=np.array(sequence.versions, dtype=np.int32),
                finish_reason=sequence.finish_reason or "abort",
            )
            for sequence in request.sequences
        )
        return Sampled(
            lease_id=name,
            prompt_token_ids=np.array(request.prompt, dtype=np.int32),
            completions=completions,
        )
