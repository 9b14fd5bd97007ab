"""The records that travel between the rooms: frozen, keyword-only, numpy only.

Letters: G completions per group, P prompt tokens, T completion tokens.
A policy version is the number of optimizer updates that the weights contain (0 = initial weights).

Example: one group of two completions for "2 + 3", the second crossing from version 4 to 5:

    completions = Completions.of([
        Completion(token_ids=[5, 1], behavior_logprobs=[-0.1, -0.02], versions=[4, 4], ...),
        Completion(token_ids=[6, 6, 1], behavior_logprobs=[...], versions=[4, 4, 5], ...),
    ])
    Group(lease=Lease(lease_id="t17", ...), prompt_token_ids=[12, 7, 9], completions=completions,
        rewards=[1.0, -1.0], reward_parts={"task": [1.0, -1.0]}, ...)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


class Completions:
    """G completions one behind the other; each is cut out when it is asked for."""

    __slots__ = (
        "_span", "behavior_logprobs", "finish_reasons", "lengths", "texts", "token_ids", "versions"
    )  # fmt: skip

    def __init__(
        self,
        lengths: Sequence[int],
        token_ids: Int32,
        behavior_logprobs: Float32,
        versions: Int32,
        finish_reasons: Sequence[FinishReason],
        texts: Sequence[str],
    ) -> None:
        """lengths, finish_reasons, texts: [G]; the arrays: [tokens]. ValueError when not so."""
        if len({len(lengths), len(finish_reasons), len(texts)}) != 1 or min(lengths, default=0) < 0:
            raise ValueError(f"{len(lengths)} lengths and other reasons or texts, or a length < 0")
        if not len(token_ids) == len(behavior_logprobs) == len(versions) == sum(lengths):
            raise ValueError(f"token arrays of other lengths than {sum(lengths)}")
        self.lengths, self.token_ids, self.versions = lengths, token_ids, versions
        self.behavior_logprobs = behavior_logprobs
        self.finish_reasons, self.texts = finish_reasons, texts
        self._span: tuple[int, int] | None = None

    @classmethod
    def of(cls, parts: Sequence[Completion]) -> Completions:
        """Some completions, one or more, as one."""
        return cls(
            [len(each.token_ids) for each in parts],
            np.concatenate([each.token_ids for each in parts]).astype(np.int32, copy=False),
            np.concatenate([c.behavior_logprobs for c in parts]).astype(np.float32, copy=False),
            np.concatenate([each.versions for each in parts]).astype(np.int32, copy=False),
            [each.finish_reason for each in parts],
            [each.text for each in parts],
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Completion:
        length, start = self.lengths[index], sum(self.lengths[: range(len(self))[index]])
        return Completion(
            token_ids=self.token_ids[start : start + length],
            behavior_logprobs=self.behavior_logprobs[start : start + length],
            versions=self.versions[start : start + length],
            finish_reason=self.finish_reasons[index],
            text=self.texts[index],
        )

    def __iter__(self) -> Iterator[Completion]:
        return (self[index] for index in range(len(self)))

    @property
    def version_span(self) -> tuple[int, int]:
        """The oldest and the newest policy version of all tokens; ValueError when there is none."""
        if self._span is None:
            self._span = int(self.versions.min()), int(self.versions.max())
        return self._span


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
    completions: Completions
    rewards: Float32  # [G] weighted sum of the parts
    reward_parts: Mapping[str, Float32]  # each [G]; NaN where a function returned None
    actor: str
    timings: Mapping[str, float] = field(default_factory=dict)  # seconds: generate, judge
    # as it came over the wire, see wire/codec.py; a changed copy (`replace`) has none
    received: Any = field(default=None, init=False, repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        """Completion tokens of all G completions."""
        return len(self.completions.token_ids)

    @property
    def mean_reward(self) -> float:
        """The mean of its rewards."""
        return sum(self.rewards.tolist()) / len(self.rewards)

    @property
    def cost(self) -> float:
        """Estimated FLOPs of training on it, as `sequence_cost` counts."""
        prompt = len(self.prompt_token_ids)
        return sum(sequence_cost(prompt + length) for length in self.completions.lengths)


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
        spans = [group.completions.versions for group in self.groups]
        return self.step - np.concatenate(spans or [np.zeros(0, np.int32)])
