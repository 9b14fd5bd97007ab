"""The one table of metrics: name, kind, unit, and what a rising value means.

`metrics.jsonl` and the Prometheus endpoints use these names and no others; a name such as
`rewards/mean` becomes `asyncgrpo_rewards_mean` for Prometheus. `eval/NAME/pass@4` is pass@k of
the evaluation block NAME for k = 4: `eval/pass` in the table, labels for Prometheus.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from asyncgrpo.config import HELD_OUT

Kind = Literal["gauge", "counter"]
# Staleness in versions, up to and including the number: what is reported split by lag.
LAG_BINS = (
    *((str(lag), float(lag)) for lag in range(5)),
    ("5_to_8", 8.0),
    ("9_to_16", 16.0),
    ("17_up", float("inf")),
)
MASK_RULES = ("icepop", "geometric_mask", "opsm", "m2po", "custom")
SEQUENCE_RULES = ("geometric_mask", "opsm", "tis_sequence")  # also reported by length decile


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One quantity. `rises` says what a rising value means."""

    name: str
    kind: Kind
    unit: str
    rises: str

    @property
    def prometheus_name(self) -> str:
        """The name that the endpoint shows."""
        base = "asyncgrpo_" + self.name.replace("/", "_")
        return base + "_total" if self.kind == "counter" else base


def masked_name(rule: str) -> str:
    """The metric with the share that a correction masks; all users' own rules share one."""
    return f"masked/{rule if rule in (*MASK_RULES, *SEQUENCE_RULES) else 'custom'}"


def _table(kind: Kind, rows: Mapping[str, tuple[str, str]]) -> dict[str, Metric]:
    return {
        name: Metric(name=name, kind=kind, unit=unit, rises=rises)
        for name, (unit, rises) in rows.items()
    }


GAUGES = _table(
    "gauge",
    {
        "step": ("steps", "the learner goes on"),
        "version": ("versions", "weights are published"),
        "seconds": ("seconds", "time since the learner was ready"),
        "loss": ("nats", "nothing by itself: a policy-gradient loss hovers around zero"),
        "lr": ("1", "the schedule warms up"),
        "grad_norm": ("1", "gradients grow; jumps announce instability (before clipping)"),
        "rewards/mean": ("reward", "the trained groups score better"),
        "rewards/best": ("reward", "the best completion of a group scores better"),
        "rewards/worst": ("reward", "the worst completion of a group scores better"),
        "rewards/generated_mean": ("reward", "all arrived groups score better, filtered included"),
        "eval/accuracy": ("share", "held-out prompts are answered better"),
        "eval/pass": ("share", "more held-out prompts have a correct answer among k (pass@k)"),
        "eval/version": ("versions", "policy version of that accuracy"),
        "eval/reward_mean": ("reward", "held-out answers score better"),
        "eval/mean_tokens": ("tokens", "held-out answers get longer"),
        "eval/truncated_share": ("share", "more held-out answers hit their token limit"),
        "objective/kl": ("nats", "engine and learner disagree more (k3 of behaviour to current)"),
        "objective/kl_k1": ("nats", "the same by the k1 estimator; may be negative"),
        "objective/entropy": ("nats", "the policy explores more; a fall to zero is a collapse"),
        "ess": ("share", "importance weights are more even; near 1 the data is on-policy"),
        "clip_low_share": ("share", "more tokens are clipped on the way down"),
        "clip_high_share": ("share", "more tokens are clipped on the way up"),
        "cap_share": ("share", "more importance weights hit the cap: data is far off-policy"),
        "logprob_diff_mean": ("nats", "behaviour and current log-probs move apart"),
        "logprob_diff_max": ("nats", "a single token moved far"),
        "objective/kl_ref": ("nats", "the policy moves away from the reference"),
        "objective/kl_coef": ("1", "the adaptive coefficient pulls back harder"),
        "chi2": ("1", "mean squared importance weight - 1: data is further off-policy"),
        "masked_share": ("share", "corrections take more tokens out of the loss"),
        **{
            masked_name(rule): ("share", f"{rule} takes more tokens out of the loss")
            for rule in MASK_RULES
        },
        **{
            f"{masked_name(rule)}/decile_{index}": (
                "share",
                f"{rule} hits more sequences of length decile {index} (0 = shortest)",
            )
            for rule in SEQUENCE_RULES
            for index in range(10)
        },
        **{
            f"lag_{label}/{name}": (unit, f"{rises} (tokens {label} versions old)")
            for label, _ in LAG_BINS
            for name, unit, rises in (
                ("tokens", "tokens", "more such tokens are trained"),
                ("kl", "nats", "behaviour and proximal policy disagree more, by k3"),
                ("kl_k1", "nats", "the same by k1; may be negative"),
            )
        },
        "optimizer_steps": ("updates", "more optimizer updates were made from one batch"),
        "nonfinite_completions": ("completions", "the engine returned NaN log-probs: dropped"),
        "truncated_share": ("share", "more completions hit sampling.max_completion_tokens"),
        "staleness/mean": ("versions", "trained tokens are older"),
        "staleness/max": ("versions", "the oldest trained token is older; bounded by the config"),
        "tokens_trained": ("tokens", "completion tokens in this step's loss"),
        "tokens_masked": ("tokens", "more tokens left the loss (stale or not finite)"),
        "completions/mean_length": ("tokens", "trained completions get longer"),
        "completions/generated_mean_length": (
            "tokens",
            "arrived completions get longer; above the trained ones: dropping favours short",
        ),
        "wait_seconds": ("seconds", "the learner waits for batches: generation is the bottleneck"),
        "train_seconds": ("seconds", "forward, backward and optimizer take longer"),
        "step_seconds": ("seconds", "one whole step takes longer"),
        "actor_idle_share": ("share", "actors wait for the gate: the learner is the bottleneck"),
        "tokens_per_second": ("tokens/s", "completion tokens reach the buffer faster"),
        "judge/error_rate": ("share", "rewards fail more often; see reward.max_error_rate"),
        "judge/latency_seconds": ("seconds", "scoring one group takes longer"),
        "publish/flatten_seconds": ("seconds", "copying weights into the send buffer takes longer"),
        "publish/broadcast_seconds": (
            "seconds",
            "the learner's side of the broadcast takes longer",
        ),
        "publish/copy_seconds": ("seconds", "the actor's side of the broadcast takes longer"),
        "publish/stall_seconds": ("seconds", "generation stands still longer at the swap"),
        "publish/live_seconds": ("seconds", "from publish to the last actor's proof takes longer"),
        "publish/canary_difference": ("nats", "engine and learner compute less alike"),
        "publish/bytes": ("bytes", "the model grew"),
        "publish/actors": ("actors", "more actors take part"),
        "buffer_groups": ("groups", "finished work piles up before the learner"),
        "buffer_tokens": ("tokens", "the same in completion tokens"),
        **{
            f"leases_{state}": ("leases", f"more leases are {state} now")
            for state in ("open", "stored", "taken")
        },
    },
)
COUNTERS = _table(
    "counter",
    {
        "tokens_generated": ("tokens", "actors generate"),
        "groups_generated": ("groups", "actors finish groups"),
        "judged_groups": ("groups", "actors have groups scored"),
        "judge_errors": ("groups", "a reward raises, returns junk, hangs or dies"),
        "judge_seconds": ("seconds", "reward workers computed"),
        "failed_groups": ("groups", "groups fail at the actor: prompts, rewards, engine"),
        "updates_skipped": ("updates", "losses or gradients were not finite"),
        "reference_syncs": ("syncs", "the reference was mixed with the policy"),
        "prompts_truncated": ("prompts", "prompts lost their beginning to data.overlong_prompt"),
        "idle_seconds": ("seconds", "actors waited"),
        "generate_seconds": ("seconds", "actors computed"),
        "swap_seconds": ("seconds", "generation stood still for weight swaps"),
        "swaps": ("swaps", "weights were swapped in"),
        "leases": ("leases", "prompts are handed out"),
        "groups_arrived": ("groups", "groups reach the buffer"),
        "tokens_arrived": ("tokens", "completion tokens reach the buffer"),
        "reward_arrived_sum": ("reward", "sum of the mean rewards of arrived groups"),
        "publish/rounds": ("rounds", "broadcasts were made"),
        "publish/evictions": ("actors", "actors missed a deadline of a publish"),
        **{
            f"leases_{state}": ("leases", f"leases ended {state}")
            for state in ("trained", "filtered", "expired", "failed", "evicted")
        },
        "groups_filtered_all_correct": ("groups", "prompts are too easy to learn from"),
        "groups_filtered_all_wrong": ("groups", "prompts are too hard to learn from"),
        "groups_filtered_empty_completion": ("groups", "the engine returned nothing"),
        "groups_expired_deadline": ("groups", "actors take too long or are gone"),
        "groups_expired_actor_restarted": ("groups", "actors were restarted"),
        "groups_expired_actor_left": ("groups", "actors left before these were through"),
        "groups_failed_handed_back": ("groups", "actors left and gave their prompts back"),
        "groups_expired_unreachable": ("groups", "actors lose their connection"),
        "groups_evicted_stale": ("groups", "work became too old before it was trained"),
        "groups_failed_prompt_too_long": ("groups", "prompts exceed data.max_prompt_tokens"),
        "groups_failed_refused_by_engine": ("groups", "the engine refused prompts"),
        "groups_failed_reward_contract": ("groups", "a reward function raised or returned junk"),
        "groups_failed_reward_lost": ("groups", "reward workers died or were too slow"),
    },
)
METRICS: Mapping[str, Metric] = {**GAUGES, **COUNTERS}
_EVAL = re.compile(r"eval/(?:(?P<eval>[\w.-]+)/)?(?P<quantity>\w+)(?:@(?P<k>\d+))?")


def metric_of(name: str) -> tuple[Metric, dict[str, str]]:
    """The row of the table for a name, and its labels; KeyError when there is none."""
    labels = {}
    if found := _EVAL.fullmatch(name):
        labels = {"eval": found["eval"] or HELD_OUT} | ({"k": found["k"]} if found["k"] else {})
        name = f"eval/{found['quantity']}"
    if name not in METRICS:
        raise KeyError(f"{name}: declare it in asyncgrpo/observe/metrics.py")
    return METRICS[name], labels


def eval_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of one evaluation (see EvalReport); the name of the default block is left out."""
    prefix = "eval/" if report["name"] == HELD_OUT else f"eval/{report['name']}/"
    names = ("accuracy", "version", "reward_mean", "mean_tokens", "truncated_share")
    passes = {f"{prefix}pass@{k}": share for k, share in report["pass_at_k"].items()}
    return {prefix + name: report[name] for name in names} | passes
