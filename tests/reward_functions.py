"""Reward functions of a user's own module, good and bad, for tests."""

from __future__ import annotations

import asyncio
import os
import time


def vowels(prompts, completions, **columns):
    """Share of vowels: something that an untrained model can learn at once."""
    return [sum(c in "aeiou" for c in text.lower()) / 16 for text in completions]


async def slow_vowels(prompts, completions, **columns):
    """The same after a while, in which an actor holds what it has generated."""
    await asyncio.sleep(0.1)
    return vowels(prompts, completions)


def sleepy(prompts, completions, **columns):
    """Hangs when a completion asks for it."""
    if any("sleep" in text for text in completions):
        time.sleep(60)
    return [1.0 for _ in completions]


def silent(prompts, completions, **columns):
    """Applies to nothing."""
    return [None for _ in completions]


def deadly(prompts, completions, **columns):
    """Takes its whole process down when a completion asks for it."""
    if any("die" in text for text in completions):
        os._exit(9)
    return [1.0 for _ in completions]


def raises(prompts, completions, **columns):
    raise KeyError("no such column")


def too_few(prompts, completions, **columns):
    return [1.0]


def not_finite(prompts, completions, **columns):
    return [float("nan") for _ in completions]
