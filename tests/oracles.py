"""The formulas of the losses and corrections as slow float64 loops, to check the fast code by.

A batch is a list of sequences; a sequence is a dict of arrays over its completion tokens:
logprobs (log π), behavior (log μ), proximal (log p), ref, mask (0/1), staleness, entropy, and
the scalar advantage. r = π/p, w = p/μ, ρ = π/μ. Every log-ratio is clamped to ±20 before exp.

A token loss is to be minimised. It takes `logprobs`, the rows that a gradient goes through, and
`fixed`, the rows that stand wherever the formula has a stop-gradient; both default to the batch's.
Masked tokens hold 0 in every result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Row = np.ndarray
Rows = list[Row]
Sequence = dict[str, Any]
Batch = list[Sequence]
LIMIT = 20.0


def ratio(top: float, bottom: float) -> float:
    """exp(top − bottom), the difference clamped to ±20."""
    return math.exp(clamp(top - bottom))


def clamp(value: float, low: float = -LIMIT, high: float = LIMIT) -> float:
    return max(low, min(high, float(value)))


def length(sequence: Sequence) -> int:
    """Number of tokens that count in the loss."""
    return sum(1 for m in sequence["mask"] if m)


def mean_gap(sequence: Sequence, top: Row, bottom: Row) -> float:
    """Mean of top − bottom over the unmasked tokens; 0 without any."""
    total = 0.0
    for t in range(len(sequence["mask"])):
        if sequence["mask"][t]:
            total += float(top[t] - bottom[t])
    return total / max(length(sequence), 1)


def policy(batch: Batch, rows: Rows | None) -> Rows:
    return [sequence["logprobs"] for sequence in batch] if rows is None else rows


def each_token(batch: Batch, value: Callable[[int, int], float]) -> Rows:
    """value(i, t) at every unmasked token t of sequence i, 0 at the masked ones."""
    rows = []
    for i, sequence in enumerate(batch):
        row = np.zeros(len(sequence["mask"]), dtype=np.float64)
        for t in range(len(row)):
            if sequence["mask"][t]:
                row[t] = value(i, t)
        rows.append(row)
    return rows


# --- token losses --------------------------------------------------------------------------------


def clipped(ratio: float, advantage: float, low: float, high: float) -> float:
    """min(r A, clip(r, 1 − low, 1 + high) A)."""
    return min(ratio * advantage, clamp(ratio, 1.0 - low, 1.0 + high) * advantage)


def ppo_clip(
    batch: Batch,
    logprobs: Rows | None = None,
    fixed: Rows | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    anchor: str = "proximal",
) -> Rows:
    """−min(r A, clip(r, 1 − ε_lo, 1 + ε_hi) A); with dual clip c and A < 0 −max(that min, c A).

    PPO 1707.06347 eq. 7; clip-higher DAPO 2503.14476; dual clip 1912.09729.
    anchor="behavior" is the bypass form, the clip on ρ.
    """
    now = policy(batch, logprobs)

    def loss(i: int, t: int) -> float:
        a = batch[i]["advantage"]
        objective = clipped(ratio(now[i][t], batch[i][anchor][t]), a, clip_low, clip_high)
        if dual_clip is not None and a < 0:
            objective = max(objective, dual_clip * a)
        return -objective

    return each_token(batch, loss)


def ppo_clip_slope(
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    anchor: str = "proximal",
) -> Rows:
    """d ppo_clip / d log π: −r A while unclipped, 0 where clipped or where log r is clamped."""

    def slope(i: int, t: int) -> float:
        a, gap = batch[i]["advantage"], batch[i]["logprobs"][t] - batch[i][anchor][t]
        r = math.exp(clamp(gap))
        if a > 0:
            moves = r < 1 + clip_high
        else:
            moves = r > 1 - clip_low and (dual_clip is None or r < dual_clip)
        return -r * a if moves and abs(gap) < LIMIT else 0.0

    return each_token(batch, slope)


def cispo(
    batch: Batch,
    logprobs: Rows | None = None,
    fixed: Rows | None = None,
    *,
    clip_low: float | None = None,
    clip_high: float = 5.0,
    anchor: str = "behavior",
) -> Rows:
    """−sg(clip(ρ, clip_low, clip_high)) A log π; the bounds are bounds of ρ, not distances from 1.

    MiniMax-M1 2506.13585 (there 1 + ε_high = clip_high); ScaleRL 2510.13786 (ε_max).
    """
    now, held = policy(batch, logprobs), policy(batch, fixed)

    def loss(i: int, t: int) -> float:
        weight = ratio(held[i][t], batch[i][anchor][t])
        weight = clamp(weight, -math.inf if clip_low is None else clip_low, clip_high)
        return -weight * batch[i]["advantage"] * float(now[i][t])

    return each_token(batch, loss)


def gspo(
    batch: Batch,
    logprobs: Rows | None = None,
    fixed: Rows | None = None,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    anchor: str = "proximal",
) -> Rows:
    """−min(s A, clip(s) A) at every token, s = exp(mean_t log r); the gradient goes through s.

    GSPO 2507.18071. The paper aggregates by sequence_mean.
    """
    now = policy(batch, logprobs)
    s = [math.exp(clamp(mean_gap(seq, now[i], seq[anchor]))) for i, seq in enumerate(batch)]
    return each_token(
        batch, lambda i, t: -clipped(s[i], batch[i]["advantage"], clip_low, clip_high)
    )


def gspo_gradient(
    batch: Batch,
    weight: Rows,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    anchor: str = "proximal",
) -> Rows:
    """Gradient of Σ weight · gspo: −s A / n · Σ_t weight_t at each of the n tokens, or 0."""
    rows = []
    for i, seq in enumerate(batch):
        a, gap = seq["advantage"], mean_gap(seq, seq["logprobs"], seq[anchor])
        s = math.exp(clamp(gap))
        moves = (s < 1 + clip_high if a > 0 else s > 1 - clip_low) and abs(gap) < LIMIT
        total = sum(float(weight[i][t]) for t in range(len(seq["mask"])) if seq["mask"][t])
        each = -s * a * total / max(length(seq), 1) if moves else 0.0
        rows.append(np.array([each if m else 0.0 for m in seq["mask"]], dtype=np.float64))
    return rows


def gspo_token(
    batch: Batch,
    logprobs: Rows | None = None,
    fixed: Rows | None = None,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    anchor: str = "proximal",
) -> Rows:
    """As gspo with s_t = sg(s) π / sg(π): the same value, each token moved by its own gradient.

    GSPO-token, 2507.18071.
    """
    now, held = policy(batch, logprobs), policy(batch, fixed)
    log_s = [clamp(mean_gap(seq, held[i], seq[anchor])) for i, seq in enumerate(batch)]

    def loss(i: int, t: int) -> float:
        s = math.exp(log_s[i]) * math.exp(float(now[i][t] - held[i][t]))
        return -clipped(s, batch[i]["advantage"], clip_low, clip_high)

    return each_token(batch, loss)


def sapo(
    batch: Batch,
    logprobs: Rows | None = None,
    fixed: Rows | None = None,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    anchor: str = "proximal",
) -> Rows:
    """−(4/τ) sigmoid(τ (r − 1)) A, τ by the sign of A. SAPO 2511.20347."""
    now = policy(batch, logprobs)

    def loss(i: int, t: int) -> float:
        a = batch[i]["advantage"]
        tau = tau_positive if a > 0 else tau_negative
        return -4 / tau * sigmoid(tau * (ratio(now[i][t], batch[i][anchor][t]) - 1)) * a

    return each_token(batch, loss)


def sapo_slope(
    batch: Batch,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    anchor: str = "proximal",
) -> Rows:
    """d sapo / d log π = −4 q (1 − q) r A, q = sigmoid(τ (r − 1)): −A at r = 1."""

    def slope(i: int, t: int) -> float:
        a, gap = batch[i]["advantage"], batch[i]["logprobs"][t] - batch[i][anchor][t]
        r = math.exp(clamp(gap))
        x = (tau_positive if a > 0 else tau_negative) * (r - 1)
        return -4 * sigmoid(x) * sigmoid(-x) * r * a if abs(gap) < LIMIT else 0.0

    return each_token(batch, slope)


def sigmoid(x: float) -> float:
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))


def dppo_tv(
    batch: Batch,
    logprobs: Rows | None = None,
    fixed: Rows | None = None,
    *,
    delta: float = 0.2,
    cap: float = 20.0,
    anchor: str = "behavior",
) -> Rows:
    """−sg(keep · min(ρ, cap)) A log π; keep: π − μ <= δ where A > 0, π − μ >= −δ where A <= 0.

    Binary total variation, DPPO 2602.04879 (the cap: §5.4), anchored at the rollout policy.
    """
    now, held = policy(batch, logprobs), policy(batch, fixed)

    def loss(i: int, t: int) -> float:
        a, old = batch[i]["advantage"], batch[i][anchor][t]
        move = math.exp(held[i][t]) - math.exp(old)
        keep = move <= delta if a > 0 else move >= -delta
        return -min(ratio(held[i][t], old), cap) * a * float(now[i][t]) if keep else 0.0

    return each_token(batch, loss)


def vespo(
    batch: Batch,
    logprobs: Rows | None = None,
    fixed: Rows | None = None,
    *,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
    anchor: str = "behavior",
) -> Rows:
    """−sg(φ(W)) A log π, φ(W) = W^c1 exp(c2 (1 − W)), W = Π_t ρ_t; (c1, c2) by the sign of A.

    VESPO 2602.10693. W is the plain product over the unmasked tokens; its log is clamped once.
    """
    now, held = policy(batch, logprobs), policy(batch, fixed)
    phi = []
    for i, seq in enumerate(batch):
        log_w = clamp(mean_gap(seq, held[i], seq[anchor]) * length(seq))
        c1, c2 = positive if seq["advantage"] >= 0 else negative
        phi.append(math.exp(c1 * log_w + c2 * (1 - math.exp(log_w))))
    return each_token(batch, lambda i, t: -phi[i] * batch[i]["advantage"] * float(now[i][t]))


def topr(
    batch: Batch,
    logprobs: Rows | None = None,
    fixed: Rows | None = None,
    *,
    level: str = "token",
    anchor: str = "behavior",
) -> Rows:
    """A > 0: −A log π; else −sg(clamp(ρ, 0, 1)) A log π. TOPR 2503.14286 eq. 8.

    The paper's ratio is that of the whole sequence (level="sequence") and its sign that of the
    reward; the sheet has the token's ratio and the sign of A.
    """
    now, held = policy(batch, logprobs), policy(batch, fixed)

    def loss(i: int, t: int) -> float:
        seq, weight = batch[i], 1.0
        if seq["advantage"] <= 0 and level == "token":
            weight = min(ratio(held[i][t], seq[anchor][t]), 1.0)
        elif seq["advantage"] <= 0:
            total = mean_gap(seq, held[i], seq[anchor]) * length(seq)
            weight = min(math.exp(clamp(total)), 1.0)
        return -weight * seq["advantage"] * float(now[i][t])

    return each_token(batch, loss)


# --- KL to a reference ---------------------------------------------------------------------------


def kl(batch: Batch, kind: str, logprobs: Rows | None = None) -> Rows:
    """With Δ = log ref − log π: k1 = −Δ, k2 = Δ²/2, k3 = exp(Δ) − Δ − 1, abs = |Δ|.

    Schulman, joschu.net/blog/kl-approx.html. k3 clamps Δ in both places: clamped in the exponent
    alone its slope beyond the clamp, +1, would push π away from the reference.
    """
    now = policy(batch, logprobs)

    def value(i: int, t: int) -> float:
        gap = float(batch[i]["ref"][t] - now[i][t])
        if kind == "k3":
            return math.exp(clamp(gap)) - clamp(gap) - 1
        return {"k1": -gap, "k2": gap * gap / 2, "abs": abs(gap)}[kind]

    return each_token(batch, value)


# --- gradients and cases -------------------------------------------------------------------------


def gradient(f: Callable[[Rows], float], logprobs: Rows, eps: float = 1e-6) -> Rows:
    """Central differences of f with respect to every log π; give stop-gradient parts as `fixed`.

    Differences of a sum lose what its largest term rounds off: with ratios of e^20 use the slopes.
    """
    result = [np.zeros(len(row), dtype=np.float64) for row in logprobs]
    for i, row in enumerate(logprobs):
        for t in range(len(row)):
            up, down = ([other.copy() for other in logprobs] for _ in range(2))
            up[i][t] += eps
            down[i][t] -= eps
            result[i][t] = (f(up) - f(down)) / (2 * eps)
    return result


def random_case(rng: np.random.Generator, extreme: bool = False) -> Batch:
    """1 to 6 sequences of 1 to 20 tokens: some of one token, fully masked or of advantage 0.

    Log-probs are negative. With `extreme` half the tokens have policies up to e^±25 apart.
    """
    batch = []
    for _ in range(int(rng.integers(1, 7))):
        size = 1 if rng.random() < 0.2 else int(rng.integers(1, 21))
        mask = (rng.random(size) < 0.8) * (rng.random() >= 0.15)
        sequence: Sequence = {
            "mask": mask.astype(np.float64),
            "staleness": np.sort(rng.integers(0, 5, size))[::-1].copy(),
            "entropy": rng.exponential(1.0, size),
            "advantage": 0.0 if rng.random() < 0.2 else float(rng.normal()),
        }
        base = -rng.exponential(1.0, size) - 0.02
        gap = (rng.random(size) < 0.5) * rng.uniform(0, 25, size) * extreme
        for name, spread in (("behavior", 0.0), ("proximal", 0.2), ("logprobs", 0.4), ("ref", 0.5)):
            row = base + spread * rng.normal(size=size) - gap * (rng.random(size) < 0.5)
            sequence[name] = np.minimum(row, -1e-3 - 1e-2 * rng.random(size))
        batch.append(sequence)
    return batch
