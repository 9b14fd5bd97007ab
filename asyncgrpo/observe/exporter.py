"""A Prometheus endpoint for one process, fed with plain numbers by metric name."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
from numpy.typing import ArrayLike, NDArray
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from asyncgrpo.errors import ConfigError
from asyncgrpo.observe.metrics import metric_of
from asyncgrpo.rows import replace_file
from asyncgrpo.rundir import RunDir
from asyncgrpo.wire.address import own_address


class Exporter(Collector):
    """Serves /metrics and /healthz: last values, histograms, and the process's own. Numbers only.

    What other libraries of the process keep for Prometheus, as vLLM does, is served beside ours.
    """

    def __init__(self, role: str, port: int, run_dir: Path, host: str = "127.0.0.1") -> None:
        self.role = role
        self._values: dict[str, float] = {}
        self._histograms: dict[str, tuple[NDArray[np.int64], float]] = {}  # per bucket; the sum
        self.told = time.monotonic()  # when the process's loop last said something
        registry = CollectorRegistry()
        registry.register(self)
        handler = type("Handler", (_Handler,), {"registry": registry, "exporter": self})
        try:
            server = ThreadingHTTPServer((host, port), handler)
        except OSError as error:
            raise ConfigError(
                f"metrics port {port} of {role} on {host} cannot be used: {error}; choose another "
                "launch.metrics_port, 0 for any free port, or observe.metrics_host='auto' when "
                "the run is on several machines"
            ) from None
        Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        self._target = run_dir / "targets" / f"{role}.json"
        self._target.parent.mkdir(exist_ok=True)
        # Not the port: a process that begins anew goes on with its series.
        labels = {"role": role, "run": run_dir.name, "instance": f"{run_dir.name}/{role}"}
        target = {"targets": [f"{host}:{server.server_port}"], "labels": labels}
        replace_file(self._target, json.dumps([target]))  # as file_sd of Prometheus reads it

    def show(self, values: Mapping[str, float]) -> None:
        """Replaces values by name; histograms count them. KeyError for names not in the table."""
        plain = {}
        for name, value in values.items():
            if metric_of(name)[0].kind == "histogram":
                self.observe(name, [value])
            else:
                plain[name] = float(value)
        kept = self._values
        if any(name.startswith("lag_") for name in plain):  # rows name only lags that they have
            kept = {name: value for name, value in kept.items() if not name.startswith("lag_")}
        self._values, self.told = {**kept, **plain}, time.monotonic()

    def observe(self, name: str, values: ArrayLike) -> None:
        """Counts values, of any shape, into a histogram of the table."""
        new = np.asarray(values, np.float64).ravel()
        new = new[np.isfinite(new)]  # one NaN would make every later sum NaN
        uppers = metric_of(name)[0].buckets
        places = np.searchsorted(uppers, new)  # a bucket holds its upper bound
        tally = np.bincount(places, minlength=len(uppers))
        counts, total = self._histograms.get(name, (np.zeros_like(tally), 0.0))
        self._histograms[name] = (counts + tally, total + float(new.sum()))

    def close(self) -> None:
        """Takes the process off the targets: it ends as it should."""
        self._target.unlink(missing_ok=True)

    def collect(self) -> Iterator[Metric]:
        """What Prometheus reads."""
        shown: dict[str, Metric] = {}
        age = time.monotonic() - self.told
        for name, value in {**self._values, "report_age_seconds": age}.items():
            family, labels = self._family(shown, name)
            family.add_sample(metric_of(name)[0].prometheus_name, labels, value)
        for name, (counts, total) in list(self._histograms.items()):
            family, labels = self._family(shown, name)
            for upper, count in zip(metric_of(name)[0].buckets, counts.cumsum(), strict=True):
                bucket = {**labels, "le": floatToGoString(upper)}
                family.add_sample(f"{family.name}_bucket", bucket, int(count))
            family.add_sample(f"{family.name}_count", labels, int(counts.sum()))
            family.add_sample(f"{family.name}_sum", labels, total)
        yield from shown.values()
        yield from REGISTRY.collect()

    def _family(self, shown: dict[str, Metric], name: str) -> tuple[Metric, dict[str, str]]:
        """The family of a name, made when it is new, and the labels."""
        metric, labels = metric_of(name)
        base = metric.prometheus_name.removesuffix("_total")
        family = shown.setdefault(base, Metric(base, metric.help, metric.kind))
        return family, {"role": self.role, **labels}


def serve_metrics(run: RunDir, role: str) -> Exporter:
    """The exporter of a role, where observe.metrics_host says."""
    launch, host = run.config.launch, run.config.observe.metrics_host
    own = own_address(*run.endpoints.store)
    port, asked = run.endpoints.metrics.get(role, 0), own if host == "auto" else host
    exporter = Exporter(role, port, run.path, asked)
    if host != "auto" and not launch.on_loopback and own != launch.host:
        exporter.close()  # on loopback of another machine: Prometheus would look on its own
    return exporter


class _Handler(MetricsHandler):
    """Always the plain text format: in OpenMetrics the client renames vllm:NAME to vllm_NAME."""

    exporter: Exporter

    def do_GET(self) -> None:
        body, kind = generate_latest(self.registry), CONTENT_TYPE_LATEST
        if self.path == "/healthz":
            age = time.monotonic() - self.exporter.told
            health = {"role": self.exporter.role, "report_age_seconds": age}
            body, kind = json.dumps(health).encode(), "application/json"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
