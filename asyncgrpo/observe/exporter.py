"""A Prometheus endpoint for one process, fed with plain numbers by metric name."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from asyncgrpo.errors import ConfigError
from asyncgrpo.observe.metrics import metric_of


def own_address(endpoint: str) -> str:
    """This machine's address on the way to "tcp://HOST:PORT"; nothing is sent."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])


class Exporter(Collector):
    """Serves the last values that `show` was given at http://HOST:PORT/metrics: numbers only."""

    def __init__(self, role: str, port: int, run_dir: Path, host: str = "127.0.0.1") -> None:
        self._role = role
        self._values: dict[str, float] = {}
        registry = CollectorRegistry()
        registry.register(self)
        try:
            server, _ = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise ConfigError(
                f"metrics port {port} of {role} cannot be used: {error}; choose another "
                "launch.metrics_port, or 0 for any free port"
            ) from None
        self._announce(run_dir / "targets", f"{host}:{server.server_port}")

    def show(self, values: Mapping[str, float]) -> None:
        """Replaces values by name; names that are not in the table are an error (KeyError)."""
        for name, value in values.items():
            metric_of(name)
            self._values[name] = float(value)

    def collect(self) -> Iterator[Metric]:
        """What Prometheus reads."""
        shown: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for name, value in list(self._values.items()):
            metric, own = metric_of(name)
            labels = {"role": self._role, **own}
            if metric.name not in shown:
                family = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
                help_text = f"{metric.unit}; rises when {metric.rises}"
                base = metric.prometheus_name.removesuffix("_total")
                shown[metric.name] = family(base, help_text, labels=list(labels))
            shown[metric.name].add_metric(list(labels.values()), value)
        yield from shown.values()

    def _announce(self, folder: Path, address: str) -> None:
        """Writes a Prometheus file_sd target, whole or not at all."""
        folder.mkdir(exist_ok=True)
        target = [{"targets": [address], "labels": {"role": self._role}}]
        draft = folder / f".{self._role}.tmp"
        draft.write_text(json.dumps(target))
        draft.rename(folder / f"{self._role}.json")
