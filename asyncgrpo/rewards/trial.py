"""Tries rewards on answers that are known to be right or wrong, before a run pays for them.

Each prompt gets four completions: its gold answer, an empty one, the answer of another prompt
in the same format (shuffled) and random words. Gold should get all, the others nothing.
"""

from __future__ import annotations

import json
import math
import random
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from asyncgrpo.errors import DataError
from asyncgrpo.rewards.answers import same_value
from asyncgrpo.rewards.function import BoundFunction
from asyncgrpo.rewards.registry import RewardSet
from asyncgrpo.types import Prompt

KINDS = ("gold", "empty", "shuffled", "random")
WRONG = ("shuffled", "random")
HOLE = "{answer}"
# Formats that a judge may want; the one that pays gold answers most is used.
TEMPLATES = (
    HOLE,
    f"#### {HOLE}",
    f"\\boxed{{{HOLE}}}",
    f"<answer>{HOLE}</answer>",
    f"<think>\n</think>\n<answer>{HOLE}</answer>",
)
TOTAL = "total"
EPSILON = 1e-6
Scored = dict[str, list[float]]  # kind -> scores of the prompts that the function applies to


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One function (or the weighted total) on one data_source; means are NaN without a score."""

    source: str
    label: str
    means: Mapping[str, float]  # by kind
    flags: Sequence[str]
    template: str


def try_rewards(
    rewards: RewardSet,
    prompts: Iterable[Prompt],
    *,
    count: int,
    correct_above: float,
    template: str | None = None,
    allow: float = 0.0,
) -> list[Row]:
    """Scores up to `count` prompts of each data_source. DataError when one has no answers.

    allow: the share of full marks that gold may miss and that wrong answers may get.
    """
    rows: list[Row] = []
    for source, chosen in sorted(_by_source(prompts, count).items()):
        functions = rewards.functions(chosen[0])
        best = template or max(
            _templates(functions),
            key=lambda t: sum(_score(rewards, functions, chosen[:8], t)[TOTAL]["gold"]),
        )
        for place, (label, scores) in enumerate(_score(rewards, functions, chosen, best).items()):
            means = {kind: sum(s) / len(s) if s else math.nan for kind, s in scores.items()}
            flags: list[str] = []
            if label == TOTAL:
                flags = _total_flags(means)
            elif place == 0 or functions[place].uses_truth:
                flags = _flags(scores, means, correct_above if place == 0 else None, allow)
            rows.append(Row(source=source, label=label, means=means, flags=flags, template=best))
    return rows


def _by_source(prompts: Iterable[Prompt], count: int) -> dict[str, list[Prompt]]:
    found: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        chosen = found.setdefault(prompt.data_source, [])
        if prompt.answer is not None and len(chosen) < count:
            chosen.append(prompt)
    for source, chosen in found.items():
        if not chosen:
            raise DataError(f"data_source {source!r} has no answers: add a column with the truth")
    return found


def _templates(functions: Sequence[BoundFunction]) -> list[str]:
    options = [function.options for function in functions]
    tags = [f"<{o['tag']}>{HOLE}</{o['tag']}>" for o in options if "tag" in o]
    return [*TEMPLATES, *tags, *(f'{{"{o["key"]}": "{HOLE}"}}' for o in options if o.get("key"))]


def _score(
    rewards: RewardSet, functions: Sequence[BoundFunction], prompts: Sequence[Prompt], template: str
) -> dict[str, Scored]:
    """Scores by label (the total last) and kind."""
    labels = [*(function.label for function in functions), TOTAL]
    scored: dict[str, Scored] = {label: {kind: [] for kind in KINDS} for label in labels}
    chance = random.Random(0)
    for place, prompt in enumerate(prompts):
        texts = {"gold": _fill(template, prompt), "empty": "", "random": _words(chance)}
        turned = (*prompts[place:], *prompts[:place])
        others = (p for p in turned if not same_value(str(p.answer), str(prompt.answer)))
        if (other := next(others, None)) is not None:
            texts["shuffled"] = _fill(template, other)
        parts = rewards.parts(prompt, list(texts.values()))
        for index, kind in enumerate(texts):
            known = [(f, s) for f in functions if not math.isnan(s := parts[f.label][index])]
            for function, score in known:
                scored[function.label][kind].append(score)
            if known:
                scored[TOTAL][kind].append(sum(f.weight * score for f, score in known))
    return scored


def _fill(template: str, prompt: Prompt) -> str:
    answer = str(prompt.answer)
    return template.replace(HOLE, json.dumps(answer)[1:-1] if template[:2] == '{"' else answer)


def _words(chance: random.Random) -> str:
    return " ".join("".join(chance.choices(string.ascii_lowercase, k=5)) for _ in range(6))


def _flags(
    scored: Scored, means: Mapping[str, float], correct_above: float | None, allow: float
) -> list[str]:
    """What is wrong with a function that should tell right from wrong.

    correct_above: of the first function, which decides what counts as correct; else None.
    """
    gold, flags = scored["gold"], []
    full = max((score for scores in scored.values() for score in scores), default=0.0)
    slack = allow * abs(full) + EPSILON
    if short := sum(score < full - slack for score in gold):
        flags.append(f"{short} of {len(gold)} gold answers get less than full marks ({full:g})")
    for kind in WRONG:
        if means[kind] > max(_empty(means), 0.0) + slack:
            flags.append(f"rewards format without correctness: {kind} gets {means[kind]:.3g}")
    if correct_above is None:
        return flags
    for kind, scores in scored.items():
        correct = [score > correct_above for score in scores]
        if kind == "gold" and not all(correct):
            flags.append(f"{correct.count(False)} of {len(gold)} gold answers are not correct")
        if kind != "gold" and any(correct):
            flags.append(f"{sum(correct)} of {len(scores)} {kind} answers count as correct")
    return flags


def _total_flags(means: Mapping[str, float]) -> list[str]:
    """What is wrong with the sum: most of it can be had without a right answer."""
    gain = means["gold"] - _empty(means)
    if not gain > EPSILON:
        return ["gold answers are not better than empty ones"]
    shares = {kind: (means[kind] - _empty(means)) / gain for kind in WRONG}
    return [
        f"{share:.0%} of what gold gains over empty goes to {kind}"
        for kind, share in shares.items()
        if share > 0.5
    ]


def _empty(means: Mapping[str, float]) -> float:
    """What an empty answer gets; 0 where the function does not apply to it."""
    return 0.0 if math.isnan(means["empty"]) else means["empty"]
