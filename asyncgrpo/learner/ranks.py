"""Sums and collections over all learner ranks; with one rank they return what they were given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Value = TypeVar("Value")
PIECE_ELEMENTS = 1 << 20  # of one message between ranks that hold parts of a tensor


def world_size() -> int:
    """Number of learner ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def backend() -> str:
    """Of the process group: NCCL for tensors on a GPU, gloo for those that stay on the CPU."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank may hold a part, gathered; every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, to be read and changed in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parts(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The elements of a sharded tensor in order, in flat pieces, on rank 0; all ranks must ask.

    Each rank sends its own part to rank 0, cast to dtype. A piece is good until the next.
    """
    assert isinstance(tensor, DTensor), "only a sharded tensor has parts"
    mesh, own = tensor.device_mesh, own_part(tensor).reshape(-1)
    holders = dist.get_process_group_ranks(mesh.get_group(mesh.ndim - 1))
    if 0 not in holders:
        return  # rank 0 has another copy at hand
    rows = -(-len(tensor) // len(holders))
    piece = torch.empty(PIECE_ELEMENTS, dtype=dtype, device=own.device)
    for number, holder in enumerate(holders):
        count = max(min(rows, len(tensor) - number * rows), 0) * (tensor.numel() // len(tensor))
        if holder == 0 == rank():
            yield own
        elif rank() == holder:
            for start in range(0, len(own), PIECE_ELEMENTS):  # no piece of nothing, as split has
                dist.send(own[start : start + PIECE_ELEMENTS].to(dtype), 0)
        elif rank() == 0:
            for start in range(0, count, PIECE_ELEMENTS):
                theirs = piece[: count - start]
                dist.recv(theirs, holder)
                yield theirs


def from_first(value: Value) -> Value:
    """What rank 0 says; the others' own value is not looked at."""
    told = [value]
    if world_size() > 1:
        dist.broadcast_object_list(told)
    return told[0]


def largest(value: float, device: str) -> float:
    """The largest of all ranks' values."""
    return summed([value], device, dist.ReduceOp.MAX)[0]


def meet() -> None:
    """Returns when every rank is here and gave its GPU back what torch keeps for later."""
    torch.cuda.empty_cache()
    summed([0.0], "cpu")


def summed(
    values: Sequence[float], device: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> list[float]:
    """Sums of each value over ranks (or what else op says), in float64."""
    if world_size() == 1:
        return list(values)
    table = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(table, op=op)
    return table.tolist()


def reduced(values: dict[str, Tensor], op: dist.ReduceOp.RedOpType) -> dict[str, Tensor]:
    """Tensors of any shape reduced over ranks in one call; every rank must have the same names."""
    if world_size() == 1 or not values:
        return values
    names = sorted(values)
    flat = torch.cat([values[name].flatten() for name in names])
    dist.all_reduce(flat, op=op)
    pieces = flat.split([values[name].numel() for name in names])
    return {n: piece.view(values[n].shape) for n, piece in zip(names, pieces, strict=True)}


def collected(values: Tensor) -> Tensor:
    """All ranks' [n] values behind each other; n may differ."""
    if world_size() == 1:
        return values
    pieces: list[Tensor] = [values] * world_size()
    dist.all_gather_object(pieces, values.cpu())
    return torch.cat(pieces).to(values.device)
