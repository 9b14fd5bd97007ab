"""Tells from the files alone whether a model can be loaded, before anything is started."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asyncgrpo.errors import AbsentModel, ModelError
from asyncgrpo.hints import did_you_mean, nearest
from asyncgrpo.learner.saved import FOLDER, read_manifest, saved

EMBEDDED = "tiny"
SUPPORTED_ARCHITECTURES = (
    "Qwen3ForCausalLM",
    "Qwen2ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "model*.bin")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
EMBEDDING, LAYER = "model.embed_tokens.weight", re.compile(r"model\.layers\.(\d+)\.")
VOCAB_MULTIPLE = 64  # vLLM's DEFAULT_VOCAB_PADDING_SIZE
LFS_POINTER = b"version https://git-lfs"


def check_model_folder(path: str, *, download: bool = True) -> Path | None:
    """The local folder of a model that can be loaded; None for the embedded one and hub names.

    ModelError: no such folder, no config.json, no tokenizer, no weights, unsupported architecture;
    AbsentModel: a hub name that is not here, while the hub cannot or (without `download`) may not
    be asked.
    """
    folder = Path(path).expanduser()
    if path == EMBEDDED:
        return None
    if folder.exists():
        _check_files(folder)
        return folder
    if not HUB_NAME.fullmatch(path):
        near = nearest(folder.name, (other.name for other in folder.parent.glob("*/")))
        hint = f" (did you mean {folder.with_name(near)}?)" if near else ""
        raise ModelError(
            f"model.path={path!r} does not exist{hint}; give a folder with config.json, tokenizer "
            "and weights, a hub name such as Qwen/Qwen3-0.6B, or 'tiny'"
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    snapshot = _cached_snapshot(path)
    if snapshot is None and (offline or not download):
        remedy = "HF_HUB_OFFLINE is set; unset it, or give a local folder"
        raise AbsentModel(
            f"model.path={path!r} is no folder, is not in the hub cache {_hub_cache()}, and "
            + (remedy if offline else "would be downloaded")
        )
    if snapshot is not None and offline:
        _check_files(snapshot)
    elif snapshot is not None and (snapshot / "config.json").is_file():
        _check_config(snapshot)
    return None


def config_folder(path: str) -> Path:
    """The folder on this machine that has a model's config.json; weights need not be there.

    ModelError without one; AbsentModel for a hub name that was not downloaded.
    """
    folder = Path(path).expanduser()
    found = folder if folder.exists() else _cached_snapshot(path)
    if found is None:
        raise AbsentModel(
            f"model.path={path!r} is no folder and is not in the hub cache {_hub_cache()}; its "
            "config.json is enough here: give a folder that holds it"
        )
    _check_config(found)
    return found


def check_tensor_parallel(path: str, size: int) -> None:
    """ModelError when vLLM cannot deal a model over `size` processes.

    Says nothing of a model whose config.json is not on this machine yet.
    """
    if size == 1:
        return
    try:
        place, config = _config_of(path)
    except AbsentModel:
        return
    heads = config.get("num_attention_heads", 0)
    key_heads = config.get("num_key_value_heads") or heads
    inner = config.get("intermediate_size", 0)
    vocab = -(-config.get("vocab_size", 0) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def fits(count: int) -> bool:
        even = heads % count == inner % count == vocab % count == 0
        return even and (key_heads % count == 0 or count % key_heads == 0)

    if not fits(size):
        allowed = ", ".join(str(count) for count in range(1, heads + 1) if fits(count))
        raise ModelError(
            f"actor.tensor_parallel={size} must divide the attention heads ({heads}), intermediate "
            f"size ({inner}) and padded vocabulary ({vocab}) of {place}, and divide its key-value "
            f"heads ({key_heads}) or be a multiple of them; set it to one of {allowed}"
        )


def check_same_model(run_dir: Path, path: str) -> None:
    """ModelError when a run's newest checkpoint is of a model of other sizes."""
    try:
        checkpoint = saved(run_dir / FOLDER)[-1]
        sizes = read_manifest(checkpoint).get("model") or {}
    except (IndexError, OSError, ValueError):
        return  # there is none, or its damage is found elsewhere
    place, config = _config_of(path)
    for key, size in sizes.items():
        if size is not None and config.get(key) not in (size, None):
            raise ModelError(
                f"{checkpoint} is of another model: {key} was {size}, but {place} has "
                f"{config[key]}; put the model back that the run began with, or start a new run"
            )


def quick_tokenizer(path: str) -> Any:
    """The model's tokenizer, without torch; None when it is not on this machine in one file.

    ModelError when it cannot be read.
    """
    if path == EMBEDDED:
        from asyncgrpo.data.tiny_tokenizer import build_tokenizer

        return build_tokenizer()
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _cached_snapshot(path) or folder
    if not (folder / "tokenizer.json").is_file():
        return None
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # the tokenizers package raises bare Exceptions
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"{folder}/tokenizer.json cannot be read: {reason}; copy the tokenizer files of its "
            "base model there: tokenizer.save_pretrained(folder)"
        ) from None


def _config_of(path: str) -> tuple[str, dict[str, Any]]:
    """What to call a model, and its config.json; errors as of config_folder."""
    if path == EMBEDDED:
        from asyncgrpo.data.tiny import model_config  # torch
        from asyncgrpo.data.tiny_tokenizer import build_tokenizer

        return "the embedded model", model_config(build_tokenizer()).to_dict()
    folder = config_folder(path)
    return f"{folder}/config.json", _check_config(folder)


def _check_files(folder: Path) -> None:
    config = _check_config(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"model folder {folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the "
            "tokenizer files of its base model there: tokenizer.save_pretrained(folder)"
        )
    _check_weights(folder, config)


def _check_config(folder: Path) -> dict[str, Any]:
    """What config.json holds, of an architecture that can be trained."""
    if not folder.is_dir():
        raise ModelError(f"model.path={str(folder)!r} is a file; give the folder that holds it")
    if not (folder / "config.json").is_file():
        remedy = "give the folder that save_pretrained wrote"
        if (folder / "adapter_config.json").is_file():
            remedy = "it holds an adapter: merge it into its base model and give that folder"
        raise ModelError(f"model folder {folder} has no config.json; {remedy}")
    try:
        config = {**json.loads((folder / "config.json").read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise ModelError(f"{folder}/config.json is not a JSON object: {error}") from None
    named = config.get("architectures") or []
    named = named if isinstance(named, list) else [f"{named!r} (not in a list)"]
    if any(name in SUPPORTED_ARCHITECTURES for name in named):
        return config
    found = ", ".join(map(str, named)) or "none named"
    raise ModelError(
        f"{folder}/config.json: architecture {found} is not supported; "
        f"{did_you_mean(found, SUPPORTED_ARCHITECTURES)}supported are "
        f"{', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    shards = _listed_shards(folder)
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise ModelError(
            f"model folder {folder} has no weights for {len(missing)} of {len(shards)} shards: "
            f"{', '.join(missing)}; download it again, completely"
        )
    names = shards or [file.name for each in WEIGHT_PATTERNS for file in folder.glob(each)]
    if not names:
        raise ModelError(f"model folder {folder} has no weights (*.safetensors, *.bin); add them")
    shapes: dict[str, Any] = {}
    for name in names:
        shapes |= _check_weight_file(folder / name)
    layers = {int(match[1]) for name in shapes if (match := LAYER.match(name))}
    found = {
        "num_hidden_layers": max(layers) + 1 if layers else None,
        **dict(zip(("vocab_size", "hidden_size"), shapes.get(EMBEDDING, ()), strict=False)),
    }
    for key, value in found.items():
        told = config.get(key)
        if value is not None and told is not None and value != told:
            raise ModelError(
                f"{folder}/config.json: {key}={told!r}, but the weights have {value}; copy the "
                "config.json that belongs to them there"
            )


def _listed_shards(folder: Path) -> list[str]:
    """The shards that an index file names; [] without an index."""
    for index in INDEX_FILES:
        if (folder / index).is_file():
            try:
                weight_map = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
                return sorted(set(weight_map.values()))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise ModelError(
                    f"{folder}/{index} is not a weight index (an object with weight_map); "
                    "download it again"
                ) from None
    return []


def _check_weight_file(file: Path) -> dict[str, Any]:
    """The shapes of a safetensors file, by name. Refuses what a broken copy leaves."""
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as opened:
        start = opened.read(len(LFS_POINTER))
    if start in (LFS_POINTER, b""):
        what = "a Git LFS pointer, no weights" if start else "empty"
        raise ModelError(f"{file} is {what}; download it again (`git lfs pull`)")
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            names = tensors.keys()
            return {name: tensors.get_slice(name).get_shape() for name in names}
    except SafetensorError as error:
        raise ModelError(
            f"{file} is cut off, or no safetensors file ({error}); download it again"
        ) from None


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _cached_snapshot(name: str) -> Path | None:
    """The newest downloaded state of a hub model, in the layout of huggingface_hub."""
    folder = _hub_cache() / f"models--{name.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    snapshot = folder / "snapshots" / revision
    return snapshot if snapshot.is_dir() else None
