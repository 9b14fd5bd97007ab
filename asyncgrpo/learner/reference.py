"""The reference policy of the KL term: a frozen second model, mixed with the policy if wanted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyncgrpo.learner.model import PackedRow, PolicyHead
from asyncgrpo.settings.algo import AlgoSettings

Context = AbstractContextManager[None]
# Ziegler et al., arXiv 1909.08593 section 2.2: one step never changes the coefficient by more.
MAX_ERROR = 0.2


class Reference:
    """Never trained: a model of its own, or with LoRA the policy while its adapter is off."""

    def __init__(self, head: PolicyHead, off: Callable[[], Context] = nullcontext) -> None:
        """head: of a frozen model; or, with off, of the policy."""
        self._head, self._off = head, off

    @torch.no_grad()
    def logprobs(self, row: PackedRow) -> Tensor:
        """float32 [S] log-probs of the targets, 0 outside the loss."""
        with self._off():
            logprobs: Tensor = self._head(row)[0]
        return logprobs

    def state(self) -> dict[str, Tensor]:
        """Its own weights, to be saved and filled."""
        return self._head.policy.state_dict() if self._off is nullcontext else {}

    @torch.no_grad()
    def sync(self, policy: PreTrainedModel, alpha: float) -> None:
        """ref := alpha pi + (1 - alpha) ref (TR-DPO, arXiv 2404.09656 eq. 2); alpha 1 resets."""
        for own, other in zip(self._head.policy.parameters(), policy.parameters(), strict=True):
            own.lerp_(other.to(own.dtype), alpha)


def adapted_coefficient(
    coefficient: float, kl: float, num_completions: int, algo: AlgoSettings
) -> float:
    """The next KL coefficient; unchanged without algo.kl_target.

    beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), Ziegler et al., arXiv 1909.08593.
    """
    if algo.kl_target is None:
        return coefficient
    error = min(max(kl / algo.kl_target - 1.0, -MAX_ERROR), MAX_ERROR)
    return coefficient * (1.0 + error * num_completions / algo.kl_horizon)
