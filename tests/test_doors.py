"""Strangers at the doors of a run, over real sockets: nobody gets in, and nothing changes."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import zmq
from fakes import CountingPrompts, make_group

from asyncgrpo.buffer.core import BufferCore
from asyncgrpo.config import from_mapping
from asyncgrpo.errors import PeerTimeout
from asyncgrpo.launch.preflight import own_port
from asyncgrpo.rundir import Endpoints, RunDir
from asyncgrpo.wire import sockets
from asyncgrpo.wire.codec import Packet, encode, group_packet, groups_from, lease_from
from asyncgrpo.wire.keys import make_keys, read_keys
from asyncgrpo.wire.sockets import DealerClient, Server

STEPS, GROUPS = 12, 2
SECONDS = 0.4  # of each attack
SECRET_PROMPT = b"Compute:"


@pytest.fixture(params=[False, True], ids=["open", "curve"])
def encrypt(request) -> bool:
    return request.param


def run_in(folder, encrypt: bool) -> RunDir:
    folder.mkdir()
    rooms = {
        "launch": {"encrypt": encrypt, "learners": 1},
        "buffer": {"groups_per_step": GROUPS},
        "algo": {"group_size": 2},
    }
    address = f"tcp://127.0.0.1:{own_port()}"
    endpoints = Endpoints(buffer=address, weights="", store=("127.0.0.1", 1))
    run = RunDir(path=folder, config=from_mapping(rooms), endpoints=endpoints)
    if encrypt:
        make_keys(folder)
    return run


@pytest.fixture
def run(tmp_path, encrypt) -> RunDir:
    return run_in(tmp_path / "run", encrypt)


@contextmanager
def buffer_of(run: RunDir):
    """A served buffer core; yields (server, core, steps that were trained)."""
    trained: list[list[str]] = []
    core = BufferCore(
        run.config,
        CountingPrompts(),
        lambda step, ended: trained.append([each.group.lease.lease_id for each in ended]),
    )
    server = Server(run.endpoints.buffer, read_keys(run, "server"))
    stop = threading.Event()

    def serve():
        while not stop.is_set():
            for peer, packet in server.receive(0.05):
                for receiver, answer in core.handle(peer, packet, 0.0):
                    send = server.answer if answer.request_id else server.push
                    send(receiver, answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server, core, trained
    finally:
        stop.set()
        thread.join()
        server.close()


@contextmanager
def client_of(run: RunDir, name: str, keys="own"):
    keys = read_keys(run, "client") if keys == "own" else keys
    client = DealerClient(run.endpoints.buffer, name, "the buffer", keys)
    try:
        yield client
    finally:
        client.close()


def train(run: RunDir, pause_seconds: float = 0.0) -> None:
    """An actor and a learner in lock-step: every step is determined."""
    with client_of(run, "actor-0") as actor, client_of(run, "learner-0") as learner:
        actor.call(Packet(kind="hello", fields={"actor": "actor-0"}), 60)
        for step in range(STEPS):
            wanted = {"version": step, "max": GROUPS}
            answer = actor.call(Packet(kind="lease", fields=wanted), 60)
            for fields in answer.fields["leases"]:
                group = make_group(lease_from(fields))
                stored = actor.call(group_packet("put", [group]), 60)
                assert stored.fields["state"] == "stored"
                time.sleep(pause_seconds)
            take = {"step": step, "rank": 0, "world_size": 1}
            shard = learner.call(Packet(kind="take", fields=take), 60)
            assert len(groups_from(shard)) == GROUPS
            told = {"step": step, "world_size": 1, "covered": 0}
            told["advantages"] = bytes(4 * sum(len(g.completions) for g in groups_from(shard)))
            learner.call(Packet(kind="trained", fields=told), 60)


def injections() -> list[Packet]:
    """What somebody who knows the format would try."""
    return [
        Packet(kind="hello", fields={"actor": "actor-0"}),
        Packet(kind="lease", fields={"version": 0, "max": 100}),
        Packet(kind="take", fields={"step": 0, "rank": 0, "world_size": 1}),
        Packet(
            kind="trained",
            fields={"step": 0, "world_size": 1, "covered": 0, "advantages": bytes(32)},
        ),
    ]


def knock(run: RunDir, keys, seconds: float, heard: list) -> None:
    """A client that speaks the format, with no keys or wrong ones, again and again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with client_of(run, "actor-0", keys) as client:
            for packet in injections():
                client.post(packet)
            heard += client.poll(0.03)


def flood(run: RunDir, seconds: float, is_enough: Callable[[], bool]) -> None:
    """Garbage at full speed: over ZeroMQ, and into the bare TCP port."""
    rng = random.Random(5)
    host, port = run.endpoints.buffer.removeprefix("tcp://").split(":")
    garbage = [rng.randbytes(rng.randint(0, 300)) for _ in range(50)] + [b"AG\x01" + bytes(2000)]
    garbage += encode(Packet(kind="hello"))[0][:-1:-1]
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.linger, dealer.sndhwm = 0, 100
    dealer.connect(run.endpoints.buffer)
    start = time.monotonic()
    while (spent := time.monotonic() - start) < seconds or (spent < 60 and not is_enough()):
        with socket.create_connection((host, int(port)), timeout=60) as bare:
            bare.sendall(b"\xff" + rng.randbytes(60))
        for _ in range(200):
            try:
                dealer.send_multipart(rng.choices(garbage, k=rng.randint(1, 4)), zmq.NOBLOCK)
            except zmq.Again:
                break
    dealer.close()


def test_a_run_that_strangers_disturb_is_the_same_as_one_left_alone(tmp_path, encrypt):
    quiet, disturbed = run_in(tmp_path / "quiet", encrypt), run_in(tmp_path / "noisy", encrypt)
    with buffer_of(quiet) as (_, core, expected):
        train(quiet)
        metrics = core.metrics()
    foreign = read_keys(quiet, "client")
    heard: list[Packet] = []
    with buffer_of(disturbed) as (server, core, trained):
        flooding = (disturbed, SECONDS, lambda: encrypt or server.num_refused > 100)
        strangers = [threading.Thread(target=flood, args=flooding)]
        if encrypt:
            for keys in (None, foreign):
                knocking = (disturbed, keys, SECONDS, heard)
                strangers.append(threading.Thread(target=knock, args=knocking))
        for thread in strangers:
            thread.start()
        train(disturbed, pause_seconds=0.01)
        for thread in strangers:
            thread.join()
        assert trained == expected
        assert core.metrics() == metrics
        assert heard == []
        assert (server.num_refused > 100) == (not encrypt)  # with keys nothing gets that far


@pytest.mark.parametrize("who", ["nobody", "stranger", "other server"])
def test_only_who_has_the_keys_of_the_run_is_let_in(tmp_path, who):
    run, other = run_in(tmp_path / "run", True), run_in(tmp_path / "other", True)
    own, theirs = read_keys(run, "client"), read_keys(other, "client")
    keys = {
        "nobody": None,
        "stranger": replace(theirs, other=own.other),
        "other server": replace(own, other=theirs.other),
    }[who]
    hello = Packet(kind="hello", fields={"actor": "actor-0"})
    with buffer_of(run) as (server, core, _):
        with client_of(run, "actor-0", keys) as stranger, pytest.raises(PeerTimeout):
            stranger.call(hello, 0.25)
        assert server.num_refused == 0
        assert core._actors == {}
        with client_of(run, "actor-0") as client:
            assert client.call(hello, 60).kind == "welcome"


def test_a_client_finds_its_server_again_after_a_restart(run):
    hello = Packet(kind="hello", fields={"actor": "actor-0"})
    with client_of(run, "actor-0") as client:
        for _ in range(2):
            with buffer_of(run):
                assert client.call(hello, 60).kind == "welcome"


def test_without_its_doorkeeper_an_encrypted_server_lets_nobody_in(tmp_path):
    run = run_in(tmp_path / "run", True)
    with buffer_of(run) as (server, _, _):
        server._doorkeeper.stop()
        with client_of(run, "actor-0") as client, pytest.raises(PeerTimeout):
            client.call(Packet(kind="hello", fields={"actor": "actor-0"}), 0.25)


def test_prompts_can_be_read_on_the_way_only_without_keys(run, encrypt):
    """A tap between actor and buffer."""
    host, port = run.endpoints.buffer.removeprefix("tcp://").split(":")
    seen = bytearray()
    listener = socket.create_server(("127.0.0.1", 0))

    def forward(source, target):
        with suppress(OSError):  # the other end is gone
            while data := source.recv(65536):
                seen.extend(data)
                target.sendall(data)

    def tap():
        left, _ = listener.accept()
        right = socket.create_connection((host, int(port)))
        for pair in ((left, right), (right, left)):
            threading.Thread(target=forward, args=pair, daemon=True).start()

    address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    tapped = replace(run, endpoints=replace(run.endpoints, buffer=address))
    with buffer_of(run):
        threading.Thread(target=tap, daemon=True).start()
        with client_of(tapped, "actor-0") as client:
            client.call(Packet(kind="hello", fields={"actor": "actor-0"}), 60)
            wanted = {"version": 0, "max": 1}
            answer = client.call(Packet(kind="lease", fields=wanted), 60)
            assert answer.kind == "leases"
    listener.close()
    assert (SECRET_PROMPT in seen) == (not encrypt)
    assert len(seen) > 200


def test_groups_that_come_twice_or_from_an_earlier_life_are_counted_and_never_trained(
    run, monkeypatch
):
    hello = Packet(kind="hello", fields={"actor": "actor-0"})
    wanted = Packet(kind="lease", fields={"version": 0, "max": 2})
    with buffer_of(run) as (_, core, _), client_of(run, "actor-0") as first:
        first.call(hello, 60)
        leases = [lease_from(f) for f in first.call(wanted, 60).fields["leases"]]
        put = group_packet("put", [make_group(leases[0])])
        assert first.call(put, 60).fields["state"] == "stored"
        assert first.call(put, 60).fields["state"] == "unknown"
        monkeypatch.setattr(sockets, "os", SimpleNamespace(getpid=lambda: "next-life"))
        with client_of(run, "actor-0") as second:
            second.call(hello, 60)
            late = group_packet("put", [make_group(leases[1])])
            assert first.call(late, 60).fields["state"] == "unknown"
            assert second.call(late, 60).fields["state"] == "unknown"
        metrics = core.metrics()
    assert metrics["groups_ignored_late"] == 3
    assert metrics["groups_expired_actor_restarted"] == 1
    assert metrics["buffer_groups"] == metrics["groups_arrived"] == 1
