"""What the buffer process can carry: groups of 8 completions of 512 tokens, served from one core.

    python benchmarks/data_plane.py [--groups 1000000] [--leases 1000000] [--folder DIR]

A bare ZeroMQ relay moves the same frames (in from producers, acknowledged, out to a consumer in
batches) and is the measure; then the buffer without its ledger, then with it. After that: how long
64 actors wait for a lease while groups arrive, whether memory grows, and how long the buffer takes
to restart with a long ledger. Machines are noisy: trust the ratios, taken side by side.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zmq
from common import made_up_group

import asyncgrpo
from asyncgrpo.buffer import server
from asyncgrpo.buffer.core import BufferCore
from asyncgrpo.buffer.journal import Journal
from asyncgrpo.buffer.ledger import Ledger
from asyncgrpo.config import from_mapping
from asyncgrpo.data.prompts import open_prompts
from asyncgrpo.launch.preflight import own_port
from asyncgrpo.rundir import Endpoints, RunDir
from asyncgrpo.types import Group
from asyncgrpo.wire.codec import Packet, decode, encode, group_packet, lease_from
from asyncgrpo.wire.sockets import DealerClient

COMPLETIONS, TOKENS, BATCH, CREDIT, PRODUCERS, ACTORS = 8, 512, 64, 8, 3, 64
SPAWN = multiprocessing.get_context("spawn")
RECORDS = Path(asyncgrpo.__path__[0]) / "data" / "gsm8k_sample" / "train.jsonl"
SETTINGS = {
    "run": {"max_steps": 10**7},
    "data": {"train": str(RECORDS)},
    "buffer": {"groups_per_step": BATCH, "max_staleness": 10**7, "credit": CREDIT},
    "algo": {"group_size": COMPLETIONS},
    "sampling": {"max_completion_tokens": TOKENS},
    "launch": {"learners": 1},
    "observe": {"trajectories": False},
}


class NoLedger(Journal):
    """Nothing is durable."""

    def __init__(self, run_dir: Path) -> None: ...

    def checkpoint_aside(self) -> None: ...

    def state(self, lease_id: str) -> None: ...

    def close(self) -> None: ...


def prepare(folder: Path) -> RunDir:
    port = own_port()
    endpoints = Endpoints(buffer=f"tcp://127.0.0.1:{port}", weights="", store=("", 0))
    run = RunDir(path=folder, config=from_mapping(SETTINGS), endpoints=endpoints)
    run.write()
    return run


def put_for(template: Group, lease: bytes) -> Packet:
    return group_packet("put", [replace(template, lease=lease_from(lease))])


def new_core(journal: Any = None) -> BufferCore:
    """A buffer that has met one actor, "a"."""
    config = from_mapping(SETTINGS)
    core = BufferCore(config, open_prompts(config), lambda step, ended: None, journal)
    core.handle("a.1", Packet(kind="hello", fields={"actor": "a"}), 0.0)
    return core


def ask(count: int) -> Packet:
    return Packet(kind="lease", fields={"version": 0, "max": count})


def leases_of(core: BufferCore, count: int = CREDIT) -> list[bytes]:
    ((_, granted),) = core.handle("a.1", ask(count), 0.0)
    return list(granted.fields["leases"])


def make_group() -> Group:
    """A group of full size, with a lease that a buffer gave."""
    lengths = [TOKENS] * COMPLETIONS
    group = made_up_group(0, lengths, vocab=30_000, prompt_tokens=200, newest=0)
    return replace(group, lease=lease_from(leases_of(new_core(), 1)[0]))


def serve(folder: Path, kind: str) -> None:
    """One of: bare, no ledger, ledger."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    run = RunDir.read(folder)
    if kind == "bare":
        relay(run.endpoints.buffer)
    if kind == "no ledger":
        server.Ledger = NoLedger  # type: ignore[misc, assignment]
    server.run_buffer(run, lambda: False)


def relay(address: str) -> None:
    """Frames in, acknowledgement out; who asks gets BATCH of them. Nothing is decoded."""
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.sndhwm = socket.rcvhwm = 0
    socket.bind(address)
    held: list[list[bytes]] = []
    asking = b""
    while True:
        peer, *frames = socket.recv_multipart()
        if len(frames) == 1:
            asking = peer
        else:
            held.append(frames)
            socket.send_multipart([peer, b"stored"])
        if asking and len(held) >= BATCH:
            batch, held = held[:BATCH], held[BATCH:]
            socket.send_multipart([asking, *itertools.chain.from_iterable(batch)])
            asking = b""


def produce_bare(address: str, index: int, count: Synchronized[int]) -> None:
    socket = dealer(address, f"producer-{index}")
    frames = encode(group_packet("put", [make_group()]))
    for _ in range(CREDIT):
        socket.send_multipart(frames)
    while True:
        socket.recv_multipart()
        socket.send_multipart(frames)
        with count.get_lock():
            count.value += 1


def consume_bare(address: str) -> None:
    socket = dealer(address, "learner-0")
    while True:
        socket.send(b"take")
        socket.recv_multipart()


def dealer(address: str, name: str) -> zmq.Socket[bytes]:
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, name.encode())
    socket.sndhwm = socket.rcvhwm = 0
    socket.connect(address)
    return socket


def produce(address: str, index: int, count: Synchronized[int]) -> None:
    """An actor that generates in no time."""
    client = DealerClient(address, f"producer-{index}", "the buffer")
    client.post(Packet(kind="hello", fields={"actor": f"producer-{index}"}))
    client.post(ask(2 * CREDIT))
    template, leases, waiting = make_group(), [], 0
    while True:
        for packet in client.poll(0.1):
            if packet.kind == "leases":
                leases += packet.fields["leases"]
            elif packet.kind == "stored":
                assert packet.fields["state"] == "stored", packet.fields
                waiting -= 1
                with count.get_lock():
                    count.value += 1
        while leases and waiting < CREDIT:
            client.post(put_for(template, leases.pop(0)))
            waiting += 1
            if len(leases) == CREDIT:
                client.post(ask(2 * CREDIT))


def consume(address: str) -> None:
    """A learner that trains in no time; frames are not decoded."""
    socket = dealer(address, "learner-0")
    for step in itertools.count():
        for packet in taken_and_trained(step):
            socket.send_multipart(encode(packet))
            socket.recv_multipart()


def taken_and_trained(step: int) -> Iterator[Packet]:
    """What a learner asks for and tells in one step."""
    of_step = {"step": step, "world_size": 1}
    yield Packet(kind="take", request_id=2 * step + 1, fields={**of_step, "rank": 0})
    told = {**of_step, "covered": step, "advantages": bytes(4 * BATCH * COMPLETIONS)}
    yield Packet(kind="trained", request_id=2 * step + 2, fields=told)


class Plant:
    """A server, its producers and its consumer."""

    def __init__(self, folder: Path, kind: str, producers: int = PRODUCERS) -> None:
        folder.mkdir()
        self.folder, self.address = folder, prepare(folder).endpoints.buffer
        self.count: Synchronized[int] = SPAWN.Value("q", 0)
        makes, takes = (produce_bare, consume_bare) if kind == "bare" else (produce, consume)
        jobs = [(serve, folder, kind), (takes, self.address)]
        jobs += [(makes, self.address, index, self.count) for index in range(producers)]
        self.processes = [
            SPAWN.Process(target=job, args=arguments, daemon=True) for job, *arguments in jobs
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, count: int) -> None:
        while self.count.value < count:
            assert self.processes[0].is_alive(), "the server ended"
            time.sleep(0.01)

    def measure(self, groups: int) -> dict[str, float]:
        """Rates over `groups` groups, after a warm-up; resident memory early and late."""
        warm = max(1000, groups // 20)
        self.wait_for(warm)
        process = psutil.Process(self.processes[0].pid)
        begin, cpu = time.monotonic(), sum(process.cpu_times()[:2])
        first, early = self.count.value, process.memory_info().rss
        self.wait_for(first + groups)
        seconds = time.monotonic() - begin
        busy = sum(process.cpu_times()[:2]) - cpu
        moved = self.count.value - first
        return {
            "groups/s": moved / seconds,
            "groups/s of CPU": moved / busy,
            "MiB early": early / 2**20,
            "MiB late": process.memory_info().rss / 2**20,
        }

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        shutil.rmtree(self.folder)


def lease_latency(folder: Path, seconds: float, rate: float) -> list[float]:
    """Milliseconds from asking for one lease to having it; each actor delivers `rate` groups/s."""
    plant = Plant(folder, "ledger", producers=0)
    clients = [DealerClient(plant.address, f"actor-{i}", "buffer") for i in range(ACTORS)]
    poller = zmq.Poller()
    for client in clients:
        poller.register(client._socket, zmq.POLLIN)
        hello = Packet(kind="hello", fields={"actor": client.identity.partition(".")[0]})
        client.call(hello, 30.0)
    template = make_group()
    due = [time.monotonic() + i / rate / ACTORS for i in range(ACTORS)]
    asked = [0.0] * ACTORS
    waits: list[float] = []
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        for i, client in enumerate(clients):
            if asked[i] == 0.0 and now >= due[i]:
                due[i] += 1 / rate
                asked[i] = time.monotonic()
                client.post(ask(1))
        ready = dict(poller.poll(2))
        for i, client in enumerate(clients):
            if client._socket in ready:
                for packet in client.poll(0.0):
                    if packet.kind == "leases":
                        waits.append(1000 * (time.monotonic() - asked[i]))
                        asked[i] = 0.0
                        (lease,) = packet.fields["leases"]
                        client.post(put_for(template, lease))
    plant.close()
    return sorted(waits)


def stages(journal: Journal | Ledger, groups: int) -> dict[str, float]:
    """Microseconds of CPU per group that each stage takes without sockets; MiB early and late."""
    core, template, leases = new_core(journal), make_group(), []
    spent, memory = Counter[str](), []

    def timed(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.thread_time()
        result = call(*arguments)
        spent[name] += time.thread_time() - start
        return result

    for number in range(groups):
        if not leases:
            leases = timed("leases", leases_of, core)
        frames = [bytes(frame) for frame in encode(put_for(template, leases.pop()))]
        packet = timed("decode", decode, frames)
        ((_, answer),) = timed("check and store", core.handle, "a.1", packet, 0.0)
        timed("answer", encode, answer)
        step, waiting = divmod(number + 1, BATCH)
        if waiting == 0:
            for packet in taken_and_trained(step - 1):
                ((_, answer),) = timed("batch", core.handle, "learner-0", packet, 0.0)
                timed("batch", encode, answer)
        timed("commit", journal.commit)
        if number in (groups // 5, groups - 1):
            memory.append(psutil.Process().memory_info().rss / 2**20)
    each = {name: 1e6 * seconds / groups for name, seconds in spent.items()}
    return {**each, "sum": sum(each.values()), "MiB early": memory[0], "MiB late": memory[1]}


def restart(folder: Path, leases: int) -> tuple[float, float]:
    """Seconds to go on with a ledger of so many leases, and its size in MiB."""
    folder.mkdir()
    Ledger(folder).commit()
    fill(folder, leases)
    start = time.perf_counter()
    core = new_core(Ledger(folder))
    seconds = time.perf_counter() - start
    assert core.leases.counts["trained"] == leases // BATCH * BATCH
    size = (folder / "ledger.sqlite").stat().st_size / 2**20
    shutil.rmtree(folder)
    return seconds, size


def fill(folder: Path, leases: int) -> None:
    """Leases that were all trained, as the buffer would have left them."""
    leases = leases // BATCH * BATCH
    db = sqlite3.connect(folder / "ledger.sqlite")
    db.execute(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
        " INSERT INTO leases SELECT i, 't' || i, i - 1, NULL, 'task-' || i, 'task/add',"
        " 'actor-0.1234', i / 64, 1, 'trained', '', (i - 1) / 64, 0, i, i, i, i, 8, 4096,"
        " 0.5, i / 64, i / 64 FROM n",
        (leases,),
    )
    for state in ("open", "stored", "taken", "trained"):
        db.execute(
            "INSERT INTO changes (ticket, state, reason, step, time)"
            " SELECT ticket, ?, '', step, ticket FROM leases",
            (state,),
        )
    db.execute(
        "INSERT INTO steps SELECT step, 1, 1, json_group_array(ticket), count(*) FROM leases"
        " GROUP BY step"
    )
    db.commit()
    db.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=1_000_000, help="with the ledger, for memory")
    parser.add_argument("--compare", type=int, default=20_000, help="groups per comparison")
    parser.add_argument("--rounds", type=int, default=3, help="comparisons, side by side")
    parser.add_argument("--leases", type=int, default=1_000_000, help="in the restarted ledger")
    parser.add_argument("--folder", type=Path, help="for the ledgers; default: a temporary one")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as base:
        folder = Path(base) / "run"
        results: dict[str, list[dict[str, float]]] = {"bare": [], "no ledger": [], "ledger": []}
        for _ in range(chosen.rounds):
            for kind, measured in results.items():
                plant = Plant(folder, kind)
                measured.append(plant.measure(chosen.compare))
                plant.close()
        print(
            f"{os.cpu_count()} cores, {COMPLETIONS} x {TOKENS} tokens, medians of {chosen.rounds}"
        )
        print(f"{'':12}{'groups/s':>12}{'of CPU':>12}{'ratio':>9}{'of CPU':>9}")
        for kind, measured in results.items():
            rates, of_cpu = (
                (
                    np.median([m[name] for m in measured]),
                    np.median(
                        [m[name] / b[name] for m, b in zip(measured, results["bare"], strict=True)]
                    ),
                )
                for name in ("groups/s", "groups/s of CPU")
            )
            print(f"{kind:12}{rates[0]:12.0f}{of_cpu[0]:12.0f}{rates[1]:9.2f}{of_cpu[1]:9.2f}")
        folder.mkdir()
        for kind, journal in (("no ledger", Journal()), ("ledger", Ledger(folder))):
            found = stages(journal, chosen.compare)
            row = ", ".join(f"{name} {value:.0f}" for name, value in found.items())
            print(f"us of CPU per group without sockets, {kind}: {row}")
        shutil.rmtree(folder)
        for rate in (1.0, 5.0):  # an actor that makes 4000 and 20000 tokens per second
            waits = lease_latency(folder, 10.0, rate)
            p50, p99 = (waits[int(len(waits) * share)] for share in (0.5, 0.99))
            load = f"{ACTORS} actors, {ACTORS * rate:.0f} groups/s"
            print(f"a lease ({load}): median {p50:.2f} ms, p99 {p99:.2f} ms")
        plant = Plant(folder, "ledger")
        measured = plant.measure(chosen.groups)
        size = sum(file.stat().st_size for file in folder.glob("ledger*")) / 2**20
        plant.close()
        early, late = measured["MiB early"], measured["MiB late"]
        print(f"memory after {chosen.groups} groups: {late:.0f} MiB, early {early:.0f} MiB")
        print(
            f"ledger on disk then: {size:.0f} MiB ({size / chosen.groups * 2**20:.0f} bytes/group)"
        )
        seconds, size = restart(folder, chosen.leases)
        print(f"restart with {chosen.leases} leases ({size:.0f} MiB): {seconds:.1f} s")


if __name__ == "__main__":
    main()
