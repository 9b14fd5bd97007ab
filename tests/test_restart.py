"""The real buffer process, killed again and again, with real actors' loops and real sockets."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from test_actor_loop import FakeEngine, FakeReceiver

from asyncgrpo.actor.judge import InlineJudge
from asyncgrpo.actor.loop import ActorLoop
from asyncgrpo.buffer.ledger import LedgerReader
from asyncgrpo.config import from_mapping
from asyncgrpo.launch.preflight import own_port
from asyncgrpo.rundir import Endpoints, RunDir
from asyncgrpo.wire import sockets
from asyncgrpo.wire.codec import Packet, shard_from
from asyncgrpo.wire.sockets import DealerClient

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))}


class Words:
    """A tokenizer whose answers are right or wrong at random."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def apply_chat_template(self, messages, **options):
        return [1] * len(messages[0]["content"])

    def batch_decode(self, ids, **options):
        return [self._random.choice(["a", "x"]) for _ in ids]


class Ranks:
    """Two learner ranks without a model: take, look again, tell what is trained, go on."""

    def __init__(self, address: str) -> None:
        names = ("learner-0", "learner-1")
        self.clients = [DealerClient(address, name, "the buffer") for name in names]
        self.step, self.shards, self.batches = 0, [None, None], {}
        self.asked = [self.take(rank) for rank in (0, 1)]
        self.telling = False
        self.is_over = False

    def take(self, rank: int) -> int:
        fields = {"step": self.step, "rank": rank, "world_size": 2}
        return self.clients[rank].post(Packet(kind="take", fields=fields))

    def tick(self) -> None:
        for rank, client in enumerate(self.clients):
            for packet in client.poll(0.0):
                if packet.kind == "shard":
                    self.got(rank, shard_from(packet))
                elif packet.kind == "noted":
                    self.step, self.telling, self.shards = self.step + 1, False, [None, None]
                    self.asked = [self.take(rank) for rank in (0, 1)]
                else:
                    assert packet.kind == "exhausted"
                    self.is_over = True

    def got(self, rank: int, shard) -> None:
        seen = [(g.lease.lease_id, g.completions[0].token_ids.tobytes()) for g in shard.groups]
        if self.shards[rank] is None:
            self.shards[rank] = seen
            self.take(rank)  # a rank may ask twice, also across a restart
        else:
            assert self.shards[rank] == seen, "a batch changed"
            self.batches[self.step, rank] = seen
        if all((self.step, r) in self.batches for r in (0, 1)) and not self.telling:
            self.telling = True
            sizes = 3 * sum(len(self.batches[self.step, r]) for r in (0, 1))
            fields = {"step": self.step, "world_size": 2, "covered": 0}
            fields["advantages"] = bytes(4 * sizes)
            self.clients[0].post(Packet(kind="trained", fields=fields))


class Stage:
    """A run directory, its buffer process, three actors and two ranks in this process."""

    def __init__(self, folder: Path, seed: int, **rooms) -> None:
        self.random = random.Random(seed)
        settings = {
            "run": {"max_steps": 60},
            "actor": {"concurrency": 6},
            "buffer": {"groups_per_step": 4, "max_staleness": 2},
            "algo": {"group_size": 3},
            "reward": {"functions": [{"use": "reward_functions:vowels"}]},
            **rooms,
        }
        port = own_port()
        address = f"tcp://127.0.0.1:{port}"
        endpoints = Endpoints(buffer=address, weights="", store=("", 0))
        self.run = RunDir(path=folder, config=from_mapping(settings), endpoints=endpoints)
        self.run.write()
        self.log = (folder / "buffer.log").open("ab")
        (folder / "trajectories").mkdir()
        row = {"lease_id": "t1", "status": "trained", "of": "a life that did not commit it"}
        (folder / "trajectories" / "step_0.jsonl").write_text(json.dumps(row) + '\n{"cut": "sho')
        self.ranks, self.receivers, self.actors = Ranks(address), [], []
        for index in range(3):
            self.receivers.append(FakeReceiver())
            self.actors.append(self.actor(index, address))
        self.start()
        self.publish(0)

    def actor(self, index: int, address: str) -> ActorLoop:
        return ActorLoop(
            f"actor-{index}",
            self.run.config,
            engine=FakeEngine(self.random.randint(2, 6)),
            tokenizer=Words(index),
            vocab_size=100,
            client=DealerClient(address, f"actor-{index}", "the buffer"),
            receiver=self.receivers[index],
            judge=InlineJudge(self.run.config.rewards),
        )

    def start(self) -> None:
        command = [sys.executable, "-m", "asyncgrpo.cli", "role", "buffer"]
        self.buffer = subprocess.Popen(
            [*command, "--run-dir", str(self.run.path)],
            env=ENVIRONMENT,
            stdout=self.log,
            stderr=self.log,
        )

    def kill(self) -> None:
        self.buffer.kill()
        self.buffer.wait()

    def publish(self, version: int) -> None:
        for receiver in self.receivers:
            receiver.waiting = version

    def tick(self) -> None:
        assert self.buffer.poll() is None, (self.run.path / "buffer.log").read_text()
        for actor in self.actors:
            actor.tick(0.001)
        before = self.ranks.step
        self.ranks.tick()
        if self.ranks.step != before:
            self.publish(self.ranks.step)

    def until(self, done, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, (self.run.path / "buffer.log").read_text()
            self.tick()

    def rest(self) -> None:
        """Some time later, at the moment when a group was sent and not acknowledged."""
        trained = self.ranks.step + self.random.randint(1, 3)
        self.until(lambda: self.ranks.step >= trained or self.ranks.is_over)
        self.until(lambda: any(a._unacked for a in self.actors) or self.ranks.is_over)

    def close(self) -> int:
        self.buffer.terminate()
        code = self.buffer.wait(60)
        for client in [*self.ranks.clients, *(actor._client for actor in self.actors)]:
            client.close()
        self.log.close()
        return code


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "asyncgrpo.cli", *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=600,
        check=False,
    )


def kill_often(folder: Path, seed: int, kills: int, **rooms) -> Stage:
    stage = Stage(folder, seed, **rooms)
    for _ in range(kills):
        stage.rest()
        stage.kill()
        while_killed = command("audit", str(folder)) if seed % 2 else None
        stage.start()
        if while_killed is not None:
            assert while_killed.returncode == 0, while_killed.stdout + while_killed.stderr
    stage.rest()
    running = command("audit", str(folder), "--json")
    assert running.returncode == 0, running.stdout + running.stderr
    assert stage.close() == 0
    done = command("audit", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    taken = [lease for seen in stage.ranks.batches.values() for lease, _ in seen]
    assert max(Counter(taken).values()) == 1
    columns, rows = LedgerReader(folder).query("SELECT lease_id, step, state, life FROM leases")
    known = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    for (step, _), seen in stage.ranks.batches.items():
        assert all(known[lease]["step"] == step for lease, _ in seen)
    _, lives = LedgerReader(folder).query("SELECT life FROM lives ORDER BY life")
    assert [life for (life,) in lives] == list(range(1, kills + 2))
    assert {row["life"] for row in known.values()} <= {life for (life,) in lives}
    for step in range(stage.ranks.step):
        lines = (folder / f"trajectories/step_{step}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        names = Counter((row["lease_id"], row["sample"]) for row in rows)
        assert max(names.values()) == 1
        leases = {row["lease_id"] for row in rows if row["status"] == "trained"}
        assert leases == {lease for r in (0, 1) for lease, _ in stage.ranks.batches[step, r]}
    return stage


@pytest.mark.slow
def test_a_buffer_process_killed_twice_goes_on_and_nothing_is_lost_or_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(sockets, "RESEND_SECONDS", 0.2)
    kill_often(tmp_path, seed=1, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("order", ["arrival", "ticket"])
def test_a_buffer_process_killed_many_times_goes_on(seed, order, tmp_path, monkeypatch):
    monkeypatch.setattr(sockets, "RESEND_SECONDS", 0.2)
    rooms = {"buffer": {"groups_per_step": 4, "max_staleness": 2, "order": order}}
    kill_often(tmp_path, seed=seed, kills=8, run={"max_steps": 100}, **rooms)
