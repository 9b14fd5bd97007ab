"""The bytes of all weights of one version, whole or piece by piece, and their digests."""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, cycle
from typing import Any

import numpy as np
import torch

from asyncgrpo.errors import WeightsError
from asyncgrpo.protocols import Parts, SentTensors

ALIGNMENT = 16  # bytes; every tensor starts on a multiple, so that any dtype can view it
DIGEST_CHUNK = 1 << 17  # elements; their int64 products stay in a core's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Names and shapes in the order in which they lie in the buffer, all of one dtype."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str

    @classmethod
    def of(cls, tensors: SentTensors, dtype: str) -> Manifest:
        """The manifest of tensors that will be sent as `dtype`."""
        named = {name: tuple(tensor.shape) for name, tensor in tensors}
        return cls(names=tuple(named), shapes=tuple(named.values()), dtype=dtype)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Manifest:
        """The manifest that `as_fields` described."""
        names, shapes = tuple(fields["names"]), tuple(map(tuple, fields["shapes"]))
        return cls(names=names, shapes=shapes, dtype=fields["dtype"])

    def as_fields(self) -> dict[str, Any]:
        """Plain values for the wire."""
        return asdict(self)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of all tensors in the buffer."""
        return getattr(torch, self.dtype)

    def spans(self) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        """(name, shape, first byte, end byte) of every tensor."""
        start = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            size = math.prod(shape) * self.torch_dtype.itemsize
            yield name, shape, start, start + size
            start += -(-size // ALIGNMENT) * ALIGNMENT

    @property
    def num_bytes(self) -> int:
        """Size of the buffer, gaps included."""
        return max((-(-end // ALIGNMENT) * ALIGNMENT for *_, end in self.spans()), default=0)

    def buckets(self, size: int) -> Manifest:
        """The same bytes as pieces of `size` bytes, of which the last may be shorter."""
        lengths = [min(size, self.num_bytes - at) for at in range(0, self.num_bytes, size)]
        names = tuple(map(str, range(len(lengths))))
        return Manifest(names=names, shapes=tuple((n,) for n in lengths), dtype="uint8")

    def check(self, tensors: SentTensors) -> Iterator[torch.Tensor | Parts]:
        """The tensors as they come; WeightsError when names or shapes differ."""
        expected = zip(self.names, self.shapes, strict=True)
        count = 0
        for name, tensor in tensors:
            wanted, shape = next(expected, ("nothing more", ()))
            if name != wanted or tuple(tensor.shape) != shape:
                raise WeightsError(f"parameter {name} {tuple(tensor.shape)} came, not {wanted}")
            yield tensor
            count += 1
        if count != len(self.names):
            raise WeightsError(f"{count} parameters came, {len(self.names)} are expected")

    @torch.no_grad()
    def pieces(
        self,
        tensors: SentTensors,
        staging: Sequence[torch.Tensor],
        wanted: Container[int] | None = None,
    ) -> Iterator[torch.Tensor]:
        """The buffer's bytes, each piece in the next of `staging`, cast as it is copied there.

        staging: uint8, all of one size, a multiple of ALIGNMENT. A piece is good until as many
        more are asked for as there are; only the last one is shorter. wanted: numbers of the
        pieces that are to come; None: all.
        """
        turns = cycle(staging)
        bucket, used, number, dtype = next(turns), 0, 0, self.torch_dtype
        for rest in chain.from_iterable(map(self._flat, self.check(tensors))):
            while len(rest):
                count = min(len(rest), (len(bucket) - used) // dtype.itemsize)
                start, used = used, used + count * dtype.itemsize
                bucket[start:used].view(dtype).copy_(rest[:count])
                rest = rest[count:]
                if used == len(bucket):
                    if wanted is None or number in wanted:
                        yield bucket
                        bucket = next(turns)
                    used, number = 0, number + 1
        if used and (wanted is None or number in wanted):
            yield bucket[:used]

    def _flat(self, tensor: torch.Tensor | Parts) -> Iterable[torch.Tensor]:
        """Its elements, and zeros up to where the next tensor starts."""
        parts = tensor.flat if isinstance(tensor, Parts) else [tensor.detach().reshape(-1)]
        gap = -math.prod(tensor.shape) % (ALIGNMENT // self.torch_dtype.itemsize)
        return chain(parts, [torch.zeros(gap)])  # which leaves `flat` open when a pass is given up


class FlatWeights:
    """One preallocated buffer, filled again for each version (allocating anew costs seconds)."""

    def __init__(
        self, manifest: Manifest, device: str = "cpu", data: torch.Tensor | None = None
    ) -> None:
        """data: a buffer that is there already, uint8."""
        self.manifest = manifest
        if data is None:
            data = torch.zeros(manifest.num_bytes, dtype=torch.uint8, device=device)
        self.bytes = data
        self._file: tuple[str, int] | None = None  # path, first byte

    @classmethod
    def in_file(
        cls, manifest: Manifest, path: str, start: int = 0, *, shared: bool = False
    ) -> FlatWeights:
        """A file's bytes from `start`, read when they are looked at. RuntimeError: cannot be read.

        Pickled it is the name of the file. shared: what is written here, others see there.
        """
        size = start + manifest.num_bytes
        whole = torch.from_file(path, shared=shared, size=size, dtype=torch.uint8)
        flat = cls(manifest, data=whole[start:])
        flat._file = (path, start)
        return flat

    @classmethod
    def for_children(cls, manifest: Manifest) -> FlatWeights:
        """In memory that processes of the same user can open; nothing is left of it behind."""
        memory = os.memfd_create("weights")
        flat = cls.in_file(manifest, f"/proc/{os.getpid()}/fd/{memory}", shared=True)
        weakref.finalize(flat, os.close, memory)
        return flat

    def __reduce__(self) -> tuple[Any, ...]:
        assert self._file is not None, "only weights in a file go to other processes"
        return FlatWeights.in_file, (self.manifest, *self._file)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.views()

    def views(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) in manifest order; tensors share the buffer's memory."""
        for name, shape, start, end in self.manifest.spans():
            yield name, self.bytes[start:end].view(self.manifest.torch_dtype).view(shape)

    def fill(self, tensors: SentTensors) -> None:
        """Copies tensors in, cast to the manifest's dtype; WeightsError when names differ."""
        for _ in self.manifest.pieces(tensors, [self.bytes]):
            pass

    def digests(self, seed: int) -> list[int]:
        """Those of a Digester that got the whole buffer."""
        digester = Digester(self.manifest, seed)
        digester.add(self.bytes)
        return digester.values


class Digester:
    """One 64-bit number per tensor; the same bytes give the same number on any device.

    Who does not know the seed cannot change a tensor so that its number stays: one attempt
    succeeds with a probability of about 2^-32. Per tensor: the sum over chunks c of
    s_c sum_i x_ci r_i, modulo 2^64; x: the bytes taken as int32. r_i and s_c are odd random
    numbers, so a single changed word always shows. A multilinear hash (Lemire and Kaser, "Strongly
    universal string hashing is fast", 2014) that draws r only once.
    """

    def __init__(self, manifest: Manifest, seed: int) -> None:
        self._spans = [(start, end) for *_, start, end in manifest.spans()]
        self._bits = np.random.PCG64(seed)
        longest = max((end - start for start, end in self._spans), default=0)
        raw = self._bits.random_raw(min(longest, DIGEST_CHUNK)) | 1
        self._factors = torch.from_numpy(raw.view(np.int64))
        self._products = torch.empty_like(self._factors)
        self._outer = self._place = self._tensor = 0
        self._sums = torch.zeros(len(self._spans), dtype=torch.int64)  # which wraps
        self.seconds = 0.0

    @property
    def values(self) -> list[int]:
        """Complete once all bytes were added. A GPU is waited for here alone."""
        began = time.perf_counter()
        values = [value % (1 << 64) for value in self._sums.tolist()]
        self.seconds += time.perf_counter() - began
        return values

    def add(self, piece: torch.Tensor) -> None:
        """The next bytes of the buffer, uint8; a multiple of ALIGNMENT of them."""
        began = time.perf_counter()
        if self._factors.device != piece.device:
            self._factors = self._factors.to(piece.device)
            self._products = self._products.to(piece.device)
            self._sums = self._sums.to(piece.device)
        first, last = self._place, self._place + len(piece)
        while self._tensor < len(self._spans) and self._spans[self._tensor][0] < last:
            start, end = self._spans[self._tensor]
            inner = piece[max(start - first, 0) : end - first]
            self._add_part(inner, max(first - start, 0), is_whole=(end - start) % 4 == 0)
            if end > last:
                break
            self._tensor += 1
        self._place = last
        self.seconds += time.perf_counter() - began

    def _add_part(self, data: torch.Tensor, offset: int, *, is_whole: bool) -> None:
        """offset: bytes of the tensor that came before; is_whole: it consists of whole words."""
        words, place = (data.view(torch.int32), offset // 4) if is_whole else (data, offset)
        while len(words):
            inside = place % len(self._factors)
            if not inside:
                self._outer = int(self._bits.random_raw(1).view(np.int64)[0]) | 1
            part = words[: len(self._factors) - inside]
            factors = self._factors[inside : inside + len(part)]
            products = torch.mul(part, factors, out=self._products[: len(part)])
            self._sums[self._tensor].add_(products.sum(), alpha=self._outer)
            words, place = words[len(part) :], place + len(part)


def differing(manifest: Manifest, ours: list[int], theirs: list[int]) -> list[str]:
    """Names of the tensors whose digests differ; all of them when the counts do."""
    if len(ours) != len(theirs):
        return list(manifest.names)
    pairs = zip(manifest.names, ours, theirs, strict=True)
    return [name for name, one, other in pairs if one != other]
