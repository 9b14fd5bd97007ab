"""One rank's model and optimizer: a shard in, one optimizer update and its metrics out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer

from asyncgrpo.config import Config
from asyncgrpo.errors import RunError
from asyncgrpo.learner.batch import Batch, PackReport, pack
from asyncgrpo.learner.losses import (
    MAX_KEYS,
    SUM_KEYS,
    finish_metrics,
    loss_inputs,
    policy_loss,
)
from asyncgrpo.learner.model import (
    PolicyHead,
    load_policy,
    next_logprobs,
    packed_row,
    published_parameters,
)
from asyncgrpo.learner.schedule import learning_rate
from asyncgrpo.protocols import NamedTensors
from asyncgrpo.types import Float32, Shard
from asyncgrpo.weights.proof import canary_prompts

METRIC_NAMES = {
    "kl": "objective/kl",
    "kl_k1": "objective/kl_k1",
    "entropy": "objective/entropy",
    "staleness_mean": "staleness/mean",
    "staleness_max": "staleness/max",
}


class PolicyUpdater:
    """The learner loop's updater. With several ranks the default process group must be up."""

    def __init__(self, config: Config, *, save_to: Path | None = None) -> None:
        """save_to: where `save` writes; None on ranks that do not save."""
        self._config, self._save_to = config, save_to
        self._world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(config.learner.threads)
        torch.manual_seed(config.run.seed)
        self._policy = load_policy(config.model.path, device=self._device)
        head = PolicyHead(self._policy, temperature=config.sampling.temperature)
        self._head = DistributedDataParallel(head) if self._world_size > 1 else head
        settings = config.learner
        self._optimizer = torch.optim.AdamW(
            self._policy.parameters(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    @property
    def vocab_size(self) -> int:
        """Rows of the output layer."""
        return int(self._policy.get_output_embeddings().weight.shape[0])

    def update(self, shard: Shard) -> dict[str, float]:
        """One optimizer update from this rank's shard; metrics of the whole batch, all ranks."""
        config = self._config
        rate = learning_rate(shard.step, config.learner, config.run.max_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        batches, report = pack(
            shard,
            advantage=config.algo.advantage,
            advantage_eps=config.algo.advantage_eps,
            max_tokens=config.learner.max_tokens_per_microbatch,
            max_staleness=config.buffer.max_staleness,
            staleness_action=config.buffer.staleness_action,
        )
        self._optimizer.zero_grad(set_to_none=True)
        sums, maxima = self._accumulate(batches, shard.num_loss_tokens_global)
        norm = torch.nn.utils.clip_grad_norm_(
            self._policy.parameters(), config.learner.max_grad_norm
        )
        if not torch.isfinite(norm):
            raise RunError(
                f"gradient norm {float(norm)} at step {shard.step}: the update would destroy the "
                f"weights; lower learner.lr={config.learner.lr} or look at trajectories/"
            )
        self._optimizer.step()
        metrics = {METRIC_NAMES.get(n, n): v for n, v in self._finish(sums, maxima).items()}
        metrics.update(self._batch_metrics(shard, report))
        return {**metrics, "grad_norm": float(norm), "lr": rate}

    def weights(self) -> NamedTensors:
        """Present weights by their Hugging Face names."""
        return ((name, tensor.detach()) for name, tensor in published_parameters(self._policy))

    def canary_logprobs(self) -> Float32:
        """float32 [NUM_CANARIES, V]: log-probs of the token after each canary prompt."""
        return next_logprobs(self._policy, canary_prompts(self.vocab_size)).numpy()

    def save(self) -> None:
        """Writes the model and its tokenizer, loadable with from_pretrained."""
        if self._save_to is not None:
            self._policy.save_pretrained(self._save_to)
            AutoTokenizer.from_pretrained(self._config.model.path).save_pretrained(self._save_to)

    def _accumulate(self, batches: Sequence[Batch], num_tokens: int) -> tuple[Tensor, Tensor]:
        """Gradients of all micro-batches; ranks meet in the last one's backward pass only."""
        sums = torch.zeros(len(SUM_KEYS), dtype=torch.float64, device=self._device)
        maxima = torch.zeros(len(MAX_KEYS), dtype=torch.float64, device=self._device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self._without_sync():
                logprobs, entropy = self._head(packed_row(batch, self._device))
                inputs = loss_inputs(batch, logprobs, entropy)
                out = policy_loss(inputs, self._config.algo, num_tokens)
                (out.loss * self._world_size).backward()  # DDP divides by the number of ranks
            sums += out.sums
            maxima = torch.maximum(maxima, out.maxima)
        return sums, maxima

    def _without_sync(self) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._head, DistributedDataParallel):
            return self._head.no_sync()
        return contextlib.nullcontext()

    def _finish(self, sums: Tensor, maxima: Tensor) -> dict[str, float]:
        if self._world_size > 1:
            dist.all_reduce(sums, op=dist.ReduceOp.SUM)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        return finish_metrics(sums.tolist(), maxima.tolist())

    def _batch_metrics(self, shard: Shard, report: PackReport) -> dict[str, float]:
        """Rewards and lengths of the whole batch, from every rank's shard."""
        rewards = [group.rewards for group in shard.groups]
        counts = torch.tensor(
            [
                sum(float(r.mean()) for r in rewards),
                sum(float(r.max()) for r in rewards),
                sum(float(r.min()) for r in rewards),
                len(rewards),
                report.num_loss_tokens,
                report.num_masked_stale + report.num_masked_nonfinite,
            ],
            dtype=torch.float64,
            device=self._device,
        )
        if self._world_size > 1:
            dist.all_reduce(counts)
        mean, best, worst, groups, tokens, masked = counts.tolist()
        return {
            "rewards/mean": mean / groups,
            "rewards/best": best / groups,
            "rewards/worst": worst / groups,
            "tokens_trained": tokens,
            "tokens_masked": masked,
            "completions/mean_length": shard.num_loss_tokens_global / shard.num_completions_global,
        }
