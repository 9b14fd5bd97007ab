"""LoRA (arXiv 2106.09685): small matrices trained beside the linear layers of a frozen policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from asyncgrpo.config import LoraSettings
from asyncgrpo.errors import ConfigError

ADAPTER = "default"  # peft's name of the only one
Forward = Callable[[Tensor], Tensor]


class Adapter:
    """The trained part of a policy: W + alpha / r B A takes the place of W in each target layer."""

    def __init__(self, policy: PreTrainedModel, settings: LoraSettings) -> None:
        """Changes the policy: its own weights are frozen. ConfigError for unknown targets."""
        check_targets(policy, settings)
        chosen = settings.targets
        config = LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=chosen if isinstance(chosen, str) else list(chosen),
            task_type="CAUSAL_LM",
        )
        self._policy, self._settings = policy, settings
        self._peft = get_peft_model(policy, config)
        policy.eval()
        self._layers = [layer for layer in policy.modules() if isinstance(layer, LoraLayer)]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Meanwhile the policy computes as its base does."""
        with self._computing(lambda layer: layer.get_base_layer().forward):
            yield

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Meanwhile the policy computes with the weights that are published, to the last bit."""

        def forward(layer: LoraLayer) -> Forward:
            bias = cast(Tensor | None, layer.get_base_layer().bias)
            return lambda hidden: functional.linear(hidden, merged_weight(layer), bias)

        with self._computing(forward):
            yield

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

    def save(self, folder: Path) -> None:
        """Writes folder/adapter for peft, and the merged model for everyone unless it is off."""
        self._peft.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        if not self._settings.save_merged:
            return
        tensors = {name: tensor.cpu() for name, tensor in merged_parameters(self._policy)}
        save_torch_state_dict(tensors, folder)
        config = copy.deepcopy(self._policy.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # merged weights are in full precision again
        config.save_pretrained(folder)
        if self._policy.generation_config is not None:
            self._policy.generation_config.save_pretrained(folder)

    @contextmanager
    def _computing(self, forward: Callable[[LoraLayer], Forward]) -> Iterator[None]:
        # Not peft's own switch: it also turns requires_grad off and on, below DDP's hooks.
        for layer in self._layers:
            vars(layer)["forward"] = forward(layer)
        try:
            yield
        finally:
            for layer in self._layers:
                del vars(layer)["forward"]


@torch.no_grad()
def merged_weight(layer: LoraLayer) -> Tensor:
    """W + alpha / r B A [out, in] in a tensor of its own; the layer stays as it is."""
    a, b = (cast(Tensor, each[ADAPTER].weight) for each in (layer.lora_A, layer.lora_B))
    base: Tensor = dequantize_module_weight(layer.get_base_layer())
    return base + layer.scaling[ADAPTER] * (b @ a)


def merged_parameters(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the base model's parameters, merged one at a time when they are asked for.

    Computed from the untouched W each time: publishing often does not add up rounding errors.
    """
    for name, parameter in policy.named_parameters():
        owner, _, kind = name.rpartition(".")
        if parameter.requires_grad:
            continue  # of the adapter
        module = policy.get_submodule(owner.removesuffix(".base_layer"))
        if isinstance(module, LoraLayer) and kind == "weight":
            yield name.replace(".base_layer.", "."), merged_weight(module)
        elif kind == "weight":
            yield name, dequantize_module_weight(module).detach()
        else:
            yield name.replace(".base_layer.", "."), parameter.detach()


def check_targets(policy: PreTrainedModel, settings: LoraSettings) -> None:
    """ConfigError when learner.lora.targets names what is no linear layer of this model."""
    output = policy.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }
    unknown = [] if settings.targets == "all-linear" else sorted({*settings.targets} - linear)
    if unknown:
        raise ConfigError(
            f"learner.lora.targets: {', '.join(unknown)} cannot be adapted in this model "
            f"({type(policy).__name__}); take 'all-linear' or some of {', '.join(sorted(linear))}"
        )


def check_targets_of(path: str, settings: LoraSettings) -> None:
    """As `check_targets`, from the model's config alone."""
    config = AutoConfig.from_pretrained(path, local_files_only=Path(path).is_dir())
    with torch.device("meta"):
        check_targets(AutoModelForCausalLM.from_config(config), settings)
