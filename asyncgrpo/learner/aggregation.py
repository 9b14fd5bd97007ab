"""How token losses become one number. Every public function is one: `algo.aggregation` names.

Each returns what every token's loss is multiplied with, so that the sum over all micro-batches
and ranks is the loss of the step, however the batch was split (bnpo excepted by its definition).
"""

from __future__ import annotations

from torch import Tensor

from asyncgrpo.learner.inputs import LossInputs
from asyncgrpo.settings.algo import AlgoSettings


def token_mean(inputs: LossInputs, algo: AlgoSettings) -> Tensor:
    """Mean over all loss tokens of the batch: long completions weigh more.

    sum M loss / (number of loss tokens of the whole optimizer batch, all ranks)
    Source: DAPO, arXiv 2503.14476 eq. 8
    Use: the default.
    """
    return inputs.mask / max(inputs.totals.num_tokens, 1)  # a batch may have no loss token


def sequence_mean(inputs: LossInputs, algo: AlgoSettings) -> Tensor:
    """Mean over sequences of each one's mean: every completion weighs the same.

    sum_i (sum_t M loss / sum_t M) / (number of completions of the whole optimizer batch)
    Source: GRPO, arXiv 2402.03300 eq. 3
    Use: gspo. Long wrong answers are punished less per token (Dr. GRPO, arXiv 2503.20783).
    """
    lengths = inputs.on_tokens(inputs.sequence_lengths)
    return inputs.mask / lengths.clamp(min=1) / max(inputs.totals.num_sequences, 1)


def bnpo(inputs: LossInputs, algo: AlgoSettings) -> Tensor:
    """Mean over the loss tokens of each micro-batch, then over micro-batches and ranks.

    (sum M loss / sum M over the micro-batch) / number of micro-batches
    Source: TRL's loss_type bnpo
    Use: only to reproduce TRL: the result depends on learner.max_tokens_per_microbatch.
    """
    tokens = inputs.mask.sum().clamp(min=1)  # a micro-batch may have no loss token
    return inputs.mask / tokens / max(inputs.totals.num_microbatches, 1)


def dr_grpo(inputs: LossInputs, algo: AlgoSettings) -> Tensor:
    """Sum over tokens by a constant: no length in the denominator, so no length bias.

    sum M loss / (number of completions of the whole optimizer batch * max_completion_tokens)
    Source: Dr. GRPO, arXiv 2503.20783
    Use: with advantage dr_grpo. The loss shrinks with sampling.max_completion_tokens: raise lr.
    """
    totals = inputs.totals
    return inputs.mask / (max(totals.num_sequences, 1) * totals.max_completion_tokens)
