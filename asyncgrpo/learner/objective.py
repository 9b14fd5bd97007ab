"""The loss of one micro-batch: token loss x correction, KL and entropy terms, aggregation.

    loss = sum_t share_t (weight_t (token_loss_t + kl_coef kl_t) - entropy_coef entropy_t)

Losses of all micro-batches and ranks add up to the loss of the step, and so do their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from asyncgrpo.algorithms import call
from asyncgrpo.errors import AlgorithmError, BadInput
from asyncgrpo.imports import described, is_interrupt, last_place
from asyncgrpo.learner.advantages import GroupRewards
from asyncgrpo.learner.corrections import Correction
from asyncgrpo.learner.inputs import LossInputs, Totals
from asyncgrpo.learner.losses import TokenLoss
from asyncgrpo.learner.shaping import estimate
from asyncgrpo.settings.algo import AlgoSettings

Parts = TypeVar("Parts", TokenLoss, Correction)
EXAMPLE_GROUP = GroupRewards(
    rewards=np.array([1.0, 0.0, 0.5, 0.0]),
    lengths=np.array([2, 2, 1, 3]),
    is_correct=np.array([True, False, True, False]),
    batch_std=0.5,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """All corrections of `algo.correction` together. No gradient flows through them."""

    weight: Tensor  # float32 [S] multiplies the token losses; 0 where a rule masks
    is_capped: Tensor  # bool [S] where the importance weight was cut off
    removed: Mapping[str, Tensor]  # rule -> bool [S] what it alone masks


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Loss of one micro-batch and what its diagnostics are made of."""

    loss: Tensor  # float32 scalar with gradient
    per_token: Tensor  # float32 [S] what the loss sums, no gradient: to find a non-finite token
    token: TokenLoss
    corrected: Corrected
    kl: Tensor | None  # float32 [S] estimate of KL(pi || ref), when there is a reference


def objective(inputs: LossInputs, algo: AlgoSettings, kl_coef: float) -> Objective:
    """The loss of one micro-batch; kl_coef is the present coefficient of KL in the loss.

    AlgorithmError when a user's function raises or returns a wrong shape or no gradient.
    """
    token = _parts(call("loss", algo.loss, inputs, algo), TokenLoss, "loss", inputs, algo.loss)
    is_training = inputs.logprobs.requires_grad and torch.is_grad_enabled()
    if is_training and not token.loss.requires_grad:
        raise AlgorithmError(
            f"algo.loss {algo.loss!r} returned a loss without gradient: nothing would be learned; "
            "compute it from inputs.logprobs or inputs.ratio, and do not detach these"
        )
    corrected = correct(inputs, algo)
    share = _checked(call("aggregation", algo.aggregation, inputs, algo), inputs, algo.aggregation)
    per_token = share * corrected.weight * token.loss
    kl = None
    if inputs.ref_logprobs is not None:
        kl = _checked(call("kl", algo.kl, inputs.ref_logprobs - inputs.logprobs), inputs, algo.kl)
        if kl_coef:
            weight = corrected.weight
            if "bypass" in algo.correction:
                # The KL term needs the policy term's weight, which the loss's own ratio hides.
                weight = weight * inputs.behavior_ratio.clamp(max=algo.correction_cap)
            per_token = per_token + share * weight * kl_coef * kl
    if algo.entropy_coef:
        per_token = per_token - share * algo.entropy_coef * inputs.entropy
    return Objective(
        loss=per_token.sum(),
        per_token=per_token.detach(),
        token=token,
        corrected=corrected,
        kl=None if kl is None else kl.detach(),
    )


@torch.no_grad()
def correct(inputs: LossInputs, algo: AlgoSettings) -> Corrected:
    """Composes the corrections: all masks first, then the one weight.

    icepop's own weight counts only when no capped weight is named.
    """
    rules = {
        name: _parts(call("correction", name, inputs, algo), Correction, "weight", inputs, name)
        for name in algo.correction
    }
    weights = {name: rule.weight for name, rule in rules.items() if rule.weight is not None}
    if len(weights) > 1 or "bypass" in rules:  # which corrects in the loss's ratio
        weights.pop("icepop", None)
    weight = torch.ones_like(inputs.mask)
    for factor in weights.values():
        weight = weight * factor
    is_capped = torch.zeros_like(weight, dtype=torch.bool)
    removed = {}
    for name, rule in rules.items():
        if rule.is_capped is not None:
            is_capped = is_capped | rule.is_capped
        if rule.keep is not None:
            removed[name] = ~rule.keep
            # where, not a product: a masked token may have an infinite weight.
            weight = torch.where(rule.keep, weight, 0.0)
    return Corrected(weight=weight, is_capped=is_capped, removed=removed)


def _parts(found: object, kind: type[Parts], main: str, inputs: LossInputs, name: str) -> Parts:
    """All of what a function returned; a user's one may return the tensor `main` alone."""
    if not isinstance(found, kind):
        return kind(**{main: _checked(found, inputs, name)})
    for part in fields(kind):
        value = getattr(found, part.name)
        if value is not None or part.default is MISSING:
            _checked(value, inputs, name, f"{kind.__name__}.{part.name} of ")
    return found


def _checked(found: object, inputs: LossInputs, name: str, part: str = "") -> Tensor:
    """A user's function may return anything."""
    shape = tuple(inputs.mask.shape)
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise AlgorithmError(
            f"{name!r} returned {part}{what}; return a tensor of shape {shape}: one number per "
            "place of the packed row"
        )
    return found


def probe(algo: AlgoSettings) -> None:
    """Calls the functions with small examples; AlgorithmError when a user's own one breaks."""
    values = torch.tensor([-0.5, -1.0, -0.25, -2.0])
    inputs = LossInputs(
        logprobs=values.clone().requires_grad_(),
        behavior_logprobs=values * 1.1,
        proximal_logprobs=values,
        old_logprobs=values,
        ref_logprobs=values * 0.9,
        advantages=torch.tensor([1.0, 1.0, -1.0, -1.0]),
        mask=torch.ones(4),
        staleness=torch.tensor([0.0, 1.0, 0.0, 2.0]),
        entropy=torch.ones(4),
        sequence_ids=torch.tensor([0, 0, 1, 1]),
        num_sequences=2,
        totals=Totals(num_tokens=4, num_sequences=2, max_completion_tokens=2),
    )
    try:
        found = objective(inputs, algo, kl_coef=1.0)
        found.loss.backward()
        estimate(EXAMPLE_GROUP, algo)
    except BadInput:
        raise
    except BaseException as error:  # a user's function may raise anything, also SystemExit
        if is_interrupt(error):
            raise
        raise AlgorithmError(
            f"your own function in algo.* raised {described(error)} at {last_place(error)} on an "
            "example of 4 tokens; see asyncgrpo/learner/inputs.py for what it gets"
        ) from error
    gradient = inputs.logprobs.grad
    for what, value in (("loss", found.loss.detach()), ("gradient", gradient)):
        if value is None or not torch.isfinite(value).all():
            shown = None if value is None else value.tolist()
            raise AlgorithmError(
                f"your own function in algo.* gave a {what} of {shown} on an example of 4 tokens; "
                "it must be finite"
            )
