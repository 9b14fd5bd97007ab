"""Mutated messages against the codec and the buffer: no crash, no growth, nothing slips through."""

from __future__ import annotations

import itertools
import random
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress

import msgpack
import psutil
import pytest
from fakes import CountingPrompts, make_group

from asyncgrpo.buffer.admission import newest_version, why_failed
from asyncgrpo.buffer.core import BufferCore
from asyncgrpo.buffer.journal import Journal
from asyncgrpo.buffer.leases import STATES
from asyncgrpo.buffer.ledger import Ledger
from asyncgrpo.config import from_mapping
from asyncgrpo.errors import WireError
from asyncgrpo.observe.metrics import metric_of
from asyncgrpo.types import Lease
from asyncgrpo.wire.codec import (
    MAGIC,
    PREFIX,
    SCHEMA,
    SIZES,
    Packet,
    decode,
    encode,
    group_packet,
    groups_from,
    lease_from,
    pack_lease,
)

CONFIG = from_mapping({"buffer": {"groups_per_step": 2}, "algo": {"group_size": 2}})
PEERS = ("actor-0.1", "actor-1.1", "learner-0", "nobody")
JUNK = (
    *(None, True, -1, 0, 1, 1 << 31, 1 << 63, -(1 << 62), 0.5, float("nan"), float("inf")),
    *(
        "",
        "x",
        "../../etc/passwd",
        "x" * 5000,
        b"\xff" * 9,
        [],
        {},
        [[[[]]]],
        {"a": {1: 2}},
        [0] * 99,
    ),
)
HEADERS = (b"", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xdb\xff\xff\xff\xff")
MESSAGES_PER_CORE = 100
MAX_GROWTH_BYTES = 24 << 20


def trained_packet(step: int, num_completions: int, request_id: int) -> Packet:
    return Packet(
        kind="trained",
        request_id=request_id,
        fields={
            "step": step,
            "world_size": 1,
            "covered": 0,
            "advantages": bytes(4 * num_completions),
        },
    )


class Victim:
    """A buffer with open leases, and the real messages that its peers would send now."""

    def __init__(self, journal: Journal) -> None:
        self.trained: list[str] = []
        self.leases: dict[str, Lease] = {}  # all that were given out
        self.core = BufferCore(CONFIG, CountingPrompts(), self.record, journal)
        self.send("actor-0.1", Packet(kind="hello", fields={"actor": "actor-0"}))
        request = Packet(kind="lease", request_id=1, fields={"version": 0, "max": 6})
        ((_, answer),) = self.send("actor-0.1", request)
        self.puts = [group_packet("put", [make_group(lease)]) for lease in self.leases.values()]
        self.packets = [
            *self.puts[:3],
            request,
            Packet(kind="hello", request_id=3, fields={"actor": "actor-1"}),
            Packet(kind="fail", fields={"lease_id": "t6", "reason": "reward_lost", "retry": True}),
            Packet(kind="held", request_id=9, fields={"version": 1}),
            Packet(kind="status", request_id=4, fields={"actor": "actor-0", "swaps": 3}),
            Packet(kind="accept", fields={"lease_ids": ["e1"], "refused": ["e2"]}),
            Packet(kind="take", request_id=5, fields={"step": 0, "rank": 0, "world_size": 1}),
            trained_packet(step=0, num_completions=4, request_id=6),
            Packet(kind="evaluate", request_id=7, fields={"version": 0, "blocks": ["held-out"]}),
            Packet(kind="results", request_id=8),
            Packet(kind="begin", request_id=10, fields={"step": 0}),
            Packet(kind="bye", request_id=11, fields={"actor": "actor-1"}),
            Packet(kind="summary", request_id=12),
            answer,
        ]
        self.real = [[bytes(frame) for frame in encode(packet)] for packet in self.packets]

    def record(self, step, ended) -> None:
        for group in (each.group for each in ended if each.status == "trained"):
            lease = self.leases[group.lease.lease_id]
            assert pack_lease(group.lease) == pack_lease(lease)
            assert why_failed(group, lease, newest_version(step)) is None
            self.trained.append(group.lease.lease_id)

    def send(self, peer, packet):
        """As the server does: every answer must be able to travel."""
        replies = self.core.handle(peer, packet, 1.0)
        for _, reply in replies:
            for lease in map(lease_from, reply.fields.get("leases", ())):
                self.leases[lease.lease_id] = lease
            encode(reply)
        return replies

    def check(self) -> None:
        """Whatever came: the books are right, and the run goes on to the next steps."""
        counts = self.core.leases.counts
        assert min(counts[state] for state in STATES) >= 0
        for name in self.core.metrics():
            metric_of(name)  # what the endpoint does with each: KeyError for unknown ones
        self.core.tick(2.0)
        for packet in self.puts:
            self.send("actor-0.1", packet)
        step = self.core.step
        take = {"step": step, "rank": 0, "world_size": 1}
        answers = self.send("learner-0", Packet(kind="take", request_id=1 << 20, fields=take))
        shards = [answer for _, answer in answers if answer.kind == "shard"]
        assert shards or counts["stored"] + counts["taken"] < CONFIG.buffer.groups_per_step
        for shard in shards[:1]:
            num_completions = sum(len(group.completions) for group in groups_from(shard))
            self.send("learner-0", trained_packet(step, num_completions, request_id=1 << 21))
            assert self.core.step == step + 1
        assert len(self.trained) == len(set(self.trained)) == counts["trained"]


def seal(frames: list[bytes]) -> list[bytes]:
    """The checksums that would be right: what only a peer that knows the format would send."""
    first, *groups = frames or [b""]
    body = first[PREFIX.size :]
    with suppress(Exception):  # it is no header any more
        header = msgpack.unpackb(body, strict_map_key=False)
        header[3] = header[3] and [zlib.crc32(frame) for frame in groups]
        body = msgpack.packb(header)
    return [PREFIX.pack(MAGIC, SCHEMA, zlib.crc32(body)) + body, *groups]


def damage(rng: random.Random, frames: list[bytes], others: list[list[bytes]]) -> list[bytes]:
    """One way in which a message can go wrong on the level of bytes."""
    frames = list(frames)
    place = rng.randrange(len(frames)) if rng.random() < 0.6 else 0
    frame = frames[place]
    match rng.randrange(8):
        case 0 | 1 if frame:
            changed = bytearray(frame)
            for _ in range(rng.randint(1, 4)):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            frames[place] = bytes(changed)
        case 2 if frame:
            frames[place] = frame[: rng.randrange(len(frame))]
        case 3:
            frames[place] = frame + rng.randbytes(rng.randint(1, 40))
        case 4:
            del frames[place]
        case 5:
            frames.insert(place, frames[rng.randrange(len(frames))])
        case 6:
            rng.shuffle(frames)
        case _:
            frames[place] = rng.choice(rng.choice(others))
    return frames


def confuse(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    """A message that follows the format and holds something else than it should."""
    if rng.random() < 0.05:
        return [bytes(PREFIX.size) + rng.choice(HEADERS) + rng.randbytes(8), *frames[1:]]
    number = rng.randrange(len(frames))
    frame = frames[number]
    start = PREFIX.size
    if number:  # a group: its sizes, its numbers or the rest
        sizes = list(SIZES.unpack_from(frame))
        num_prompt, size, total, parts = sizes
        start = SIZES.size + 4 * (num_prompt + 2 * size + 3 * total + parts * size)
        if rng.random() < 0.4:
            changed = bytearray(frame)
            wrong = rng.choice((0, 1, 2, 3, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1))
            struct.pack_into("<I", changed, 4 * rng.randrange(start // 4), wrong)
            return [*frames[:number], bytes(changed), *frames[number + 1 :]]
    header = msgpack.unpackb(frame[start:], strict_map_key=False)
    place, key = header, rng.choice(list(header) if number else range(len(header)))
    while isinstance(place[key], list | dict) and place[key] and rng.random() < 0.85:
        place = place[key]
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    if rng.random() < 0.2 and isinstance(place, dict):
        del place[key]
    else:
        place[key] = rng.choice(JUNK)
    changed = frame[:start] + msgpack.packb(header)
    return [*frames[:number], changed, *frames[number + 1 :]]


def fuzz(
    seed: int, num_messages: int, new_journal: Callable[[], Journal] = Journal
) -> dict[str, int]:
    rng = random.Random(seed)
    seen = {"refused by codec": 0, "refused by buffer": 0, "taken": 0}
    for number in range(num_messages):
        if number % MESSAGES_PER_CORE == 0:
            victim = Victim(new_journal())
        frames = rng.choice(victim.real)
        is_sealed = rng.random() < 0.7
        if is_sealed and rng.random() < 0.6:
            mutated = confuse(rng, frames)
        else:
            mutated = damage(rng, frames, victim.real)
        try:
            packet = decode(seal(mutated) if is_sealed else mutated)
        except WireError:
            seen["refused by codec"] += 1
        else:
            assert is_sealed or mutated == frames or mutated in victim.real, "damage went unseen"
            replies = victim.send(rng.choice(PEERS), packet)
            refused = [reply for _, reply in replies if reply.kind == "refused"]
            seen["refused by buffer" if refused else "taken"] += 1
        if number % MESSAGES_PER_CORE == MESSAGES_PER_CORE - 1:
            victim.check()
    return seen


def test_mutated_messages_do_no_harm():
    seen = fuzz(seed=1, num_messages=5000)
    assert min(seen.values()) > 250, seen  # each stage had its share


def test_mutated_messages_do_no_harm_to_a_buffer_with_a_ledger(tmp_path):
    folders = (tmp_path / str(number) for number in itertools.count())

    def ledger() -> Ledger:
        folder = next(folders)
        folder.mkdir()
        return Ledger(folder)

    seen = fuzz(seed=7, num_messages=1500, new_journal=ledger)
    assert min(seen.values()) > 75, seen


@pytest.mark.slow
def test_a_hundred_thousand_mutated_messages_neither_crash_nor_grow_the_buffer():
    fuzz(seed=2, num_messages=5000)
    before = psutil.Process().memory_info().rss
    for seed in range(3, 23):
        fuzz(seed, num_messages=5000)
    assert psutil.Process().memory_info().rss - before < MAX_GROWTH_BYTES
