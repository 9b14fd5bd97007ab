"""What losses, corrections and aggregations may look at: one micro-batch, and totals of the batch.

Notation, per token: mu the behaviour policy that sampled it, p the proximal policy (the learner's
weights before the first optimizer step on this batch), pi the policy being optimised; r = pi / p,
w = p / mu, rho = pi / mu. M is the loss mask, A the advantage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# exp of a larger difference of log-probs overflows float32 once squared (e^40 = 2e17 is safe,
# e^89 is infinite), and inf * 0 is NaN in every sum after it.
MAX_LOG_RATIO = 20.0
# Rounding alone moves the log-prob of a token by about this much when rows are packed otherwise:
# the sign of a smaller log-ratio says nothing, and would make results depend on the split.
ROUNDING = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counts over the whole optimizer batch, all ranks: no answer depends on how it was split."""

    num_tokens: int  # loss tokens
    num_sequences: int  # completions
    num_microbatches: int = 1  # of this rank times the number of ranks; only bnpo looks at it
    max_completion_tokens: int = 1
    second_moment_cut: float = float("inf")  # m2po: tokens with a larger log(w)^2 are masked
    decile_edges: Tensor | None = None  # int64 [9] completion lengths that part ten equal shares


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """One micro-batch of N sequences; never logits. Float32 [S] on one device, 0 where mask is 0.

    A sequence is always whole. ref_logprobs is None without a reference model.
    """

    logprobs: Tensor  # log pi of the target, with gradient
    behavior_logprobs: Tensor  # log mu
    proximal_logprobs: Tensor  # log p, no gradient
    old_logprobs: Tensor  # what the loss's own ratio is taken against: log p, with bypass log mu
    ref_logprobs: Tensor | None = None
    advantages: Tensor
    mask: Tensor  # 1 = in the loss
    staleness: Tensor  # policy versions
    entropy: Tensor  # nats; with gradient only when there is an entropy bonus
    sequence_ids: Tensor  # int64 [S] 0..N-1
    num_sequences: int
    totals: Totals

    @property
    def ratio(self) -> Tensor:
        """pi / p (pi / mu with bypass), with gradient."""
        return safe_exp(self.logprobs - self.old_logprobs)

    @property
    def behavior_ratio(self) -> Tensor:
        """rho = pi / mu, without gradient."""
        return safe_exp((self.logprobs - self.behavior_logprobs).detach())

    @property
    def log_weight(self) -> Tensor:
        """log w = log p - log mu, without gradient."""
        return self.proximal_logprobs - self.behavior_logprobs

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[N] sums over the loss tokens of each sequence."""
        sums = torch.zeros(self.num_sequences, dtype=values.dtype, device=values.device)
        return sums.index_add(0, self.sequence_ids, values * self.mask)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[N] means over the loss tokens of each sequence."""
        # clamp: a sequence without loss tokens would divide by zero.
        return self.sequence_sum(values) / self.sequence_lengths.clamp(min=1)

    @property
    def sequence_lengths(self) -> Tensor:
        """float32 [N] number of loss tokens."""
        return self.sequence_sum(torch.ones_like(self.mask))

    def on_tokens(self, per_sequence: Tensor) -> Tensor:
        """[N] -> [S]: each token gets its sequence's value."""
        return per_sequence[self.sequence_ids]


def safe_exp(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), the exponent held within +-MAX_LOG_RATIO; gradient 0 outside."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def moves_on(log_weight: Tensor, advantages: Tensor) -> Tensor:
    """bool [S]: p has already moved the way that the advantage pushes (A > 0, w > 1, or both <)."""
    return log_weight * advantages.sign() > ROUNDING
