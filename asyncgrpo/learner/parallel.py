"""How the policy lies on the ranks, how its blocks run, and how it is gathered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from asyncgrpo.learner import ranks
from asyncgrpo.learner.attention import packed_attention
from asyncgrpo.learner.model import PolicyHead
from asyncgrpo.protocols import Parts
from asyncgrpo.settings.learner import LearnerSettings


def set_up_blocks(policy: nn.Module, settings: LearnerSettings) -> None:
    """Makes the blocks that are to be compiled or computed again in the backward pass so."""
    every = settings.checkpoint_activations
    if settings.compile:
        # Its loop over the sequences of a row would be compiled anew for each row.
        AttentionInterface.register("packed", torch.compiler.disable(packed_attention))
    for number, block in enumerate(_blocks(policy)):
        forward = block.forward
        if settings.compile:
            forward = torch.compile(forward, dynamic=True)
        if every and number % every == 0:
            forward = partial(checkpoint, forward, use_reentrant=False)
        vars(block)["forward"] = forward


def shard(
    head: PolicyHead, settings: LearnerSettings, device: str, *, cpu_offload: bool = False
) -> None:
    """Leaves each rank its part of every parameter (FSDP2); a lone rank keeps all in one part.

    A block's parameters are gathered when it runs, in settings.dtype; gradients are summed over
    ranks in float32. The rest (embedding, norm, output layer) is gathered with the head.
    cpu_offload: the parts lie in host memory.
    """
    mesh = _mesh(settings.shard_ranks, device)
    dtype = getattr(torch, settings.dtype)
    offload = CPUOffloadPolicy(pin_memory=device == "cuda")
    place = offload if cpu_offload else OffloadPolicy()
    for block in _blocks(head.policy):
        fully_shard(block, mesh=mesh, offload_policy=place, mp_policy=_precision(dtype))
    outer = _precision(torch.float32 if settings.float32_head else dtype)
    # The root stays gathered after its forward pass by default, and would be published stale.
    fully_shard(head, mesh=mesh, offload_policy=place, mp_policy=outer, reshard_after_forward=True)
    register_fsdp_forward_method(head, "next_logprobs")


@contextmanager
def brought(model: nn.Module, device: str) -> Iterator[None]:
    """A model of host memory on the device, for a while."""
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")


def open_lone_group() -> None:
    """FSDP wants a process group, also of a rank that torchrun did not start with others."""
    if not dist.is_initialized():
        dist.init_process_group(ranks.backend(), store=HashStore(), rank=0, world_size=1)


def make_optimizer(policy: nn.Module, settings: LearnerSettings) -> Optimizer:
    """AdamW on what is trained; weight decay on matrices only, not on biases and norms."""
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    matrices = [weight for weight in trained if weight.ndim > 1]
    others = [weight for weight in trained if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}]
    groups += [{"params": others, "weight_decay": 0.0}] if others else []
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.adam_eps}
    if settings.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # an extra

        return AdamW8bit(groups, **options)
    return AdamW(groups, **options, fused=True)


class Published:
    """The policy's weights by their Hugging Face names; a tied output layer does not appear.

    Anew for each iteration: with an adapter merged into the one tensor at hand, or the adapter
    alone. Where ranks hold parts, rank 0 gets them piece by piece; all of them must take part.
    """

    def __init__(
        self,
        policy: nn.Module,
        is_sharded: bool,
        only_adapter: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """dtype: in which parts travel between ranks."""
        self._dtype = dtype
        self._policy, self._is_sharded, self._only_adapter = policy, is_sharded, only_adapter
        self._pass: Iterator[tuple[str, Tensor | Parts]] = iter(())

    def __iter__(self) -> Iterator[tuple[str, Tensor | Parts]]:
        """On rank 0; the others take part to the end of a pass, so one that is given up goes on."""
        if not self._is_sharded:
            return self._tensors()
        self._end_pass()
        ranks.from_first(True)
        self._pass = self._tensors()
        return self._pass

    def help(self) -> None:
        """On every rank when rank 0 is done: until then the others take part in each pass."""
        if self._is_sharded and ranks.rank() == 0:
            self._end_pass()
            ranks.from_first(False)
        while self._is_sharded and ranks.rank() and ranks.from_first(False):
            self._pass = self._tensors()
            self._end_pass()

    def _end_pass(self) -> None:
        for _ in self._pass:
            pass

    def _tensors(self) -> Iterator[tuple[str, Tensor | Parts]]:
        if hasattr(self._policy, "peft_config"):
            from asyncgrpo.learner import lora  # peft: slow, and an extra

            named_of = lora.adapter_parameters if self._only_adapter else lora.merged_parameters
            yield from named_of(self._policy)
            return
        for name, tensor in self._policy.named_parameters():
            if not isinstance(tensor, DTensor):
                yield name, tensor
                continue
            flat = ranks.parts(tensor.detach(), self._dtype)
            yield name, Parts(tensor.shape, flat)
            for _ in flat:
                pass  # rank 0 wanted no more of it, or this is another rank


def _blocks(policy: nn.Module) -> list[nn.Module]:
    return [block for block in policy.modules() if isinstance(block, GradientCheckpointingLayer)]


def _precision(dtype: torch.dtype) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


def _mesh(shard_ranks: int, device: str) -> DeviceMesh:
    """One group, or several that each hold the whole model and average their gradients."""
    size = ranks.world_size()
    if shard_ranks in (0, size):
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    shape = (size // shard_ranks, shard_ranks)
    return init_device_mesh(device, shape, mesh_dim_names=("copy", "shard"))
