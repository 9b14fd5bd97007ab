"""The policy as the learner runs it: loaded and written, packed rows, log-probs in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from asyncgrpo.errors import ModelError
from asyncgrpo.learner import ranks
from asyncgrpo.learner.attention import Packing, packing_of
from asyncgrpo.learner.batch import Batch

if TYPE_CHECKING:
    from asyncgrpo.learner.lora import Adapter  # peft: an extra

NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
LOGITS_PER_CHUNK = 1 << 26  # elements of one float32 chunk of tokens x vocabulary: 256 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """The part of a Batch that the model needs, on its device."""

    input_ids: Tensor  # int64 [1, S]
    position_ids: Tensor  # int64 [1, S]
    loss_places: Tensor  # int64 [n] places inside the loss
    targets: Tensor  # int64 [n] tokens to be scored there
    packing: Packing


def packed_row(batch: Batch, device: str | torch.device = "cpu") -> PackedRow:
    """Moves a batch to the model's device."""
    return PackedRow(
        input_ids=torch.from_numpy(batch.input_ids)[None].to(device),
        position_ids=torch.from_numpy(batch.position_ids)[None].to(device),
        loss_places=torch.from_numpy(np.flatnonzero(batch.loss_mask)).to(device),
        targets=torch.from_numpy(batch.target_ids[batch.loss_mask]).to(device),
        packing=packing_of(batch.cu_seqlens, device),
    )


def load_policy(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantized: bool = False,
) -> PreTrainedModel:
    """Loads a causal language model from a local folder (nothing is downloaded) or by hub name.

    Packed attention, evaluation mode: dropout would make the learner's log-probs differ from the
    engine's. quantized: linear layers as NF4, computing in bfloat16 (QLoRA, arXiv 2305.14314);
    CUDA only. Raises ModelError when it cannot be loaded, scales its logits in a way that
    `PolicyHead` does not know, or lets sequences of a row see each other.
    """
    options = {"quantization_config": NF4, "device_map": {"": device}} if quantized else {}
    try:
        policy = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="packed",
            local_files_only=Path(path).is_dir(),
            **options,
        )
        policy.eval().to(torch.device(device))
        _check_separation(policy, path)
    except Exception as error:
        if isinstance(error, ModelError | torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"model {path!r} cannot be loaded: {type(error).__name__}: {error}; set model.path to "
            "a folder with config.json and safetensors weights, or to a hub name"
        ) from error
    config = policy.config.get_text_config()
    for option in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, option, None) not in (None, 1.0):
            raise ModelError(f"model {path!r} scales its logits ({option}): unsupported; change it")
    return policy


@torch.no_grad()
def _check_separation(policy: PreTrainedModel, path: str) -> None:
    """Changes the first of two sequences on a row: the second must not notice.

    Layers that do not use the registered attention (recurrent ones) would mix them silently.
    """
    packing = packing_of(np.array([0, 2, 4], np.int32), policy.device)
    rows, places = torch.tensor([[[0, 0, 0, 1]], [[1, 0, 0, 1]]]), torch.tensor([[0, 1, 0, 1]])
    one, other = (_hidden_states(policy, row, places, packing)[2:] for row in rows)
    if not torch.allclose(one, other, rtol=1e-2, atol=1e-3):
        raise ModelError(
            f"model {path!r} ({type(policy).__name__}) lets packed sequences see each other; "
            "use a model with plain causal attention in every layer"
        )


def write_model(
    policy: PreTrainedModel, adapter: Adapter | None, origin: str, folder: Path | None
) -> None:
    """Writes the policy, or its adapter, and the tokenizer of `origin`; for from_pretrained.

    folder: None on ranks that only help to gather a sharded policy, one tensor after the other.
    """
    if adapter is not None:
        adapter.save(folder)
    else:
        own = dict(policy.named_parameters()).keys() | dict(policy.named_buffers()).keys()
        state = policy.state_dict().items()  # a tied output layer is not in own
        gathered = ((name, ranks.whole(tensor)) for name, tensor in state if name in own)
        tensors = {name: tensor.cpu() for name, tensor in gathered if folder is not None}
        if folder is not None:
            policy.save_pretrained(folder, state_dict=tensors)
    if folder is not None:
        AutoTokenizer.from_pretrained(origin).save_pretrained(folder)


def _hidden_states(policy: PreTrainedModel, ids: Tensor, places: Tensor, pack: Packing) -> Tensor:
    """Last hidden states [S, width] of one row of token and position ids, [1, S] each."""
    ids, places = ids.to(policy.device), places.to(policy.device)
    output = policy.base_model(input_ids=ids, position_ids=places, use_cache=False, packing=pack)
    return cast(Tensor, output.last_hidden_state[0])


class PolicyHead(nn.Module):
    """Scores the targets of packed rows. What DistributedDataParallel wraps and FSDP shards.

    Only places inside the loss meet the vocabulary, in chunks that are computed again in the
    backward pass: tokens x vocabulary never exists whole.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        *,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
        chunk_tokens: int | None = None,
        autocast: torch.dtype | None = None,
        float32_head: bool = False,
        fused: bool = False,
    ) -> None:
        """autocast: what matrix products of float32 weights are computed in.

        float32_head: the output layer's are not. fused: they are by Liger's kernel, with log-probs
        and entropies; ModelError when it is more than a matrix.
        """
        super().__init__()
        self._autocast, self._float32_head = autocast, float32_head
        self.policy = policy
        self._entropy_gradient = entropy_gradient
        self._temperature = temperature
        self._fused = _fused_kernel(policy) if fused else None
        vocab_size = policy.get_output_embeddings().weight.shape[0]
        self._chunk_tokens = chunk_tokens or max(1, LOGITS_PER_CHUNK // vocab_size)

    def forward(self, row: PackedRow) -> tuple[Tensor, Tensor]:
        """Log-probs of the targets and entropies of their distributions, at the temperature.

        Both float32 [S] in nats, 0 outside the loss; the entropies carry a gradient only when
        there is an entropy bonus.
        """
        with torch.autocast(row.input_ids.device.type, self._autocast, self._autocast is not None):
            hidden = _hidden_states(self.policy, row.input_ids, row.position_ids, row.packing)
            logprobs, entropy = self._score(hidden[row.loss_places], row.targets)
        zeros = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        on_row = zeros.index_copy(0, row.loss_places, logprobs)
        return on_row, zeros.index_copy(0, row.loss_places, entropy)

    @torch.no_grad()
    def next_logprobs(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """float32 [N, V] on the CPU: log-probs of the token after each prompt, temperature 1."""
        lengths = [len(prompt) for prompt in prompts]
        packing = packing_of(np.cumsum([0, *lengths], dtype=np.int32), self.policy.device)
        ids = torch.tensor([[token for prompt in prompts for token in prompt]])
        positions = torch.tensor([[place for length in lengths for place in range(length)]])
        hidden = _hidden_states(self.policy, ids, positions, packing)
        last = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
        return self._logits(hidden[last]).float().log_softmax(-1).cpu()

    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [n, width], targets [n] -> log-probs and entropies, float32 [n]."""
        size = self._chunk_tokens
        if self._fused is not None and len(hidden):
            weight = self.policy.get_output_embeddings().weight.bfloat16()
            scale, own = self._temperature, hidden.bfloat16()
            nll, entropy = self._fused(own, weight, targets, scale, return_entropy=True)
            return -nll, (entropy if self._entropy_gradient else entropy.detach()).float()
        if len(hidden) <= size:
            return self._score_chunk(hidden, targets)
        scored = [
            checkpoint(self._score_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        logprobs, entropies = zip(*scored, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _score_chunk(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._logits(hidden).float() / self._temperature
        table = logits.log_softmax(-1)
        logprobs = table.gather(-1, targets[:, None])[:, 0]
        with torch.set_grad_enabled(self._entropy_gradient and torch.is_grad_enabled()):
            entropy = -(table.exp() * table).sum(-1)
        return logprobs, entropy

    def _logits(self, hidden: Tensor) -> Tensor:
        output = self.policy.get_output_embeddings()
        if not self._float32_head:
            return cast(Tensor, output(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if output.bias is None else output.bias.float()
            return functional.linear(hidden.float(), output.weight.float(), bias)


def _fused_kernel(policy: PreTrainedModel) -> Any:
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as liger  # an extra

    output = policy.get_output_embeddings()
    if type(output) is not nn.Linear or output.bias is not None:
        raise ModelError(f"learner.fused_head=true knows no output layer {output}; leave it out")
    return liger.LigerFusedLinearScaledCrossEntropyFunction.apply
