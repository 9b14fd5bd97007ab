"""What every step reports about its data and its loss: sums per micro-batch, divided once.

With delta = log p - log mu, k1 and k3 of kl.py estimate KL(mu || p), and w = exp(delta). Ranks add
the sums and compare the maxima.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from asyncgrpo.learner import kl
from asyncgrpo.learner.inputs import LossInputs, safe_exp
from asyncgrpo.learner.objective import Objective
from asyncgrpo.observe.metrics import LAG_BINS, SEQUENCE_RULES, masked_name
from asyncgrpo.settings.algo import AlgoSettings

Sums = dict[str, Tensor]  # float64, any shape
DECILE, DECILES_OF_ALL = "/decile", "sequences by decile"


@torch.no_grad()
def measure(inputs: LossInputs, found: Objective, algo: AlgoSettings) -> tuple[Sums, Sums]:
    """Sums and maxima of one micro-batch over its loss tokens; metrics by their names."""
    delta, removed = inputs.log_weight, found.corrected.removed
    weight, nothing = safe_exp(delta), torch.zeros_like(inputs.mask)
    low, high = found.token.is_clipped_low, found.token.is_clipped_high
    per_token = {
        "tokens": torch.ones_like(inputs.mask),
        "weight": weight,
        "weight_squared": weight.double().square(),
        "objective/kl_k1": kl.k1(delta),
        "objective/kl": kl.k3(delta),
        "objective/entropy": inputs.entropy,
        "logprob_diff_mean": delta.abs(),
        "clip_low_share": nothing if low is None else low,
        "clip_high_share": nothing if high is None else high,
        "cap_share": found.corrected.is_capped,
        "masked_share": torch.stack([nothing.bool(), *removed.values()]).any(0),
        "staleness/mean": inputs.staleness,
        **{masked_name(name): which for name, which in removed.items()},
    }
    if found.kl is not None:
        per_token["objective/kl_ref"] = found.kl
    # float64: a float32 sum over a large batch would depend on how it was split.
    sums = {n: (inputs.mask * v).sum(dtype=torch.float64) for n, v in per_token.items()}
    sums["loss"] = found.loss.detach().double()
    names = ("tokens", "objective/kl_k1", "objective/kl")
    sums["by_lag"] = _by_lag(inputs, torch.stack([per_token[n] for n in names], dim=1))
    sums |= _by_decile(inputs, found, algo)
    maxima = {"logprob_diff_max": delta.abs(), "staleness/max": inputs.staleness}
    return sums, {name: (inputs.mask * value).max().double() for name, value in maxima.items()}


def _by_lag(inputs: LossInputs, table: Tensor) -> Tensor:
    """[S, 3] values -> [bins, 3] sums over the loss tokens of each lag."""
    uppers = inputs.staleness.new_tensor([float(upper) for _, upper in LAG_BINS[:-1]])
    bins = torch.zeros(len(LAG_BINS), 3, dtype=torch.float64, device=table.device)
    values = (table * inputs.mask[:, None]).double()
    return bins.index_add(0, torch.bucketize(inputs.staleness, uppers), values)


def _by_decile(inputs: LossInputs, found: Objective, algo: AlgoSettings) -> Sums:
    """Sequences removed (or capped) by each sequence-level rule, per tenth of the lengths."""
    edges, lengths = inputs.totals.decile_edges, inputs.sequence_lengths
    if edges is None:
        return {}
    chosen = {DECILES_OF_ALL: lengths > 0}
    for name in [name for name in algo.correction if name in SEQUENCE_RULES]:
        hit = found.corrected.removed.get(name, found.corrected.is_capped)
        chosen[masked_name(name) + DECILE] = inputs.sequence_sum(hit.to(lengths.dtype)) > 0
    place = torch.bucketize(lengths, edges.to(lengths.dtype))
    counts = torch.zeros(10, dtype=torch.float64, device=lengths.device)
    return {name: counts.index_add(0, place, which.double()) for name, which in chosen.items()}


def finish(sums: Mapping[str, Tensor], maxima: Mapping[str, Tensor]) -> dict[str, float]:
    """The step's metrics from its sums and maxima over all micro-batches and ranks.

    Means are per loss token; ess is Kish's effective share of samples (sum w)^2 / (n sum w^2).
    A step without loss tokens reports 0 throughout.
    """
    total = {name: float(value) for name, value in sums.items() if value.ndim == 0}
    count = max(total.pop("tokens"), 1.0)  # an empty step would divide by zero
    weight, squares = total.pop("weight"), total.pop("weight_squared")
    del total["loss"]  # a sum of shares, not of tokens
    metrics = {name: value / count for name, value in total.items()}
    metrics |= {name: float(value) for name, value in maxima.items()}
    metrics["ess"] = weight**2 / (count * squares) if squares > 0 else 0.0
    metrics["chi2"] = squares / count - 1.0 if squares > 0 else 0.0
    for (label, _), (tokens, k1, k3) in zip(LAG_BINS, sums["by_lag"].tolist(), strict=True):
        if tokens:
            metrics[f"lag_{label}/tokens"] = tokens
            metrics[f"lag_{label}/kl_k1"] = k1 / tokens
            metrics[f"lag_{label}/kl"] = k3 / tokens
    for name in [name for name in sums if name.endswith(DECILE)]:
        pairs = zip(sums[name].tolist(), sums[DECILES_OF_ALL].tolist(), strict=True)
        for index, (hit, all_of) in enumerate(pairs):
            if all_of:
                metrics[f"{name}_{index}"] = hit / all_of
    return metrics
