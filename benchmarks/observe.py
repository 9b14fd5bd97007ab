"""What observing costs: CPU time of rows, endpoint and writers beside that of the learner's steps.

    python benchmarks/observe.py [--steps 120] [--seed 0] [--report-to tensorboard wandb]

One serial run of the tiny task in which a coin decides for each step whether it is observed as
always or not at all: no row, no writer, no histogram. Something reads /metrics once per second all
the time. CPU time, because other work on the machine counts less in it. Prints the calls' own
milliseconds per observed step, also as a share of a step without, and how both kinds of steps
differ in seconds per generated token, which is the same with the noise of the steps themselves.
vLLM's own counting is not in it: the engine of a serial run is the toy.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncgrpo.config import load_config
from asyncgrpo.launch.session import Session
from asyncgrpo.observe import exporter
from asyncgrpo.observe.recorder import RunRecorder

CONFIG = Path(__file__).parent.parent / "configs" / "tiny.toml"
WARM_UP = 4  # steps that compile and fill caches


class Watch:
    """Times the calls of observation, and lets them happen in the steps that a coin chooses."""

    def __init__(self, seed: int) -> None:
        self.is_on = True
        self._coin, self._num_rows = random.Random(seed), 0
        # By is_on: CPU seconds and generated tokens of each step.
        self.steps: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
        self._tokens = 0
        self.calls = self.scrapes = 0.0  # CPU seconds in observed steps, and of all scrapes
        self.num_scrapes = 0
        self._depth, self._since = 0, time.process_time()

    def timed(self, call: Callable[..., Any]) -> Callable[..., None]:
        """The call when it is on; calls within calls count once."""

        def wrapped(*arguments: Any) -> None:
            if "completion/tokens" in arguments[1:2]:
                self._tokens += sum(arguments[2])
            if not self.is_on:
                return
            start, self._depth = time.thread_time(), self._depth + 1
            call(*arguments)
            self._depth -= 1
            if not self._depth:
                self.calls += time.thread_time() - start

        return wrapped

    def ending_step(self, row: Callable[..., None]) -> Callable[..., None]:
        """Where one step ends and the next begins, observed or not."""

        def wrapped(*arguments: Any) -> None:
            row(*arguments)
            now = time.process_time()
            self.steps[self.is_on].append((now - self._since, self._tokens))
            self._tokens = 0
            self.is_on, self._since = self._coin.random() < 0.5, now
            self._num_rows += 1
            if self._num_rows == WARM_UP:
                self.steps, self.calls = {True: [], False: []}, 0.0

        return wrapped

    def scrape(self, run_dir: Path) -> None:
        """Reads /metrics once per second, for ever."""
        while True:
            time.sleep(1.0)
            for target in run_dir.glob("targets/*.json"):
                address = json.loads(target.read_text())[0]["targets"][0]
                urllib.request.urlopen(f"http://{address}/metrics", timeout=60).read()

    def timed_page(self, page: Callable[..., bytes]) -> Callable[..., bytes]:
        """One scrape, which its own thread serves."""

        def wrapped(*arguments: Any) -> bytes:
            start = time.thread_time()
            text = page(*arguments)
            self.scrapes += time.thread_time() - start
            self.num_scrapes += 1
            return text

        return wrapped


def pace(steps: list[tuple[float, int]]) -> tuple[float, float]:
    """CPU seconds per token, and the standard error of this ratio of sums."""
    ratio = sum(seconds for seconds, _ in steps) / sum(tokens for _, tokens in steps)
    spread = statistics.stdev(seconds - ratio * tokens for seconds, tokens in steps)
    return ratio, spread / statistics.fmean(tokens for _, tokens in steps) / len(steps) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-to", nargs="*", default=[])
    asked = parser.parse_args()
    watch = Watch(asked.seed)
    RunRecorder.row = watch.ending_step(watch.timed(RunRecorder.row))
    exporter.Exporter.observe = watch.timed(exporter.Exporter.observe)
    exporter.generate_latest = watch.timed_page(exporter.generate_latest)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run.dir": json.dumps(f"{folder}/run"),
            "run.max_steps": WARM_UP + asked.steps,
            "run.seed": asked.seed,
            "eval": "[]",  # its answers would count as work of some steps only
            "observe.report_to": json.dumps(asked.report_to),
        }
        overrides = [f"{name}={value}" for name, value in settings.items()]
        threading.Thread(target=watch.scrape, args=[Path(folder, "run")], daemon=True).start()
        Session(load_config(CONFIG, overrides)).run_serially()
    (on, on_error), (off, off_error) = (pace(watch.steps[kind]) for kind in (True, False))
    step = statistics.fmean(seconds for seconds, _ in watch.steps[False])
    calls, scrape = watch.calls / len(watch.steps[True]), watch.scrapes / watch.num_scrapes
    print(f"calls {1000 * calls:.2f} ms of a step of {1000 * step:.0f} ms: {calls / step:.2%}")
    print(f"a scrape {1000 * scrape:.2f} ms; every second of one core: {scrape:.2%}")
    print(
        f"{len(watch.steps[True])} steps with, {len(watch.steps[False])} without: "
        f"{on / off - 1:+.2%} per token, standard error {math.hypot(on_error, off_error) / off:.2%}"
    )


if __name__ == "__main__":
    sys.exit(main())
