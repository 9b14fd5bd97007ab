"""The real Prometheus server and promtool: the rules, and a run that is scraped as it is."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import load_script
from prometheus_client import CollectorRegistry, generate_latest
from test_grafana import BOARDS, GRAFANA
from test_launch import TWO_BLOCKS, Launch

from asyncgrpo.data.tiny import build_untrained
from asyncgrpo.launch.preflight import own_port
from asyncgrpo.observe.exporter import Exporter
from asyncgrpo.observe.metrics import METRICS

pytestmark = [
    pytest.mark.prometheus,
    pytest.mark.skipif(shutil.which("promtool") is None, reason="apt-get install prometheus"),
]
CHANGED = {  # of grafana/prometheus.yml: a short run wants short intervals
    "scrape_interval: 2s": "scrape_interval: 1s",
    "evaluation_interval: 5s": "evaluation_interval: 1s",
    "refresh_interval: 5s": "refresh_interval: 1s",
}
# Every panel has something to show: a reference, corrections that mask, two evaluations.
SETTINGS = [
    "run.max_steps=5000",
    "algo.kl_coef=0.01",
    'algo.correction=["geometric_mask","icepop"]',
    f"eval={TWO_BLOCKS}",
]


def promtool(*arguments: str | Path, stdin: bytes = b"") -> str:
    done = subprocess.run(["promtool", *map(str, arguments)], input=stdin, capture_output=True)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    said = promtool("check", "config", GRAFANA / "prometheus.yml")
    assert "1 rule files found" in said


def test_each_alert_fires_when_it_should_and_not_otherwise() -> None:
    assert "SUCCESS" in promtool("test", "rules", GRAFANA / "rules_test.yml")


def test_promtool_has_no_complaint_about_any_metric(tmp_path) -> None:
    exporter, registry = Exporter("learner-0", 0, tmp_path), CollectorRegistry()
    exporter.show({name: 1.0 for name in METRICS})
    registry.register(exporter)
    text = generate_latest(registry)
    ours = text[: text.index(b"# HELP python")]
    assert promtool("check", "metrics", stdin=ours) == ""


class Prometheus:
    """A server of ours on grafana/prometheus.yml."""

    def __init__(self, folder: Path, runs: Path) -> None:
        text = (GRAFANA / "prometheus.yml").read_text()
        for before, after in {**CHANGED, "../runs/": f"{runs}/"}.items():
            assert before in text
            text = text.replace(before, after)
        (folder / "prometheus.yml").write_text(text)
        shutil.copy(GRAFANA / "rules.yml", folder)
        port = own_port()
        self.api = f"http://127.0.0.1:{port}/api/v1"
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}"]
        command += [f"--storage.tsdb.path={folder / 'data'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}"]
        with (folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def series(self, expression: str, seconds: float) -> list[dict]:
        """What came in the last seconds, with numbers only; AssertionError on a bad query."""
        now = time.time()
        query = {"query": expression, "start": now - seconds, "end": now, "step": 1}
        url = f"{self.api}/query_range?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                found = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}: {error.read().decode()}") from None
        return [row for row in found if any(value != "NaN" for _, value in row["values"])]

    def targets(self) -> set[str]:
        try:
            with urllib.request.urlopen(f"{self.api}/targets", timeout=60) as answer:
                active = json.load(answer)["data"]["activeTargets"]
        except OSError:
            return {"Prometheus does not answer"}
        return {t["labels"]["role"] for t in active if t["health"] == "up"}


def shown() -> Iterator[tuple[str, str]]:
    """Where, and the expression: of every panel, recording rule, and both sides of every alert."""
    for board in BOARDS:
        for panel in json.loads(board.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{board.stem}, {panel['title']}", target["expr"]
    expression = load_script(GRAFANA / "generate.py").expression
    rules = tomllib.loads((GRAFANA / "alerts.toml").read_text())
    for name, text in rules["record"].items():
        yield name, expression(text)
    for name, alert in rules["alerts"].items():
        yield f"{name}, value", expression(alert["value"])
        yield f"{name}, limit", expression(alert["limit"])


def without_data(server: Prometheus, run: str, seconds: float) -> list[str]:
    """What is shown and had no value in the last seconds."""
    empty = []
    for place, text in shown():
        query = text.replace("$run", run).replace("$__rate_interval", "10s")
        if not server.series(re.sub(r"\b\d+[mh]\b", "10s", query), seconds):
            empty.append(f"{place}: {query}")
    return empty


@pytest.mark.engine
def test_every_panel_and_rule_has_data_of_a_real_run_across_the_restart_of_an_actor(tmp_path):
    start = time.time()
    (tmp_path / "runs").mkdir()
    model = build_untrained(tmp_path / "untrained", True, 5)
    server = Prometheus(tmp_path, tmp_path / "runs")
    run = Launch(tmp_path / "runs", model, *SETTINGS, engine="vllm")
    try:
        run.until(lambda: len(run.targets()) == 5, "told Prometheus where it listens")
        run.until(lambda: len(server.targets()) == 5, "scraped by Prometheus")
        run.until_training()
        run.find("actor", "1").kill()
        began = 'changes(process_start_time_seconds{role="actor-1"}[1h]) > 0'
        run.until(lambda: server.series(began, 5), "scraped again after a restart")
        steps = len(run.rows())
        run.until(lambda: len(run.rows()) > steps + 20, "trained on")
        end = time.monotonic() + 120  # a few more scrapes, and evaluations of the rules
        while empty := without_data(server, run.run_dir.name, time.time() - start):
            assert time.monotonic() < end, empty
            time.sleep(0.5)
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 130
        end = time.monotonic() + 120
        while server.targets() and time.monotonic() < end:
            time.sleep(0.2)
        assert server.targets() == set()
    finally:
        server.process.terminate()
        server.process.wait(120)
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGTERM)
            run.wait()
