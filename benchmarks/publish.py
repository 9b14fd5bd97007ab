"""Seconds per publish against a bare broadcast of the same bytes, in the same run.

    python benchmarks/publish.py [--parameters 1e6 1e8] [--repeat 7] [--dtype bfloat16]

One sender and one receiver process on this machine, float32 parameters sent as --dtype by gloo
(with --transport disk as a file). sent: reading and casting the parameters, the broadcast, digests;
live: until the receiver has checked its own digests, copied all into another model's memory and
answered. bare: the same bytes from one buffer to another, in the same buckets. Medians; publishes
and bare broadcasts take turns. extra: peak resident memory of the sender above that before it.
With --sharded the parameters lie on two learner ranks, as with FSDP on the CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from asyncgrpo.config import Config, from_mapping
from asyncgrpo.launch.preflight import own_port
from asyncgrpo.learner.parallel import Published
from asyncgrpo.weights.collective import WeightGroup, open_group, open_store
from asyncgrpo.weights.proof import NUM_CANARIES
from asyncgrpo.weights.receiver import CollectiveReceiver
from asyncgrpo.weights.sender import CollectiveSender

SEED, WIDTH, SECONDS, MIB = 0, 1024, 120, 1 << 20


def parameters(count: int) -> list[tuple[str, torch.Tensor]]:
    """Matrices of four million elements, as those of a model of some size, and what is left."""
    torch.manual_seed(SEED)
    sizes = [4 * WIDTH] * (count // (4 * WIDTH * WIDTH))
    sizes += [(count - sum(sizes) * WIDTH) // WIDTH or 1]
    return [(f"layer.{i}.weight", torch.randn(size, WIDTH)) for i, size in enumerate(sizes)]


class Named:
    """A model that has parameters and nothing else."""

    def __init__(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self._named = named

    def named_parameters(self) -> list[tuple[str, torch.Tensor]]:
        return self._named


def sharded(count: int, port: int, rank: int, dtype: torch.dtype) -> Published:
    """The parameters, of which this learner rank holds half the rows."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    named = [
        (name, DTensor.from_local(tensor.chunk(2)[rank].clone(), mesh, [Shard(0)]))
        for name, tensor in parameters(count)
    ]
    return Published(Named(named), is_sharded=True, dtype=dtype)


def hold(count: int, port: int, dtype: torch.dtype) -> None:
    """The other learner rank."""
    torch.set_num_threads(1)
    sharded(count, port, 1, dtype).help()


def bare_group(port: int, rank: int) -> WeightGroup:
    store = open_store("127.0.0.1", port, is_master=rank == 0, timeout_seconds=SECONDS)
    return open_group(
        store, transport="gloo", generation=0, rank=rank, world_size=2, seconds=SECONDS
    )


def receive(config: Config, address: str, port: int, pipe: Connection) -> None:
    """The actor: loads whatever is published, and takes part in a bare broadcast when asked."""
    torch.set_num_threads(1)
    group, receiver = bare_group(port, 1), CollectiveReceiver(config, "actor-0", address)
    held: dict[str, torch.Tensor] = {}
    while True:
        receiver.check()
        if pipe.poll(0.001):
            size = pipe.recv()
            if not size:
                return
            buffer = torch.zeros(size, dtype=torch.uint8)
            pipe.send("ready")
            group.broadcast(buffer.split(config.weights.bucket_bytes), lambda bucket: None)
            pipe.send("done")
        if (staged := receiver.staged()) is not None:
            began = time.perf_counter()
            for name, tensor in staged[1]:
                held.setdefault(name, torch.empty_like(tensor)).copy_(tensor)
            receiver.loaded(staged[0], time.perf_counter() - began, [(0, 0.0)] * NUM_CANARIES)


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def measure(count: int, options: argparse.Namespace, folder: Path) -> None:
    config = from_mapping(
        {
            "model": {"dtype": options.dtype},
            "weights": {"bucket_bytes": options.bucket_mib << 20},
            "learner": {"parallel": "fsdp" if options.sharded else "ddp"},
        }
    )
    port, context = own_port(), mp.get_context("spawn")
    tensors: Any = () if options.sharded else parameters(count)
    if options.sharded:
        meeting, dtype = own_port(), getattr(torch, options.dtype)
        context.Process(target=hold, args=(count, meeting, dtype), daemon=True).start()
        tensors = sharded(count, meeting, 0, dtype)
    address = f"tcp://127.0.0.1:{own_port()}"
    pipe, other = mp.Pipe()
    actor = context.Process(target=receive, args=(config, address, port, other), daemon=True)
    actor.start()
    group = bare_group(port, 0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    sender = CollectiveSender(
        config,
        address,
        ("127.0.0.1", own_port()),
        transport=options.transport,
        folder=folder / f"{count}",
    )
    canaries = np.zeros((NUM_CANARIES, 1), np.float32)
    sender.publish(0, tensors, canaries)
    sender.wait_for_actors(1, SECONDS)
    extra = resident("VmHWM") - before
    rows: list[dict[str, Any]] = []
    for version in range(1, options.repeat + 1):
        sender.publish(version, tensors, canaries)
        sender.settle(SECONDS)
        sender.release()
        metrics = sender.metrics()
        buffer = torch.zeros(int(metrics["publish/bytes"]), dtype=torch.uint8)
        pipe.send(len(buffer))
        pipe.recv()
        began = time.perf_counter()
        group.broadcast(buffer.split(config.weights.bucket_bytes), lambda bucket: None)
        pipe.recv()
        bare = time.perf_counter() - began
        rows.append({**metrics, "bare": bare})
    if options.sharded:
        tensors.help()
        dist.destroy_process_group()
    pipe.send(0)
    actor.join(SECONDS)
    sender.close()
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    bare, live, sent = median["bare"], median["publish/live_seconds"], "publish/broadcast_seconds"
    pause = median["publish/stall_seconds"]
    print(
        f"{count / 1e6:.0f}M parameters, {median['publish/bytes'] / MIB:.0f} MiB: bare "
        f"{1000 * bare:.1f} ms, sent {1000 * median[sent]:.1f} ms ({bare / median[sent]:.0%} of "
        f"the bare rate), live {1000 * live:.1f} ms ({bare / live:.0%}); digests "
        f"{1000 * median['publish/digest_seconds']:.1f} ms, pause {1000 * pause:.1f} ms "
        f"({pause / live:.0%} of a publish); learner blocked "
        f"{1000 * median['publish/blocked_seconds']:.1f} ms; extra {extra / MIB:.0f} MiB "
        f"({extra / median['publish/bytes']:.2f} copies)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, nargs="+", default=[1e6, 1e8])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--bucket-mib", type=int, default=8)
    parser.add_argument("--transport", choices=("gloo", "disk"), default="gloo")
    parser.add_argument("--sharded", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for count in options.parameters:
            measure(int(count), options, Path(folder))


if __name__ == "__main__":
    main()
