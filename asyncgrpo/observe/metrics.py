"""Names, kinds and units of all metrics, from the table in metrics.toml.

`metrics.jsonl`, TensorBoard and Weights & Biases use these names and no others. Prometheus gets
asyncgrpo_<room>_<thing>_<unit>[_total]: `tokens_generated` of the room actor, a counter of tokens,
is `asyncgrpo_actor_generated_tokens_total`. What names of one family differ in becomes labels:
`lag_3/kl` is `asyncgrpo_learner_lag_kl_nats{lag="3"}`. `eval/NAME/pass@4` is pass@k of the
evaluation block NAME for k = 4: `eval/pass` in the table, two labels for Prometheus.
`rewards/NAME/mean` is that of the reward function NAME: `rewards/function_mean` in the table.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from asyncgrpo.settings.reward import HELD_OUT

Kind = Literal["gauge", "counter", "histogram"]
# Staleness in versions, up to and including the number: what is reported split by lag.
LAG_BINS = (
    *((str(lag), float(lag)) for lag in range(5)),
    ("5_to_8", 8.0),
    ("9_to_16", 16.0),
    ("17_up", float("inf")),
)
MASK_RULES = ("icepop", "geometric_mask", "opsm", "m2po", "custom")
SEQUENCE_RULES = ("geometric_mask", "opsm", "tis_sequence")  # also reported by length decile
VALUES: Mapping[str, Sequence[Any]] = {  # of {placeholders} in names of the table
    "lag": [label for label, _ in LAG_BINS],
    "rule": MASK_RULES,
    "sequence_rule": SEQUENCE_RULES,
    "decile": range(10),
    "held": ("open", "stored", "taken"),
    "ended": ("trained", "filtered", "expired", "failed", "evicted"),
}
# Names that differ in labels only: pattern, family.
FAMILIES = (
    (r"lag_(?P<lag>\w+)/(?P<rest>\w+)", "lag/{rest}"),
    (r"masked/(?P<rule>\w+)/decile_(?P<decile>\d)", "masked_by_decile"),
    (r"masked/(?P<rule>\w+)", "masked_by_rule"),
    (r"leases_(?P<state>open|stored|taken)", "leases_held"),
    (r"leases_(?P<state>\w+)", "leases_ended"),
    (r"groups_(?P<state>filtered|expired|evicted|failed|ignored)_(?P<reason>\w+)", "groups_ended"),
    (r"reward_arrived_sum", "reward_arrived"),  # may fall: no counter
    (r"rewards/function_(?P<rest>\w+)(?P<function>)", "rewards/function_{rest}"),
    (r"eval/pass(?P<eval>)(?P<k>)", "eval/pass"),
    (r"eval/(?P<rest>\w+)(?P<eval>)", "eval/{rest}"),
)
SUFFIXES = {"share": "ratio", "1": "", "reward": "", "tokens/s": ""}
BUCKETS: Mapping[str, Sequence[float]] = {  # by unit
    "seconds": (
        *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
        *(1, 2.5, 5, 10, 30, 60, 300, 1800),
    ),
    "tokens": tuple(2**power for power in range(2, 18)),
    "versions": tuple(upper for _, upper in LAG_BINS[:-1]),
    "reward": (-10, -5, -2, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 2, 5, 10),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One quantity. `rises` says what a rising value means; labels: their names and values."""

    name: str
    kind: Kind
    room: str
    unit: str
    rises: str
    family: str
    labels: Mapping[str, str]

    @property
    def prometheus_name(self) -> str:
        """The name that the endpoint shows, the same for a whole family."""
        words = self.family.replace("/", "_").split("_")
        if words[0] == self.room:
            words = words[1:]
        unit = SUFFIXES.get(self.unit, self.unit)
        if unit and "per" not in words:
            named = {self.unit, self.unit.removesuffix("s"), "rate" if unit == "ratio" else ""}
            words = [word for word in words if word not in named] + [unit]
        total = ["total"] if self.kind == "counter" else []
        return "_".join(["asyncgrpo", self.room, *words, *total])

    @property
    def buckets(self) -> tuple[float, ...]:
        """Upper bounds of a histogram."""
        return (*BUCKETS[self.unit], float("inf"))

    @property
    def help(self) -> str:
        """Unit and meaning, the same for a whole family."""
        rises = "a group ends so" if self.family == "groups_ended" else self.rises
        return f"{self.unit}; rises when {rises}"


def masked_name(rule: str) -> str:
    """The metric with the share that a correction masks; all users' own rules share one."""
    return f"masked/{rule if rule in (*MASK_RULES, *SEQUENCE_RULES) else 'custom'}"


def _family(name: str) -> dict[str, Any]:
    for pattern, family in FAMILIES:
        if found := re.fullmatch(pattern, name):
            labels = found.groupdict()
            return {"family": family.format(rest=labels.pop("rest", "")), "labels": labels}
    return {"family": name, "labels": {}}


def _names(pattern: str) -> Iterator[str]:
    """What a name of the table stands for: each of its {placeholders} takes all its values."""
    fields = [field for _, field, _, _ in Formatter().parse(pattern) if field]
    for values in product(*(VALUES[field] for field in fields)):
        yield pattern.format(**dict(zip(fields, values, strict=True)))


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
METRICS: Mapping[str, Metric] = {
    name: Metric(name=name, kind=kind, room=room, unit=unit, rises=rises, **_family(name))
    for room, kinds in _TABLE.items()
    for kind, rows in kinds.items()
    for pattern, (unit, rises) in rows.items()
    for name in _names(pattern)
}
_REWARD = re.compile(r"rewards/(?P<function>.*)/(?P<quantity>mean|std)", re.DOTALL)
_EVAL = re.compile(r"eval/(?:(?P<eval>[\w.-]+)/)?(?P<quantity>\w+)(?:@(?P<k>\d+))?")


def counters(room: str) -> list[str]:
    """The counters of a room."""
    return [m.name for m in METRICS.values() if (m.room, m.kind) == (room, "counter")]


def metric_of(name: str) -> tuple[Metric, dict[str, str]]:
    """The row of the table for a name, and its labels; KeyError when there is none."""
    if found := _EVAL.fullmatch(name):
        labels = {"eval": found["eval"] or HELD_OUT} | ({"k": found["k"]} if found["k"] else {})
        metric = METRICS.get(f"eval/{found['quantity']}")
    elif found := _REWARD.fullmatch(name):
        labels = {"function": found["function"]}
        metric = METRICS[f"rewards/function_{found['quantity']}"]
    elif metric := METRICS.get(name):
        labels = dict(metric.labels)
    if metric is None:
        raise KeyError(f"{name}: declare it in asyncgrpo/observe/metrics.toml")
    return metric, labels


def eval_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of one evaluation (see summarise); the name of the default block is left out.

    None of one that nobody answered.
    """
    if not report["num_answered"]:
        return {}
    prefix = "eval/" if report["name"] == HELD_OUT else f"eval/{report['name']}/"
    names = ("accuracy", "version", "reward_mean", "mean_tokens", "truncated_share")
    passes = {f"{prefix}pass@{k}": share for k, share in report["pass_at_k"].items()}
    return {prefix + name: report[name] for name in names} | passes
