"""LoRA (arXiv 2106.09685): small matrices trained beside the linear layers of a frozen policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from asyncgrpo.learner import ranks
from asyncgrpo.settings.learner import LoraSettings

ADAPTER = "default"  # peft's name of the only one


class Adapter:
    """The trained part of a policy: W + alpha / r B A takes the place of W in each target layer."""

    def __init__(self, policy: PreTrainedModel, settings: LoraSettings) -> None:
        """Changes the policy: its own weights are frozen."""
        targets = settings.targets
        config = LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        )
        self._policy, self._settings = policy, settings
        self._peft = get_peft_model(policy, config)
        policy.eval()
        self._layers = [layer for layer in policy.modules() if isinstance(layer, LoraLayer)]

    def off(self) -> AbstractContextManager[None]:
        """Meanwhile the policy computes as its base does."""
        return self._computing(lambda layer: layer.get_base_layer().forward)

    def merged(self) -> AbstractContextManager[None]:
        """Meanwhile the policy computes with the weights that are published, to the last bit."""
        return self._computing(lambda layer: partial(_merged_forward, layer))

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """Meanwhile the adapter's dropout acts; the policy's own never does."""
        for layer in self._layers:
            layer.lora_dropout.train()
        try:
            yield
        finally:
            for layer in self._layers:
                layer.lora_dropout.eval()

    def save(self, folder: Path | None) -> None:
        """Writes folder/adapter for peft, and the merged model for everyone unless it is off.

        None on ranks that only help to gather.
        """
        named = self._peft.named_parameters()
        trained = {name: ranks.whole(weight) for name, weight in named if weight.requires_grad}
        merged = merged_parameters(self._policy) if self._settings.save_merged else ()
        tensors = {name: tensor.cpu() for name, tensor in merged if ranks.rank() == 0}
        if folder is None:
            return
        self._peft.save_pretrained(
            str(folder / "adapter"), save_embedding_layers=False, state_dict=trained
        )
        if not tensors:
            return
        save_torch_state_dict(tensors, folder)
        config = copy.copy(self._policy.config)
        vars(config).pop("quantization_config", None)  # merged weights are in full precision again
        config.save_pretrained(folder)
        self._policy.generation_config.save_pretrained(folder)

    @contextmanager
    def _computing(self, forward: Callable[[LoraLayer], Callable[..., Tensor]]) -> Iterator[None]:
        # Not peft's own switch: it also turns requires_grad off and on, below DDP's hooks.
        for layer in self._layers:
            vars(layer)["forward"] = forward(layer)
        try:
            yield
        finally:
            for layer in self._layers:
                del vars(layer)["forward"]


def _merged_forward(layer: LoraLayer, hidden: Tensor) -> Tensor:
    bias = cast(Tensor | None, layer.get_base_layer().bias)
    return functional.linear(hidden, merged_weight(layer), bias)


@torch.no_grad()
def merged_weight(layer: LoraLayer) -> Tensor:
    """W + alpha / r B A [out, in] in a tensor of its own; the layer stays as it is."""
    a, b = (
        ranks.whole(cast(Tensor, each[ADAPTER].weight)) for each in (layer.lora_A, layer.lora_B)
    )
    base = ranks.whole(dequantize_module_weight(layer.get_base_layer()))
    return base + layer.scaling[ADAPTER] * (b @ a)


def merged_parameters(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the base model's parameters, merged one at a time when they are asked for.

    Computed from the untouched W each time: publishing often does not add up rounding errors.
    """
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            continue  # of the adapter
        name = name.replace(".base_layer.", ".")
        owner, _, kind = name.rpartition(".")
        module, tensor = policy.get_submodule(owner), parameter.detach()
        if kind == "weight" and isinstance(module, LoraLayer):
            tensor = merged_weight(module)
        elif kind == "weight":
            tensor = dequantize_module_weight(module).detach()
        yield name, ranks.whole(tensor)


def adapter_parameters(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of A and B of each target layer, by the names of saved adapters."""
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            yield name.replace(f".{ADAPTER}.", "."), ranks.whole(parameter.detach())
