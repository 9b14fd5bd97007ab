"""The folder grafana/: up to date, sound as files, and only about metrics that exist."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import load_script

from asyncgrpo.observe.metrics import METRICS

ROOT = Path(__file__).parent.parent
GRAFANA = ROOT / "grafana"
PROVISIONING = GRAFANA / "provisioning"
BOARDS = sorted((PROVISIONING / "dashboards").glob("*.json"))
KINDS = {"timeseries", "stat", "gauge", "bargauge", "table"}
SERIES = re.compile(r"((?:asyncgrpo|vllm|process)[\w:]+|\bup)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(=~|=)"([^"]*)"')
TARGET_LABELS = {"run", "role", "job"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    return [rule for group in read(GRAFANA / "rules.yml")["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def expressions() -> Iterator[str]:
    for board in BOARDS:
        for panel in json.loads(board.read_text())["panels"]:
            yield from (target["expr"] for target in panel["targets"])
    yield from (rule["expr"] for rule in rules())


def series_names() -> set[str]:
    """What the endpoints can serve of ours."""
    names = set()
    for metric in METRICS.values():
        ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names |= {metric.prometheus_name + end for end in ends}
    return names


def test_generating_anew_gives_the_same_files() -> None:
    files = load_script(GRAFANA / "generate.py").files()
    stale = [p.name for p, text in files.items() if p.read_text(encoding="utf-8") != text]
    assert stale == [], "run make dashboards"
    assert {path for path in files if path.suffix == ".json"} == set(BOARDS)


def test_every_metric_of_a_panel_or_rule_exists() -> None:
    ours = series_names()
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    found = {name for text in expressions() for name, _ in SERIES.findall(text)}
    assert {name for name in found if name.startswith("asyncgrpo_")} <= ours
    assert {name for name in found if name.startswith("asyncgrpo:")} <= recorded
    assert len(found & ours) > 60


def test_every_metric_of_vllm_is_one_that_it_declares() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    declared = set(re.findall(r'name="(vllm:\w+)"', source))
    found = {n for text in expressions() for n, _ in SERIES.findall(text) if n.startswith("vllm:")}
    assert len(found) >= 8
    assert {re.sub(r"_(total|bucket)$", "", name) for name in found} <= declared


def test_matchers_name_labels_that_the_metric_has_and_values_that_it_takes() -> None:
    values: dict[tuple[str, str], set[str]] = {}
    for metric in METRICS.values():
        for label, value in metric.labels.items():
            values.setdefault((metric.prometheus_name, label), set()).add(value)
    checked = 0
    for text in expressions():
        for name, matchers in SERIES.findall(text):
            for label, kind, wanted in MATCHER.findall(matchers):
                if label in TARGET_LABELS:
                    continue
                known = values[name, label]
                pattern = wanted if kind == "=~" else re.escape(wanted)
                assert any(re.fullmatch(pattern, value) for value in known), (name, label, wanted)
                checked += 1
    assert checked >= 5


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_dashboard_has_its_own_place_for_every_panel_and_asks_for_one_run(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"] == f"asyncgrpo-{path.stem}"
    assert [v["name"] for v in board["templating"]["list"]] == ["datasource", "run"]
    panels = board["panels"]
    for name in ("id", "title"):
        assert max(Counter(panel[name] for panel in panels).values()) == 1
    for panel in panels:
        assert panel["type"] in KINDS
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        refs = [target["refId"] for target in panel["targets"]]
        assert refs == [chr(ord("A") + index) for index in range(len(refs))]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert all('run="$run"' in labels for _, labels in SERIES.findall(target["expr"]))
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y


def lost(given: Any, kept: Any, place: str = "") -> Iterator[str]:
    """Places of what is not the same after a round trip; keys may be added."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key in kept:
                yield from lost(value, kept[key], f"{place}.{key}")
            else:
                yield f"{place}.{key}"
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for index, pair in enumerate(zip(given, kept, strict=True)):
            yield from lost(*pair, f"{place}[{index}]")
    elif given != kept:
        yield place


def through_sdk(board: dict[str, Any]) -> Any:
    """A dashboard as Grafana's foundation SDK reads and writes it."""
    sdk = pytest.importorskip("grafana_foundation_sdk", reason="make install")
    assert sdk
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    return json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_no_key_of_a_dashboard_is_unknown_to_the_foundation_sdk(path: Path) -> None:
    board = json.loads(path.read_text())
    assert list(lost(board, through_sdk(board))) == []


def test_a_misspelt_key_is_found_by_the_foundation_sdk() -> None:
    board = json.loads(BOARDS[0].read_text())
    board["panels"][0]["fieldConfig"]["defaults"]["untis"] = "s"
    board["panels"][0]["targets"][0]["legendFromat"] = "x"
    assert list(lost(board, through_sdk(board))) == [
        ".panels[0].fieldConfig.defaults.untis",
        ".panels[0].targets[0].legendFromat",
    ]


def test_grafana_alerts_on_what_prometheus_alerts_on() -> None:
    (group,) = read(PROVISIONING / "alerting" / "rules.yml")["groups"]
    theirs = {rule["title"]: rule for rule in group["rules"]}
    assert set(theirs) == set(alerts())
    (source,) = read(PROVISIONING / "datasources" / "prometheus.yml")["datasources"]
    for name, alert in alerts().items():
        rule = theirs[name]
        query, threshold = rule["data"]
        assert query["model"]["expr"] == alert["expr"]
        assert query["datasourceUid"] == source["uid"]
        assert threshold["model"]["expression"] == query["refId"]
        assert rule["condition"] == threshold["refId"]
        assert rule["noDataState"] == "OK"
        assert (rule["for"], rule["labels"]) == (alert["for"], alert["labels"])
        assert "$value " not in rule["annotations"]["summary"]
    assert len({rule["uid"] for rule in theirs.values()}) == len(theirs)


def test_every_alert_says_what_to_do_and_has_its_paragraph_and_both_kinds_of_test() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^### (\w+)$", page, re.MULTILINE))
    assert headings == set(alerts())
    cases = [
        case
        for test in read(GRAFANA / "rules_test.yml")["tests"]
        for case in test["alert_rule_test"]
    ]
    for name, alert in alerts().items():
        assert alert["annotations"]["runbook"].endswith(f"(docs/monitoring.md#{name.lower()})")
        fires = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == name}
        assert fires == {True, False}, name


def test_prometheus_and_grafana_agree_on_interval_address_and_folder() -> None:
    prometheus = read(GRAFANA / "prometheus.yml")
    (source,) = read(PROVISIONING / "datasources" / "prometheus.yml")["datasources"]
    (provider,) = read(PROVISIONING / "dashboards" / "asyncgrpo.yml")["providers"]
    compose = read(GRAFANA / "docker-compose.yml")["services"]
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    assert (
        f"--web.listen-address={source['url'].removeprefix('http://')}"
        in (compose["prometheus"]["command"])
    )
    (mount,) = compose["grafana"]["volumes"]
    where = mount.split(":")[1]
    assert provider["options"]["path"] == f"{where}/dashboards"
    home = compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (PROVISIONING / Path(home).relative_to(where)).is_file()
