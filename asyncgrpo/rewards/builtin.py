"""The built-in reward functions. None of them raises on any completion text.

What counts as the answer is the first line that is not empty (code fences removed), and on
that line what stands after the last "=", so "3 + 4 = 7" answers 7.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

PENALTY_PER_CHARACTER = 0.002
MAX_PENALISED_CHARACTERS = 200

# A minus directly after a digit is an operator: "10-3" holds 10 and 3.
_NUMBER = re.compile(r"(?<![0-9.])-?[0-9]+(?:\.[0-9]+)?")
_FENCE = re.compile(r"```(?:[\w+-]*[ \t]*\r?\n)?(.*?)(?:```|\Z)", re.DOTALL)
_YES_OR_NO = re.compile(r"\b(YES|NO)\b", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


def task(completions: Sequence[str], answer: Sequence[str], kind: Sequence[str]) -> list[float]:
    """+1 for a right and -1 for a wrong answer to a generated task (see asyncgrpo.data.tasks).

    Numbers: the last number counts, so that a worked answer may lead up to it. sort: exactly
    these numbers. palindrome: YES or NO as a word, not both. Words: the exact text, one pair
    of quotes allowed. Raises ValueError for a kind that is not a generated task.
    """
    return [
        task_score(text, truth, name)
        for text, truth, name in zip(completions, answer, kind, strict=True)
    ]


def length_penalty(completions: Sequence[str]) -> list[float]:
    """-0.002 per character, -0.4 at most: of two right answers the shorter one is better."""
    return [-PENALTY_PER_CHARACTER * min(len(c), MAX_PENALISED_CHARACTERS) for c in completions]


def exact(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """1 when the text without outer white space equals the answer, else 0.

    Raises ValueError for a record without an answer.
    """
    return [
        float(text.strip() == _known(truth).strip())
        for text, truth in zip(completions, answer, strict=True)
    ]


def gsm8k(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """1 when the number after the last "####" (else the last number) equals the answer's, else 0.

    The answer may be the bare number or the data set's whole solution. "1,234" is 1234.
    Raises ValueError for a record whose answer holds no number.
    """
    return [
        float(_final_number(text) == _true_number(truth))
        for text, truth in zip(completions, answer, strict=True)
    ]


def task_score(text: str, answer: str, kind: str) -> float:
    """+1 or -1 for one completion of a generated task."""
    if kind not in _JUDGES:
        raise ValueError(f"kind {kind!r} is not a generated task: {', '.join(_JUDGES)}")
    return 1.0 if _JUDGES[kind](_answer_part(text), _known(answer)) else -1.0


def _known(answer: str | None) -> str:
    if answer is None:
        raise ValueError("the record has no answer; add an answer column to the data")
    return answer


def _answer_part(text: str) -> str:
    """The part of a completion that counts as its answer; "" when there is none."""
    bare = text.strip().replace("\N{MINUS SIGN}", "-")
    fenced = _FENCE.match(bare)
    lines = (fenced.group(1) if fenced else bare).strip().splitlines()
    return lines[0].rpartition("=")[2].strip() if lines else ""


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(text)]


def _last_number_is(text: str, answer: str) -> bool:
    return _numbers(text)[-1:] == [float(answer)]


def _all_numbers_are(text: str, answer: str) -> bool:
    return _numbers(text) == _numbers(answer)


def _says(text: str, answer: str) -> bool:
    return {word.upper() for word in _YES_OR_NO.findall(text)} == {answer}


def _is_text(text: str, answer: str) -> bool:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"`"
    return (text[1:-1] if quoted else text) == answer


def _is_value(text: str, answer: str) -> bool:
    is_number = _NUMBER.fullmatch(answer) is not None
    return _last_number_is(text, answer) if is_number else _is_text(text, answer)


def _final_number(text: str) -> float | None:
    numbers = _numbers(_THOUSANDS.sub("", text.rpartition("####")[2]))
    return numbers[-1] if numbers else None


def _true_number(answer: str | None) -> float:
    number = _final_number(_known(answer))
    if number is None:
        raise ValueError(f"the record's answer {answer!r} holds no number; use another reward")
    return number


_JUDGES: dict[str, Callable[[str, str], bool]] = {
    "add": _last_number_is,
    "sub": _last_number_is,
    "mul": _last_number_is,
    "gcd": _last_number_is,
    "check": _last_number_is,
    "sort": _all_numbers_are,
    "palindrome": _says,
    "reverse": _is_text,
    "expression": _is_value,
}

BUILTINS: dict[str, Callable[..., list[float]]] = {
    "task": task,
    "length_penalty": length_penalty,
    "exact": exact,
    "gsm8k": gsm8k,
}
