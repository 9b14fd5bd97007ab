"""Causal attention within each sequence of a packed row, called by the models' layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from asyncgrpo.errors import ModelError

# Sequences up to this many tokens share one padded attention call with those at most twice as
# short, longer ones get a call each: on a CPU the call costs more than padding below this length
# (128 sequences of 12 to 30: 6 against 23 ms) and less above it (16 of 8 to 256: 26 against 16).
MAX_PADDED_TOKENS = 128


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

    @property
    def num_slots(self) -> int:
        """Places that attention is computed for block by block, padding included."""
        return sum(count * longest for count, longest in (block.shape for block in self.blocks))


def packing_of(cu_seqlens: NDArray[np.int32], device: str | torch.device) -> Packing:
    """Groups neighbouring sequences of like length into blocks. cu_seqlens: int32 [N + 1]."""
    lengths = np.diff(cu_seqlens).astype(np.int64)
    cuts = _cut_points(lengths.tolist())
    return Packing(
        cu_seqlens=torch.from_numpy(cu_seqlens).to(device),
        longest=int(lengths.max()),
        blocks=tuple(_block(int(cu_seqlens[a]), lengths[a:b], device) for a, b in pairwise(cuts)),
    )


def has_kernel(device: str, dtype: torch.dtype) -> bool:
    """Whether all sequences of a row go through attention in one call without padding."""
    return device == "cuda" and dtype != torch.float32


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
    if has_kernel(v.device.type, v.dtype):
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
