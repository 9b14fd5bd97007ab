"""Shows the memory estimate to people: in advance, and when memory has run out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table

from asyncgrpo.config import Config
from asyncgrpo.errors import AbsentModel, ConfigError
from asyncgrpo.hints import did_you_mean
from asyncgrpo.launch.memory import GIB, Device, ModelShape, estimate, remedies
from asyncgrpo.launch.model_folder import EMBEDDED, check_tensor_parallel, config_folder
from asyncgrpo.launch.placement import choose_transport
from asyncgrpo.launch.plan import Host, assign_gpus, role_names

MACHINE, WIDTH = "this machine (CPU run)", 120


def model_shape(path: str) -> ModelShape:
    """The sizes of a model by its config.json; ModelError when it is not on this machine."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from asyncgrpo.data.tiny import model_config
    from asyncgrpo.data.tiny_tokenizer import build_tokenizer
    from asyncgrpo.learner.model import LOGITS_PER_CHUNK

    if path == EMBEDDED:
        whole = model_config(build_tokenizer())
    else:
        whole = AutoConfig.from_pretrained(config_folder(path))
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(whole)
    config = whole.get_text_config()
    layer = {n.rpartition(".")[2]: m for n, m in policy.named_modules() if ".layers.0." in n}
    head_norms = layer.keys() & {"q_norm", "k_norm"}
    heads, vocab = config.num_attention_heads, len(policy.get_output_embeddings().weight)
    count = sum(weight.numel() for weight in policy.parameters())
    return ModelShape(
        parameters=count,
        reference_parameters=count,
        vocab=vocab,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=config.intermediate_size,
        hidden_norms=sum("norm" in name for name in layer) - len(head_norms),
        head_norms=bool(head_norms),
        linears={
            name: (module.in_features, module.out_features)
            for name, module in layer.items()
            if isinstance(module, torch.nn.Linear)
        },
        chunk_tokens=max(1, LOGITS_PER_CHUNK // vocab),
    )


def check_targets(path: str, targets: Sequence[str]) -> None:
    """ConfigError when learner.lora.targets names what is no linear layer within a model's layers.

    Says nothing of a model whose config.json is not on this machine yet.
    """
    try:
        linears = model_shape(path).linears
    except AbsentModel:
        return
    for name in targets:
        if name not in linears:
            raise ConfigError(
                f"learner.lora.targets: {name!r} cannot be adapted in this model; "
                f"{did_you_mean(name, linears)}take 'all-linear' or some of "
                f"{', '.join(sorted(linears))}"
            )


def device_bytes(config: Config) -> int | None:
    """Of one GPU of this machine, or for a CPU run of the machine; None without a GPU."""
    if not config.launch.gpus:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import torch

    available = torch.cuda.is_available()
    return torch.cuda.get_device_properties(0).total_memory if available else None


class MemoryReport:
    """The estimate of one run, ready to be shown."""

    def __init__(self, config: Config) -> None:
        """ModelError when a model is not here; ConfigError when the engine could not start."""
        check_tensor_parallel(config.model.path, config.actor.tensor_parallel)
        places, shape = _places(config), model_shape(config.model.path)
        transport, _ = choose_transport(config, places if config.launch.gpus else {})
        weights = config.weights.model_copy(update={"transport": transport})
        config = config.model_copy(update={"weights": weights})
        if config.algo.kl_coef and (path := config.algo.reference.path):
            shape = replace(shape, reference_parameters=model_shape(path).parameters)
        self._config, self._shape = config, shape
        self._devices = estimate(config, shape, places)
        least = shape.kv_bytes(config)
        if config.actor.engine == "vllm" and config.actor.kv_cache_bytes < least:
            raise ConfigError(
                f"actor.kv_cache_bytes={config.actor.kv_cache_bytes} must be >= {least}: one "
                f"sequence of {config.max_sequence_tokens} tokens takes that much, and the engine "
                "would not start"
            )

    def fits(self, room: float) -> bool:
        """Whether no device needs more than room bytes."""
        return all(device.num_bytes <= room for device in self._devices)

    def all_devices(self, room: float | None) -> str:
        """A table for each device, or several that are alike; remedies below what does not fit."""
        alike: dict[tuple[object, ...], list[Device]] = {}
        for device in self._devices:
            alike.setdefault(tuple(device.lines.values()), []).append(device)
        blocks = []
        for devices in alike.values():
            blocks.append(_table(devices, room))
            if room is not None and devices[0].num_bytes > room:
                blocks.append(self._advice(devices[0], room))
        return "\n\n".join(blocks)

    def exhausted(self, role: str, peak: float, room: float) -> str:
        """What to say when a role's memory has run out at a peak of so many bytes."""
        (device,) = (device for device in self._devices if role in device.lines)
        advice = self._advice(device, min(room, device.num_bytes - 1))
        measured = f"measured peak of {role}: {peak / GIB:.2f} GiB"
        return "\n".join([measured, _table([device], room), advice])

    def _advice(self, device: Device, room: float) -> str:
        found = remedies(self._config, self._shape, device, room)
        lines = [f"  {what:<46} saves {saved / GIB:.2f} GiB" for what, saved in found]
        if self._config.launch.gpus and len(device.lines) > 1:
            lines.append("  launch.share_gpus = false, with a GPU for each process")
        left = device.num_bytes - sum(saved for _, saved in found)
        if left > room:  # though what two settings save together is less than the sum
            lines.append(
                f"  All of that is not enough, {left / GIB:.2f} GiB stay: take fewer processes "
                "(launch.actors, launch.learners), a smaller model or more memory"
            )
        return "\n".join(["What to change, mildest first:", *lines])


@contextmanager
def memory_explained(config: Config, role: str) -> Iterator[None]:
    """Makes a ConfigError with table and remedies of CUDA's running out of memory.

    A ConfigError, for a second life of the process would meet the same end.
    """
    try:
        yield
    except Exception as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        peak, room = torch.cuda.max_memory_allocated(), device_bytes(config) or 0
        told = MemoryReport(config).exhausted(role, peak, room)
        raise ConfigError(f"{role} ran out of memory: {error}\n{told}") from error


def _places(config: Config) -> dict[str, str]:
    """Role ("actor-0.1": its second GPU) -> device, as planned on a machine with enough GPUs."""
    if not config.launch.gpus:
        names = role_names(config.launch.actors, config.launch.learners)[1:]
        return dict.fromkeys(names, MACHINE)
    host = Host(cores=(), gpu_ids=tuple(map(str, range(config.launch.gpus))))
    gpus = assign_gpus(config, host)
    return {
        f"{role}.{place}" if place else role: f"GPU {gpu}"
        for role in sorted(gpus, key=lambda role: role.startswith("actor"))  # learners first
        for place, gpu in enumerate(gpus[role])
    }


def _table(devices: list[Device], room: float | None) -> str:
    """devices: alike but for the numbers of their roles."""
    first, total = devices[0], f"{devices[0].num_bytes / GIB:.2f}"
    title = ", ".join(device.name for device in devices)
    if room is not None:
        verdict = "fits" if first.num_bytes <= room else "does NOT fit"
        title += f": {verdict}, {total} of {room / GIB:.2f} GiB"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column("process", "all")
    table.add_column("what")
    table.add_column("GiB", total, justify="right")
    table.add_column("estimated as")
    for roles in zip(*(device.lines for device in devices), strict=True):
        for what, size, how in first.lines[roles[0]]:
            table.add_row(", ".join(roles), what, f"{size / GIB:.2f}", how)
    text = StringIO()
    Console(file=text, width=WIDTH, highlight=False).print(table)
    return "\n".join(filter(None, map(str.rstrip, text.getvalue().splitlines())))
