"""One rank's model and optimizer: a shard in, optimizer updates and their metrics out."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as states
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from asyncgrpo.config import Config
from asyncgrpo.errors import AlgorithmError, RunError
from asyncgrpo.learner import parallel, ranks
from asyncgrpo.learner.attention import has_kernel
from asyncgrpo.learner.checkpoint import AddFiles, Checkpoints
from asyncgrpo.learner.diagnostics import Sums, finish, measure
from asyncgrpo.learner.model import PolicyHead, load_policy, write_model
from asyncgrpo.learner.objective import objective
from asyncgrpo.learner.prepare import OptimizerBatch, Preparer, Reference
from asyncgrpo.learner.saved import FOLDER, MODEL_SIZES, step_of
from asyncgrpo.learner.schedule import adapted_coefficient, learning_rate
from asyncgrpo.observe.token_log import Columns, write_token_log
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
    tokens: list[Columns] = field(default_factory=list)  # for observe.token_log

    def add(self, sums: Sums, maxima: Sums) -> None:
        """Adds a micro-batch's or an update's part."""
        self.sums = {n: self.sums[n] + v if n in self.sums else v for n, v in sums.items()}
        self.maxima = {
            n: torch.maximum(self.maxima[n], v) if n in self.maxima else v
            for n, v in maxima.items()
        }


class PolicyUpdater:
    """The learner loop's updater. With several ranks the default process group must be up."""

    def __init__(self, config: Config, *, run_dir: Path | None = None) -> None:
        """run_dir: for the model, checkpoints and token logs; None: nothing is written."""
        self._config, self._run_dir = config, run_dir
        self._world_size = ranks.world_size()
        self._device = "cuda" if config.launch.gpus and torch.cuda.is_available() else "cpu"
        torch.set_num_threads(config.learner.threads)
        torch.manual_seed(config.run.seed)
        lora = config.learner.lora
        quantized = lora is not None and lora.quantize is not None
        settings = config.learner
        self._sharded = settings.parallel == "fsdp"
        if self._sharded:
            parallel.open_lone_group()
        # Sharded models are loaded in host memory: no GPU ever holds one whole.
        load = partial(load_policy, device="cpu" if self._sharded else self._device)
        self._policy = load(config.model.path, quantized=quantized)
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
            self._reference = Reference(head, self._adapter.off, is_policy=True)
        elif algo.kl_coef > 0:
            model = load(algo.reference.path or config.model.path).requires_grad_(False)
            frozen = self._make_head(model, offload=algo.reference.on_cpu)
            self._reference = Reference(frozen)
            if algo.reference.on_cpu and not self._sharded:  # FSDP brings block by block
                frozen.to("cpu")
                during = partial(parallel.brought, frozen, self._device)
                self._reference = Reference(frozen, during)
        self._preparer = Preparer(config, head, self._reference, self._device)
        self._counters: dict[str, float] = {"kl_coef": algo.kl_coef, "skipped": 0, "syncs": 0}
        # [C] of the last update's completions, rank by rank as they were dealt
        self.advantages = np.zeros(0, np.float32)
        self._optimizer = parallel.make_optimizer(self._policy, settings)
        self._only_adapter = settings.published_adapter is not None
        sent_as = getattr(torch, config.model.dtype)
        self._published = parallel.Published(
            self._policy, self._sharded, self._only_adapter, sent_as
        )
        told = self._policy.config.get_text_config()
        sizes = {name: getattr(told, name, None) for name in MODEL_SIZES}
        folder = (run_dir or Path(os.devnull)) / FOLDER
        self.checkpoints = Checkpoints(folder, config.checkpoint, sizes)

    def _make_head(self, policy: PreTrainedModel, *, offload: bool = False) -> PolicyHead:
        settings = self._config.learner
        parallel.set_up_blocks(policy, settings)
        is_mixed = settings.dtype != "float32" and not self._sharded  # FSDP casts by itself
        head = PolicyHead(
            policy,
            temperature=self._config.sampling.temperature,
            entropy_gradient=self._config.algo.entropy_coef > 0,
            autocast=getattr(torch, settings.dtype) if is_mixed else None,
            float32_head=settings.float32_head,
            fused=settings.fused_head,
        )
        if self._sharded:
            offload = offload or settings.cpu_offload
            parallel.shard(head, settings, self._device, cpu_offload=offload)
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
        ready = self._preparer.prepare(shard.step, parts, self._counters["kl_coef"])
        self.advantages = self._all_advantages(shard, ready)
        record = StepRecord()
        for index in range(algo.passes):
            for batch in ready:
                self._step(batch, shard.step, record, is_last=index == algo.passes - 1)
                self._optimizer.zero_grad(set_to_none=True)  # no gradients stay for the next step
        metrics = self._finish(record)
        self._after(shard, metrics)
        if self._config.observe.token_log and self._run_dir is not None:
            leases = [group.lease.lease_id for batch in ready for group in batch.groups]
            write_token_log(self._run_dir, shard.step, ranks.rank(), leases, record.tokens)
        return metrics | self._batch_metrics(shard, ready)

    def weights(self) -> parallel.Published:
        """Present weights by their Hugging Face names, for rank 0 while the others `help`."""
        return self._published

    def canary_logprobs(self) -> Float32:
        """float32 [NUM_CANARIES, V]: log-probs of the token after each canary prompt."""
        adapter = None if self._only_adapter else self._adapter
        with adapter.merged() if adapter else contextlib.nullcontext():
            return self._plain_head.next_logprobs(canary_prompts(self.vocab_size)).numpy()

    def checkpoint(self, step: int, add: AddFiles = lambda _: None) -> None:
        """Begins to save the state after `step` updates, with what `add` puts into its folder."""
        self.checkpoints.save(step, self._state(), self._counters, add)

    def restore(self) -> int:
        """Goes back to the newest checkpoint of the run; returns its step, 0 without any."""
        path = self.checkpoints.newest()
        if path is None:
            return 0
        self.go_to(self.checkpoints, path)
        return step_of(path)

    def go_to(self, checkpoints: Checkpoints, path: Path) -> None:
        """Takes up the state of one checkpoint, also of another run with the same model."""
        state = self._state()
        self._counters = checkpoints.load(path, state)
        states.set_optimizer_state_dict(self._policy, self._optimizer, state["optimizer"])
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
        """Writes the model and its tokenizer to RUN/model, loadable with from_pretrained.

        Waits for a checkpoint under way; CheckpointError when it failed.
        """
        self.checkpoints.wait()
        if self._run_dir is not None:
            self._write(self._run_dir / "model")

    def export(self, step: int) -> None:
        """Writes the model after `step` updates to RUN/exports/step_<k>, when it is due."""
        every = self._config.checkpoint.export_every
        if self._run_dir is None or not every or step % every:
            return
        final = self._run_dir / "exports" / f"step_{step}"
        draft = final.with_name(f".{final.name}.part")
        self._write(draft)
        if ranks.rank() == 0:
            shutil.rmtree(final, ignore_errors=True)  # of a life that was rolled back
            draft.rename(final)

    def _write(self, folder: Path) -> None:
        """On rank 0; the others help to gather a sharded policy."""
        if self._sharded or ranks.rank() == 0:
            own = folder if ranks.rank() == 0 else None
            write_model(self._policy, self._adapter, self._config.model.path, own)

    def _step(self, batch: OptimizerBatch, step: int, record: StepRecord, *, is_last: bool) -> None:
        """One optimizer update."""
        config = self._config
        kl_coef = self._counters["kl_coef"] if config.algo.kl_in == "loss" else 0.0
        update, per_token = StepRecord(), []
        for index, row in enumerate(batch.rows):
            with contextlib.ExitStack() as meanwhile:
                if self._adapter is not None:
                    meanwhile.enter_context(self._adapter.dropping())
                is_before_last = index + 1 < len(batch.rows)
                if isinstance(self._head, DistributedDataParallel) and is_before_last:
                    meanwhile.enter_context(self._head.no_sync())  # ranks meet in the last one
                logprobs, entropy = self._head(row)
                inputs = batch.inputs(index, logprobs, entropy, config)
                found = objective(inputs, config.algo, kl_coef)
                (found.loss * self._world_size).backward()  # DDP divides by the number of ranks
            update.add(*measure(inputs, found, config.algo))
            per_token.append(found.per_token)
            if is_last and config.observe.token_log:
                record.tokens += batch.token_rows(index, inputs, found.corrected.weight)
        limit = config.learner.max_grad_norm
        gradients = torch.nn.utils.clip_grad_norm_(self._policy.parameters(), limit)
        norm = float(ranks.whole(gradients))
        # over ranks, so that all decide alike
        (loss,) = ranks.summed([float(update.sums["loss"])], self._device)
        if not (math.isfinite(norm) and math.isfinite(loss)):
            self._skip(f"loss {loss}, gradient norm {norm} at step {step}: ", batch, per_token)
            return
        record.rate = self._learning_rate(step, update.sums)
        for group in self._optimizer.param_groups:
            group["lr"] = record.rate
        self._before_change()
        self._optimizer.step()
        record.add(update.sums, update.maxima)
        record.norms.append(norm)

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

    def _skip(self, what: str, batch: OptimizerBatch, per_token: Sequence[torch.Tensor]) -> None:
        """Leaves the weights as they are, names the culprit, and stops after too many."""
        self._counters["skipped"] += 1  # the same on every rank, as loss and gradient norm are
        skipped, allowed = self._counters["skipped"], self._config.algo.max_nonfinite
        message = (
            f"{what}{batch.culprit(per_token)}; update skipped, weights unchanged "
            f"({skipped} skipped, allowed are algo.max_nonfinite={allowed})"
        )
        if skipped > allowed:
            raise RunError(
                f"{message}; lower learner.lr={self._config.learner.lr}, or look at trajectories/"
            )
        log.warning(message)

    def _after(self, shard: Shard, metrics: dict[str, float]) -> None:
        """What the reference and the KL coefficient learn from the step."""
        if self._reference is None:
            return
        algo, counters, count = self._config.algo, self._counters, shard.num_completions_global
        if "objective/kl_ref" in metrics:
            measured = metrics["objective/kl_ref"]
            counters["kl_coef"] = adapted_coefficient(counters["kl_coef"], measured, count, algo)
        every = algo.reference.sync_every
        if every and (shard.step + 1) % every == 0:
            self._reference.sync(self._policy, algo.reference.mix_alpha)
            counters["syncs"] += 1
            if ranks.rank() == 0:
                log.info("reference synced with alpha %g", algo.reference.mix_alpha)
        metrics["objective/kl_coef"] = counters["kl_coef"]
        metrics["reference_syncs"] = float(counters["syncs"])

    def _finish(self, record: StepRecord) -> dict[str, float]:
        """Metrics over all ranks; without the loss's own when every update was skipped."""
        metrics = {"updates_skipped": float(self._counters["skipped"])}
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
        reports = [batch.report for batch in ready]
        rows = [row for batch in ready for row in batch.rows]
        by_kernel = has_kernel(self._device, getattr(torch, self._config.learner.dtype))
        slots = [row.input_ids.numel() if by_kernel else row.packing.num_slots for row in rows]
        reasons = [c.finish_reason for group in shard.groups for c in group.completions]
        own = {
            "rewards/mean": sum(float(group.rewards.mean()) for group in shard.groups),
            "rewards/best": sum(float(group.rewards.max()) for group in shard.groups),
            "rewards/worst": sum(float(group.rewards.min()) for group in shard.groups),
            "groups": len(shard.groups),
            "tokens_trained": sum(report.num_loss_tokens for report in reports),
            "tokens_masked": sum(report.num_masked_tokens for report in reports),
            "nonfinite_completions": sum(report.num_nonfinite_sequences for report in reports),
            "truncated": reasons.count("length"),
            "cost": sum(group.cost for group in shard.groups),
            "places": sum(row.input_ids.numel() for row in rows if len(row.targets)),
            "slots": sum(slots),
        }
        found = dict(zip(own, ranks.summed(list(own.values()), self._device), strict=True))
        groups, completions = found.pop("groups"), shard.num_completions_global
        for name in ("rewards/mean", "rewards/best", "rewards/worst"):
            found[name] /= groups
        largest = ranks.largest(own["cost"], self._device)
        found["truncated_share"] = found.pop("truncated") / completions
        found["padding_share"] = 1.0 - found.pop("places") / found.pop("slots")
        found["rank_balance"] = found.pop("cost") / (largest * self._world_size)
        found["completions/mean_length"] = shard.num_loss_tokens_global / completions
        return found

    def _all_advantages(self, shard: Shard, ready: list[OptimizerBatch]) -> Float32:
        """float32 [C] of all ranks' completions, rank by rank, in the order of each shard."""
        ordered: list[Float32] = [np.zeros(0, np.float32)] * len(shard.groups)
        for first, batch in enumerate(ready):
            ordered[first :: len(ready)] = batch.advantages
        own = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *ordered]))
        return ranks.collected(own.to(self._device)).cpu().numpy()
