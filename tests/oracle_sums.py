"""Aggregation and diagnostics as slow float64 loops, to check the fast code by.

Layout of a batch: see oracles.py. The denominators count the loss mask M, so a token that a
correction dropped still counts, as a clipped token does.
"""

from __future__ import annotations

import math

import numpy as np
from oracles import Batch, Rows, clamp, length, ratio

# --- aggregation of per-token values to one number -----------------------------------------------


def token_sum(batch: Batch, values: Rows) -> float:
    total = 0.0
    for seq, row in zip(batch, values, strict=True):
        for t in range(len(row)):
            total += float(row[t]) * float(seq["mask"][t])
    return total


def product(left: Rows, right: Rows) -> Rows:
    """Elementwise, for loss · weight."""
    return [
        np.array([x * y for x, y in zip(a, b, strict=True)])
        for a, b in zip(left, right, strict=True)
    ]


def token_mean(batch: Batch, values: Rows) -> float:
    """Σ M x / Σ M over the whole optimizer batch; 0 without a token. DAPO 2503.14476."""
    return token_sum(batch, values) / max(sum(length(seq) for seq in batch), 1)


def sequence_mean(batch: Batch, values: Rows) -> float:
    """Mean over sequences of Σ_t M x / Σ_t M; a masked sequence counts, as 0. GRPO 2402.03300."""
    total = 0.0
    for seq, row in zip(batch, values, strict=True):
        total += token_sum([seq], [row]) / max(length(seq), 1)
    return total / len(batch)


def bnpo(batch: Batch, values: Rows, micro_batches: list[list[int]] | None = None) -> float:
    """Mean over micro-batches of Σ M x / Σ M within the micro-batch; all in one by default."""
    parts = [list(range(len(batch)))] if micro_batches is None else micro_batches
    total = 0.0
    for part in parts:
        total += token_mean([batch[i] for i in part], [values[i] for i in part])
    return total / len(parts)


def dr_grpo(batch: Batch, values: Rows, max_completion_tokens: int) -> float:
    """Σ M x / (number of sequences · max_completion_tokens). Dr. GRPO 2503.20783."""
    return token_sum(batch, values) / (len(batch) * max_completion_tokens)


# --- diagnostics ---------------------------------------------------------------------------------


def weights(batch: Batch) -> list[float]:
    """Every untruncated w = p/μ of the unmasked tokens."""
    found = []
    for seq in batch:
        for t in range(len(seq["mask"])):
            if seq["mask"][t]:
                found.append(ratio(seq["proximal"][t], seq["behavior"][t]))
    return found


def ess(batch: Batch) -> float:
    """(Σ w)² / (n Σ w²): 1 on policy, 1/n where one token has all the weight."""
    w = weights(batch)
    return sum(w) ** 2 / (len(w) * sum(x * x for x in w))


def chi2(batch: Batch) -> float:
    """mean w² − 1, an estimate of χ²(p ‖ μ)."""
    w = weights(batch)
    return sum(x * x for x in w) / len(w) - 1


def drift_by_staleness(batch: Batch) -> dict[int, tuple[float, float, int]]:
    """Per staleness: mean k1 = −log w, mean k3 = w − 1 − log w (of KL(μ ‖ p)) and the count."""
    found: dict[int, list[tuple[float, float]]] = {}
    for seq in batch:
        for t in range(len(seq["mask"])):
            if seq["mask"][t]:
                gap = float(seq["proximal"][t] - seq["behavior"][t])
                pair = (-gap, math.exp(clamp(gap)) - 1 - clamp(gap))
                found.setdefault(int(seq["staleness"][t]), []).append(pair)
    return {
        lag: (sum(k1 for k1, _ in p) / len(p), sum(k3 for _, k3 in p) / len(p), len(p))
        for lag, p in found.items()
    }


def removed_by_decile(batch: Batch, keep: Rows) -> dict[int, tuple[float, float]]:
    """Per length decile the share of its sequences and of its tokens that `keep` removed.

    Length counts unmasked tokens; a sequence is in decile floor(10 · share of strictly shorter
    sequences), so equal lengths share a decile. It is removed when no token is kept. Fully masked
    sequences are left out; a decile without sequences is absent.
    """
    pairs = [(length(seq), int(sum(row))) for seq, row in zip(batch, keep, strict=True)]
    pairs = [pair for pair in pairs if pair[0] > 0]
    found: dict[int, list[tuple[int, int]]] = {}
    for size, stayed in pairs:
        shorter = sum(1 for other, _ in pairs if other < size)
        found.setdefault(10 * shorter // len(pairs), []).append((size, stayed))
    return {
        decile: (
            sum(1 for _, stayed in group if stayed == 0) / len(group),
            1 - sum(stayed for _, stayed in group) / sum(size for size, _ in group),
        )
        for decile, group in found.items()
    }
