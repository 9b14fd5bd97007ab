"""Oracle batches as the packed inputs of the fast code, and its answers as rows again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from oracles import Batch, Rows

from asyncgrpo.learner.inputs import LossInputs, Totals
from asyncgrpo.settings.algo import AlgoSettings


def totals(batch: Batch, **changes: object) -> Totals:
    """Counts of the whole batch."""
    values = {
        "num_tokens": int(sum(seq["mask"].sum() for seq in batch)),
        "num_sequences": len(batch),
        "max_completion_tokens": 20,
    }
    return Totals(**{**values, **changes})


def as_inputs(
    batch: Batch,
    algo: AlgoSettings,
    whole: Totals | None = None,
    dtype: torch.dtype = torch.float64,
) -> LossInputs:
    """One micro-batch of the sequences, end to end; masked places hold 0."""

    def row(name: str) -> torch.Tensor:
        rows = [np.where(seq["mask"] > 0, seq[name], 0.0) for seq in batch]
        return torch.from_numpy(np.concatenate(rows)).to(dtype)

    ids = [np.full(len(seq["mask"]), i) for i, seq in enumerate(batch)]
    advantages = [np.where(seq["mask"] > 0, seq["advantage"], 0.0) for seq in batch]
    behavior, proximal = row("behavior"), row("proximal")
    return LossInputs(
        logprobs=row("logprobs").requires_grad_(),
        behavior_logprobs=behavior,
        proximal_logprobs=proximal,
        old_logprobs=behavior if "bypass" in algo.correction else proximal,
        ref_logprobs=row("ref"),
        advantages=torch.from_numpy(np.concatenate(advantages)).to(dtype),
        mask=row("mask"),
        staleness=row("staleness"),
        entropy=row("entropy"),
        sequence_ids=torch.from_numpy(np.concatenate(ids)),
        num_sequences=len(batch),
        totals=whole or totals(batch),
    )


def as_rows(batch: Batch, values: torch.Tensor) -> Rows:
    """[S] -> one row per sequence, 0 at masked places."""
    flat = values.detach().double().numpy()
    ends = np.cumsum([len(seq["mask"]) for seq in batch])
    rows = np.split(flat, ends[:-1])
    return [r * (seq["mask"] > 0) for r, seq in zip(rows, batch, strict=True)]


def assert_rows_equal(found: Rows, expected: Rows, rtol: float = 1e-6, atol: float = 1e-9) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def parts_of(batch: Batch, cuts: Sequence[int]) -> list[Batch]:
    """The sequences cut into micro-batches."""
    return [list(part) for part in np.split(np.array(batch, dtype=object), cuts)]
