"""Publishing: the bookkeeping, the buffer with its digests, and broadcasts with real faults."""

from __future__ import annotations

import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from receiver_process import VOCAB, logprobs

from asyncgrpo.config import from_mapping
from asyncgrpo.errors import WeightsError
from asyncgrpo.weights.flat import FlatWeights, Manifest, differing
from asyncgrpo.weights.handshake import Handshake
from asyncgrpo.weights.sender import CollectiveSender

SCRIPT = Path(__file__).with_name("receiver_process.py")


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


def test_a_digest_is_the_weighted_sum_of_the_words_modulo_2_to_the_64():
    flat = FlatWeights(Manifest.of(tensors(2), "float32"))
    flat.fill(tensors(2))
    for value, (_, tensor) in zip(flat.digests(), tensors(2), strict=True):
        words = tensor.flatten().view(torch.int32).tolist()
        slow = sum(word * (2 * i + 1) for i, word in enumerate(words)) % 2**64
        assert value % 2**64 == slow


@given(st.integers(0, VOCAB * 8 - 1), st.integers(0, 31))
def test_any_flipped_bit_changes_the_digest_of_its_tensor_only(place, bit):
    flat = FlatWeights(Manifest.of(tensors(3), "float32"))
    flat.fill(tensors(3))
    before = flat.digests()
    dict(flat.views())["head"].flatten().view(torch.int32)[place] ^= (
        1 << bit if bit < 31 else -(2**31)
    )
    assert differing(flat.manifest, before, flat.digests()) == ["head"]


def test_swapped_values_change_the_digest():
    flat = FlatWeights(Manifest.of(tensors(4), "float32"))
    flat.fill(tensors(4))
    before = flat.digests()
    embed = dict(flat.views())["embed"]
    embed.copy_(embed.flip(0))
    assert differing(flat.manifest, before, flat.digests()) == ["embed"]


def test_missing_or_misnamed_parameters_are_refused_by_name():
    flat = FlatWeights(Manifest.of(tensors(1), "float32"))
    with pytest.raises(WeightsError, match="1 parameters came, 2 are expected"):
        flat.fill(tensors(1)[:1])
    with pytest.raises(WeightsError, match=r"head .* came, not embed"):
        flat.fill(tensors(1)[::-1])


# -- handshake ------------------------------------------------------------------------------------


def handshake(*names: str) -> Handshake:
    state = Handshake(ready_timeout_seconds=1.0, loaded_timeout_seconds=5.0)
    for name in names:
        state.join(name, f"{name}.1")
    return state


def test_a_round_asks_those_who_are_behind_and_counts_only_proofs():
    state = handshake("a", "b")
    state.newest = 3
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
    state.newest = 1
    opened = state.open_round(0.0)
    state.answer("a", opened.number, ready=True)
    state.close_round(0.0, sent=False)
    assert not state.loaded("a", 1)
    assert [member.name for member in state.behind()] == ["a"]


def test_silence_past_a_deadline_is_overdue():
    state = handshake("a", "b")
    state.newest = 0
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
    state.newest = 0
    opened = state.open_round(0.0)
    state.answer("a", opened.number, ready=True)
    state.close_round(0.0, sent=True)
    assert not state.answer("a", opened.number, ready=True)


@given(st.integers(0, 2**32))
def test_no_schedule_lets_a_member_hold_what_it_did_not_prove(seed):
    rng = random.Random(seed)
    state, proven, sent = handshake("a", "b", "c"), {}, {}
    for now in range(200):
        name = rng.choice("abc")
        match rng.randrange(7):
            case 0:
                state.newest += 1
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
                for receiver in state.close_round(now, sent=ok):
                    if ok:
                        sent[receiver] = version
            case 5 if name in sent and state.loaded(name, sent[name]):
                proven[name] = sent.pop(name)
            case 6:
                state.free(name)
        for member in state.members.values():
            assert member.held == proven.get(member.name, -1)
            assert member.held <= state.newest


# -- real processes --------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Actor:
    """A receiver process and the lines it prints."""

    def __init__(self, name: str, address: str, fault: str = "none") -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), name, address, fault], stdout=subprocess.PIPE, text=True
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line.strip())

    def next_line(self) -> str:
        return self.lines.get(timeout=30)


@pytest.fixture
def network():
    """A sender and a function that starts actors; everything is stopped afterwards."""
    config = from_mapping({"weights": {"ready_timeout_seconds": 2.0, "bucket_bytes": 1024}})
    address = f"tcp://127.0.0.1:{free_port()}"
    sender = CollectiveSender(config, address, ("127.0.0.1", free_port()))
    actors: list[Actor] = []

    def start(name: str, fault: str = "none") -> Actor:
        actors.append(Actor(name, address, fault))
        return actors[-1]

    yield sender, start
    sender.close()
    for actor in actors:
        actor.process.kill()
        actor.process.wait()
        actor.process.stdout.close()


def publish(sender: CollectiveSender, version: int) -> None:
    named = tensors(version)
    sender.publish(version, named, logprobs(dict(named)).numpy())


def test_every_actor_gets_every_version_and_late_ones_get_the_newest(network):
    sender, start = network
    first, second = start("actor-0"), start("actor-1")
    publish(sender, 0)
    sender.wait_for_actors(2, 30)
    for version in (1, 2):
        publish(sender, version)
        sender.settle(30)
    late = start("actor-2")
    assert late.next_line() == "live 2"
    sender.settle(30)
    publish(sender, 3)
    sender.settle(30)
    for actor in (first, second):
        assert [actor.next_line() for _ in range(4)] == [f"live {v}" for v in range(4)]
    assert late.next_line() == "live 3"
    assert sender.metrics()["publish/evictions"] == 0


def test_an_engine_that_keeps_its_old_weights_is_found_in_the_same_round(network):
    sender, start = network
    good, bad = start("actor-0"), start("actor-1", "stale_engine")
    publish(sender, 0)
    sender.wait_for_actors(2, 30)
    publish(sender, 1)
    sender.settle(30)
    assert [bad.next_line() for _ in range(2)] == ["live 0", "live 1"]
    assert "does not compute with it" in bad.next_line()
    assert [good.next_line() for _ in range(2)] == ["live 0", "live 1"]
    assert sender.metrics()["publish/actors"] == 1
    assert sender.metrics()["publish/proofs"] == 3
    assert sender.metrics()["publish/rejections"] == 1


def test_wrong_bytes_are_found_and_the_tensor_is_named(network):
    sender, start = network
    bad = start("actor-0", "bit_flip")
    publish(sender, 0)
    sender.wait_for_actors(1, 30)
    publish(sender, 1)
    sender.settle(30)
    assert [bad.next_line() for _ in range(2)] == ["live 0", "live 1"]
    assert "1 tensors differ, first head" in bad.next_line()


def test_an_actor_killed_in_the_broadcast_does_not_stop_the_others(network):
    sender, start = network
    good, doomed = start("actor-0"), start("actor-1", "die_in_broadcast")
    publish(sender, 0)
    assert good.next_line() == "live 0"
    assert doomed.process.wait(30) == -signal.SIGKILL
    publish(sender, 1)
    sender.settle(30)
    assert good.next_line() == "live 1"
    assert sender.metrics()["publish/actors"] == 1


def test_a_silent_actor_is_evicted_at_its_deadline_and_rejoins_with_fresh_weights(network):
    sender, start = network
    good, silent = start("actor-0"), start("actor-1")
    publish(sender, 0)
    sender.wait_for_actors(2, 30)
    os.kill(silent.process.pid, signal.SIGSTOP)
    publish(sender, 1)
    sender.settle(30)
    assert sender.metrics()["publish/evictions"] == 1
    assert [good.next_line() for _ in range(2)] == ["live 0", "live 1"]
    os.kill(silent.process.pid, signal.SIGCONT)
    assert [silent.next_line() for _ in range(2)] == ["live 0", "live 1"]
    publish(sender, 2)
    sender.settle(30)
    assert silent.next_line() == "live 2"


def test_an_actor_that_was_evicted_without_a_word_is_asked_to_join_again(network):
    sender, start = network
    actor = start("actor-0")
    publish(sender, 0)
    sender.wait_for_actors(1, 30)
    with sender._changed:
        sender._evict("actor-0", "its connection was lost for a moment")
    sender.wait_for_actors(1, 30)
    assert [actor.next_line() for _ in range(2)] == ["live 0", "live 0"]
