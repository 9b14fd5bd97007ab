"""Makes optimizer batches ready: packed, with reference and proximal log-probs and advantages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asyncgrpo.algorithms import call
from asyncgrpo.config import Config
from asyncgrpo.learner import ranks, shaping
from asyncgrpo.learner.advantages import Float64
from asyncgrpo.learner.batch import Batch, PackReport, pack, with_advantages
from asyncgrpo.learner.inputs import LossInputs, Totals, moves_on
from asyncgrpo.learner.model import PolicyHead, packed_row
from asyncgrpo.learner.reference import Reference
from asyncgrpo.observe.metrics import SEQUENCE_RULES
from asyncgrpo.staleness import share_of
from asyncgrpo.types import Float32, Group

Logprobs = tuple[Tensor, ...]  # float32 [S] per micro-batch


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerBatch:
    """What one optimizer step is made from on this rank."""

    groups: tuple[Group, ...]
    first_group: int = 0  # how many groups the optimizer batches before this one hold
    batches: tuple[Batch, ...]  # micro-batches
    advantages: tuple[Float32, ...]  # [G] of each group, before a KL per token is taken off
    report: PackReport
    totals: Totals
    proximal: Logprobs | None  # None: pi itself, as it is before the only optimizer step
    ref: Logprobs | None

    def inputs(self, index: int, logprobs: Tensor, entropy: Tensor, config: Config) -> LossInputs:
        """The loss's inputs for micro-batch `index`; logprobs and entropy as PolicyHead gives."""
        batch, device, algo = self.batches[index], logprobs.device, config.algo

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(getattr(batch, name)).to(device, torch.float32)

        behavior, staleness = tensor("behavior_logprobs"), tensor("staleness")
        proximal = logprobs.detach() if self.proximal is None else self.proximal[index]
        if algo.proximal == "loglinear":
            # A-3PO, arXiv 2512.06547, as AReaL counts: mu is version k - lag, p is k, pi on its way
            # to k + 1, so p lies lag / (lag + 1) of the way.
            share = staleness / (staleness + 1.0)
            proximal = behavior + share * (proximal - behavior)
        return LossInputs(
            logprobs=logprobs,
            behavior_logprobs=behavior,
            proximal_logprobs=proximal,
            old_logprobs=behavior if "bypass" in algo.correction else proximal,
            ref_logprobs=None if self.ref is None else self.ref[index],
            advantages=tensor("advantages"),
            mask=tensor("loss_mask"),
            staleness=staleness,
            entropy=entropy,
            sequence_ids=torch.from_numpy(batch.sequence_ids).to(device, torch.int64),
            num_sequences=len(batch.completion_ids),
            totals=self.totals,
        )


class Preparer:
    """Turns the groups of one learner step into optimizer batches. Ranks must call it together."""

    def __init__(
        self, config: Config, head: PolicyHead, reference: Reference | None, device: str
    ) -> None:
        self._config, self._head, self._device = config, head, device
        self._reference = reference

    def prepare(
        self, step: int, parts: Sequence[tuple[Group, ...]], kl_coef: float
    ) -> list[OptimizerBatch]:
        """One optimizer batch per part, in order. kl_coef: of KL in the reward."""
        packed = [self._pack(step, groups) for groups in parts]
        refs = [self._logprobs(self._reference, batches) for batches, _ in packed]
        proximal = [self._logprobs(self._needed_head(), batches) for batches, _ in packed]
        kl = [self._kl(b, r, kl_coef) for (b, _), r in zip(packed, refs, strict=True)]
        extras = [
            self._extras(groups, batches, values)
            for groups, (batches, _), values in zip(parts, packed, kl, strict=True)
        ]
        spread = self._batch_std(parts, extras)
        ready: list[OptimizerBatch] = []
        for groups, (batches, report), ref, prox, extra, values in zip(
            parts, packed, refs, proximal, extras, kl, strict=True
        ):
            advantages, batches = self._advantages(groups, batches, extra, values, spread)
            totals = self._totals(batches, report, prox)
            ready.append(
                OptimizerBatch(
                    groups=groups,
                    first_group=sum(len(before.groups) for before in ready),
                    batches=batches,
                    advantages=advantages,
                    report=report,
                    totals=totals,
                    proximal=prox,
                    ref=ref,
                )
            )
        return ready

    def _pack(self, step: int, groups: tuple[Group, ...]) -> tuple[tuple[Batch, ...], PackReport]:
        config = self._config
        return pack(
            groups,
            step,
            max_tokens=config.learner.max_tokens_per_microbatch,
            max_staleness=config.buffer.max_staleness,
            staleness_action=config.buffer.staleness_action,
            mask_truncated=config.algo.mask_truncated,
            agree=lambda count: int(ranks.largest(count, self._device)),
        )

    def _needed_head(self) -> PolicyHead | None:
        """With one optimizer step p is pi, and log-linear p needs no pass; m2po's cut needs one."""
        algo = self._config.algo
        several = algo.optimizer_steps > 1 and algo.proximal == "recompute"
        return self._head if several or "m2po" in algo.correction else None

    @torch.no_grad()
    def _logprobs(
        self, model: PolicyHead | Reference | None, batches: Sequence[Batch]
    ) -> Logprobs | None:
        if model is None:
            return None
        rows = (packed_row(batch, self._device) for batch in batches)
        if isinstance(model, Reference):
            return tuple(model.logprobs(row) for row in rows)
        return tuple(model(row)[0] for row in rows)

    def _kl(
        self, batches: Sequence[Batch], ref: Logprobs | None, kl_coef: float
    ) -> list[Float64] | None:
        """kl_coef times the estimate of KL(mu || ref) at each loss token, when in the reward."""
        algo = self._config.algo
        if ref is None or algo.kl_in == "loss":
            return None
        found = []
        for batch, logprobs in zip(batches, ref, strict=True):
            delta = logprobs.cpu().double() - torch.from_numpy(batch.behavior_logprobs).double()
            values = call("kl", algo.kl, delta)
            found.append(kl_coef * np.where(batch.loss_mask, values.numpy(), 0.0))
        return found

    def _extras(
        self, groups: Sequence[Group], batches: Sequence[Batch], kl: list[Float64] | None
    ) -> list[Float64]:
        """What is added to the rewards of each group: length penalties, and KL per completion."""
        extras = [shaping.penalties(group, self._config) for group in groups]
        if kl is None or self._config.algo.kl_in != "reward":
            return extras
        flat = np.concatenate(extras)
        for batch, values in zip(batches, kl, strict=True):
            ids = batch.completion_ids[batch.sequence_ids]
            flat -= np.bincount(ids, weights=values, minlength=len(flat))
        return np.split(flat, np.cumsum([len(extra) for extra in extras])[:-1])

    def _batch_std(
        self, parts: Sequence[tuple[Group, ...]], extras: Sequence[list[Float64]]
    ) -> float:
        if self._config.algo.advantage != "batch_std":
            return math.nan
        rewards = np.concatenate(
            [
                group.rewards.astype(np.float64) + extra
                for groups, values in zip(parts, extras, strict=True)
                for group, extra in zip(groups, values, strict=True)
            ]
        )
        local = [float(len(rewards)), float(rewards.sum())]
        count, total = ranks.summed(local, self._device)
        squares = float(np.square(rewards - total / count).sum())
        (squares,) = ranks.summed([squares], self._device)
        return math.sqrt(squares / max(count - self._config.algo.advantage_ddof, 1.0))

    def _advantages(
        self,
        groups: Sequence[Group],
        batches: Sequence[Batch],
        extras: Sequence[Float64],
        kl: list[Float64] | None,
        batch_std: float,
    ) -> tuple[tuple[Float32, ...], tuple[Batch, ...]]:
        values = tuple(
            shaping.advantages(group, self._config, extra, batch_std)
            for group, extra in zip(groups, extras, strict=True)
        )
        flat = np.concatenate(values) if values else np.zeros(1, np.float32)
        on_places: list[Float64 | float] = [0.0] * len(batches)
        if kl is not None and self._config.algo.kl_in == "reward_token":
            pairs = zip(batches, kl, strict=True)
            on_places = [-shaping.reward_to_go(p, batch.cu_seqlens) for batch, p in pairs]
        buffer = self._config.buffer
        return values, tuple(
            with_advantages(
                batch,
                flat,
                extra,
                share_of(batch.staleness, buffer.max_staleness, buffer.staleness_action),
            )
            for batch, extra in zip(batches, on_places, strict=True)
        )

    def _totals(
        self, batches: Sequence[Batch], report: PackReport, proximal: Logprobs | None
    ) -> Totals:
        config = self._config
        counts = [report.num_counted_tokens, report.num_counted_sequences]
        tokens, sequences = ranks.summed(counts, self._device)
        return Totals(
            num_tokens=int(tokens),
            num_sequences=int(sequences),
            num_microbatches=len(batches) * ranks.world_size(),
            max_completion_tokens=config.sampling.max_completion_tokens,
            second_moment_cut=self._second_moment_cut(batches, proximal),
            decile_edges=self._decile_edges(batches),
        )

    def _second_moment_cut(self, batches: Sequence[Batch], proximal: Logprobs | None) -> float:
        if "m2po" not in self._config.algo.correction or proximal is None:
            return math.inf
        moments = []
        for batch, logprobs in zip(batches, proximal, strict=True):
            behavior = torch.from_numpy(batch.behavior_logprobs).to(logprobs.device)
            mask = torch.from_numpy(batch.loss_mask).to(logprobs.device)
            advantages = torch.from_numpy(batch.advantages).to(logprobs.device)
            log_weight = logprobs - behavior
            moments.append(log_weight[mask & moves_on(log_weight, advantages)].square())
        everyone = ranks.collected(torch.cat(moments))
        return second_moment_cut(everyone, self._config.algo.m2po.threshold)

    def _decile_edges(self, batches: Sequence[Batch]) -> Tensor | None:
        if not set(SEQUENCE_RULES) & set(self._config.algo.correction):
            return None
        limit = self._config.sampling.max_completion_tokens
        lengths = [
            np.bincount(b.sequence_ids, weights=b.loss_mask, minlength=len(b.completion_ids))
            for b in batches
        ]
        clipped = np.clip(np.concatenate(lengths), 0, limit).astype(np.int64)
        counts = np.bincount(clipped, minlength=limit + 1).astype(float)
        counts[0] = 0.0  # nothing was trained of these
        return decile_edges(ranks.summed(counts.tolist(), self._device)).to(self._device)


def second_moment_cut(squares: Tensor, threshold: float) -> float:
    """The largest cut such that the mean of all squares <= cut is at most threshold.

    squares: float32 [n], log(w)^2 of the tokens that m2po may mask. Returns -1 when even the
    smallest is too large: all are masked.
    """
    ordered = squares.double().sort().values
    if len(ordered) == 0:
        return math.inf
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    kept = int((means <= threshold).sum())
    if 0 < kept < len(ordered) and ordered[kept] == ordered[kept - 1]:
        # equal values stay or go together: the cut knows no places
        kept = int(torch.searchsorted(ordered, ordered[kept].clone()))
    return float(ordered[kept - 1]) if kept else -1.0


def decile_edges(counts: Sequence[float]) -> Tensor:
    """int64 [9] lengths up to which 1, 2 .. 9 tenths of the sequences lie; counts: per length."""
    share = np.cumsum(counts) / max(float(np.sum(counts)), 1.0)
    tenths = np.arange(1, 10) / 10.0
    # 1e-9: a cumulative sum of exact tenths may lie a rounding below them.
    return torch.from_numpy(np.searchsorted(share, tenths - 1e-9).astype(np.int64))
