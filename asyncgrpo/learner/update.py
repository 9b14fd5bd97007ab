"""One rank's model and optimizer: a shard in, optimizer updates and their metrics out."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from asyncgrpo.config import Config
from asyncgrpo.errors import AlgorithmError, RunError
from asyncgrpo.learner import parallel, ranks
from asyncgrpo.learner.attention import has_kernel, num_slots
from asyncgrpo.learner.checkpoint import AddFiles, Checkpoints
from asyncgrpo.learner.diagnostics import Sums, finish, measure
from asyncgrpo.learner.export import whole_or_not, write_model
from asyncgrpo.learner.inputs import LossInputs
from asyncgrpo.learner.model import (
    PolicyHead,
    PublishedParameters,
    load_policy,
    packed_row,
)
from asyncgrpo.learner.objective import Objective, objective
from asyncgrpo.learner.prepare import OptimizerBatch, Preparer
from asyncgrpo.learner.reference import Reference, adapted_coefficient
from asyncgrpo.learner.saved import FOLDER, step_of
from asyncgrpo.learner.schedule import learning_rate
from asyncgrpo.observe.token_log import write_token_log
from asyncgrpo.protocols import NamedTensors
from asyncgrpo.types import Float32, Shard
from asyncgrpo.weights.proof import canary_prompts

log = logging.getLogger(__name__)


@dataclass(slots=True)
class StepRecord:
    """What the optimizer updates of one learner step add up to, on this rank."""

    sums: Sums = field(default_factory=dict)
    maxima: Sums = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    rate: float = 0.0
    tokens: list[dict[str, np.ndarray]] = field(default_factory=list)  # for observe.token_log

    def add(self, sums: Sums, maxima: Sums) -> None:
        """Adds a micro-batch's or an update's part."""
        self.sums = {n: self.sums[n] + v if n in self.sums else v for n, v in sums.items()}
        self.maxima = {
            n: torch.maximum(self.maxima[n], v) if n in self.maxima else v
            for n, v in maxima.items()
        }


class PolicyUpdater:
    """The learner loop's updater. With several ranks the default process group must be up."""

    def __init__(
        self, config: Config, *, save_to: Path | None = None, run_dir: Path | None = None
    ) -> None:
        """save_to: where `save` writes, None on ranks that do not.

        run_dir: for checkpoints and token logs; None: neither.
        """
        self._config, self._save_to, self._run_dir = config, save_to, run_dir
        self._world_size = ranks.world_size()
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(config.learner.threads)
        torch.manual_seed(config.run.seed)
        lora = config.learner.lora
        quantized = lora is not None and lora.quantize is not None
        settings = config.learner
        self._sharded = settings.parallel == "fsdp"
        if self._sharded:
            parallel.open_lone_group()
        self._policy = self._load(config.model.path, quantized=quantized)
        self._adapter = None
        if lora is not None:
            from asyncgrpo.learner.lora import Adapter  # peft: slow, and an extra

            self._adapter = Adapter(self._policy, lora)
        algo = config.algo
        head = self._make_head(self._policy)
        is_copied = self._world_size > 1 and not self._sharded
        self._head = DistributedDataParallel(head) if is_copied else head
        self._plain_head = head  # runs without the other ranks, unless they hold parts of it
        self._reference = None
        if algo.kl_coef > 0 and self._adapter is not None and not algo.reference.path:
            self._reference = Reference(head, self._adapter.off)
        elif algo.kl_coef > 0:
            model = self._load(algo.reference.path or config.model.path)
            self._reference = Reference(self._make_head(model.requires_grad_(False)))
        self._preparer = Preparer(config, head, self._reference, self._device)
        self._kl_coef = algo.kl_coef
        self._num_skipped = self._num_syncs = 0
        self.advantages = np.zeros(0, np.float32)  # [C] of the last update, see Updater
        self._optimizer = parallel.make_optimizer(self._policy, settings)
        self._published = PublishedParameters(
            self._policy, only_adapter=settings.published_adapter is not None
        )
        self._weights = parallel.Gathered(self._published)
        self._checkpoints = (
            None if run_dir is None else Checkpoints(run_dir / FOLDER, config.checkpoint)
        )

    def _load(self, path: str, *, quantized: bool = False) -> PreTrainedModel:
        """Sharded models are loaded in host memory: no GPU ever holds one whole."""
        device = "cpu" if self._sharded else self._device
        return load_policy(path, device=device, quantized=quantized)

    def _make_head(self, policy: PreTrainedModel) -> PolicyHead:
        settings = self._config.learner
        parallel.set_up_blocks(policy, settings)
        is_mixed = settings.dtype != "float32" and not self._sharded  # FSDP casts by itself
        head = PolicyHead(
            policy,
            temperature=self._config.sampling.temperature,
            entropy_gradient=self._config.algo.entropy_coef > 0,
            autocast=getattr(torch, settings.dtype) if is_mixed else None,
            float32_head=settings.float32_head,
        )
        if self._sharded:
            parallel.shard(head, settings, self._device)
        return head

    @property
    def vocab_size(self) -> int:
        """Rows of the output layer."""
        return int(self._policy.get_output_embeddings().weight.shape[0])

    def update(
        self, shard: Shard, before_change: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """The optimizer updates of one learner step, algo.minibatches times algo.passes of them.

        before_change: called before each change of the weights. Returns the metrics of the whole
        batch, all ranks. An update whose loss or gradient is not finite is skipped; RunError after
        more than algo.max_nonfinite of these in the run. AlgorithmError, with the step, when a
        user's own function breaks its contract.
        """
        try:
            self._before_change = before_change
            return self._update(shard)
        except AlgorithmError as error:
            raise AlgorithmError(f"at step {shard.step}: {error}") from error

    def _update(self, shard: Shard) -> dict[str, float]:
        algo = self._config.algo
        parts = [shard.groups[first :: algo.minibatches] for first in range(algo.minibatches)]
        ready = self._preparer.prepare(shard.step, parts, self._kl_coef)
        self.advantages = self._all_advantages(shard, ready)
        record = StepRecord()
        for index in range(algo.passes):
            for batch in ready:
                self._step(batch, shard.step, record, is_last=index == algo.passes - 1)
        metrics = self._finish(record, shard)
        self._after(shard, metrics)
        if algo.kl_coef:
            metrics["objective/kl_coef"] = self._kl_coef
        if self._config.observe.token_log and self._run_dir is not None:
            leases = [group.lease.lease_id for batch in ready for group in batch.groups]
            write_token_log(self._run_dir, shard.step, ranks.rank(), leases, record.tokens)
        return metrics | self._batch_metrics(shard, ready)

    def weights(self) -> NamedTensors:
        """Present weights by their Hugging Face names. Rank 0 asks; see `help_gather`."""
        return self._weights if self._sharded else self._published

    def help_gather(self) -> None:
        """On every rank when rank 0 is done with `weights`: until then the others help it."""
        if self._sharded:
            self._weights.help()

    def canary_logprobs(self) -> Float32:
        """float32 [NUM_CANARIES, V]: log-probs of the token after each canary prompt."""
        adapter = None if self._published.only_adapter else self._adapter
        with adapter.merged() if adapter else contextlib.nullcontext():
            return self._plain_head.next_logprobs(canary_prompts(self.vocab_size)).numpy()

    def is_checkpoint_due(self, step: int) -> bool:
        """Whether the state after `step` updates is to be saved."""
        return self._checkpoints is not None and self._checkpoints.is_due(step)

    @property
    def covered(self) -> int:
        """The step that no later life of the learner begins before (on rank 0)."""
        return self._checkpoints.covered if self._checkpoints is not None else 0

    def checkpoint(self, step: int, add: AddFiles = lambda _: None) -> None:
        """Begins to save the state after `step` updates, with what `add` puts into its folder."""
        if self._checkpoints is not None:
            counters = {
                "kl_coef": self._kl_coef,
                "skipped": self._num_skipped,
                "syncs": self._num_syncs,
            }
            self._checkpoints.save(step, self._state(), counters, add)

    def restore(self) -> int:
        """Goes back to the newest checkpoint of the run; returns its step, 0 without any."""
        path = self._checkpoints.newest() if self._checkpoints is not None else None
        if self._checkpoints is None or path is None:
            return 0
        self.go_to(self._checkpoints, path)
        return step_of(path)

    def go_to(self, checkpoints: Checkpoints, path: Path) -> None:
        """Takes up the state of one checkpoint, also of another run with the same model."""
        state = self._state()
        counters = checkpoints.load(path, state)
        states.set_optimizer_state_dict(self._policy, self._optimizer, state["optimizer"])
        self._kl_coef = counters["kl_coef"]
        self._num_skipped, self._num_syncs = int(counters["skipped"]), int(counters["syncs"])
        log.info("restored %s", path)

    def _state(self) -> dict[str, Any]:
        """What is trained and its optimizer; the weights are the policy's own, filled in place."""
        named = self._policy.named_parameters()
        trained = {name: weight.detach() for name, weight in named if weight.requires_grad}
        optimizer = states.get_optimizer_state_dict(self._policy, self._optimizer)
        state: dict[str, Any] = {"model": trained, "optimizer": optimizer}
        if self._reference is not None:
            state["reference"] = self._reference.state()
        return state

    def save(self) -> None:
        """Writes the model and its tokenizer, loadable with from_pretrained.

        Waits for a checkpoint under way; CheckpointError when it failed.
        """
        if self._checkpoints is not None:
            self._checkpoints.wait()
        self._write(self._save_to)

    def export(self, step: int) -> None:
        """Writes the model after `step` updates to RUN/exports/step_<k>, when it is due."""
        every = self._config.checkpoint.export_every
        if self._run_dir is None or not every or step % every:
            return
        with whole_or_not(self._run_dir / "exports" / f"step_{step}") as folder:
            self._write(folder)

    def _write(self, folder: Path | None) -> None:
        if self._sharded or folder is not None:
            write_model(self._policy, self._adapter, self._config.model.path, folder)

    def _step(self, batch: OptimizerBatch, step: int, record: StepRecord, *, is_last: bool) -> None:
        """One optimizer update."""
        self._optimizer.zero_grad(set_to_none=True)
        update = StepRecord()
        for index, last in self._microbatches(batch):
            dropping = self._adapter.dropping() if self._adapter else contextlib.nullcontext()
            with contextlib.nullcontext() if last else self._without_sync(), dropping:
                inputs, found = self._objective(batch, index, self._head)
                (found.loss * self._world_size).backward()  # DDP divides by the number of ranks
            update.add(*measure(inputs, found, self._config.algo))
            if is_last and self._config.observe.token_log:
                record.tokens += self._token_rows(batch, index, inputs, found)
        limit = self._config.learner.max_grad_norm
        gradients = torch.nn.utils.clip_grad_norm_(self._policy.parameters(), limit)
        norm = float(ranks.whole(gradients))
        # over ranks, so that all decide alike
        (loss,) = ranks.summed([float(update.sums["loss"])], self._device)
        if not (math.isfinite(norm) and math.isfinite(loss)):
            self._skip(batch, step, loss, norm)
            return
        record.rate = self._learning_rate(step, update.sums)
        for group in self._optimizer.param_groups:
            group["lr"] = record.rate
        self._before_change()
        self._optimizer.step()
        record.add(update.sums, update.maxima)
        record.norms.append(norm)

    def _microbatches(self, batch: OptimizerBatch) -> Iterator[tuple[int, bool]]:
        """(index, is the last one): with DDP ranks meet in the last one's backward pass only."""
        for index in range(len(batch.batches)):
            yield index, index == len(batch.batches) - 1

    def _objective(
        self, batch: OptimizerBatch, index: int, head: nn.Module
    ) -> tuple[LossInputs, Objective]:
        row = packed_row(batch.batches[index], self._device)
        logprobs, entropy = head(row)
        inputs = batch.inputs(index, logprobs, entropy, self._config)
        kl_coef = self._kl_coef if self._config.algo.kl_in == "loss" else 0.0
        return inputs, objective(inputs, self._config.algo, kl_coef)

    def _learning_rate(self, step: int, sums: Sums) -> float:
        """The schedule's, times sqrt(ESS / n) of this update if wanted.

        Importance weights leave only ESS independent samples; noise grows with their square root.
        """
        rate = learning_rate(step, self._config.learner, self._config.run.max_steps)
        if not self._config.learner.ess_scaled_lr:
            return rate
        names = ("tokens", "weight", "weight_squared")
        count, weight, squared = ranks.summed([float(sums[n]) for n in names], self._device)
        return rate * math.sqrt(weight**2 / (count * squared)) if squared else rate

    def _without_sync(self) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._head, DistributedDataParallel):
            return self._head.no_sync()
        return contextlib.nullcontext()

    def _skip(self, batch: OptimizerBatch, step: int, loss: float, norm: float) -> None:
        """Leaves the weights as they are, names the culprit, and stops after too many."""
        self._num_skipped += 1  # the same on every rank, as loss and gradient norm are
        allowed = self._config.algo.max_nonfinite
        message = (
            f"loss {loss}, gradient norm {norm} at step {step}: {self._culprit(batch)}; update "
            f"skipped, weights unchanged ({self._num_skipped} skipped, allowed are "
            f"algo.max_nonfinite={allowed})"
        )
        if self._num_skipped > allowed:
            raise RunError(
                f"{message}; lower learner.lr={self._config.learner.lr}, or look at trajectories/"
            )
        log.warning(message)

    @torch.no_grad()
    def _culprit(self, batch: OptimizerBatch) -> str:
        """The first token of this rank whose loss is not finite, by its group."""
        losses = [
            self._objective(batch, index, self._plain_head)[1]
            for index in range(len(batch.batches))
        ]
        for micro, found in zip(batch.batches, losses, strict=True):
            bad = (~torch.isfinite(found.per_token)).nonzero().flatten().tolist()
            if bad:
                sequence = int(micro.sequence_ids[bad[0]])
                flat = [(g, i) for g in batch.groups for i in range(len(g.completions))]
                group, sample = flat[int(micro.completion_ids[sequence])]
                length = len(group.completions[sample].token_ids)
                place = bad[0] - (int(micro.cu_seqlens[sequence + 1]) - length)
                return (
                    f"loss {float(found.per_token[bad[0]])} at group {group.lease.lease_id}, "
                    f"completion {sample}, token {place} (id {int(micro.target_ids[bad[0]])})"
                )
        return "no loss of this rank's tokens is to blame: the backward pass, or another rank"

    def _after(self, shard: Shard, metrics: dict[str, float]) -> None:
        """What the reference and the KL coefficient learn from the step."""
        if self._reference is None:
            return
        algo, count = self._config.algo, shard.num_completions_global
        if "objective/kl_ref" in metrics:
            measured = metrics["objective/kl_ref"]
            self._kl_coef = adapted_coefficient(self._kl_coef, measured, count, algo)
        every = algo.reference.sync_every
        if every and (shard.step + 1) % every == 0:
            self._reference.sync(self._policy, algo.reference.mix_alpha)
            self._num_syncs += 1
            if ranks.rank() == 0:
                log.info("reference synced with alpha %g", algo.reference.mix_alpha)
        metrics["reference_syncs"] = float(self._num_syncs)

    def _finish(self, record: StepRecord, shard: Shard) -> dict[str, float]:
        """Metrics over all ranks; without the loss's own when every update was skipped."""
        metrics = {"updates_skipped": float(self._num_skipped)}
        if not record.norms:
            return metrics
        sums = ranks.reduced(record.sums, dist.ReduceOp.SUM)
        maxima = ranks.reduced(record.maxima, dist.ReduceOp.MAX)
        count, limit = len(record.norms), self._config.learner.max_grad_norm
        return metrics | {
            **finish(sums, maxima),
            "loss": float(sums["loss"]) / count,
            "grad_norm": sum(record.norms) / count,
            "grad_norm_clipped": sum(min(n, limit) for n in record.norms) / count,
            "optimizer_steps": float(count),
            "lr": record.rate,
        }

    def _batch_metrics(self, shard: Shard, ready: list[OptimizerBatch]) -> dict[str, float]:
        """Rewards and lengths of the whole batch, from every rank's shard."""
        rewards = [group.rewards for group in shard.groups]
        reports = [batch.report for batch in ready]
        micros = [micro for batch in ready for micro in batch.batches]
        by_kernel = has_kernel(self._device, getattr(torch, self._config.learner.dtype))
        own_cost = sum(group.cost for group in shard.groups)
        reasons = [c.finish_reason for group in shard.groups for c in group.completions]
        counts = [
            sum(float(r.mean()) for r in rewards),
            sum(float(r.max()) for r in rewards),
            sum(float(r.min()) for r in rewards),
            len(rewards),
            sum(report.num_loss_tokens for report in reports),
            sum(report.num_masked_stale + report.num_masked_nonfinite for report in reports),
            sum(report.num_nonfinite_sequences for report in reports),
            reasons.count("length"),
            own_cost,
            sum(len(micro.input_ids) for micro in micros if micro.loss_mask.any()),
            sum(num_slots(micro.cu_seqlens, by_kernel=by_kernel) for micro in micros),
        ]
        totals = ranks.summed(counts, self._device)
        mean, best, worst, groups, tokens, masked, nonfinite, truncated, cost, used, slots = totals
        completions = shard.num_completions_global
        largest = ranks.largest(own_cost, self._device)
        return {
            "rewards/mean": mean / groups,
            "rewards/best": best / groups,
            "rewards/worst": worst / groups,
            "tokens_trained": tokens,
            "tokens_masked": masked,
            "nonfinite_completions": nonfinite,
            "truncated_share": truncated / completions,
            "padding_share": 1.0 - used / slots,
            "rank_balance": cost / (largest * self._world_size),
            "completions/mean_length": shard.num_loss_tokens_global / completions,
        }

    def _all_advantages(self, shard: Shard, ready: list[OptimizerBatch]) -> Float32:
        """float32 [C] of all ranks' completions, rank by rank, in the order of each shard."""
        ordered: list[Float32] = [np.zeros(0, np.float32)] * len(shard.groups)
        for first, batch in enumerate(ready):
            ordered[first :: len(ready)] = batch.advantages
        own = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *ordered]))
        return ranks.collected(own.to(self._device)).cpu().numpy()

    def _token_rows(
        self, batch: OptimizerBatch, index: int, inputs: LossInputs, found: Objective
    ) -> Iterator[dict[str, np.ndarray]]:
        """The columns of observe/token_log.py for each completion of a micro-batch."""
        micro, first = batch.batches[index], batch.first_group
        flat = [
            (g, i) for g, group in enumerate(batch.groups) for i in range(len(group.completions))
        ]
        tensors = {
            "proximal_logprob": inputs.proximal_logprobs,
            "logprob": inputs.logprobs.detach(),
            "ref_logprob": inputs.ref_logprobs,
            "advantage": inputs.advantages,
            "weight": found.corrected.weight,
            "mask": inputs.mask.bool(),
        }
        arrays = {n: None if v is None else v.cpu().numpy() for n, v in tensors.items()}
        for number, which in enumerate(micro.completion_ids.tolist()):
            if not len(flat):
                return
            lease, sample = flat[which]
            completion = batch.groups[lease].completions[sample]
            count = len(completion.token_ids)
            end = int(micro.cu_seqlens[number + 1])
            yield {
                "lease": np.full(count, first + lease),
                "sample": np.full(count, sample),
                "place": np.arange(count),
                "token_id": completion.token_ids,
                "version": completion.versions,
                "behavior_logprob": completion.behavior_logprobs,
                **{
                    name: np.full(count, np.nan) if array is None else array[end - count : end]
                    for name, array in arrays.items()
                },
            }
