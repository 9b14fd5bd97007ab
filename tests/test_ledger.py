"""The ledger: a buffer that is killed at any moment loses nothing, and the audit finds any lie."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
from fakes import make_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_buffer import SCHEDULES, Simulation

from asyncgrpo.buffer.audit import audit
from asyncgrpo.buffer.core import BufferCore
from asyncgrpo.buffer.ledger import Ledger, LedgerReader
from asyncgrpo.data.prompts import PromptSource
from asyncgrpo.rundir import Endpoints, RunDir
from asyncgrpo.wire.codec import Packet

SHARED_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
EPOCHS = {"data": {"train": "prompts.jsonl", "epochs": 2}, "run": {"max_steps": 1000}}


def same_groups(first, second):
    assert [g.lease.lease_id for g in first] == [g.lease.lease_id for g in second]
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a.completions, b.completions, strict=True):
            assert np.array_equal(x.token_ids, y.token_ids)
            assert np.array_equal(x.behavior_logprobs, y.behavior_logprobs)
            assert np.array_equal(x.versions, y.versions)
        assert np.array_equal(a.rewards, b.rewards)
        assert a.lease == b.lease


class Killed(Simulation):
    """The buffer is killed at random moments: before a commit, before sending, halfway through.

    Everybody repeats what is unanswered, as DealerClient does; actors say hello as ActorLoop does.
    """

    def __init__(self, seed, folder, *, kill_share=0.008, **rooms):
        self.folder, self.kill_share = Path(folder), kill_share
        self.ledger, self.num_kills, self.now = None, 0, 0.0
        self.unanswered: dict[str, dict[int, Packet]] = {}
        self.known_life: dict[str, int] = {}
        self.mail: deque = deque()
        self.acknowledged: dict[str, str] = {}  # lease -> what the buffer said
        super().__init__(seed, **rooms)

    def new_core(self):
        if self.ledger is not None:
            self.ledger.close()  # what is not committed is lost
        self.ledger = Ledger(self.folder, lambda: self.now)
        prompts = PromptSource.from_prompts(
            [make_prompt(i) for i in range(31)], epochs=self.config.data.epochs, seed=3
        )
        return BufferCore(self.config, prompts, self.record, self.ledger, self.now)

    def record(self, step, groups):
        if step in self.trained:  # killed after the record, before the commit
            same_groups(self.trained[step], groups)
        self.trained[step] = list(groups)

    def post(self, peer, packet):
        self.ids[peer] += 1
        numbered = Packet(
            kind=packet.kind,
            request_id=self.ids[peer],
            fields=packet.fields,
            arrays=packet.arrays,
        )
        self.unanswered.setdefault(peer, {})[self.ids[peer]] = numbered
        self.mail.append((peer, numbered))
        while self.mail:
            peer, numbered = self.mail.popleft()
            if numbered.request_id in self.unanswered.get(peer, {}):
                self.deliver(peer, numbered)
        self.check()

    def deliver(self, peer, packet):
        replies = self.core.handle(peer, packet, self.now)
        fate = self.random.random() / self.kill_share
        if fate < 1:
            return self.kill()
        self.ledger.commit()
        if fate < 2:
            return self.kill()
        for number, (receiver, answer) in enumerate(replies):
            if fate < 3 and number >= len(replies) // 2:
                return self.kill()
            assert answer.kind != "refused", answer.fields
            if self.unanswered.get(receiver, {}).pop(answer.request_id, None) is not None:
                self.arrive(receiver, answer)
        return None

    def kill(self):
        self.num_kills += 1
        self.core = self.new_core()
        self.mail.extend(
            (p, packet) for p, sent in self.unanswered.items() for packet in sent.values()
        )

    def arrive(self, peer, packet):
        if packet.kind == "introduce":
            self.asked.discard(peer)
            if self.known_life.get(peer) != packet.fields["life"]:
                self.known_life[peer] = packet.fields["life"]
                self.hello(peer)
        elif packet.kind == "stored":
            self.acknowledged.setdefault(packet.fields["lease_id"], packet.fields["state"])
        elif packet.kind == "shard":
            before = self.shards.get(packet.fields["step"], {}).get(int(peer[-1]))
            super().arrive(peer, packet)
            if before is not None:
                after = self.shards[packet.fields["step"]][int(peer[-1])]
                same_groups(before.groups, after.groups)
        else:
            super().arrive(peer, packet)

    def hello(self, peer):
        actor = peer.rpartition(".")[0]
        at_work = [lease.lease_id for lease in self.work.get(peer, ())]
        sent = [
            packet.fields["groups"][0]["lease"]["lease_id"]
            for packet in self.unanswered[peer].values()
            if packet.kind == "put"
        ]
        self.ids[peer] += 1
        fields = {"actor": actor, "version": self.held[actor], "leases": at_work + sent}
        packet = Packet(kind="hello", request_id=self.ids[peer], fields=fields)
        self.unanswered[peer][packet.request_id] = packet
        self.mail.append((peer, packet))

    def act(self):
        for peer in list(self.unanswered):
            if peer.startswith("actor") and peer != self.peer(peer.rpartition(".")[0]):
                del self.unanswered[peer]  # killed: it repeats nothing
        super().act()

    def audited(self):
        endpoints = Endpoints(buffer="", weights="", store=("", 0))
        return audit(RunDir(path=self.folder, config=self.config, endpoints=endpoints))


def check_killed_run(seed, name, rooms, folder):
    rooms = {"run": {"max_steps": 6}, **rooms, "observe": {"trajectories": False}}
    run = Killed(seed, folder, **rooms)
    run.run()
    bound, action = run.config.buffer.max_staleness, run.config.buffer.staleness_action
    used = Counter(g.lease.lease_id for groups in run.trained.values() for g in groups)
    assert set(used.values()) == {1}
    for step, groups in run.trained.items():
        oldest = [step - int(c.versions.min()) for g in groups for c in g.completions]
        newest = [step - int(c.versions.max()) for g in groups for c in g.completions]
        assert (max(oldest) if action == "drop" else min(newest)) <= bound
    assert sorted(run.trained) == list(range(run.core.step))
    found = run.audited()
    assert not any(found.rows.values()), found.rows
    states = dict(LedgerReader(run.folder).query("SELECT lease_id, state FROM leases")[1])
    for lease_id, said in run.acknowledged.items():
        if said == "stored":
            assert states[lease_id] in ("stored", "taken", "trained", "evicted")
        elif said == "filtered":
            assert states[lease_id] == "filtered"
    assert {lease for lease, state in states.items() if state == "trained"} == set(used)
    if name == "two_epochs":
        assert states and not {"open", "stored", "taken"} & set(states.values()) or run.is_over
    run.ledger.close()
    return run


@pytest.mark.parametrize("name", [*SCHEDULES, "two_epochs"])
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_buffer_killed_at_random_moments_loses_nothing_and_trains_nothing_twice(name, seed):
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder:
        check_killed_run(seed, name, SCHEDULES.get(name, EPOCHS), folder)
