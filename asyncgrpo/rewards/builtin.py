"""The built-in judges. None of them raises on any completion text, and none runs what it reads.

Each scores one completion; parameters after the * are its options:
`{ use = "gsm8k", options = { extract = "flexible" } }`. A record whose truth the judge cannot use
(no answer, no number in it) is a ValueError, whatever the text.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from asyncgrpo.rewards.answers import (
    after_equals,
    extract_tag,
    leading_number,
    numbers,
    plain,
    same_value,
    unfenced,
)
from asyncgrpo.rewards.http import http

Pattern = Annotated[  # "." matches a line break too, so that answers may have several lines
    re.Pattern[str], AfterValidator(lambda found: re.compile(found.pattern, re.DOTALL))
]
TagName = Annotated[str, Field(pattern=r"^[\w-]+$")]


def task(completion: str, answer: str, kind: str) -> float:
    """+1 for a right and -1 for a wrong answer to a generated task (see asyncgrpo.data.tasks).

    The first line that is not empty counts, and on it what stands after the last "=". Numbers: the
    last number counts, so that a worked answer may lead up to it. sort: exactly these numbers.
    palindrome: YES or NO as a word, not both. Words: the exact text, one pair of quotes allowed.
    ValueError for a kind that is not a generated task.
    """
    if kind not in _JUDGES:
        raise ValueError(f"kind {kind!r} is not a generated task: {', '.join(_JUDGES)}")
    lines = unfenced(plain(completion)).splitlines()
    said = after_equals(lines[0]) if lines else ""
    return 1.0 if _JUDGES[kind](said, _known(answer)) else -1.0


def length_penalty(
    completion: str, *, per_character: float = 0.002, max_characters: int = 200
) -> float:
    """-0.002 per character, -0.4 at most: of two right answers the shorter one is better."""
    return -per_character * min(len(completion), max_characters)


def length(
    completion: str,
    *,
    max_length: int,
    min_length: int = 0,
    unit: Literal["characters", "words"] = "characters",
) -> float:
    """1 when the completion is min_length to max_length long, else 0. Says nothing about truth."""
    size = len(completion.split()) if unit == "words" else len(completion)
    return float(min_length <= size <= max_length)


def exact(completion: str, answer: str) -> float:
    """1 when the text, without outer white space or a code fence, equals the answer, else 0."""
    truth = _known(answer).strip()
    return float(truth in (completion.strip(), unfenced(completion)))


def integer(completion: str, answer: str, *, strict: bool = False) -> float:
    """1 when the last number of the text equals the answer, else 0; strict: it is the only one.

    "3 + 4 = 7" answers 7, and so does "7.0"; "7.5" does not answer 7.
    """
    truth, found = _true_number(answer), numbers(unfenced(completion))
    return float(found == [truth] if strict else found[-1:] == [truth])


def choice(
    completion: str, answer: str, *, choices: Annotated[list[str], Field(min_length=2)]
) -> float:
    """1 when exactly one of the choices occurs as a whole word and it is the answer, else 0.

    "UNKNOWN" is not "NO". Case is ignored, but not for one letter: "a" is a word, "A" a choice.
    """
    truth = _known(answer).strip()
    if truth not in choices:
        raise ValueError(f"the record's answer {truth!r} is none of the choices {choices}")
    return float({c for c in choices if _occurs(c, plain(completion))} == {truth})


def gsm8k(
    completion: str,
    answer: str,
    *,
    extract: Literal["strict", "flexible"] = "strict",
    score: float = 1.0,
    format_score: float = 0.0,
) -> float:
    """`score` for the right final number, `format_score` for another one, 0 without any.

    strict: the number must follow the last "####". flexible: without "####" the last number of
    the text counts. The truth may be the bare number or the data set's whole solution.
    """
    truth, found = _true_number(answer), _final_number(completion, strict=extract == "strict")
    return 0.0 if found is None else score if found == truth else format_score


def tag(
    completion: str,
    answer: str,
    *,
    tag: TagName = "answer",
    score: float = 1.0,
    format_score: float = 0.0,
) -> float:
    """`score` when the last <answer>...</answer> holds the answer, `format_score` when another.

    Numbers are compared as numbers, other answers as text; "3 + 4 = 7" holds 7.
    """
    truth, content = _known(answer), extract_tag(completion, tag)
    if content is None:
        return 0.0
    bare = unfenced(content)
    right = same_value(bare, truth) or same_value(after_equals(bare), truth)
    return score if right else format_score


def format(completion: str, *, pattern: Pattern) -> float:
    """1 when the regular expression is found in the stripped text, else 0; anchor with ^ and $.

    Says nothing about truth: use it with a small weight beside a judge that does.
    """
    return float(pattern.search(completion.strip()) is not None)


def json_answer(
    completion: str,
    answer: str,
    *,
    key: str = "",
    score: float = 1.0,
    format_score: float = 0.0,
) -> float:
    """`score` when the text (a code fence removed) is JSON that says the answer.

    key: the answer is this entry of the object. `format_score` for other JSON (with that key), 0
    for what is no JSON.
    """
    truth = _known(answer)
    try:
        found = json.loads(unfenced(completion), parse_constant=_refuse)
        found = found[key] if key else found
    except (ValueError, RecursionError, KeyError, TypeError):
        return 0.0
    return score if _says_json(found, truth) else format_score


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
    in_main = threading.current_thread() is threading.main_thread()
    seconds = timeout_seconds if in_main else None
    truth, library = _known(answer), _math_verify()
    marked = truth if "$" in truth or "\\boxed" in truth else f"${truth}$"
    gold = library.parse(marked, parsing_timeout=seconds)
    if not gold:
        raise ValueError(f"the record's answer {truth!r} is no expression; use another reward")
    found = library.parse(plain(unfenced(completion)), parsing_timeout=seconds)
    if not found:
        return 0.0
    return score if library.verify(gold, found, timeout_seconds=seconds) else format_score


def _known(answer: object) -> str:
    if answer is None:
        raise ValueError("the record has no answer; add an answer column to the data")
    return str(answer)


def _true_number(answer: object) -> Decimal:
    number = _final_number(_known(answer), strict=False)
    if number is None:
        raise ValueError(f"the record's answer {answer!r} holds no number; use another reward")
    return number


def _final_number(text: str, *, strict: bool) -> Decimal | None:
    _, mark, tail = text.rpartition("####")
    if not mark:
        return None if strict else next(reversed(numbers(text)), None)
    said = after_equals((tail.strip().splitlines() or [""])[0])
    return leading_number(said) if strict else next(iter(numbers(said)), None)


def _occurs(word: str, text: str) -> bool:
    flags = re.IGNORECASE if len(word) > 1 else 0
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, flags) is not None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _says_json(found: object, truth: str) -> bool:
    if isinstance(found, str):
        return same_value(found, truth)
    try:
        text, wanted = json.dumps(found, sort_keys=True), json.loads(truth)
    except (ValueError, RecursionError):
        return same_value(str(found), truth)
    return text == json.dumps(wanted, sort_keys=True) or same_value(text, truth)


def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise ImportError(
            "the reward 'math' needs the math-verify library: pip install 'asyncgrpo[math]'"
        ) from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it logs whole completions
    return math_verify


def _last_number_is(text: str, answer: str) -> bool:
    return numbers(text)[-1:] == [Decimal(answer)]


def _is_text(text: str, answer: str) -> bool:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"`"
    return (text[1:-1] if quoted else text) == answer


def _is_value(text: str, answer: str) -> bool:
    is_number = numbers(answer) != [] and same_value(answer, str(numbers(answer)[0]))
    return _last_number_is(text, answer) if is_number else _is_text(text, answer)


_JUDGES: dict[str, Callable[[str, str], bool]] = {
    **dict.fromkeys(("add", "sub", "mul", "gcd", "check"), _last_number_is),
    "sort": lambda text, truth: numbers(text, thousands=False) == numbers(truth, thousands=False),
    "palindrome": lambda text, truth: choice(text, truth, choices=["YES", "NO"]) == 1,
    "reverse": _is_text,
    "expression": _is_value,
}

_NAMED = (task, length_penalty, exact, gsm8k, math, tag, integer, choice, format, length, http)
BUILTINS: dict[str, Callable[..., Any]] = {judge.__name__: judge for judge in _NAMED}
BUILTINS["json"] = json_answer
