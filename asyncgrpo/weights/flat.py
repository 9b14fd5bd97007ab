"""All weights of one version in one buffer: its manifest, its views by name, its digests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from asyncgrpo.errors import WeightsError
from asyncgrpo.protocols import NamedTensors

ALIGNMENT = 16  # bytes; every tensor starts on a multiple, so that any dtype can view it
DIGEST_CHUNK = 1 << 20  # elements; bounds the int64 copies that a digest makes


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Names, dtypes and shapes in the order in which they lie in the buffer."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: NamedTensors, dtype: str) -> Manifest:
        """The manifest of tensors that will be sent as `dtype`."""
        named = [(name, tuple(tensor.shape)) for name, tensor in tensors]
        return cls(
            names=tuple(name for name, _ in named),
            dtypes=(dtype,) * len(named),
            shapes=tuple(shape for _, shape in named),
        )

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Manifest:
        """The manifest that `as_fields` described."""
        return cls(
            names=tuple(fields["names"]),
            dtypes=tuple(fields["dtypes"]),
            shapes=tuple(tuple(shape) for shape in fields["shapes"]),
        )

    def as_fields(self) -> dict[str, Any]:
        """Plain values for the wire."""
        return asdict(self)

    def spans(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], int, int]]:
        """(name, dtype, shape, first byte, end byte) of every tensor."""
        start = 0
        for name, dtype_name, shape in zip(self.names, self.dtypes, self.shapes, strict=True):
            dtype = getattr(torch, dtype_name)
            size = math.prod(shape) * dtype.itemsize
            yield name, dtype, shape, start, start + size
            start += -(-size // ALIGNMENT) * ALIGNMENT

    @property
    def num_bytes(self) -> int:
        """Size of the buffer, gaps included."""
        return max((-(-end // ALIGNMENT) * ALIGNMENT for *_, end in self.spans()), default=0)


class FlatWeights:
    """One preallocated buffer, filled again for each version (allocating anew costs seconds)."""

    def __init__(self, manifest: Manifest, device: str = "cpu") -> None:
        self.manifest = manifest
        self.bytes = torch.zeros(manifest.num_bytes, dtype=torch.uint8, device=device)

    def views(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) in manifest order; tensors share the buffer's memory."""
        for name, dtype, shape, start, end in self.manifest.spans():
            yield name, self.bytes[start:end].view(dtype).view(shape)

    @torch.no_grad()
    def fill(self, tensors: NamedTensors) -> None:
        """Copies tensors in, cast to the manifest's dtypes; WeightsError when names differ."""
        views = self.views()
        count = 0
        for name, tensor in tensors:
            expected, view = next(views, ("nothing more", None))
            if name != expected or view is None or view.shape != tensor.shape:
                raise WeightsError(f"parameter {name} {tuple(tensor.shape)} came, not {expected}")
            view.copy_(tensor)
            count += 1
        if count != len(self.manifest.names):
            raise WeightsError(f"{count} parameters came, {len(self.manifest.names)} are expected")

    def buckets(self, bucket_bytes: int) -> tuple[torch.Tensor, ...]:
        """The buffer in pieces of at most bucket_bytes."""
        return self.bytes.split(bucket_bytes)

    def digests(self, seed: int) -> list[int]:
        """One 64-bit number per tensor; the same bytes give the same number on any device.

        Who does not know the seed cannot change a tensor so that its number stays: one attempt
        succeeds with a probability of about 2^-32.
        """
        bits = np.random.PCG64(seed)
        longest = max((end - start for *_, start, end in self.manifest.spans()), default=0)
        factors = (bits.random_raw(min(longest, DIGEST_CHUNK)) | 1).view(np.int64)
        on_device = torch.from_numpy(factors).to(self.bytes.device)
        return [_digest(self.bytes[i:end], on_device, bits) for *_, i, end in self.manifest.spans()]


def _digest(data: torch.Tensor, factors: torch.Tensor, bits: np.random.PCG64) -> int:
    """sum over chunks c: s_c sum_i x_ci r_i, modulo 2^64; x: the bytes taken as int32.

    r_i and s_c are odd random numbers, so a single changed word always shows. A multilinear hash
    (Lemire and Kaser, "Strongly universal string hashing is fast", 2014) that draws r only once.
    """
    words = data.view(torch.int32) if len(data) % 4 == 0 else data
    total = 0
    for chunk in words.split(len(factors)) if len(words) else ():
        part = int((chunk.to(torch.int64) * factors[: len(chunk)]).sum())  # int64 wraps around
        total += part * (bits.random_raw() | 1)
    return total % (1 << 64)


def differing(manifest: Manifest, ours: list[int], theirs: list[int]) -> list[str]:
    """Names of the tensors whose digests differ; all of them when the counts do."""
    if len(ours) != len(theirs):
        return list(manifest.names)
    pairs = zip(manifest.names, ours, theirs, strict=True)
    return [name for name, one, other in pairs if one != other]
