"""What every step reports about its data and its loss: sums per micro-batch, divided once.

With delta = log p - log mu: k1 = -delta and k3 = exp(delta) - delta - 1 estimate KL(mu || p)
(http://joschu.net/blog/kl-approx.html), w = exp(delta). Ranks add the sums and compare the maxima.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from asyncgrpo.learner.inputs import MAX_LOG_RATIO, LossInputs, safe_exp
from asyncgrpo.learner.objective import Objective
from asyncgrpo.observe.metrics import LAG_BINS, SEQUENCE_RULES, masked_name
from asyncgrpo.settings.algo import AlgoSettings

Sums = dict[str, Tensor]  # float64, any shape


@torch.no_grad()
def measure(inputs: LossInputs, found: Objective, algo: AlgoSettings) -> tuple[Sums, Sums]:
    """Sums and maxima of one micro-batch over its loss tokens."""
    delta = inputs.log_weight
    bounded = delta.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    weight = safe_exp(delta)
    token, corrected = found.token, found.corrected
    masked = torch.zeros_like(token.is_clipped_low)
    for removed in corrected.removed.values():
        masked = masked | removed
    per_token = {
        "tokens": torch.ones_like(inputs.mask),
        "weight": weight,
        "weight_squared": weight.double().square(),
        "kl_k1": -delta,
        # expm1: exp(delta) - 1 loses all digits of the k3 of nearly equal policies.
        "kl_k3": bounded.expm1() - bounded,
        "logprob_diff": delta.abs(),
        "clip_low": token.is_clipped_low,
        "clip_high": token.is_clipped_high,
        "capped": corrected.is_capped,
        "masked": masked,
        "staleness": inputs.staleness,
        "entropy": inputs.entropy,
        **{f"removed/{name}": removed for name, removed in corrected.removed.items()},
    }
    if found.kl is not None:
        per_token["kl_ref"] = found.kl
    # float64: a float32 sum over a large batch would depend on how it was split.
    sums = {n: (inputs.mask * v).sum(dtype=torch.float64) for n, v in per_token.items()}
    sums["loss"] = found.loss.detach().double()
    table = torch.stack([per_token[n] * inputs.mask for n in ("tokens", "kl_k1", "kl_k3")], dim=1)
    sums["by_lag"] = _by_lag(inputs.staleness, table.double())
    sums |= _by_decile(inputs, found, algo)
    maxima = {n: (inputs.mask * per_token[n]).max().double() for n in ("logprob_diff", "staleness")}
    return sums, maxima


def _by_lag(staleness: Tensor, table: Tensor) -> Tensor:
    """[S] versions, [S, 3] values -> [bins, 3] sums."""
    uppers = torch.tensor([float(upper) for _, upper in LAG_BINS[:-1]], device=staleness.device)
    bins = torch.zeros(len(LAG_BINS), 3, dtype=torch.float64, device=staleness.device)
    return bins.index_add(0, torch.bucketize(staleness, uppers), table)


def _by_decile(inputs: LossInputs, found: Objective, algo: AlgoSettings) -> Sums:
    """Sequences removed (or capped) by each sequence-level rule, per tenth of the lengths."""
    edges = inputs.totals.decile_edges
    if edges is None:
        return {}
    lengths = inputs.sequence_lengths
    place = torch.bucketize(lengths, edges.to(lengths.dtype))
    removed = found.corrected.removed
    hits = {
        name: removed.get(name, found.corrected.is_capped)
        for name in algo.correction
        if name in SEQUENCE_RULES
    }

    def tally(chosen: Tensor) -> Tensor:
        counts = torch.zeros(10, dtype=torch.float64, device=lengths.device)
        return counts.index_add(0, place, chosen.double())

    sums = {
        f"decile/{n}": tally(inputs.sequence_sum(hit.to(lengths.dtype)) > 0)
        for n, hit in hits.items()
    }
    return {**sums, "decile_sequences": tally(lengths > 0)}


def finish(sums: Mapping[str, Tensor], maxima: Mapping[str, Tensor]) -> dict[str, float]:
    """The step's metrics from its sums and maxima over all micro-batches and ranks.

    Means are per loss token; ess is Kish's effective share of samples (sum w)^2 / (n sum w^2).
    A step without loss tokens reports 0 throughout.
    """
    total = {name: float(value) for name, value in sums.items() if value.ndim == 0}
    count = max(total["tokens"], 1.0)  # an empty step would divide by zero
    squares = total["weight_squared"]
    metrics = {
        "objective/kl": total["kl_k3"] / count,
        "objective/kl_k1": total["kl_k1"] / count,
        "objective/entropy": total["entropy"] / count,
        "ess": total["weight"] ** 2 / (count * squares) if squares > 0 else 0.0,
        "chi2": squares / count - 1.0 if squares > 0 else 0.0,
        "clip_low_share": total["clip_low"] / count,
        "clip_high_share": total["clip_high"] / count,
        "cap_share": total["capped"] / count,
        "masked_share": total["masked"] / count,
        "logprob_diff_mean": total["logprob_diff"] / count,
        "logprob_diff_max": float(maxima["logprob_diff"]),
        "staleness/mean": total["staleness"] / count,
        "staleness/max": float(maxima["staleness"]),
    }
    if "kl_ref" in total:
        metrics["objective/kl_ref"] = total["kl_ref"] / count
    for name, value in total.items():
        if name.startswith("removed/"):
            metrics[masked_name(name.removeprefix("removed/"))] = value / count
    for (label, _), row in zip(LAG_BINS, sums["by_lag"].tolist(), strict=True):
        if row[0]:
            metrics[f"lag_{label}/tokens"] = row[0]
            metrics[f"lag_{label}/kl_k1"] = row[1] / row[0]
            metrics[f"lag_{label}/kl"] = row[2] / row[0]
    return metrics | _decile_shares(sums)


def _decile_shares(sums: Mapping[str, Tensor]) -> dict[str, float]:
    metrics = {}
    for name, counts in sums.items():
        if name.startswith("decile/"):
            pairs = zip(counts.tolist(), sums["decile_sequences"].tolist(), strict=True)
            for index, (hit, all_of) in enumerate(pairs):
                if all_of:
                    rule = name.removeprefix("decile/")
                    metrics[f"{masked_name(rule)}/decile_{index}"] = hit / all_of
    return metrics
