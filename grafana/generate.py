"""Writes the dashboards and rules of this folder anew from its TOML files: `make dashboards`.

In their expressions `{loss}` stands for the metric of that name in asyncgrpo/observe/metrics.toml,
with its labels: `{groups_filtered_all_wrong}`; or for all of a family: `{groups_ended}`. A part of
a histogram is `{step_seconds.sum}`, one value per run `{setting/actors.run}`, a further matcher
`{up,role="buffer"}`, and `[$]` the window for rates that Grafana chooses.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from asyncgrpo.observe.metrics import METRICS

HERE = Path(__file__).parent
NOTE = "# Written by generate.py (make dashboards): change alerts.toml.\n"
PLACEHOLDER = re.compile(
    r"\{(?P<name>[\w/:]+)(?:\.(?P<part>bucket|sum|count|run))?(?P<more>,[^{}]*)?\}"
)
OTHERS = re.compile(r"vllm:\w+|process_\w+|up|asyncgrpo:\w+:\w+")  # not of the table
FAMILIES = {metric.family: metric for metric in METRICS.values()}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {"legend": LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}},
    "stat": {"reduceOptions": LAST, "colorMode": "value", "graphMode": "area", "textMode": "auto"},
    "gauge": {"reduceOptions": LAST, "showThresholdMarkers": True, "showThresholdLabels": False},
    "bargauge": {"reduceOptions": LAST, "displayMode": "gradient", "orientation": "horizontal"},
    "table": {"showHeader": True, "cellHeight": "sm"},
}
HEIGHTS, WIDTH = {"stat": 4, "gauge": 4}, 8


def expression(text: str, run: str = "") -> str:
    """PromQL of a text with placeholders; run: the matcher that a dashboard adds."""

    def replace(found: re.Match[str]) -> str:
        name, part, more = found["name"], found["part"], found["more"] or ""
        matchers = [run, more.removeprefix(",")]
        if not OTHERS.fullmatch(name):
            metric = METRICS.get(name) or FAMILIES[name]
            labels = metric.labels if name in METRICS else {}
            matchers += [f'{label}="{value}"' for label, value in labels.items() if value]
            name = metric.prometheus_name
        suffix = f"_{part}" if part not in (None, "run") else ""
        chosen = ",".join(filter(None, matchers))
        series = f"{name}{suffix}{{{chosen}}}" if chosen else name + suffix
        return f"max by (run) ({series})" if part == "run" else series

    return PLACEHOLDER.sub(replace, text).replace("[$]", "[$__rate_interval]")


def queries(row: dict[str, Any]) -> dict[str, str]:
    """Legend and PromQL of each line of a panel."""
    shown = dict(row.get("show", {}))
    if name := row.get("quantiles"):
        rate = f"sum by (le) (rate({{{name}.bucket}}[$]))"
        shown = {f"p{q}": f"histogram_quantile(0.{q}, {rate})" for q in (50, 90, 99)}
    return {legend: expression(text, 'run="$run"') for legend, text in shown.items()}


def meanings(row: dict[str, Any]) -> list[str]:
    """What the table says about the metrics of a panel."""
    text = " ".join([*row.get("show", {}).values(), f"{{{row.get('quantiles')}}}"])
    names = dict.fromkeys(found["name"] for found in PLACEHOLDER.finditer(text))
    metrics = [METRICS.get(name) or FAMILIES.get(name) for name in names]
    return [f"- {m.prometheus_name}: {m.help}" for m in metrics if m]


def panel(row: dict[str, Any], number: int, x: int, y: int) -> dict[str, Any]:
    """One panel as Grafana stores it."""
    kind = row.get("kind", "timeseries")
    defaults: dict[str, Any] = {"unit": row.get("unit", "none"), "custom": {}}
    if "maximum" in row:
        defaults |= {"min": 0, "max": row["maximum"]}
    if kind == "timeseries":
        stacking = {"mode": "normal" if row.get("stacked") else "none", "group": "A"}
        defaults["custom"] = {"lineWidth": 1, "fillOpacity": 10, "stacking": stacking}
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": SOURCE,
            "expr": text,
            "legendFormat": legend,
            "range": kind != "table",
            "instant": kind == "table",
            "format": "table" if kind == "table" else "time_series",
        }
        for index, (legend, text) in enumerate(queries(row).items())
    ]
    return {
        "id": number,
        "type": kind,
        "title": row["title"],
        "description": "\n".join([row["says"], "", *meanings(row)]).strip(),
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": row.get("width", WIDTH), "h": HEIGHTS.get(kind, 8)},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": OPTIONS[kind],
        "targets": targets,
    }


def placed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Panels from left to right; a line is as high as its highest panel."""
    panels: list[dict[str, Any]] = []
    x = y = 0
    for number, row in enumerate(rows, start=1):
        width = row.get("width", WIDTH)
        if x + width > 24:
            x, y = 0, max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
        panels.append(panel(row, number, x, y))
        x += width
    return panels


def dashboard(name: str, content: dict[str, Any]) -> dict[str, Any]:
    """One dashboard, with a choice of data source and run."""
    runs = 'label_values(up{job="asyncgrpo"}, run)'
    variables = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "run",
            "label": "Run",
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": runs, "refId": "run"},
            "refresh": 2,  # when the time range changes
            "sort": 2,  # descending: names of runs begin with their time
        },
    ]
    link = {"type": "dashboards", "tags": ["asyncgrpo"], "title": "asyncgrpo", "asDropdown": True}
    return {
        "uid": f"asyncgrpo-{name}",
        "title": content["title"],
        "description": content["says"],
        "tags": ["asyncgrpo"],
        "schemaVersion": 41,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": variables},
        "links": [{**link, "includeVars": True, "keepTime": True}],
        "annotations": {"list": []},
        "panels": placed(content["panels"]),
    }


def condition(alert: dict[str, str]) -> str:
    """PromQL of the series for which an alert holds."""
    return expression(f"{alert['value']} {alert['op']} {alert['limit']}")


def prometheus_rules(content: dict[str, Any]) -> dict[str, Any]:
    """rules.yml: what is recorded for dashboards and alerts, and the alerts."""
    records = [{"record": n, "expr": expression(text)} for n, text in content["record"].items()]
    alerts = [
        {
            "alert": name,
            "expr": condition(alert),
            "for": alert["for"],
            "labels": {"severity": alert["severity"]},
            "annotations": annotations(name, alert),
        }
        for name, alert in content["alerts"].items()
    ]
    groups = {"asyncgrpo-records": records, "asyncgrpo-alerts": alerts}
    return {"groups": [{"name": name, "rules": rules} for name, rules in groups.items()]}


def annotations(name: str, alert: dict[str, str]) -> dict[str, str]:
    page = f"docs/monitoring.md#{name.lower()}"
    return {"summary": alert["says"], "runbook": f"{alert['runbook']} ({page})"}


def any_value() -> dict[str, Any]:
    """The query returns only what holds: whatever comes back is above the threshold."""
    return {"evaluator": {"type": "gt", "params": [-1e300]}}


def grafana_rules(content: dict[str, Any]) -> dict[str, Any]:
    """The same alerts for Grafana's own alerting."""
    rules = [
        {
            "uid": f"asyncgrpo-{name.lower()}",
            "title": name,
            "condition": "B",
            "data": [
                query("A", "prometheus", {"expr": condition(alert), "instant": True}),
                query(
                    "B",
                    "__expr__",
                    {"type": "threshold", "expression": "A", "conditions": [any_value()]},
                ),
            ],
            "noDataState": "OK",
            "execErrState": "Error",
            "for": alert["for"],
            "labels": {"severity": alert["severity"]},
            "annotations": {
                key: text.replace("$value ", "$values.A.Value ")
                for key, text in annotations(name, alert).items()
            },
        }
        for name, alert in content["alerts"].items()
    ]
    group = {"orgId": 1, "name": "asyncgrpo", "folder": "asyncgrpo", "interval": "30s"}
    return {"apiVersion": 1, "groups": [{**group, "rules": rules}]}


def query(ref: str, source: str, model: dict[str, Any]) -> dict[str, Any]:
    return {
        "refId": ref,
        "relativeTimeRange": {"from": 600, "to": 0},
        "datasourceUid": source,
        "model": {"refId": ref, "datasource": {"type": source, "uid": source}, **model},
    }


def files() -> dict[Path, str]:
    """Every generated file and its text."""
    boards = tomllib.loads((HERE / "dashboards.toml").read_text(encoding="utf-8"))
    alerts = tomllib.loads((HERE / "alerts.toml").read_text(encoding="utf-8"))
    provisioning = HERE / "provisioning"
    texts = {
        provisioning / "dashboards" / f"{name}.json": json.dumps(dashboard(name, board), indent=1)
        for name, board in boards.items()
    }
    rules = {
        HERE / "rules.yml": prometheus_rules(alerts),
        provisioning / "alerting" / "rules.yml": grafana_rules(alerts),
    }
    return {path: text + "\n" for path, text in texts.items()} | {
        path: NOTE + yaml.safe_dump(rule, sort_keys=False, width=100)
        for path, rule in rules.items()
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(HERE))
