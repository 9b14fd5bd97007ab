"""Groups that teach nothing: why one is not trained."""

from __future__ import annotations

from asyncgrpo.config import Config
from asyncgrpo.evaluate import is_correct
from asyncgrpo.types import Group


def filter_reason(group: Group, config: Config) -> str:
    """empty_completion, all_correct or all_wrong; "" when the group is good to train on."""
    if not all(group.completions.lengths):
        return "empty_completion"
    if not config.algo.drop_uniform_groups:
        return ""
    scores = next(iter(group.reward_parts.values())).tolist()
    right = is_correct(scores, config.reward.correct_above)
    if all(right):
        return "all_correct"
    return "" if any(right) else "all_wrong"
