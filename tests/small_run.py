"""Settings of runs that are over in seconds, and which of their metrics differ from run to run."""

from __future__ import annotations

from asyncgrpo.observe.metrics import METRICS

MAX_STALENESS = 2
SMALL = [
    "data.max_prompt_tokens=32",
    "sampling.max_completion_tokens=8",
    'reward.functions=[{use="reward_functions:vowels"}]',
    "algo.drop_uniform_groups=false",
    "algo.group_size=4",
    "buffer.groups_per_step=4",
    f"buffer.max_staleness={MAX_STALENESS}",
    "actor.concurrency=8",
    "eval.num_prompts=12",
    "eval.every=3",
]
BY_THE_CLOCK = {  # durations, and what the actor reports once a second
    *(n for n, metric in METRICS.items() if metric.unit in ("seconds", "tokens/s")),
    *("tokens_generated", "groups_generated", "judged_groups", "judge_errors", "failed_groups"),
    *("swaps", "prompts_truncated", "actor_idle_share", "judge/error_rate"),
}
