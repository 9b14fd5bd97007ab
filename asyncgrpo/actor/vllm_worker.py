"""What each process of a vLLM engine does with new weights; VllmEngine calls it between steps."""

from __future__ import annotations

from multiprocessing.connection import Client
from threading import Thread
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from asyncgrpo.protocols import NamedTensors
from asyncgrpo.settings.learner import LoraSettings, WeightSettings
from asyncgrpo.weights.inbox import Inbox

ADAPTER_ID = 1  # of the only one


def open_inbox(worker: Any, address: str, settings: WeightSettings) -> None:
    """Lets weights arrive in this process, whatever else it does."""
    work = (Client(address), worker.worker.device)
    Thread(target=Inbox(settings).serve, args=work, name="weights-inbox", daemon=True).start()


def replace_weights(worker: Any, tensors: NamedTensors) -> None:
    """Takes this process's part of each tensor."""
    worker = worker.worker  # out of its wrapper
    model = worker.model_runner.get_model()
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        model.load_weights(iter(tensors))
        finalize_layerwise_reload(model, worker.model_config)
        _refresh_tied_head(model)


def replace_adapter(worker: Any, tensors: NamedTensors, lora: LoraSettings) -> None:
    """Puts an adapter in the place of the last one, which sequences in flight go on with."""
    manager = worker.worker.model_runner.lora_manager
    slots = manager._adapter_manager
    mapper = getattr(slots.model, "hf_to_vllm_mapper", None)
    adapter = LoRAModel.from_lora_tensors(
        ADAPTER_ID,
        # vLLM scales B in place, and all processes look at the same memory.
        {name: tensor.to("cpu", copy=True) for name, tensor in tensors},
        PEFTHelper(r=lora.r, lora_alpha=lora.alpha, target_modules=[]),
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=mapper and mapper.get_rename_mapper(),
    )
    slots.remove_adapter(ADAPTER_ID)
    slots.add_adapter(adapter)
    slots.activate_adapter(ADAPTER_ID)


def _refresh_tied_head(model: torch.nn.Module) -> None:
    """vLLM's CPU build packs a tied lm_head into a copy that a reload leaves as it was."""
    head: Any = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)
