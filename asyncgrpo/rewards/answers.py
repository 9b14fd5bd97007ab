"""Finds the answer in a text: numbers, tags, code fences. Nothing here raises on any text."""

from __future__ import annotations

import re
from decimal import Decimal

# A minus directly after a digit is an operator: "10-3" holds 10 and 3.
_NUMBER = re.compile(
    r"(?<![0-9.])-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z]))?"
)
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_FENCE = re.compile(r"```(?:(?:[A-Za-z][\w+-]*)?[ \t]*\r?\n)?(.*?)(?:```|\Z)", re.DOTALL)
_FULL_WIDTH = {0xFF01 + offset: 0x21 + offset for offset in range(94)}  # "７２" -> "72"
_PLAIN: dict[int, int | str] = {**_FULL_WIDTH, 0x3000: " ", 0x2212: "-"}
_CURRENCY = dict.fromkeys(map(ord, "$€£¥"))


def plain(text: str) -> str:
    """Full-width characters and the minus sign as their ASCII twins."""
    return text.translate(_PLAIN)


def unfenced(text: str) -> str:
    """The content of the code fence that the text begins with, else the text; stripped."""
    bare = text.strip()
    fenced = _FENCE.match(bare)
    return (fenced.group(1) if fenced else bare).strip()


def after_equals(text: str) -> str:
    """What stands after the last "=": the answer of "3 + 4 = 7"."""
    return text.rpartition("=")[2].strip()


def numbers(text: str, *, thousands: bool = True) -> list[Decimal]:
    """All numbers of a text, exactly; currency signs and (if asked) thousands commas are dropped.

    "-$1,234.50 for 3" holds -1234.5 and 3.
    """
    return [Decimal(number) for number in _NUMBER.findall(_bare(text, thousands))]


def leading_number(text: str) -> Decimal | None:
    """The number that a text begins with, markdown emphasis aside: 72 for "**$72** per day"."""
    found = _NUMBER.match(_bare(text, True).lstrip(" \t*_`"))
    return Decimal(found.group()) if found else None


def same_value(text: str, truth: str) -> bool:
    """Equal as texts without outer white space, or as numbers: "72.0", "$72." and "７２" are 72."""
    if text.strip() == truth.strip():
        return True
    left, right = _whole_number(text), _whole_number(truth)
    return left is not None and left == right


def extract_tag(text: str, tag: str) -> str | None:
    """The stripped content of the last closed <tag>, over several lines too; None without one."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if start < 0 else text[start + len(tag) + 2 : end].strip()


def _bare(text: str, thousands: bool) -> str:
    bare = plain(text).translate(_CURRENCY)
    return _THOUSANDS.sub("", bare) if thousands else bare


def _whole_number(text: str) -> Decimal | None:
    found = _NUMBER.fullmatch(_bare(text, True).strip().rstrip("."))
    return Decimal(found.group()) if found else None
