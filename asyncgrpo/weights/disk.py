"""Weights of a version as a safetensors file, for engines that no collective reaches."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch

from asyncgrpo.errors import WeightsError
from asyncgrpo.weights.flat import ALIGNMENT, FlatWeights, Manifest

FILE, NUM_KEPT = "model.safetensors", 2
SIZE = struct.Struct("<Q")  # of the header, before it
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def write_version(
    folder: Path,
    manifest: Manifest,
    pieces: Iterable[torch.Tensor],
    then: Callable[[torch.Tensor], None],
) -> Path:
    """Writes Manifest.pieces one by one, and `then` gets each; returns the file.

    The folder is there whole or not at all. WeightsError when the disk does not take it.
    """
    draft = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        with open(draft / FILE, "wb") as file:
            file.write(_header(manifest))
            for piece in pieces:
                file.write(piece.cpu().numpy().data)
                then(piece)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except OSError as error:
        raise WeightsError(
            f"{folder} cannot be written ({error.strerror}); make room on its disk, or set another "
            "weights.transport"
        ) from error
    return folder / FILE


def prune(folder: Path, wanted: Collection[int]) -> None:
    """Removes all versions but the newest ones and those that are wanted."""
    there = sorted(int(path.name[1:]) for path in folder.glob("v*"))
    for version in there[:-NUM_KEPT]:
        if version not in wanted:
            shutil.rmtree(folder / f"v{version}", ignore_errors=True)


def open_version(path: str, manifest: Manifest) -> FlatWeights:
    """Memory-mapped: read from the disk when it is looked at. WeightsError when it is cut off."""
    start = len(_header(manifest))
    size = start + manifest.num_bytes
    try:
        if Path(path).stat().st_size != size:
            raise WeightsError(f"{path} has {Path(path).stat().st_size} bytes, not {size}")
        return FlatWeights.in_file(manifest, path, start)
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


def _header(manifest: Manifest) -> bytes:
    """Padded, so that the tensors behind it are aligned; gaps between them are tensors too."""
    entries, place = {}, 0
    dtype = DTYPES[manifest.dtype]
    for name, shape, start, end in manifest.spans():
        if place < start:
            entries[f"padding.{place}"] = _entry("U8", (start - place,), place, start)
        entries[name] = _entry(dtype, shape, start, end)
        place = end
    if place < manifest.num_bytes:
        size = manifest.num_bytes
        entries[f"padding.{place}"] = _entry("U8", (size - place,), place, size)
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + SIZE.size) % ALIGNMENT)
    return SIZE.pack(len(text)) + text


def _entry(dtype: str, shape: tuple[int, ...], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
