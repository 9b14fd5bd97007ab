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
from asyncgrpo.rewards.function import BoundFunction, Score
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
Parts = Mapping[str, Mapping[str, Sequence[Score]]]  # label -> kind -> one score per prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One function (or the weighted total) on one data_source; means are NaN without a score."""

    source: str
    label: str
    means: Mapping[str, float]  # by kind
    flags: tuple[str, ...]
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
    """Scores up to `count` prompts of each data_source. DataError when none has an answer.

    allow: the share of full marks that gold may miss and that wrong answers may get.
    """
    by_source: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        chosen = by_source.setdefault(prompt.data_source, [])
        if prompt.answer is not None and len(chosen) < count:
            chosen.append(prompt)
    missing = [source for source, chosen in by_source.items() if not chosen]
    if missing or not by_source:
        raise DataError(
            f"no answers in the data of {', '.join(missing) or 'this config'}: there is no gold to "
            "score; add an answer column"
        )
    rows: list[Row] = []
    for source, chosen in sorted(by_source.items()):
        functions = rewards.functions(chosen[0])
        best = template or _best_template(rewards, functions, chosen[:8])
        parts = _scores(rewards, functions, chosen, best)
        for label in parts:
            if label == TOTAL:
                flags = _total_flags(_means(parts[label]))
            else:
                first = label == functions[0].label
                judges = first or next(f for f in functions if f.label == label).uses_truth
                flags = _flags(parts[label], allow) if judges else ()
                flags += _correctness_flags(parts[label], correct_above) if first else ()
            means = _means(parts[label])
            rows.append(Row(source=source, label=label, means=means, flags=flags, template=best))
    return rows


def _best_template(
    rewards: RewardSet, functions: Sequence[BoundFunction], prompts: Sequence[Prompt]
) -> str:
    options = [function.options for function in functions]
    tags = [f"<{o['tag']}>{HOLE}</{o['tag']}>" for o in options if "tag" in o]
    keys = [f'{{"{o["key"]}": "{HOLE}"}}' for o in options if o.get("key")]
    totals = {
        template: sum(
            _total(functions, rewards.parts(prompt, [_fill(template, prompt)]), 0) or 0.0
            for prompt in prompts
        )
        for template in (*TEMPLATES, *tags, *keys)
    }
    return max(totals, key=lambda template: totals[template])


def _scores(
    rewards: RewardSet, functions: Sequence[BoundFunction], prompts: Sequence[Prompt], template: str
) -> dict[str, dict[str, list[Score]]]:
    labels = [*(function.label for function in functions), TOTAL]
    scores: dict[str, dict[str, list[Score]]] = {n: {k: [] for k in KINDS} for n in labels}
    chance = random.Random(0)
    for place, prompt in enumerate(prompts):
        other = _another(place, prompts)
        texts = {"gold": _fill(template, prompt), "empty": "", "random": _words(chance)}
        if other is not None:
            texts["shuffled"] = _fill(template, other)
        parts = rewards.parts(prompt, list(texts.values()))
        for index, kind in enumerate(texts):
            for label, values in parts.items():
                scores[label][kind].append(values[index])
            scores[TOTAL][kind].append(_total(functions, parts, index))
    return scores


def _total(
    functions: Sequence[BoundFunction], parts: Mapping[str, Sequence[Score]], index: int
) -> Score:
    scored = [(f.weight, parts[f.label][index]) for f in functions]
    terms = [weight * score for weight, score in scored if score is not None]
    return sum(terms) if terms else None


def _fill(template: str, prompt: Prompt) -> str:
    answer = str(prompt.answer)
    is_json = template.startswith('{"')
    return template.replace(HOLE, json.dumps(answer)[1:-1] if is_json else answer)


def _another(place: int, prompts: Sequence[Prompt]) -> Prompt | None:
    """The next prompt with another answer; None when all answers are the same."""
    turned = (*prompts[place:], *prompts[:place])
    truth = str(prompts[place].answer)
    return next((other for other in turned if not same_value(str(other.answer), truth)), None)


def _words(chance: random.Random) -> str:
    return " ".join(
        "".join(chance.choices(string.ascii_lowercase, k=chance.randint(3, 8))) for _ in range(6)
    )


def _means(scores: Mapping[str, Sequence[Score]]) -> dict[str, float]:
    known = {kind: [s for s in scores[kind] if s is not None] for kind in KINDS}
    return {kind: sum(v) / len(v) if v else math.nan for kind, v in known.items()}


def _flags(scores: Mapping[str, Sequence[Score]], allow: float) -> tuple[str, ...]:
    """What is wrong with a function that should tell right from wrong."""
    means, flags = _means(scores), []
    everything = [score for kind in KINDS for score in scores[kind] if score is not None]
    full = max(everything, default=0.0)
    slack = allow * abs(full) + EPSILON
    gold = [score for score in scores["gold"] if score is not None]
    short = sum(score < full - slack for score in gold)
    if short:
        flags.append(f"{short} of {len(gold)} gold answers get less than full marks ({full:g})")
    for kind in WRONG:
        if means[kind] > max(_empty(means), 0.0) + slack:
            flags.append(f"rewards format without correctness: {kind} gets {means[kind]:.3g}")
    return tuple(flags)


def _correctness_flags(
    scores: Mapping[str, Sequence[Score]], correct_above: float
) -> tuple[str, ...]:
    """What is wrong with the first function, which decides what counts as correct."""
    flags = []
    correct = {k: sum(s is not None and s > correct_above for s in scores[k]) for k in KINDS}
    missed = len(scores["gold"]) - correct["gold"]
    if missed:
        flags.append(f"{missed} of {len(scores['gold'])} gold answers do not count as correct")
    for kind in ("empty", *WRONG):
        if correct[kind]:
            flags.append(f"{correct[kind]} of {len(scores[kind])} {kind} answers count as correct")
    return tuple(flags)


def _total_flags(means: Mapping[str, float]) -> tuple[str, ...]:
    """What is wrong with the sum: most of it can be had without a right answer."""
    gain = means["gold"] - _empty(means)
    if not gain > EPSILON:
        return ("gold answers are not better than empty ones",)
    shares = {kind: (means[kind] - _empty(means)) / gain for kind in WRONG}
    return tuple(
        f"{share:.0%} of what gold gains over empty goes to {kind}"
        for kind, share in shares.items()
        if share > 0.5
    )


def _empty(means: Mapping[str, float]) -> float:
    """What an empty answer gets; 0 where the function does not apply to it."""
    return 0.0 if math.isnan(means["empty"]) else means["empty"]
