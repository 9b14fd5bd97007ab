"""A run across two hosts, which are network namespaces: what a cut link does to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_launch import SIX_STEPS, TESTS

from asyncgrpo.data.tiny import build_untrained
from asyncgrpo.rows import whole_rows

READY_SECONDS = 15.0  # then an actor that does not answer is evicted
HEAD, OTHER = "10.77.0.1", "10.77.0.2"
SETTINGS = [
    f"launch.host={HEAD}",
    "observe.metrics_host=auto",
    "actor.engine=toy",
    "run.max_steps=100000",
    f"weights.ready_timeout_seconds={READY_SECONDS}",
    "weights.transfer_timeout_seconds=20.0",
    "weights.loaded_timeout_seconds=20.0",
    "buffer.lease_deadline_seconds=20.0",
]


def why_not() -> str:
    """Why there can be no namespaces here; "" when there can."""
    if shutil.which("ip") is None:
        return "no `ip netns` here (Debian: apt-get install iproute2)"
    name = f"asyncgrpo-probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "network namespaces need root"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


REASON = why_not()
pytestmark = [
    pytest.mark.netns,
    pytest.mark.slow,
    pytest.mark.skipif(bool(REASON), reason=REASON),
]


class Hosts:
    """Two namespaces with a cable between them, and processes of ours inside."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._running = folder, list[subprocess.Popen[bytes]]()
        self._names = {host: f"asyncgrpo-{os.getpid()}-{host}" for host in (HEAD, OTHER)}
        for name in self._names.values():
            _ip("netns", "add", name)
        head, other = self._names.values()
        _ip("link", "add", "veth0", "netns", head, "type", "veth", "peer", "veth0", "netns", other)
        for host, name in self._names.items():
            _ip("-n", name, "addr", "add", f"{host}/24", "dev", "veth0")
            for device in ("lo", "veth0"):
                _ip("-n", name, "link", "set", device, "up")

    def start(self, host: str, log: str, *words: str) -> subprocess.Popen[bytes]:
        command = [*("ip", "netns", "exec", self._names[host]), sys.executable]
        with (self._folder / f"{log}.log").open("wb") as out:
            process = subprocess.Popen(
                [*command, "-m", "asyncgrpo.cli", *words],
                cwd=TESTS,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self._running.append(process)
        return process

    def shown(self, log: str) -> str:
        return (self._folder / f"{log}.log").read_text(errors="replace")

    def link(self, state: str) -> None:
        _ip("-n", self._names[OTHER], "link", "set", "veth0", state)

    def remove(self) -> None:
        for process in self._running:
            process.terminate()  # torchrun takes its ranks along
        for process in self._running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for name in self._names.values():
            _ip("netns", "del", name)

    def until(self, done: Callable[[], object], what: str, seconds: float = 200) -> None:
        end = time.monotonic() + seconds
        while not done():
            ended = [p.args for p in self._running if p.poll() is not None]
            shown = "\n".join(
                file.read_text(errors="replace")[-2000:] for file in self._folder.glob("*.log")
            )
            assert not ended, f"{ended}\n{shown}"
            assert time.monotonic() < end, f"not within {seconds:g} s: {what}\n{shown}"
            time.sleep(0.1)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    yield made
    made.remove()


def test_an_actor_elsewhere_outlives_a_short_cut_and_is_let_in_again_after_a_long_one(
    hosts: Hosts, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    model = build_untrained(tmp_path / "untrained", True, 5)
    settings = [*SIX_STEPS, *SETTINGS, f"model.path={model}"]
    own = [word for setting in settings for word in ("--set", setting)]
    buffer = hosts.start(HEAD, "buffer", "buffer", "--run-dir", str(run_dir), *own)
    hosts.until(lambda: "listening on" in hosts.shown("buffer"), "the buffer listens")
    join = ("--join", str(run_dir))
    learner = hosts.start(HEAD, "learner", "learner", *join)
    near = hosts.start(HEAD, "near", "actor", *join, "--index", "0")
    far = hosts.start(OTHER, "far", "actor", *join, "--index", "1")

    def rows() -> list[dict]:
        return [row for row in whole_rows(run_dir / "metrics.jsonl") if "loss" in row]

    def trained_of_far(first: int) -> bool:
        files = (run_dir / f"trajectories/step_{row['step']}.jsonl" for row in rows()[first:])
        return any(
            '"actor-1' in file.read_text(errors="replace") for file in files if file.exists()
        )

    def takes_part() -> bool:
        last = rows()[-1:]
        return bool(last) and last[0]["publish/actors"] == 2

    hosts.until(lambda: takes_part() and trained_of_far(0), "both actors take part")
    target = json.loads((run_dir / "targets" / "actor-1.json").read_text())[0]["targets"][0]
    assert target.startswith(f"{OTHER}:")
    assert (run_dir / "keys" / "client.key").stat().st_mode & 0o777 == 0o600

    hosts.link("down")
    time.sleep(2)
    hosts.link("up")
    seen = len(rows())
    hosts.until(lambda: takes_part() and trained_of_far(seen + 1), "it goes on after a short cut")
    assert rows()[-1]["publish/evictions"] == 0

    hosts.link("down")
    hosts.until(lambda: not takes_part(), "it is evicted")
    seen = len(rows())
    hosts.until(lambda: len(rows()) >= seen + 5, "the others train on")
    hosts.link("up")
    seen = len(rows())
    hosts.until(lambda: takes_part() and trained_of_far(seen + 1), "it is let in again")
    assert rows()[-1]["publish/evictions"] >= 1  # a slow machine may be late once more

    for process in (learner, near, far, buffer):
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0 or process is learner  # torchrun's is its rank's
    assert hosts.start(HEAD, "audit", "audit", str(run_dir)).wait() == 0, hosts.shown("audit")
