"""The `math` judge: equal as mathematics, by the math-verify library."""

from __future__ import annotations

import logging
import threading
from typing import Any

from asyncgrpo.rewards.answers import plain, unfenced

MISSING = "the reward 'math' needs the math-verify library: pip install 'asyncgrpo[math]'"


def math(
    completion: str,
    answer: str,
    *,
    score: float = 1.0,
    format_score: float = 0.0,
    timeout_seconds: int = 2,
) -> float:
    r"""`score` for an expression equal to the answer, `format_score` for another one, 0 without.

    LaTeX (\boxed{} first) and plain expressions: 1/2, 0.5 and $\frac{1}{2}$ are equal. For answers
    that are words use `exact` or `choice`: to this judge "NO" is a product. What takes longer than
    timeout_seconds is wrong. The library keeps time with a signal, which only a main thread can
    take: in other threads reward.timeout_seconds of the worker is the only limit.
    """
    if answer is None:
        raise ValueError("the record has no answer; add an answer column to the data")
    in_main = threading.current_thread() is threading.main_thread()
    seconds = timeout_seconds if in_main else None
    truth = str(answer)
    gold = _parse(truth if "$" in truth or "\\boxed" in truth else f"${truth}$", seconds)
    if not gold:
        raise ValueError(f"the record's answer {truth!r} is no expression; use another reward")
    found = _parse(plain(unfenced(completion)), seconds)
    if not found:
        return 0.0
    return score if _library().verify(gold, found, timeout_seconds=seconds) else format_score


def _library() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise ImportError(MISSING) from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it logs whole completions
    return math_verify


def _parse(text: str, seconds: int | None) -> list[Any]:
    found: list[Any] = _library().parse(text, parsing_timeout=seconds)
    return found
