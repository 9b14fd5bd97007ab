"""The policy as the learner runs it: Hugging Face weights, packed rows, log-probs in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from asyncgrpo.errors import ModelError
from asyncgrpo.learner.batch import Batch

try:
    from torch.nn.attention import varlen
except ImportError:  # builds without it call attention block by block on CUDA too: same numbers
    varlen = None  # type: ignore[assignment]

# Sequences up to this many tokens share one padded attention call with those at most twice as
# short, longer ones get a call each: on a CPU the call costs more than padding below this length
# (128 sequences of 12 to 30: 6 against 23 ms) and less above it (16 of 8 to 256: 26 against 16).
MAX_PADDED_TOKENS = 128
LOGITS_PER_CHUNK = 1 << 26  # elements of one float32 chunk of tokens x vocabulary: 256 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Neighbouring sequences that go through attention in one call, N of them, T the longest."""

    places: slice  # of the row
    shape: tuple[int, int]  # N, T
    gather: Tensor  # int64 [N * T] the place that fills each padded slot
    scatter: Tensor  # int64 [number of places] padded slot of each place


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Where sequences begin and end on a packed row; reaches every attention layer."""

    cu_seqlens: Tensor  # int32 [N + 1]
    longest: int
    blocks: tuple[Block, ...]


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
        packing=_packing(batch.cu_seqlens, device),
    )


def _packing(cu_seqlens: NDArray[np.int32], device: str | torch.device) -> Packing:
    lengths = np.diff(cu_seqlens).astype(np.int64)
    cuts = _cut_points(lengths.tolist())
    return Packing(
        cu_seqlens=torch.from_numpy(cu_seqlens).to(device),
        longest=int(lengths.max()),
        blocks=tuple(_block(int(cu_seqlens[a]), lengths[a:b], device) for a, b in pairwise(cuts)),
    )


def _cut_points(lengths: Sequence[int]) -> list[int]:
    """Indices of the sequences at which a new block begins, and the end."""
    cuts, shortest, longest = [0], lengths[0], lengths[0]
    for index, length in enumerate(lengths[1:], start=1):
        shortest, longest = min(shortest, length), max(longest, length)
        if longest > min(MAX_PADDED_TOKENS, 2 * shortest):
            cuts.append(index)
            shortest = longest = length
    return [*cuts, len(lengths)]


def _block(start: int, lengths: NDArray[np.int64], device: str | torch.device) -> Block:
    longest = int(lengths.max())
    slots = np.arange(longest)
    starts = start + np.cumsum(lengths) - lengths
    # Padding repeats the sequence's own last place: nothing of a neighbour is ever read.
    places = np.minimum(starts[:, None] + slots, (starts + lengths - 1)[:, None])
    return Block(
        places=slice(start, start + int(lengths.sum())),
        shape=(len(lengths), longest),
        gather=torch.from_numpy(places.ravel()).to(device),
        scatter=torch.from_numpy(np.flatnonzero(slots < lengths[:, None])).to(device),
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    packing: Packing | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row.

    query [1, H, S, D], key and value [1, H_kv, S, D] -> [1, S, H, D]; the attention mask is not
    looked at. Raises ModelError for options that would otherwise be left out silently.
    """
    if packing is None:
        raise ModelError("packed attention was called without `packing`; use PolicyHead")
    window = options.get("sliding_window")
    if window is not None and window < packing.longest:
        raise ModelError(
            f"{type(module).__name__} has a sliding window of {window} tokens, shorter than a "
            f"sequence of {packing.longest}; use a model with full attention or shorter completions"
        )
    if options.get("s_aux") is not None or options.get("softcap") or options.get("dropout"):
        raise ModelError(f"{type(module).__name__}: no sinks, soft caps or dropout in attention")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [S, H, D]
    if varlen is not None and v.is_cuda and v.dtype != torch.float32:  # a half-precision kernel
        return _attend_varlen(q, k, v, packing, scaling)[None], None
    return torch.cat([_attend_block(q, k, v, b, scaling) for b in packing.blocks])[None], None


def _attend_block(q: Tensor, k: Tensor, v: Tensor, block: Block, scaling: float | None) -> Tensor:
    """[S, H, D] each -> [number of places, H, D] of one block, by one padded causal call."""
    is_single = block.shape[0] == 1

    def padded(x: Tensor) -> Tensor:  # [N, H, T, D]
        rows = x[block.places] if is_single else x.index_select(0, block.gather)
        return rows.view(*block.shape, *x.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        *(padded(q), padded(k), padded(v)),
        is_causal=True,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    out = out.transpose(1, 2).flatten(0, 1)
    return out if is_single else out.index_select(0, block.scatter)


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float | None
) -> Tensor:
    """All sequences in one call. Under autocast the norms of q and k give float32: cast back."""
    out = varlen.varlen_attn(
        *(q.to(v.dtype), k.to(v.dtype), v),
        *(packing.cu_seqlens, packing.cu_seqlens),
        *(packing.longest, packing.longest),
        scale=scaling,
        window_size=(-1, 0),  # causal; the default looks both ways
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return cast(Tensor, out)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)


def load_policy(
    path: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Loads a causal language model from a local folder (nothing is downloaded) or by hub name.

    Packed attention, evaluation mode: dropout would make the learner's log-probs differ from the
    engine's. Raises ModelError when it cannot be loaded, scales its logits in a way that
    `PolicyHead` does not know, or lets sequences of a row see each other.
    """
    try:
        policy = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="packed", local_files_only=Path(path).is_dir()
        )
        policy.eval().to(torch.device(device))
        _check_separation(policy, path)
    except Exception as error:
        if isinstance(error, ModelError):
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
    packing = _packing(np.array([0, 2, 4], np.int32), policy.device)
    rows, places = torch.tensor([[[0, 0, 0, 1]], [[1, 0, 0, 1]]]), torch.tensor([[0, 1, 0, 1]])
    one, other = (_hidden_states(policy, row, places, packing)[2:] for row in rows)
    if not torch.allclose(one, other, rtol=1e-2, atol=1e-3):
        raise ModelError(
            f"model {path!r} ({type(policy).__name__}) lets packed sequences see each other; "
            "use a model with plain causal attention in every layer"
        )


def _hidden_states(policy: PreTrainedModel, ids: Tensor, places: Tensor, pack: Packing) -> Tensor:
    """Last hidden states [S, width] of one row of token and position ids, [1, S] each."""
    ids, places = ids.to(policy.device), places.to(policy.device)
    output = policy.base_model(input_ids=ids, position_ids=places, use_cache=False, packing=pack)
    return cast(Tensor, output.last_hidden_state[0])


class PolicyHead(nn.Module):
    """Scores the targets of packed rows. What DistributedDataParallel wraps.

    Only places inside the loss meet the vocabulary, in chunks that are computed again in the
    backward pass: tokens x vocabulary never exists whole.
    """

    def __init__(
        self, policy: PreTrainedModel, *, temperature: float = 1.0, chunk_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.policy = policy
        self._temperature = temperature
        vocab_size = policy.get_output_embeddings().weight.shape[0]
        self._chunk_tokens = chunk_tokens or max(1, LOGITS_PER_CHUNK // vocab_size)

    def forward(self, row: PackedRow) -> tuple[Tensor, Tensor]:
        """Log-probs of the targets and entropies of their distributions, at the temperature.

        Both float32 [S] in nats, 0 outside the loss; the entropies carry no gradient.
        """
        hidden = _hidden_states(self.policy, row.input_ids, row.position_ids, row.packing)
        logprobs, entropy = self._score(hidden[row.loss_places], row.targets)
        zeros = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        on_row = zeros.index_copy(0, row.loss_places, logprobs)
        return on_row, zeros.index_copy(0, row.loss_places, entropy)

    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [n, width], targets [n] -> log-probs and entropies, float32 [n]."""
        size = self._chunk_tokens
        if len(hidden) <= size:
            return self._score_chunk(hidden, targets)
        scored = [
            checkpoint(self._score_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        logprobs, entropies = zip(*scored, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _score_chunk(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.policy.get_output_embeddings()(hidden).float() / self._temperature
        table = logits.log_softmax(-1)
        logprobs = table.gather(-1, targets[:, None])[:, 0]
        with torch.no_grad():
            entropy = -(table.exp() * table).sum(-1)
        return logprobs, entropy


def published_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name as in Hugging Face's named_parameters, tensor) of a policy, however it is wrapped.

    Looks through DistributedDataParallel and PolicyHead; a tied output layer does not appear.
    """
    for wrapper in ("module", "policy"):
        inner = getattr(module, wrapper, None)
        if isinstance(inner, nn.Module):
            module = inner
    yield from module.named_parameters()


@torch.no_grad()
def next_logprobs(policy: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """float32 [N, V] on the CPU: log-probs of the token after each prompt, at temperature 1."""
    lengths = [len(prompt) for prompt in prompts]
    packing = _packing(np.cumsum([0, *lengths], dtype=np.int32), policy.device)
    ids = torch.tensor([[token for prompt in prompts for token in prompt]])
    positions = torch.tensor([[place for length in lengths for place in range(length)]])
    hidden = _hidden_states(policy, ids, positions, packing)
    last = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
    return policy.get_output_embeddings()(hidden[last]).float().log_softmax(-1).cpu()
