"""The one table of metrics: name, kind, room, unit, labels, and what a rising value means.

`metrics.jsonl`, TensorBoard and Weights & Biases use these names and no others. Prometheus gets
asyncgrpo_<room>_<thing>_<unit>[_total]: `tokens_generated` of the room actor, a counter of tokens,
is `asyncgrpo_actor_generated_tokens_total`. What names of one family differ in becomes labels:
`lag_3/kl` is `asyncgrpo_learner_lag_kl_nats{lag="3"}`. `eval/NAME/pass@4` is pass@k of the
evaluation block NAME for k = 4: `eval/pass` in the table, two labels for Prometheus.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
# Names that differ in labels only: pattern, family.
FAMILIES = (
    (r"lag_(?P<lag>\w+)/(?P<rest>\w+)", "lag/{rest}"),
    (r"masked/(?P<rule>\w+)/decile_(?P<decile>\d)", "masked_by_decile"),
    (r"masked/(?P<rule>\w+)", "masked_by_rule"),
    (r"leases_(?P<state>open|stored|taken)", "leases_held"),
    (r"leases_(?P<state>\w+)", "leases_ended"),
    (r"groups_(?P<state>filtered|expired|evicted|failed|ignored)_(?P<reason>\w+)", "groups_ended"),
    (r"reward_arrived_sum", "reward_arrived"),  # may fall: no counter
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


# (kind, room): name: unit, what a rising value means. Histograms are for Prometheus; of them rows
# of metrics.jsonl have the three times of a step, as plain values.
TABLE: Mapping[tuple[Kind, str], Mapping[str, tuple[str, str]]] = {
    ("gauge", "learner"): {
        "step": ("steps", "the learner goes on"),
        "version": ("versions", "weights are published"),
        "seconds": ("seconds", "time since the learner was ready"),
        "loss": ("nats", "nothing by itself: a policy-gradient loss hovers around zero"),
        "lr": ("1", "the schedule warms up"),
        "grad_norm": ("1", "gradients grow; jumps announce instability (before clipping)"),
        "grad_norm_clipped": ("1", "gradients grow, up to learner.max_grad_norm (after clipping)"),
        "padding_share": ("share", "more of the learner's attention is computed for nothing"),
        "rank_balance": ("share", "ranks wait less for each other (mean over largest FLOPs)"),
        "rewards/mean": ("reward", "the trained groups score better"),
        "rewards/best": ("reward", "the best completion of a group scores better"),
        "rewards/worst": ("reward", "the worst completion of a group scores better"),
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
            masked_name(rule): ("share", "this correction takes more tokens out of the loss")
            for rule in MASK_RULES
        },
        **{
            f"{masked_name(rule)}/decile_{index}": (
                "share",
                "this correction hits more sequences of this length decile (0 = shortest)",
            )
            for rule in SEQUENCE_RULES
            for index in range(10)
        },
        **{
            f"lag_{label}/{name}": (unit, rises)
            for label, _ in LAG_BINS
            for name, unit, rises in (
                ("tokens", "tokens", "more tokens are trained that are so many versions old"),
                ("kl", "nats", "behaviour and proximal policy disagree more there, by k3"),
                ("kl_k1", "nats", "the same by k1; may be negative"),
            )
        },
        "optimizer_steps": ("steps", "more optimizer updates were made from one batch"),
        "nonfinite_completions": ("completions", "the engine returned NaN log-probs: dropped"),
        "truncated_share": ("share", "more completions hit sampling.max_completion_tokens"),
        "staleness/mean": ("versions", "trained tokens are older"),
        "staleness/max": ("versions", "the oldest trained token is older; bounded by the config"),
        "tokens_trained": ("tokens", "completion tokens in this step's loss"),
        "tokens_masked": ("tokens", "more tokens left the loss (stale or not finite)"),
        "completions/mean_length": ("tokens", "trained completions get longer"),
    },
    ("counter", "learner"): {
        "updates_skipped": ("updates", "losses or gradients were not finite"),
        "reference_syncs": ("syncs", "the reference was mixed with the policy"),
    },
    ("gauge", "eval"): {
        "eval/accuracy": ("share", "held-out prompts are answered better"),
        "eval/pass": ("share", "more held-out prompts have a correct answer among k (pass@k)"),
        "eval/version": ("versions", "policy version of that accuracy"),
        "eval/reward_mean": ("reward", "held-out answers score better"),
        "eval/mean_tokens": ("tokens", "held-out answers get longer"),
        "eval/truncated_share": ("share", "more held-out answers hit their token limit"),
    },
    ("gauge", "weights"): {
        "publish/blocked_seconds": ("seconds", "training waits longer for weights to be read"),
        "publish/digest_seconds": ("seconds", "digests take longer at the learner"),
        "publish/broadcast_seconds": ("seconds", "the broadcast takes longer at the learner"),
        "publish/copy_seconds": ("seconds", "the broadcast takes longer at the actor"),
        "publish/stall_seconds": ("seconds", "generation stands still longer at the swap"),
        "publish/live_seconds": ("seconds", "from publish to the last actor's proof takes longer"),
        "publish/canary_difference": ("nats", "engine and learner compute less alike"),
        "publish/bytes": ("bytes", "more is sent per broadcast"),
        "publish/actors": ("actors", "more actors take part"),
    },
    ("counter", "weights"): {
        "publish/rounds": ("rounds", "broadcasts were made"),
        "publish/refused_messages": ("messages", "garbage reaches the learner's weights server"),
        "publish/evictions": ("evictions", "actors missed a deadline of a publish"),
        "publish/proofs": ("proofs", "actors proved by digests and canaries what they loaded"),
        "publish/rejections": ("rejections", "an actor holds or computes other weights: a fault"),
    },
    ("gauge", "buffer"): {
        "buffer_groups": ("groups", "finished work piles up before the learner"),
        "buffer_tokens": ("tokens", "the same in completion tokens"),
        **{
            f"leases_{state}": ("leases", "more leases are in this state now")
            for state in ("open", "stored", "taken")
        },
        "gate_open": ("groups", "more work may start; 0: actors wait for the learner"),
        "actors_waiting": ("actors", "more actors ask for work that the gate holds back"),
        "staleness/publish": ("versions", "actors get work while they hold older weights"),
        "staleness/generation": ("versions", "groups take longer to make, counted in versions"),
        "staleness/queue": ("versions", "groups wait longer for their batch: make fewer ahead"),
        "queue_age_seconds": ("seconds", "groups wait longer between arrival and batch"),
        "reward_arrived_sum": ("reward", "sum of the mean rewards of arrived groups"),
    },
    ("counter", "buffer"): {
        "leases": ("leases", "prompts are handed out"),
        "groups_arrived": ("groups", "groups reach the buffer"),
        "tokens_arrived": ("tokens", "completion tokens reach the buffer"),
        "refused_messages": ("messages", "garbage or senseless requests reach the buffer"),
        "groups_ignored_late": ("groups", "groups come twice, or after their lease has ended"),
        "groups_ignored_other_actor": ("groups", "actors send groups of others' leases"),
        "groups_failed_other_lease": ("groups", "actors change the prompts they were given"),
        "groups_failed_group_size": ("groups", "actors send other than group_size completions"),
        "groups_failed_rewards": ("groups", "rewards arrive missing or not finite"),
        "groups_failed_tokens": ("groups", "tokens arrive negative, or more than were allowed"),
        "groups_failed_versions": ("groups", "tokens claim versions that cannot be"),
        **{
            f"leases_{state}": ("leases", "leases end in this state")
            for state in ("trained", "filtered", "expired", "failed", "evicted")
        },
        "groups_replayed": ("groups", "groups are trained once more (buffer.replay_ratio)"),
        "groups_filtered_all_correct": ("groups", "prompts are too easy to learn from"),
        "groups_filtered_all_wrong": ("groups", "prompts are too hard to learn from"),
        "groups_filtered_empty_completion": ("groups", "the engine returned nothing"),
        "groups_expired_deadline": ("groups", "actors take too long or are gone"),
        "groups_expired_actor_restarted": ("groups", "actors were restarted"),
        "groups_expired_undelivered": ("groups", "leases were lost on the way, at a restart"),
        "groups_expired_actor_left": ("groups", "actors left before these were through"),
        "groups_failed_handed_back": ("groups", "actors left and gave their prompts back"),
        "groups_expired_unreachable": ("groups", "actors lose their connection"),
        "groups_evicted_stale": ("groups", "work became too old before it was trained"),
        "groups_failed_prompt_too_long": ("groups", "prompts exceed data.max_prompt_tokens"),
        "groups_failed_refused_by_engine": ("groups", "the engine refused prompts"),
        "groups_failed_reward_contract": ("groups", "a reward function raised or returned junk"),
        "groups_failed_reward_lost": ("groups", "reward workers died or were too slow"),
    },
    ("counter", "actor"): {
        "tokens_generated": ("tokens", "actors generate"),
        "groups_generated": ("groups", "actors finish groups"),
        "judged_groups": ("groups", "actors have groups scored"),
        "judge_errors": ("errors", "a reward raises, returns junk, hangs or dies"),
        "judge_seconds": ("seconds", "reward workers computed"),
        "failed_groups": ("groups", "groups fail at the actor: prompts, rewards, engine"),
        "prompts_truncated": ("prompts", "prompts lost their beginning to data.overlong_prompt"),
        "idle_seconds": ("seconds", "actors waited"),
        "generate_seconds": ("seconds", "actors computed"),
        "swap_seconds": ("seconds", "generation stood still for weight swaps"),
        "swaps": ("swaps", "weights were swapped in"),
    },
    ("gauge", "run"): {
        "rewards/generated_mean": ("reward", "all arrived groups score better, filtered included"),
        "completions/generated_mean_length": (
            "tokens",
            "arrived completions get longer; above the trained ones: dropping favours short",
        ),
        "actor_idle_share": ("share", "actors wait for the gate: the learner is the bottleneck"),
        "tokens_per_second": ("tokens/s", "completion tokens reach the buffer faster"),
        "judge/error_rate": ("share", "rewards fail more often; see reward.max_error_rate"),
        "judge/latency_seconds": ("seconds", "scoring one group takes longer"),
        "disk_free_bytes": ("bytes", "the run directory's disk gets room; at 0 the run fails"),
    },
    ("gauge", "setting"): {
        "setting/actors": ("actors", "more actors were asked for"),
        "setting/groups_per_step": ("groups", "batches are larger"),
        "setting/max_staleness": ("versions", "older tokens may be trained"),
        "setting/max_steps": ("steps", "the run is longer"),
    },
    ("gauge", "process"): {
        "report_age_seconds": ("seconds", "its loop is in one long turn, or hangs"),
    },
    ("histogram", "learner"): {
        "wait_seconds": ("seconds", "the learner waits for batches: generation is the bottleneck"),
        "train_seconds": ("seconds", "forward, backward and optimizer take longer"),
        "step_seconds": ("seconds", "one whole step takes longer"),
        "token_staleness": ("versions", "the tokens of the batches are older"),
    },
    ("histogram", "actor"): {
        "completion/tokens": ("tokens", "completions get longer, those of filtered groups too"),
        "completion/reward": ("reward", "completions score better, filtered groups included"),
        "group/generate_seconds": ("seconds", "a group takes longer from lease to last token"),
        "group/judge_seconds": ("seconds", "scoring a group takes longer"),
        "swap/stall_seconds": ("seconds", "generation stands still longer at a weight swap"),
    },
}
METRICS: Mapping[str, Metric] = {
    name: Metric(name=name, kind=kind, room=room, unit=unit, rises=rises, **_family(name))
    for (kind, room), rows in TABLE.items()
    for name, (unit, rises) in rows.items()
}
_EVAL = re.compile(r"eval/(?:(?P<eval>[\w.-]+)/)?(?P<quantity>\w+)(?:@(?P<k>\d+))?")


def metric_of(name: str) -> tuple[Metric, dict[str, str]]:
    """The row of the table for a name, and its labels; KeyError when there is none."""
    if found := _EVAL.fullmatch(name):
        labels = {"eval": found["eval"] or HELD_OUT} | ({"k": found["k"]} if found["k"] else {})
        metric = METRICS.get(f"eval/{found['quantity']}")
    elif metric := METRICS.get(name):
        labels = dict(metric.labels)
    if metric is None:
        raise KeyError(f"{name}: declare it in asyncgrpo/observe/metrics.py")
    return metric, labels


def eval_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of one evaluation (see EvalReport); the name of the default block is left out."""
    prefix = "eval/" if report["name"] == HELD_OUT else f"eval/{report['name']}/"
    names = ("accuracy", "version", "reward_mean", "mean_tokens", "truncated_share")
    passes = {f"{prefix}pass@{k}": share for k, share in report["pass_at_k"].items()}
    return {prefix + name: report[name] for name in names} | passes
