"""Publishing: the bookkeeping, the buffer with its digests, and broadcasts with real faults."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from receiver_process import TRANSFER_SECONDS, VOCAB, logprobs, receive
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from asyncgrpo.config import from_mapping
from asyncgrpo.errors import DataError, WeightsError
from asyncgrpo.launch.preflight import own_port
from asyncgrpo.learner import loop
from asyncgrpo.learner.parallel import Published
from asyncgrpo.rundir import RunDir
from asyncgrpo.weights import flat as flat_module
from asyncgrpo.weights.collective import open_group, open_store
from asyncgrpo.weights.disk import open_version, prune, write_version
from asyncgrpo.weights.flat import ALIGNMENT, Digester, FlatWeights, Manifest, differing
from asyncgrpo.weights.handshake import Handshake
from asyncgrpo.weights.proof import check_proof
from asyncgrpo.weights.sender import CollectiveSender
from asyncgrpo.wire.codec import Packet
from asyncgrpo.wire.keys import make_keys, read_keys
from asyncgrpo.wire.schema import WEIGHTS_REQUESTS
from asyncgrpo.wire.sockets import DealerClient

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["asyncgrpo.weights.receiver"])


def tensors(seed: int) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        ("embed", torch.randn(VOCAB, 8, generator=generator)),
        ("head", torch.randn(VOCAB, 8, generator=generator)),
    ]


# -- flat buffer and digests ----------------------------------------------------------------------


def test_what_is_filled_in_comes_out_by_name():
    flat = FlatWeights(Manifest.of(tensors(1), "float32"))
    flat.fill(tensors(1))
    for (name, view), (expected, tensor) in zip(flat.views(), tensors(1), strict=True):
        assert name == expected
        assert torch.equal(view, tensor)


def test_bfloat16_buffers_hold_rounded_values_and_odd_sizes_are_aligned():
    odd = [("a", torch.randn(3)), ("b", torch.randn(5, 1))]
    flat = FlatWeights(Manifest.of(odd, "bfloat16"))
    flat.fill(odd)
    assert all(
        torch.equal(view, tensor.bfloat16())
        for (_, view), (_, tensor) in zip(flat.views(), odd, strict=True)
    )


@settings(deadline=None)  # a busy machine
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=6),
    st.integers(1, 40),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_two_small_buckets_in_turn_carry_the_same_bytes_and_digests_as_one_copy(
    shapes, size, dtype
):
    named = [(str(i), torch.randn(shape)) for i, shape in enumerate(shapes)]
    manifest = Manifest.of(named, dtype)
    flat = FlatWeights(manifest)
    flat.fill(named)
    staging = [torch.full((size * ALIGNMENT,), 255, dtype=torch.uint8) for _ in range(2)]
    digester, came = Digester(manifest, 3), []
    for piece in manifest.pieces(iter(named), staging):
        assert piece.data_ptr() == staging[len(came) % 2].data_ptr()
        digester.add(piece)
        came.append(piece.clone())
    assert torch.equal(torch.cat(came), flat.bytes)
    assert digester.values == flat.digests(3) == slow_digests(flat, 3)


def test_a_sender_reads_no_further_than_the_names_it_promised():
    manifest = Manifest.of(tensors(1), "float32")
    staging = [torch.zeros(64, dtype=torch.uint8) for _ in range(2)]
    with pytest.raises(WeightsError, match="1 parameters came, 2 are expected"):
        list(manifest.pieces(tensors(1)[:1], staging))
    with pytest.raises(WeightsError, match=r"more \(32, 8\) came, not nothing more"):
        list(manifest.pieces([*tensors(1), ("more", torch.zeros(VOCAB, 8))], staging))


def test_a_version_on_disk_is_a_safetensors_file_and_is_mapped_as_it_was(tmp_path):
    odd = [("a", torch.randn(3)), ("b", torch.randn(5, 3)), ("c", torch.randn(64, 8))]
    flat = FlatWeights(Manifest.of(odd, "bfloat16"))
    flat.fill(odd)
    seen = []
    path = write_version(tmp_path / "v7", flat.manifest, flat.bytes.split(48), seen.append)
    assert torch.equal(torch.cat(seen), flat.bytes)
    assert [entry.name for entry in tmp_path.iterdir()] == ["v7"]
    mapped = open_version(str(path), flat.manifest)
    assert torch.equal(mapped.bytes, flat.bytes)
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], view) for name, view in mapped.views())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"model.safetensors has \d+ bytes, not \d+"):
        open_version(str(path), flat.manifest)
    with pytest.raises(WeightsError, match="cannot be read"):
        open_version(str(tmp_path / "v8"), flat.manifest)


def test_the_newest_versions_on_disk_stay_and_those_that_are_still_owed(tmp_path):
    for version in (8, 9, 10, 11):
        (tmp_path / f"v{version}").mkdir()
    prune(tmp_path, {8, 11})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["v10", "v11", "v8"]


def slow_digests(flat: FlatWeights, seed: int) -> list[int]:
    """The formula word by word: one random factor per place, one per tensor."""
    bits = np.random.PCG64(seed)
    data = [tensor.flatten().view(torch.uint8) for _, tensor in flat.views()]
    words = [(x if len(x) % 4 else x.view(torch.int32)).tolist() for x in data]
    factors = [int(bits.random_raw()) | 1 for _ in range(max(map(len, data)))]
    return [
        sum(word * factor for word, factor in zip(row, factors, strict=False))
        * (int(bits.random_raw()) | 1)
        % 2**64
        for row in words
    ]


def test_a_digest_is_the_sum_of_words_times_secret_factors_modulo_2_to_the_64(monkeypatch):
    whole = FlatWeights(Manifest.of(tensors(2), "float32"))
    whole.fill(tensors(2))
    assert whole.digests(99) == slow_digests(whole, 99)
    assert whole.digests(98) != whole.digests(99)
    monkeypatch.setattr(flat_module, "DIGEST_CHUNK", 100)
    in_chunks = whole.digests(99)
    dict(whole.views())["head"][-1, -1] += 1
    assert differing(whole.manifest, in_chunks, whole.digests(99)) == ["head"]


def test_a_change_that_keeps_the_plain_sums_shows():
    """What fools sums with known factors: d, -2 d, d at three places in a row."""
    flat = FlatWeights(Manifest.of(tensors(5), "float32"))
    flat.fill(tensors(5))
    before = flat.digests(7)
    words = dict(flat.views())["embed"].flatten().view(torch.int32)
    words[10:13] += torch.tensor([1 << 20, -2 << 20, 1 << 20], dtype=torch.int32)
    assert differing(flat.manifest, before, flat.digests(7)) == ["embed"]


@given(st.integers(0, VOCAB * 8 - 1), st.integers(0, 31))
def test_any_flipped_bit_changes_the_digest_of_its_tensor_only(place, bit):
    flat = FlatWeights(Manifest.of(tensors(3), "float32"))
    flat.fill(tensors(3))
    before = flat.digests(1)
    dict(flat.views())["head"].flatten().view(torch.int32)[place] ^= (
        1 << bit if bit < 31 else -(2**31)
    )
    assert differing(flat.manifest, before, flat.digests(1)) == ["head"]


def test_swapped_values_change_the_digest():
    flat = FlatWeights(Manifest.of(tensors(4), "float32"))
    flat.fill(tensors(4))
    before = flat.digests(1)
    embed = dict(flat.views())["embed"]
    embed.copy_(embed.flip(0))
    assert differing(flat.manifest, before, flat.digests(1)) == ["embed"]


def test_missing_or_misnamed_parameters_are_refused_by_name():
    flat = FlatWeights(Manifest.of(tensors(1), "float32"))
    with pytest.raises(WeightsError, match="1 parameters came, 2 are expected"):
        flat.fill(tensors(1)[:1])
    with pytest.raises(WeightsError, match=r"head .* came, not embed"):
        flat.fill(tensors(1)[::-1])


# -- proof ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "logprobs_", "message"),
    [
        ([0, 1, 2, VOCAB], [-1.0] * 4, f"canary tokens .*{VOCAB}.* not all in the vocabulary"),
        ([0, 1, 2, 3], [-1.0, -1.0, float("nan"), -1.0], "differ by nan nats"),
        ([0, 1, 2, 3], [-1.0, -1.0, -1.0, -1.2], r"differ by 0\.2 nats"),
        ([0, 1, 2], [-1.0] * 3, "sent 3 canaries, not 4"),
    ],
)
def test_canaries_that_prove_nothing_are_refused(tokens, logprobs_, message):
    fields = {"actor": "actor-0", "canary_tokens": tokens, "canary_logprobs": logprobs_}
    ours = np.full((4, VOCAB), -1.0, dtype=np.float32)
    with pytest.raises(WeightsError, match=message):
        check_proof(fields, version=3, wrong_tensors=[], logprobs=ours, tolerance=1e-3)


# -- handshake ------------------------------------------------------------------------------------


def handshake(*names: str) -> Handshake:
    state = Handshake(ready_timeout_seconds=1.0, loaded_timeout_seconds=5.0)
    for name in names:
        state.join(name, f"{name}.1")
    return state


def test_a_round_asks_those_who_are_behind_and_counts_only_proofs():
    state = handshake("a", "b")
    state.publish(3)
    opened = state.open_round(now=0.0)
    assert opened is not None
    assert opened.asked == {"a", "b"}
    assert state.answer("a", opened.number, ready=True)
    assert not state.decided()
    assert state.answer("b", opened.number, ready=False)
    assert state.decided()
    assert state.close_round(0.0, sent=True) == ["a"]
    assert state.members["a"].held == -1
    assert state.loaded("a", 3)
    assert state.members["a"].held == 3
    assert state.settled()
    state.free("b")
    assert [member.name for member in state.behind()] == ["b"]


def test_a_failed_broadcast_counts_as_not_applied():
    state = handshake("a")
    state.publish(1)
    opened = state.open_round(0.0)
    state.answer("a", opened.number, ready=True)
    state.close_round(0.0, sent=False)
    assert not state.loaded("a", 1)
    assert [member.name for member in state.behind()] == ["a"]


def test_silence_past_a_deadline_is_overdue():
    state = handshake("a", "b")
    state.publish(0)
    opened = state.open_round(0.0)
    state.answer("a", opened.number, ready=True)
    assert state.overdue(0.9) == []
    assert state.overdue(1.1) == ["b"]
    state.evict("b")
    assert state.decided()
    state.close_round(2.0, sent=True)
    assert state.overdue(6.9) == []
    assert state.overdue(7.1) == ["a"]


def test_answers_to_a_round_that_is_over_are_ignored():
    state = handshake("a")
    state.publish(0)
    opened = state.open_round(0.0)
    state.answer("a", opened.number, ready=True)
    state.close_round(0.0, sent=True)
    assert not state.answer("a", opened.number, ready=True)


def test_weights_that_may_change_are_offered_to_nobody_until_the_next_publish():
    state = handshake("a")
    assert state.open_round(0.0) is None
    state.publish(0)
    assert not state.at_rest()  # "a" is to get it first
    opened = state.open_round(0.0)
    state.answer("a", opened.number, ready=True)
    assert not state.at_rest()
    state.close_round(0.0, sent=True)
    assert state.at_rest()
    state.hold()
    state.join("b", "b.1")
    assert state.at_rest()
    assert state.open_round(1.0) is None
    state.publish(1)
    assert state.open_round(1.0).asked == {"b"}  # "a" owes a proof


def test_after_a_failed_broadcast_nobody_is_waited_for():
    state = handshake("a")
    state.publish(0)
    opened = state.open_round(0.0)
    state.answer("a", opened.number, ready=True)
    state.close_round(0.0, sent=False)
    assert state.at_rest()
    state.publish(1)
    assert not state.at_rest()


@given(st.integers(0, 2**32))
def test_no_schedule_lets_a_member_hold_what_it_did_not_prove(seed):
    rng = random.Random(seed)
    state, proven, sent, held = handshake("a", "b", "c"), {}, {}, set()
    for now in range(200):
        name = rng.choice("abc")
        match rng.randrange(8):
            case 0:
                state.publish(state.newest + 1)
            case 1:
                state.join(name, f"{name}.{now}")
                proven.pop(name, None)
                sent.pop(name, None)
            case 2:
                state.open_round(now)
            case 3 if state.round:
                state.answer(name, state.round.number, ready=rng.random() < 0.8)
            case 4 if state.decided():
                version, ok = state.round.version, rng.random() < 0.8
                assert state.newest not in held
                for receiver in state.close_round(now, sent=ok):
                    if ok:
                        sent[receiver] = version
            case 5 if name in sent and state.loaded(name, sent[name]):
                proven[name] = sent.pop(name)
            case 6:
                state.free(name)
            case 7 if not state.round:
                state.hold()
                held.add(state.newest)
        for member in state.members.values():
            assert member.held == proven.get(member.name, -1)
            assert member.held <= state.newest


# -- real processes --------------------------------------------------------------------------------


class Actor:
    """A receiver process and what it says; forked from one that has imported torch."""

    def __init__(self, name: str, address: str, fault: str = "none") -> None:
        self.lines, says = FORKED.Pipe(duplex=False)
        arguments = (name, address, fault, says, dict(os.environ))
        self.process = FORKED.Process(target=receive, args=arguments, daemon=True)
        self.process.start()
        says.close()

    def next_line(self) -> str:
        assert self.lines.poll(120)
        return self.lines.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.lines.close()


class Network:
    """A sender and the actors that were started."""

    def __init__(self, folder: Path, transport: str = "gloo", rooms=None, **weights) -> None:
        settings = {"ready_timeout_seconds": 20.0, "bucket_bytes": 1024, **weights}
        self.address, self._actors = f"tcp://127.0.0.1:{own_port()}", []
        rooms = {"weights": settings, "buffer": {"max_staleness": 4}, **(rooms or {})}
        self.config = from_mapping(rooms)
        self.sender = CollectiveSender(
            self.config,
            self.address,
            ("127.0.0.1", own_port()),
            transport=transport,
            folder=folder,
        )

    def start(self, name: str, fault: str = "none") -> Actor:
        self._actors.append(Actor(name, self.address, fault))
        return self._actors[-1]

    def stop(self) -> None:
        self.sender.close()
        for actor in self._actors:
            actor.end()


@pytest.fixture
def make_network(tmp_path):
    """Makes networks; everything is stopped afterwards."""
    networks = []

    def make(**how) -> Network:
        networks.append(Network(tmp_path / "weights", **how))
        return networks[-1]

    yield make
    for network in networks:
        network.stop()


@pytest.fixture
def network(make_network):
    """A sender and a function that starts actors."""
    both = make_network()
    return both.sender, both.start


def publish(sender: CollectiveSender, version: int, *, size: int = 0) -> None:
    """size: elements of a third tensor, which nobody computes with."""
    named = [*tensors(version), *([("rest", torch.ones(size))] if size else [])]
    sender.publish(version, named, logprobs(dict(named)).numpy())


def publish_twice(sender: CollectiveSender, count: int) -> None:
    """Version 0 to so many actors, then version 1."""
    publish(sender, 0)
    sender.wait_for_actors(count, 120)
    publish(sender, 1)
    sender.settle(120)


def test_every_actor_gets_every_version_and_late_ones_get_the_newest(network):
    sender, start = network
    first, second = start("actor-0"), start("actor-1")
    publish(sender, 0)
    sender.wait_for_actors(2, 120)
    for version in (1, 2):
        publish(sender, version)
        sender.settle(120)
    late = start("actor-2")
    assert late.next_line() == "live 2"
    sender.settle(120)
    publish(sender, 3)
    sender.settle(120)
    for actor in (first, second):
        assert [actor.next_line() for _ in range(4)] == [f"live {v}" for v in range(4)]
    assert late.next_line() == "live 3"
    assert sender.metrics()["publish/evictions"] == 0


def test_all_processes_of_an_engine_are_members_of_a_broadcast_beside_other_actors(network):
    sender, start = network
    engine, other = start("actor-0", "engine"), start("actor-1")
    publish_twice(sender, 2)
    for actor in (engine, other):
        assert [actor.next_line() for _ in range(2)] == ["live 0", "live 1"]
    assert sender.metrics()["publish/proofs"] == 4


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("engine_differs", "did not receive version 1 intact: 1 tensors differ, first head"),
        ("engine_ends", "error actor-0: a process of the engine is gone"),
    ],
)
def test_a_process_of_an_engine_that_fails_takes_its_actor_along(network, fault, said):
    sender, start = network
    engine, other = start("actor-0", fault), start("actor-1")
    publish(sender, 0)
    sender.wait_for_actors(2, 120)
    publish(sender, 1)
    assert engine.next_line() == "live 0"
    assert said in engine.next_line()
    assert [other.next_line() for _ in range(2)] == ["live 0", "live 1"]


def test_an_engine_that_keeps_its_old_weights_is_found_in_the_same_round(network):
    sender, start = network
    good, bad = start("actor-0"), start("actor-1", "stale_engine")
    publish_twice(sender, 2)
    assert [bad.next_line() for _ in range(2)] == ["live 0", "live 1"]
    assert "does not compute with it" in bad.next_line()
    assert [good.next_line() for _ in range(2)] == ["live 0", "live 1"]
    assert sender.metrics()["publish/actors"] == 1
    assert sender.metrics()["publish/proofs"] == 3
    assert sender.metrics()["publish/rejections"] == 1


def test_wrong_bytes_are_found_and_the_tensor_is_named(network):
    sender, start = network
    bad = start("actor-0", "bit_flip")
    publish_twice(sender, 1)
    assert [bad.next_line() for _ in range(2)] == ["live 0", "live 1"]
    assert "1 tensors differ, first head" in bad.next_line()


def test_bytes_that_somebody_changed_on_the_way_never_reach_the_engine(network):
    sender, start = network
    victim = start("actor-0", "tampered")
    publish_twice(sender, 1)
    assert victim.next_line() == "live 0"
    assert "version 1 intact: 1 tensors differ, first head" in victim.next_line()


def test_senseless_requests_are_refused_and_publishing_goes_on(network):
    sender, start = network
    actor = start("actor-0")
    stranger = DealerClient(start.__self__.address, "actor-0", "the learner")
    stranger._socket.send(b"garbage")
    for kind in (*WEIGHTS_REQUESTS, "dance"):
        stranger.tell(Packet(kind=kind))
    with sender._changed:
        sender._wait(lambda: sender._server.num_refused > len(WEIGHTS_REQUESTS) + 1, "refused", 120)
    publish_twice(sender, 1)
    assert [actor.next_line() for _ in range(2)] == ["live 0", "live 1"]
    metrics = sender.metrics()
    assert metrics["publish/refused_messages"] == len(WEIGHTS_REQUESTS) + 2
    assert metrics["publish/evictions"] == 0
    stranger.close()


@pytest.mark.slow
def test_with_keys_only_their_holders_take_part(tmp_path, monkeypatch):
    make_keys(tmp_path)
    config = from_mapping({"launch": {"encrypt": True}})
    run = RunDir(path=tmp_path, config=config, endpoints=None)
    address = f"tcp://127.0.0.1:{own_port()}"
    sender = CollectiveSender(config, address, ("127.0.0.1", own_port()), read_keys(run, "server"))
    words = (tmp_path / "keys" / "client.key").read_text()
    stranger = Actor("actor-1", address)
    monkeypatch.setenv("ASYNCGRPO_CLIENT_KEYS", words)
    actor = Actor("actor-0", address)
    publish(sender, 0)
    sender.wait_for_actors(1, 120)
    assert actor.next_line() == "live 0"
    assert sender.metrics()["publish/actors"] == 1
    assert not stranger.lines.poll()
    sender.close()
    for each in (actor, stranger):
        each.end()


@pytest.mark.parametrize("doomed_name", ["actor-0", "actor-2"])
def test_an_actor_killed_in_the_broadcast_does_not_stop_the_others(make_network, doomed_name):
    seconds = {"ready_timeout_seconds": 4.0, "transfer_timeout_seconds": TRANSFER_SECONDS}
    network = make_network(bucket_bytes=65536, **seconds)
    sender, start = network.sender, network.start
    good, doomed = start("actor-1"), start(doomed_name, "die_in_broadcast")
    with sender._changed:  # both are in the first broadcast
        sender._wait(lambda: len(sender._waiting_joins) == 2, "joining", 120)
    publish(sender, 0, size=1 << 20)
    # Not after weights.transfer_timeout_seconds, when the rest of the broadcast is given up.
    assert good.next_line() == "live 0"
    doomed.process.join(120)
    assert doomed.process.exitcode == -signal.SIGKILL
    publish(sender, 1, size=1 << 20)
    sender.settle(120)
    assert good.next_line() == "live 1"
    assert sender.metrics()["publish/actors"] == 1


def test_a_silent_actor_is_evicted_at_its_deadline_and_rejoins_with_fresh_weights(make_network):
    network = make_network(ready_timeout_seconds=4.0)
    sender, start = network.sender, network.start
    good, silent = start("actor-0"), start("actor-1")
    publish(sender, 0)
    sender.wait_for_actors(2, 120)
    os.kill(silent.process.pid, signal.SIGSTOP)
    publish(sender, 1)
    sender.settle(120)
    assert sender.metrics()["publish/evictions"] == 1
    assert [good.next_line() for _ in range(2)] == ["live 0", "live 1"]
    os.kill(silent.process.pid, signal.SIGCONT)
    assert [silent.next_line() for _ in range(2)] == ["live 0", "live 1"]
    publish(sender, 2)
    sender.settle(120)
    assert silent.next_line() == "live 2"


def test_an_actor_that_was_evicted_without_a_word_is_asked_to_join_again(network):
    sender, start = network
    actor = start("actor-0")
    publish(sender, 0)
    sender.wait_for_actors(1, 120)
    with sender._changed:
        sender._evict("actor-0", "its connection was lost for a moment")
    sender.wait_for_actors(1, 120)
    assert [actor.next_line() for _ in range(2)] == ["live 0", "live 0"]


def test_actors_load_every_version_from_disk_and_late_ones_the_newest(make_network, tmp_path):
    network = make_network(transport="disk")
    sender, first = network.sender, network.start("actor-0")
    publish(sender, 0)
    sender.wait_for_actors(1, 120)
    for version in (1, 2):
        publish(sender, version)
        sender.settle(120)
        sender.release()
    assert [first.next_line() for _ in range(3)] == [f"live {v}" for v in range(3)]
    late = network.start("actor-1")  # nothing is read from the learner's parameters any more
    assert late.next_line() == "live 2"
    folders = sorted(path.name for path in (tmp_path / "weights").iterdir())
    assert folders == ["v1", "v2"]
    assert sender.metrics()["publish/evictions"] == 0


def test_a_file_that_somebody_changed_never_reaches_the_engine(make_network, tmp_path):
    network = make_network(transport="disk")
    publish(network.sender, 0)
    (path,) = (tmp_path / "weights").glob("v0/*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    victim = network.start("actor-0")
    assert "version 0 intact: 1 tensors differ, first head" in victim.next_line()


@pytest.mark.parametrize("overlap", [True, False])
def test_parameters_are_read_between_publish_and_release_only(make_network, overlap):
    network = make_network(overlap=overlap)
    sender, first = network.sender, network.start("actor-0")
    readers = []

    class Live:
        """Parameters that say when they are read; of version 9 after the release."""

        version = 0

        def __iter__(self):
            readers.append(self.version)
            yield from tensors(self.version)

    live = Live()

    def publish_live(version: int) -> None:
        live.version = version
        sender.publish(version, live, logprobs(dict(tensors(version))).numpy())

    publish_live(0)
    sender.wait_for_actors(1, 120)
    assert first.next_line() == "live 0"
    for version in (1, 2):
        publish_live(version)
        if not overlap:
            assert readers[-1] == version
        sender.release()
        live.version = 9
        sender.release()  # as each optimizer step of an update does
        assert readers[-1] == version
        sender.settle(120)
        assert first.next_line() == f"live {version}"
    late = network.start("actor-1")
    with sender._changed:
        sender._wait(lambda: len(sender._handshake.members) == 2, "joining", 120)
    assert not late.lines.poll(0.3)
    publish_live(3)
    sender.wait_for_actors(2, 120)
    assert late.next_line() == "live 3"
    assert 9 not in readers


def test_actors_copy_out_of_two_buckets_that_the_learner_fills_in_turn():
    """The meetings of CUDA IPC, with threads that share the buckets' memory."""
    named = [(str(i), torch.randn(300)) for i in range(20)]
    manifest = Manifest.of(named, "float32")
    staging = [torch.zeros(256, dtype=torch.uint8) for _ in range(2)]
    port, received = own_port(), [FlatWeights(manifest) for _ in range(2)]

    def member(rank: int) -> None:
        store = open_store("127.0.0.1", port, is_master=rank == 0, timeout_seconds=20)
        group = open_group(
            store,
            transport="cuda_ipc",
            generation=1,
            rank=rank,
            world_size=3,
            seconds=20,
            opened=tuple(staging) if rank else (),
        )
        mine = received[rank - 1].bytes.split(256) if rank else manifest.pieces(named, staging)
        digester = Digester(manifest, 5)
        group.broadcast(mine, digester.add)
        digests[rank] = digester.values

    digests: dict[int, list[int]] = {}
    members = [threading.Thread(target=member, args=(rank,)) for rank in range(3)]
    for thread in members:
        thread.start()
    for thread in members:
        thread.join(120)
    flat = FlatWeights(manifest)
    flat.fill(named)
    assert all(torch.equal(each.bytes, flat.bytes) for each in received)
    assert digests == dict.fromkeys(range(3), flat.digests(5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_actors_on_the_learners_gpu_copy_out_of_its_buckets(make_network):
    network = make_network(transport="cuda_ipc")
    first, second = network.start("actor-0"), network.start("actor-1")
    publish(network.sender, 0)
    network.sender.wait_for_actors(2, 120)
    for version in (1, 2):
        publish(network.sender, version)
        network.sender.settle(120)
    for actor in (first, second):
        assert [actor.next_line() for _ in range(3)] == [f"live {v}" for v in range(3)]
    late = network.start("actor-2")
    assert late.next_line() == "live 2"
    assert network.sender.metrics()["publish/evictions"] == 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three CUDA devices")
def test_actors_on_gpus_of_their_own_are_reached_by_nccl(make_network, monkeypatch):
    network, actors = make_network(transport="nccl"), []
    for number in range(2):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", str(number + 1))
        actors.append(network.start(f"actor-{number}"))
    publish_twice(network.sender, 2)
    for actor in actors:
        assert [actor.next_line() for _ in range(2)] == ["live 0", "live 1"]
    assert network.sender.metrics()["publish/evictions"] == 0


class FakeNCCL:
    """What torch's group is given; NCCL's own is on GPUs only."""

    def __init__(self, store, rank, world_size, options):
        assert not store.check([str(rank)])  # where NCCL puts its own keys
        self.waits_raise = os.environ.get("TORCH_NCCL_BLOCKING_WAIT")
        self.seconds = options._timeout.total_seconds()

    Options = type("Options", (), {})

    def name(self):
        return "nccl"

    def abort(self):
        raise RuntimeError("aborted too late")


def test_an_nccl_group_waits_for_its_members_before_nccl_does_and_raises_when_one_is_lost(
    monkeypatch,
):
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeNCCL, raising=False)
    port = own_port()
    stores = [open_store("127.0.0.1", port, is_master=m, timeout_seconds=60) for m in (True, False)]
    form = partial(open_group, transport="nccl", world_size=2)
    with pytest.raises(WeightsError, match="generation 1 did not form"):
        form(stores[0], generation=1, rank=0, seconds=0.2)
    with ThreadPoolExecutor() as ranks:
        forms = [ranks.submit(form, stores[r], generation=2, rank=r, seconds=30) for r in (0, 1)]
    for group in [formed.result() for formed in forms]:
        assert (group.handle.waits_raise, group.handle.seconds) == ("1", 30)
        group.close()
    assert "TORCH_NCCL_BLOCKING_WAIT" not in os.environ


def test_weights_that_change_before_the_next_publish_are_copied(make_network):
    network = make_network(publish_every=2)
    live = [(name, tensor.clone()) for name, tensor in tensors(1)]
    network.sender.publish(1, live, logprobs(dict(tensors(1))).numpy())
    network.sender.release()
    for _, tensor in live:
        tensor.zero_()
    assert network.start("actor-0").next_line() == "live 1"
    network.sender.settle(120)
    assert network.sender.metrics()["publish/proofs"] == 1


def test_only_buckets_that_changed_are_sent_to_those_who_have_the_others(make_network):
    """Two buckets of 1 KiB: the embedding and the head."""
    network = make_network(only_changed=True)
    sender, first = network.sender, network.start("actor-0")
    seeds = [(0, 0), (0, 1), (0, 1), (2, 3), (2, 4)]  # of embedding and head, by version
    saved = []

    def publish_mixed(version: int) -> None:
        embed, head = (dict(tensors(seed)) for seed in seeds[version])
        named = {"embed": embed["embed"], "head": head["head"]}
        sender.publish(version, list(named.items()), logprobs(named).numpy())
        sender.wait_for_actors(1, 120)
        sender.settle(120)
        metrics = sender.metrics()
        assert metrics["publish/bytes"] + metrics["publish/bytes_saved"] == 2048
        saved.append(metrics["publish/bytes_saved"])

    for version in range(4):
        publish_mixed(version)
        assert first.next_line() == f"live {version}"
    assert saved == [0, 1024, 2048, 0]
    late = network.start("actor-1")
    assert late.next_line() == "live 3"  # all of it
    sender.settle(120)
    publish_mixed(4)
    assert saved[-1] == 1024
    assert [first.next_line(), late.next_line()] == ["live 4", "live 4"]
    assert sender.metrics()["publish/proofs"] == 7
    assert sender.metrics()["publish/rejections"] == 0


def test_after_a_broken_broadcast_buckets_that_did_not_change_are_sent_too(make_network):
    network = make_network(only_changed=True, bucket_bytes=65536, ready_timeout_seconds=4.0)
    sender, good = network.sender, network.start("actor-1")
    publish(sender, 0, size=1 << 20)
    assert good.next_line() == "live 0"
    sender.settle(120)
    sender.release()
    network.start("actor-0", "die_in_broadcast")
    with sender._changed:
        sender._wait(lambda: len(sender._handshake.members) == 2, "joining", 120)
    publish(sender, 1, size=1 << 20)
    assert good.next_line() == "live 1"
    assert sender.metrics()["publish/bytes_saved"] == 0
    sender.settle(120)
    publish(sender, 2, size=1 << 20)
    assert good.next_line() == "live 2"
    assert sender.metrics()["publish/bytes_saved"] == 63 * 65536 + 2048  # all but the first


TURNS = {"actor": {"engine": "toy", "sleep": True}}


def test_engines_sleep_from_release_to_publish_and_late_ones_sleep_too(make_network, caplog):
    network = make_network(rooms=TURNS)
    first = network.start("actor-0")
    publish(network.sender, 0)
    network.sender.wait_for_actors(1, 30)
    network.sender.release()
    assert [first.next_line() for _ in range(2)] == ["live 0", "asleep"]
    assert network.sender.metrics()["publish/sleep_seconds"] > 0
    assert "training goes on beside" not in caplog.text
    late = network.start("actor-1")
    assert late.next_line() == "asleep"  # before it has any weights
    network.sender.release()  # before each change of the weights; nobody waits again
    publish(network.sender, 1)
    network.sender.release()
    for actor in (first, late):
        assert [actor.next_line() for _ in range(3)] == ["awake", "live 1", "asleep"]
    assert network.sender.metrics()["publish/evictions"] == 0
    assert not any(actor.lines.poll(0.05) for actor in (first, late))


def test_engines_prove_what_they_hold_before_they_sleep(make_network):
    """Else a proof could be overdue when training takes long."""
    network = make_network(rooms=TURNS)
    actor = network.start("actor-0")
    publish(network.sender, 0, size=1 << 20)
    network.sender.wait_for_actors(1, 30)
    publish(network.sender, 1, size=1 << 20)
    network.sender.release()
    proven = network.sender.metrics()["publish/proofs"]
    assert [actor.next_line() for _ in range(3)] == ["live 0", "live 1", "asleep"]
    assert proven == 2


def test_actors_that_are_killed_or_do_not_sleep_are_not_waited_for_long(make_network, caplog):
    network = make_network(rooms=TURNS, loaded_timeout_seconds=3.0)
    actors = [network.start(f"actor-{i}") for i in range(3)]
    publish(network.sender, 0)
    network.sender.wait_for_actors(3, 30)
    actors[0].process.kill()
    actors[0].process.join()
    network.sender.release()
    assert [actors[1].next_line() for _ in range(2)] == ["live 0", "asleep"]
    assert network.sender.metrics()["publish/sleep_seconds"] < 30
    actors[1].process.kill()  # asleep
    actors[1].process.join()
    sleepless = network.start("actor-1", "sleepless")  # its next life, stuck in a step
    publish(network.sender, 1)
    network.sender.wait_for_actors(2, 30)
    network.sender.release()
    assert "training goes on beside actor-1, awake after 3 s" in caplog.text
    assert 3 <= network.sender.metrics()["publish/sleep_seconds"] < 30
    lines = [actors[2].next_line() for _ in range(5)]
    assert lines == ["live 0", "asleep", "awake", "live 1", "asleep"]
    assert sleepless.next_line() == "live 1"


@pytest.mark.slow
def test_engines_that_sleep_wake_up_for_another_life_of_the_learner(make_network):
    network = make_network(rooms=TURNS)
    actor = network.start("actor-0")
    publish(network.sender, 0)
    network.sender.wait_for_actors(1, 30)
    network.sender.release()
    network.sender.close()
    store = ("127.0.0.1", own_port())
    network.sender = CollectiveSender(network.config, network.address, store)
    assert [actor.next_line() for _ in range(3)] == ["live 0", "asleep", "awake"]
    publish(network.sender, 0)
    network.sender.wait_for_actors(1, 30)
    network.sender.release()
    assert [actor.next_line() for _ in range(2)] == ["live 0", "asleep"]


class Sharded(Published):
    """Tensors, not all of which divide, of which each rank holds a part; of the first, nothing."""

    def __init__(self, version: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        rest = [(f"rest.{i}", torch.full((3 << 20 | i,), i)) for i in range(3)]
        named = [
            (name, distribute_tensor(tensor, mesh, [Shard(0)]))
            for name, tensor in [("row", torch.ones(1, 4)), *tensors(version), *rest]
        ]
        super().__init__(Mock(spec=["named_parameters"], named_parameters=lambda: named), True)


def learner_rank(rank: int, address: str, port: int, is_late_there: Any) -> None:
    """Publishes 0 to a good and a doomed actor, 1 to the good one, and 1 to one that is late."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    sender = None
    if rank == 0:
        settings = {"ready_timeout_seconds": 4.0, "bucket_bytes": 65536}
        config = from_mapping({"weights": settings, "learner": {"parallel": "fsdp"}})
        sender = CollectiveSender(config, address, ("127.0.0.1", own_port()))
        with sender._changed:
            sender._wait(lambda: len(sender._waiting_joins) == 2, "joining", 120)
    for version in range(2):
        weights = Sharded(version)
        if sender is not None:
            sender.publish(version, weights, logprobs(dict(tensors(version))).numpy())
            sender.wait_for_actors(1, 120)
            if version == 1:
                is_late_there.wait(120)
                while sender.metrics()["publish/proofs"] < 3:
                    sender.serve()
            sender.release()
        weights.help()
    if sender is not None:
        sender.close()
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_gather_while_rank_0_sends_whoever_dies_or_is_late():
    address, context = f"tcp://127.0.0.1:{own_port()}", mp.get_context("spawn")
    good, doomed = Actor("actor-1", address), Actor("actor-0", address, "die_in_broadcast")
    is_late_there, port, late = context.Event(), own_port(), None
    learners = [
        context.Process(target=learner_rank, args=(rank, address, port, is_late_there))
        for rank in range(2)
    ]
    try:
        for process in learners:
            process.start()
        assert [good.next_line() for _ in range(2)] == ["live 0", "live 1"]
        late = Actor("actor-2", address)
        is_late_there.set()
        assert late.next_line() == "live 1"
        for process in learners:
            process.join(120)
        assert [process.exitcode for process in learners] == [0, 0]
    finally:
        for process in learners:
            process.kill()
        for each in filter(None, (good, doomed, late)):
            each.end()


class Untrained:
    """A lone rank's updater that has nothing to train on; an actor joins when it saves."""

    def __init__(self, network: Network) -> None:
        self._network, self._policy = network, torch.nn.ParameterDict(dict(tensors(0)))

    def restore(self) -> int:
        return 0

    def canary_logprobs(self):
        return logprobs(dict(tensors(0))).numpy()

    def weights(self) -> Published:
        return Published(self._policy, is_sharded=True)

    def save(self) -> None:
        self._network.start("actor-1")
        while self._network.sender.metrics()["publish/actors"] < 2:
            time.sleep(0.01)


class NoPrompts:
    """A buffer without prompts."""

    def call(self, packet, timeout_seconds, meanwhile=None) -> Packet:
        kind = "exhausted" if packet.kind == "take" else "noted"
        return Packet(kind=kind, fields={"reports": []})


def test_an_actor_that_joins_when_the_prompts_are_used_up_gets_weights_with_fsdp(
    make_network, monkeypatch
):
    monkeypatch.setattr(loop, "CALL_SECONDS", 30.0)
    alone = {"launch": {"actors": 1}, "data": {"eval": "none"}}
    network = make_network(rooms={"learner": {"parallel": "fsdp"}, **alone})
    first, recorder = network.start("actor-0"), Mock()
    learner = loop.Learner(
        network.config,
        updater=Untrained(network),
        client=NoPrompts(),
        sender=network.sender,
        recorder=recorder,
        exporter=Mock(),
    )
    with pytest.raises(DataError, match="nothing was trained: the prompts are used up"):
        learner.run()
    assert first.next_line() == "live 0"
    assert network.sender.metrics()["publish/proofs"] == 2
    assert recorder.finish.called


def test_an_actor_that_is_late_gets_weights_while_the_learner_waits_for_an_evaluation(make_network):
    """It may have been busy with the last one, and the next cannot begin without its weights."""
    network = make_network(rooms={"learner": {"parallel": "fsdp"}, "launch": {"actors": 1}})
    first, proofs = network.start("actor-0"), []

    class Buffer(NoPrompts):
        def call(self, packet, timeout_seconds, meanwhile=None) -> Packet:
            if packet.kind == "evaluate" and not proofs:
                late, end = network.start("actor-1"), time.monotonic() + 120
                while not late.lines.poll() and time.monotonic() < end:
                    meanwhile()
                    time.sleep(0.01)
                proofs.append(late.next_line())
            return super().call(packet, timeout_seconds, meanwhile)

    updater = Untrained(network)
    updater.save = lambda: None
    learner = loop.Learner(
        network.config,
        updater=updater,
        client=Buffer(),
        sender=network.sender,
        recorder=Mock(),
        exporter=Mock(),
    )
    with pytest.raises(DataError, match="nothing was trained"):
        learner.run()
    assert [first.next_line(), *proofs] == ["live 0", "live 0"]
