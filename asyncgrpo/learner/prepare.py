"""Makes optimizer batches ready: packed, with reference and proximal log-probs and advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyncgrpo.algorithms import call
from asyncgrpo.config import Config
from asyncgrpo.learner import ranks, shaping
from asyncgrpo.learner.advantages import Float64
from asyncgrpo.learner.batch import Batch, PackReport, pack, with_advantages
from asyncgrpo.learner.inputs import LossInputs, Totals, moves_on
from asyncgrpo.learner.model import PackedRow, PolicyHead, packed_row
from asyncgrpo.observe.metrics import SEQUENCE_RULES
from asyncgrpo.observe.token_log import Columns
from asyncgrpo.staleness import share_of
from asyncgrpo.types import Completion, Float32, Group

Logprobs = tuple[Tensor, ...]  # float32 [S] per micro-batch


class Reference:
    """The policy of the KL term, never trained: a model of its own, or the policy without adapter.

    It may be mixed with the policy now and then.
    """

    def __init__(
        self,
        head: PolicyHead,
        during: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        is_policy: bool = False,
    ) -> None:
        """head: of a frozen model, or of the policy. during: what it needs while it computes."""
        self._head, self._during, self._is_policy = head, during, is_policy

    @torch.no_grad()
    def logprobs(self, rows: Sequence[PackedRow]) -> Logprobs:
        """Of the targets of each row, 0 outside the loss."""
        with self._during():
            return tuple(self._head(row)[0] for row in rows)

    def state(self) -> dict[str, Tensor]:
        """Its own weights, to be saved and filled."""
        return {} if self._is_policy else self._head.policy.state_dict()

    @torch.no_grad()
    def sync(self, policy: PreTrainedModel, alpha: float) -> None:
        """ref := alpha pi + (1 - alpha) ref (TR-DPO, arXiv 2404.09656 eq. 2); alpha 1 resets."""
        for own, other in zip(self._head.policy.parameters(), policy.parameters(), strict=True):
            mine = ranks.own_part(own)  # it may be in host memory
            mine.lerp_(ranks.own_part(other).to(mine), alpha)


@dataclass(slots=True, kw_only=True)
class OptimizerBatch:
    """What one optimizer step is made from on this rank; the Preparer fills it in."""

    groups: tuple[Group, ...]
    batches: tuple[Batch, ...]  # micro-batches
    rows: tuple[PackedRow, ...]  # the same for the model, on its device
    report: PackReport
    totals: Totals
    first_group: int = 0  # how many groups the optimizer batches before this one hold
    ref: Logprobs | None = None
    proximal: Logprobs | None = None  # None: pi itself, as before the only optimizer step
    kl: Sequence[Float64] = ()  # [S] kl_coef KL(mu || ref) per micro-batch, if in the reward
    extras: Sequence[Float64] = ()  # [G] of each group, added to its rewards
    advantages: Sequence[Float32] = ()  # [G] of each group, before a KL per token is taken off

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

    def completions(self, index: int) -> Iterator[tuple[int, int, Completion, slice]]:
        """(group, sample, completion, places of its tokens) of all on micro-batch `index`."""
        batch = self.batches[index]
        every = [
            (g, i, c) for g, own in enumerate(self.groups) for i, c in enumerate(own.completions)
        ]
        if batch.loss_mask.any():  # else it holds none
            for which, end in zip(batch.completion_ids, batch.cu_seqlens[1:].tolist(), strict=True):
                yield *every[which], slice(end - len(every[which][2].token_ids), end)

    def culprit(self, losses: Sequence[Tensor]) -> str:
        """The first token whose loss is not finite, by its group; losses: [S] per micro-batch."""
        for index, values in enumerate(losses):
            for group, sample, completion, places in self.completions(index):
                for token, loss in enumerate(values[places].tolist()):
                    if not math.isfinite(loss):
                        return (
                            f"loss {loss} at group {self.groups[group].lease.lease_id}, completion "
                            f"{sample}, token {token} (id {completion.token_ids[token]})"
                        )
        return "no loss of this rank's tokens is to blame: the backward pass, or another rank"

    def token_rows(self, index: int, inputs: LossInputs, weight: Tensor) -> Iterator[Columns]:
        """The columns of observe/token_log.py for each completion on micro-batch `index`."""
        tensors = {
            "proximal_logprob": inputs.proximal_logprobs,
            "logprob": inputs.logprobs.detach(),
            "ref_logprob": inputs.ref_logprobs,
            "advantage": inputs.advantages,
            "weight": weight,
            "mask": inputs.mask.bool(),
        }
        arrays = {n: v.cpu().numpy() for n, v in tensors.items() if v is not None}
        for group, sample, completion, places in self.completions(index):
            count = len(completion.token_ids)
            yield {
                "lease": np.full(count, self.first_group + group),
                "sample": np.full(count, sample),
                "place": np.arange(count),
                "token_id": completion.token_ids,
                "version": completion.versions,
                "behavior_logprob": completion.behavior_logprobs,
                "ref_logprob": np.full(count, np.nan),
                **{name: array[places] for name, array in arrays.items()},
            }


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
        ready = [self._packed(step, groups) for groups in parts]
        for batch in ready:
            self._score(batch, kl_coef)
        spread, first = self._batch_std(ready), 0
        for batch in ready:
            self._set_advantages(batch, spread)
            batch.totals = replace(batch.totals, second_moment_cut=self._second_moment_cut(batch))
            batch.first_group, first = first, first + len(batch.groups)
        return ready

    def _packed(self, step: int, groups: tuple[Group, ...]) -> OptimizerBatch:
        config = self._config
        batches, report = pack(
            groups, step, config, lambda count: int(ranks.largest(count, self._device))
        )
        counts = [report.num_counted_tokens, report.num_counted_sequences]
        tokens, sequences = ranks.summed(counts, self._device)
        totals = Totals(
            num_tokens=int(tokens),
            num_sequences=int(sequences),
            num_microbatches=len(batches) * ranks.world_size(),
            max_completion_tokens=config.sampling.max_completion_tokens,
            decile_edges=self._decile_edges(batches),
        )
        rows = tuple(packed_row(batch, self._device) for batch in batches)
        return OptimizerBatch(
            groups=groups, batches=batches, rows=rows, report=report, totals=totals
        )

    @torch.no_grad()
    def _score(self, batch: OptimizerBatch, kl_coef: float) -> None:
        """Log-probs of reference and proximal policy, where they are needed; what rewards get."""
        config, algo = self._config, self._config.algo
        if self._reference is not None:
            batch.ref = self._reference.logprobs(batch.rows)
        # With one optimizer step p is pi, and log-linear p needs no pass; m2po's cut needs one.
        several = algo.optimizer_steps > 1 and algo.proximal == "recompute"
        if several or "m2po" in algo.correction:
            batch.proximal = tuple(self._head(row)[0] for row in batch.rows)
        batch.extras = [shaping.penalties(group, config) for group in batch.groups]
        if batch.ref is None or algo.kl_in == "loss":
            return
        pairs = zip(batch.batches, batch.ref, strict=True)
        batch.kl = [kl_coef * self._kl(*pair) for pair in pairs]
        if algo.kl_in == "reward":
            flat = np.concatenate([np.zeros(0), *batch.extras])
            for part, values in zip(batch.batches, batch.kl, strict=True):
                ids = part.completion_ids[part.sequence_ids]
                flat -= np.bincount(ids, weights=values, minlength=len(flat))
            ends = np.cumsum([len(extra) for extra in batch.extras], dtype=int)
            batch.extras = np.split(flat, ends)[:-1]

    def _kl(self, batch: Batch, ref: Tensor) -> Float64:
        """float64 [S]: the estimate of KL(mu || ref) at each loss token."""
        delta = ref.cpu().double() - torch.from_numpy(batch.behavior_logprobs).double()
        values = call("kl", self._config.algo.kl, delta)
        return np.where(batch.loss_mask, values.numpy(), 0.0)

    def _batch_std(self, ready: Sequence[OptimizerBatch]) -> float:
        """Of all rewards of the batch, all ranks; NaN when nothing looks at it."""
        if self._config.algo.advantage != "batch_std":
            return math.nan
        pairs = [pair for batch in ready for pair in zip(batch.groups, batch.extras, strict=True)]
        rewards = [group.rewards.astype(np.float64) + extra for group, extra in pairs]
        own = torch.from_numpy(np.concatenate([np.zeros(0), *rewards])).to(self._device)
        return float(ranks.collected(own).std(correction=self._config.algo.advantage_ddof))

    def _set_advantages(self, batch: OptimizerBatch, batch_std: float) -> None:
        config, buffer = self._config, self._config.buffer
        pairs = zip(batch.groups, batch.extras, strict=True)
        batch.advantages = [shaping.advantages(g, config, x, batch_std) for g, x in pairs]
        flat = np.concatenate([*batch.advantages, np.zeros(1, "f4")])  # the last: of an empty batch
        parts = []
        for index, part in enumerate(batch.batches):
            on_places: Float64 | float = 0.0
            if config.algo.kl_in == "reward_token" and batch.kl:
                on_places = -shaping.reward_to_go(batch.kl[index], part.cu_seqlens)
            shares = share_of(part.staleness, buffer.max_staleness, buffer.staleness_action)
            parts.append(with_advantages(part, flat, on_places, shares))
        batch.batches = tuple(parts)

    def _second_moment_cut(self, batch: OptimizerBatch) -> float:
        algo = self._config.algo
        if "m2po" not in algo.correction or batch.proximal is None:
            return math.inf
        moments = []
        for index, logprobs in enumerate(batch.proximal):
            inputs = batch.inputs(index, logprobs, torch.zeros_like(logprobs), self._config)
            is_chosen = inputs.mask.bool() & moves_on(inputs.log_weight, inputs.advantages)
            moments.append(inputs.log_weight[is_chosen].square())
        return second_moment_cut(ranks.collected(torch.cat(moments)), algo.m2po.threshold)

    def _decile_edges(self, batches: Sequence[Batch]) -> Tensor | None:
        if not set(SEQUENCE_RULES) & set(self._config.algo.correction):
            return None
        lengths = [np.bincount(b.sequence_ids, weights=b.loss_mask) for b in batches]
        own = torch.from_numpy(np.concatenate(lengths)).to(self._device)
        return decile_edges(ranks.collected(own))


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


def decile_edges(lengths: Tensor) -> Tensor:
    """float64 [9] lengths up to which 1, 2 .. 9 tenths of the sequences lie; 0: nothing trained."""
    trained = lengths[lengths > 0].tolist() or [0.0]
    edges = np.quantile(trained, np.arange(1, 10) / 10, method="inverted_cdf")
    return torch.from_numpy(edges).to(lengths.device)
