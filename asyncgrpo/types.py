"""The records that travel between the rooms: frozen, keyword-only, numpy only.

Letters: G completions per group, P prompt tokens, T completion tokens.
A policy version is the number of optimizer updates that the weights contain (0 = initial weights).

Example: one group of two completions for "2 + 3", the second crossing from version 4 to 5:

    Group(lease=Lease(lease_id="t17", ...), prompt_token_ids=[12, 7, 9], completions=(
        Completion(token_ids=[5, 1], behavior_logprobs=[-0.1, -0.02], versions=[4, 4], ...),
        Completion(token_ids=[6, 6, 1], behavior_logprobs=[...], versions=[4, 4, 5], ...),
    ), rewards=[1.0, -1.0], reward_parts={"task": [1.0, -1.0]}, ...)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Message = dict[str, str]  # {"role": ..., "content": ...}
FinishReason = Literal["stop", "length", "abort"]
Purpose = Literal["train", "eval"]


# Attention of a causal block costs as much as its matrices (about 12 width^2, and per token 24
# width^2 FLOPs against 2 width L) in sequences of 12 widths: this many tokens at a width of 1365.
ATTENTION_TOKENS = 16_384


def sequence_cost(num_tokens: int) -> float:
    """Estimated FLOPs of training on one sequence, in those of a token without attention."""
    return num_tokens * (1.0 + num_tokens / ATTENTION_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question. `columns` holds every column of the data set; rewards get them by keyword."""

    prompt_id: str
    messages: tuple[Message, ...]
    answer: str | None
    data_source: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn. temperature 0 is greedy; top_k 0 and top_p 1 truncate nothing."""

    temperature: float
    top_p: float
    top_k: int
    max_completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Permission to make one group for one prompt."""

    lease_id: str
    prompt: Prompt
    group_size: int
    sampling: Sampling
    seed: int  # f(run seed, lease_id); engines that sample per request use it
    purpose: Purpose
    version: int  # train: the version the actor held when it asked; eval: the one to evaluate
    deadline_seconds: float  # after this long without the group the lease expires
    block: str = ""  # eval: name of the evaluation, whose reward scores it


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer, its end-of-sequence token included when finish_reason is "stop"."""

    token_ids: Int32  # [T]
    behavior_logprobs: Float32  # [T] nats, at the sampling temperature, from the engine
    versions: Int32  # [T] policy version that sampled each token; may change inside a completion
    finish_reason: FinishReason
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What an engine returns for one lease: all G completions, not yet scored."""

    lease_id: str
    prompt_token_ids: Int32  # [P]
    completions: tuple[Completion, ...]  # G of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All completions of one lease with their rewards: the unit on the wire; never split."""

    lease: Lease
    prompt_token_ids: Int32  # [P]
    completions: tuple[Completion, ...]  # G of them
    rewards: Float32  # [G] weighted sum of the parts
    reward_parts: Mapping[str, Float32]  # each [G]; NaN where a function returned None
    actor: str
    timings: Mapping[str, float] = field(default_factory=dict)  # seconds: generate, judge
    # as it came over the wire, see wire/codec.py; a changed copy (`replace`) has none
    received: Any = field(default=None, init=False, repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        """Completion tokens of all G completions."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def cost(self) -> float:
        """Estimated FLOPs of training on it, as `sequence_cost` counts."""
        prompt = len(self.prompt_token_ids)
        return sum(sequence_cost(prompt + len(c.token_ids)) for c in self.completions)

    @property
    def versions(self) -> Int32:
        """[tokens] of all completions."""
        return np.concatenate([completion.versions for completion in self.completions])

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that sampled any token of the group."""
        return int(self.versions.min())


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedGroup:
    """A group that was trained or dropped, for the record of samples."""

    group: Group
    status: Literal["trained", "replayed", "filtered", "evicted"]  # replayed: trained once more
    reason: str = ""  # of a dropped one, such as all_wrong or stale
    advantages: Float32 | None = None  # [G] of a trained one, as the learner computed them


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's part of the batch of one step; asking twice for (step, rank) gives the same."""

    step: int
    groups: tuple[Group, ...]
    num_loss_tokens_global: int  # completion tokens of the whole batch, all ranks
    num_completions_global: int

    @property
    def staleness(self) -> Int32:
        """[tokens] age in versions of every completion token, at this step."""
        spans = [c.versions for group in self.groups for c in group.completions]
        return self.step - np.concatenate(spans or [np.zeros(0, np.int32)])
