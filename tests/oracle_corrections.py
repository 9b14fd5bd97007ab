"""The off-policy corrections as slow float64 loops, to check the fast code by.

Each returns (keep, weight) per token, see oracles.py for the layout: keep is 0 or 1, weight is 0
where keep is 0. Both are constants to the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from oracles import Batch, Rows, clamp, each_token, length, mean_gap, ratio


def kept(batch: Batch, weight: Callable[[int, int], float | None]) -> tuple[Rows, Rows]:
    """Split weight(i, t), None where the token is dropped, into a 0/1 mask and the weights."""
    keep = each_token(batch, lambda i, t: 0.0 if weight(i, t) is None else 1.0)
    return keep, each_token(batch, lambda i, t: weight(i, t) or 0.0)


def tis(batch: Batch, cap: float = 2.0) -> tuple[Rows, Rows]:
    """min(w, cap). Truncated importance sampling (Ionides 2008); the weight of decoupled PPO,
    2110.00641, AReaL 2505.24298.
    """
    return kept(
        batch, lambda i, t: min(ratio(batch[i]["proximal"][t], batch[i]["behavior"][t]), cap)
    )


def tis_sequence(batch: Batch, cap: float = 8.0) -> tuple[Rows, Rows]:
    """min(Π_t w_t, cap) over the unmasked tokens, the same for every token of a sequence."""
    product = []
    for seq in batch:
        log_w = mean_gap(seq, seq["proximal"], seq["behavior"]) * length(seq)
        product.append(min(math.exp(clamp(log_w)), cap))
    return kept(batch, lambda i, t: product[i])


def icepop(batch: Batch, low: float = 0.5, high: float = 5.0) -> tuple[Rows, Rows]:
    """w where low <= w <= high, else the token is dropped. IcePop, 2510.18855."""

    def weight(i: int, t: int) -> float | None:
        w = ratio(batch[i]["proximal"][t], batch[i]["behavior"][t])
        return w if low <= w <= high else None

    return kept(batch, weight)


def geometric_mask(batch: Batch, low: float = 0.99, high: float = 1.01) -> tuple[Rows, Rows]:
    """Keep the sequences with low <= exp(mean_t log w) <= high, with weight 1."""

    def weight(i: int, t: int) -> float | None:
        gap = mean_gap(batch[i], batch[i]["proximal"], batch[i]["behavior"])
        return 1.0 if low <= math.exp(clamp(gap)) <= high else None

    return kept(batch, weight)


def opsm(batch: Batch, delta: float = 1e-4) -> tuple[Rows, Rows]:
    """Drop a sequence where A < 0 and mean_t (log μ − log π) > δ. DeepSeek-V3.2 2512.02556."""

    def weight(i: int, t: int) -> float | None:
        gap = mean_gap(batch[i], batch[i]["behavior"], batch[i]["logprobs"])
        return None if batch[i]["advantage"] < 0 and gap > delta else 1.0

    return kept(batch, weight)


def m2po(batch: Batch, threshold: float = 0.04) -> tuple[Rows, Rows]:
    """While the mean of (log w)² over T exceeds τ, drop the token of T where it is largest.

    M2PO 2510.01161 alg. 1, with p in the place of π as AReaL: T holds, over the whole batch, the
    tokens that PPO could clip: A > 0 and w > 1, or A < 0 and w < 1. The paper divides the loss by
    all tokens, dropped ones included.
    """
    moments = {}
    for i, seq in enumerate(batch):
        for t in range(len(seq["mask"])):
            gap = float(seq["proximal"][t] - seq["behavior"][t])
            if seq["mask"][t] and gap * seq["advantage"] > 0:
                moments[i, t] = gap * gap
    dropped = set()
    while moments and sum(moments.values()) / len(moments) > threshold:
        largest = max(moments, key=lambda place: moments[place])
        dropped.add(largest)
        del moments[largest]
    return kept(batch, lambda i, t: None if (i, t) in dropped else 1.0)


def loglinear_proximal(batch: Batch) -> Rows:
    """log p := log μ + a (sg log π − log μ), a = d / (d + 1) for staleness d.

    A-3PO 2512.06547 as AReaL counts: a = (v_p − v_μ) / (v_π − v_μ) with v_p = v_π − 1.
    """

    def value(i: int, t: int) -> float:
        d, old = int(batch[i]["staleness"][t]), float(batch[i]["behavior"][t])
        return old + d / (d + 1) * (float(batch[i]["logprobs"][t]) - old)

    return each_token(batch, value)
