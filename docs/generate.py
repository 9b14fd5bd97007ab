"""Writes the generated parts of docs/*.md: `make docs`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from asyncgrpo.aliases import Entry, entries
from asyncgrpo.config import Config
from asyncgrpo.observe.metrics import METRICS, Metric
from asyncgrpo.reference import settings

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- /generated -->)", re.DOTALL)
TITLES = {
    "not_needed": "Not needed: taken with a notice",
    "not_yet": "Not offered yet: taken with a notice",
    "refused": "Refused, unless they are off: they would change what is learned",
}


def called() -> str:
    """Names of TRL and XTuner beside ours."""
    rows = [
        (_codes(row.trl), _codes(row.xtuner), _codes(row.ours), _prose(row.note))
        for row in _of("called")
    ]
    return _table(("TRL", "XTuner", "here", "what differs"), rows)


def left_out() -> str:
    """What other trainers have and we do not."""
    return "\n".join(
        f"### {title}\n\n"
        + _table(
            ("names", "why, or what to do"),
            [(_codes(row.names), _prose(row.note)) for row in _of(kind)],
        )
        for kind, title in TITLES.items()
    )


def reference() -> str:
    """Every setting, a table for each room."""
    return "\n".join(f"## {room}\n\n{_room(room)}" for room in Config.model_fields)


def _room(room: str) -> str:
    rows = [
        (
            _codes([setting.key]),
            _codes([setting.default] if setting.default else []),
            _prose(setting.kind),
            _prose(setting.description),
            _codes(setting.aliases),
        )
        for setting in settings().values()
        if setting.key.partition(".")[0] == room
    ]
    return _table(("setting", "default", "allowed", "meaning", "elsewhere"), rows)


def metrics() -> str:
    """Every metric, a table for each room; names that differ in labels only share a row."""
    rooms: dict[str, dict[tuple[str, str], Metric]] = {}
    for metric in METRICS.values():
        rooms.setdefault(metric.room, {}).setdefault((metric.prometheus_name, metric.rises), metric)
    columns = ("name", "for Prometheus", "kind", "unit", "labels", "rises when")
    return "\n".join(
        f"## {room}\n\n" + _table(columns, [_metric(metric) for metric in rows.values()])
        for room, rows in rooms.items()
    )


def _metric(metric: Metric) -> tuple[str, ...]:
    name = metric.name
    if metric.room == "eval":
        name = name.replace("eval/", "eval/[<eval>/]") + ("@<k>" if "k" in metric.labels else "")
    elif "function" in metric.labels:
        name = name.replace("function_", "<function>/")
    elif metric.family != "groups_ended":
        for label, value in metric.labels.items():
            name = name.replace(value, f"<{label}>", 1)
    labels = _codes(metric.labels)
    shown = (_codes([name]), _codes([metric.prometheus_name]), metric.kind, metric.unit, labels)
    return (*shown, _prose(metric.rises))


PARTS: dict[str, Callable[[], str]] = {
    "called": called,
    "left_out": left_out,
    "reference": reference,
    "metrics": metrics,
}


def renewed(text: str) -> str:
    """A page with its generated parts as they should be now."""
    return BLOCK.sub(lambda found: f"{found[1]}{PARTS[found[2]]()}{found[3]}", text)


def _of(kind: str) -> list[Entry]:
    return [row for row in entries() if row.kind == kind]


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _codes(names: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in names).replace("|", r"\|")


def _prose(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


if __name__ == "__main__":
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if renewed(text) != text:
            page.write_text(renewed(text), encoding="utf-8")
            print(f"docs/{page.name}: written")
