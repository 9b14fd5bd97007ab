"""trl's released GRPOTrainer on numbers of ours: its own scoring and loss, no model, no dataset."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

EOS = 2
MAX_TOKENS = 8  # of a completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """N completions of lengths[n] tokens, padded to T places."""

    lengths: tuple[int, ...]
    present: Tensor  # float32 [N, T] log pi
    proximal: Tensor  # float32 [N, T] log p; trl's old_per_token_logps
    behavior: Tensor  # float32 [N, T] log mu; trl's sampling_per_token_logps
    ref: Tensor  # float32 [N, T]
    entropy: Tensor  # float32 [N, T]
    mask: Tensor  # float32 [N, T] 0 behind the end, and at some tokens before it (a tool's)
    advantages: Tensor  # float32 [N]
    truncated: tuple[int, ...] = ()  # rows that do not end with EOS

    def with_one(self, name: str, row: int, place: int, value: float) -> Sample:
        values = getattr(self, name).clone()
        values[row, place] = value
        return replace(self, **{name: values})


def random_sample(
    seed: int, *, count: int = 6, spread: float = 0.4, lengths: Sequence[int] | None = None
) -> Sample:
    random = np.random.default_rng(seed)
    spans = lengths or [int(n) for n in random.integers(2, MAX_TOKENS + 1, count)]
    shape = (count, max(spans))

    def normal(scale: float) -> Tensor:
        return torch.tensor(random.normal(size=shape) * scale, dtype=torch.float32)

    present = -torch.tensor(random.uniform(0.3, 2.5, shape), dtype=torch.float32)
    mask = (random.random(shape) < 0.85) * (np.arange(shape[1]) < np.array(spans)[:, None])
    mask[:, 0] = True
    advantages = np.where(np.arange(count) % 2, -1, 1) * random.uniform(0.3, 1.5, count)
    return Sample(
        lengths=tuple(spans),
        present=present,
        proximal=present + normal(spread),
        behavior=present + normal(spread),
        ref=present + normal(spread),
        entropy=torch.tensor(random.uniform(0.1, 3.0, shape), dtype=torch.float32),
        mask=torch.tensor(mask, dtype=torch.float32),
        advantages=torch.tensor(advantages, dtype=torch.float32),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A loss and what it does to each token of the sample."""

    loss: float
    gradient: Tensor  # float32 [N, T] with respect to log pi
    entropy_gradient: Tensor  # float32 [N, T] with respect to the entropies
    values: Tensor  # float32 [N, T] what each token adds to the loss; theirs: see `their_loss`


@cache
def released() -> tuple[Any, Any]:
    """GRPOTrainer and GRPOConfig of the installed trl, which is a declared test dependency."""
    environment = dict(os.environ)
    try:
        with warnings.catch_warnings():
            # It warns of every vLLM above 0.31; nothing that is compared here goes through vLLM.
            warnings.filterwarnings("ignore", "TRL currently supports vLLM", UserWarning)
            from trl import GRPOConfig, GRPOTrainer
    finally:
        # The import quietens vLLM's log and sets library paths; other tests start engines.
        os.environ.clear()
        os.environ.update(environment)
    return GRPOTrainer, GRPOConfig


def their_config(num_generations: int = 2, **settings: Any) -> Any:
    """GRPOConfig with trl's defaults but for `settings`."""
    given = {"per_device_train_batch_size": num_generations, "num_iterations": 2, **settings}
    return released()[1](
        output_dir="never-written",
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_completion_length=MAX_TOKENS,
        num_generations=num_generations,
        **given,
    )


def their_advantages(parts: Tensor, weights: Sequence[float], size: int, **settings: Any) -> Tensor:
    """float32 [N] from parts float32 [N, K]: N completions in groups of `size`, K functions."""
    count = len(parts)
    sample = random_sample(0, count=count)
    args = their_config(size, per_device_train_batch_size=count, **settings)
    return _scored(_trainer(sample, args, parts, weights), sample)["advantages"]


def their_scoring(sample: Sample, **settings: Any) -> dict[str, Tensor]:
    """What trl's scoring hands to its loss: ratios, masks, log-probs."""
    return _scored(_loss_trainer(sample, settings), sample)


def their_loss(sample: Sample, *, micro_batches: int = 1, **settings: Any) -> Measured:
    """trl's own scoring, then its own loss, summed over equal micro-batches.

    values are right for losses that divide by a constant (dapo, cispo, vespo, dr_grpo): such a loss
    is linear in its mask, so what a token adds to it is the derivative by the token's mask.
    """
    settings = {"gradient_accumulation_steps": micro_batches, **settings}
    trainer = _loss_trainer(sample, settings)
    scored = {**_scored(trainer, sample), "advantages": sample.advantages}
    scored["tool_mask"] = mask = scored["tool_mask"].float().requires_grad_()
    present, entropy = sample.present.clone(), sample.entropy.clone()
    leaves = (present.requires_grad_(), entropy.requires_grad_())
    count, losses = len(sample.lengths), []
    for rows in torch.arange(count).chunk(micro_batches):
        trainer.script["present"] = tuple(leaf[rows] for leaf in leaves)
        part = {k: v[rows] if v.dim() and len(v) == count else v for k, v in scored.items()}
        losses.append(trainer._compute_loss("present", part))
    total = torch.stack(losses).sum()
    grads = torch.autograd.grad(total, (*leaves, mask), allow_unused=True)
    gradient, entropy_gradient, slope = (
        torch.zeros_like(present) if grad is None else grad for grad in grads
    )
    return Measured(
        loss=total.item(),
        gradient=gradient,
        entropy_gradient=entropy_gradient,
        values=slope * mask.detach(),
    )


def _loss_trainer(sample: Sample, settings: dict[str, Any]) -> Any:
    count = len(sample.lengths)
    steps = settings.get("gradient_accumulation_steps", 1)
    args = their_config(**{"per_device_train_batch_size": count // steps, **settings})
    return _trainer(sample, args, torch.zeros(count, 1), [1.0])


def _trainer(sample: Sample, args: Any, parts: Tensor, weights: Sequence[float]) -> Any:
    """A GRPOTrainer that was never initialised: settings, and scripts in place of its models."""
    trainer = object.__new__(released()[0])
    same = ("beta", "delta", "entropy_coef", "importance_sampling_level", "loss_type")
    same += ("mask_truncated_completions", "max_completion_length", "multi_objective_aggregation")
    same += ("num_generations", "num_iterations", "off_policy_mask_threshold", "scale_rewards")
    same += ("top_entropy_quantile", "use_adaptive_entropy", "use_vllm", "pad_to_multiple_of")
    same += tuple(f"vllm_importance_sampling_{k}" for k in ("clip_max", "clip_min", "correction"))
    vars(trainer).update({name: getattr(args, name) for name in same})
    vars(trainer).update(
        args=args,
        epsilon_low=args.epsilon,  # as GRPOTrainer.__init__ names these
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        vllm_importance_sampling_mode=args.vllm_importance_sampling_mode,
        _entropy_bonus_enabled=args.entropy_coef != 0.0,
        current_gradient_accumulation_steps=args.gradient_accumulation_steps,
        aux_loss_enabled=False,
        environment_factories=None,
        environments=None,
        tools=[],
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        ref_model="ref",
        eos_token_ids=[EOS],
        _tokenizer=SimpleNamespace(pad_token_id=0),
        accelerator=_OneProcess(),
        reward_funcs=[None] * len(weights),
        reward_func_names=[f"part{k}" for k in range(len(weights))],
        reward_weights=torch.tensor(weights),
        _metrics={"train": defaultdict(list)},
        _logs={key: defaultdict(list) if key == "rewards" else [] for key in _LOGS},
        _pending_extra_logs={},
        _pending_metrics={},
        script={"old": (sample.proximal, None), "ref": (sample.ref, None)},
        _generate=lambda prompts: _generated(sample),
        _calculate_rewards=lambda *_: parts,
    )

    def logprobs(model: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
        return (*trainer.script[model if isinstance(model, str) else "old"], None)

    trainer._get_per_token_logps_and_entropies = logprobs
    return trainer


_LOGS = ("prompt", "completion", "rewards", "advantages")


class _OneProcess:
    """accelerate's Accelerator of a single process."""

    device = torch.device("cpu")
    is_main_process = sync_gradients = True
    process_index, num_processes = 0, 1

    def gather(self, values: Tensor) -> Tensor:
        return values

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values


def _generated(sample: Sample) -> tuple[Any, ...]:
    """What GRPOTrainer._generate returns."""
    count = len(sample.lengths)
    ends = [5 if row in sample.truncated else EOS for row in range(count)]
    ids = [[5] * (n - 1) + [end] for n, end in zip(sample.lengths, ends, strict=True)]
    tool_mask = [row[:n].int().tolist() for row, n in zip(sample.mask, sample.lengths, strict=True)]
    logprobs = [row[:n].tolist() for row, n in zip(sample.behavior, sample.lengths, strict=True)]
    return [[3]] * count, ids, tool_mask, [""] * count, logprobs, {}, None, None


def _scored(trainer: Any, sample: Sample) -> dict[str, Tensor]:
    prompts = [{"prompt": "?"} for _ in sample.lengths]
    return trainer._generate_and_score_completions(prompts)
