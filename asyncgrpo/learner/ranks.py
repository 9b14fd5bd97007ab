"""Sums and collections over all learner ranks; with one rank they return what they were given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Value = TypeVar("Value")


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


def from_first(value: Value) -> Value:
    """What rank 0 says; the others' own value is not looked at."""
    told = [value]
    if world_size() > 1:
        dist.broadcast_object_list(told)
    return told[0]


def largest(value: float, device: str) -> float:
    """The largest of all ranks' values."""
    return summed([value], device, dist.ReduceOp.MAX)[0]


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
