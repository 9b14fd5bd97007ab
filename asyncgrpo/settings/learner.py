"""Settings of the learner: optimizer, parallelism, LoRA, how weights travel, checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from asyncgrpo.settings.room import Room, Unbounded

Beta = Annotated[float, Field(ge=0, lt=1)]


class LoraSettings(Room):
    r: int = Field(16, ge=1, description="rank of the trained matrices A and B")
    alpha: int = Field(32, ge=1, description="W + alpha / r B A takes the place of W")
    dropout: float = Field(0.0, ge=0, lt=1, description="of A's inputs, in training only")
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "all-linear", description="names of layers; all-linear: all of attention and MLP"
    )
    quantize: Literal["4bit"] | None = Field(
        None, description="4bit: the frozen weights as NF4 (QLoRA); CUDA only"
    )
    publish: Literal["merged", "adapter"] = Field(
        "merged", description="adapter: engines keep the base and get only A and B"
    )
    save_merged: bool = Field(
        True, description="false: RUN/model/adapter alone, without the merged RUN/model"
    )


def _as_interval(value: Any) -> Any:
    return {"none": 0, "full": 1}.get(value, value) if isinstance(value, str) else value


class LearnerSettings(Room):
    lr: float = Field(5e-4, gt=0, description="peak learning rate; larger models want 1e-6")
    betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="of AdamW")
    adam_eps: float = Field(1e-8, gt=0, description="of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW; not on biases and norms")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw_8bit: its states in 8 bit (bitsandbytes, CUDA)"
    )
    warmup_steps: int = Field(5, ge=0, description="steps over which lr rises from 0")
    warmup_ratio: float | None = Field(
        None, ge=0, le=1, description="share of run.max_steps, in place of warmup_steps"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of lr after the warm-up, until run.max_steps"
    )
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="floor of the schedule, as share of lr"
    )
    max_grad_norm: Unbounded = Field(1.0, gt=0, description="longer gradients are scaled down")
    ess_scaled_lr: bool = Field(
        False, description="lr times the square root of the effective share of samples"
    )
    max_tokens_per_microbatch: int = Field(8192, ge=16, description="prompt and completion tokens")
    threads: int = Field(1, ge=1, description="torch threads of one rank")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="ddp: the whole model on each rank; fsdp: a part of it"
    )
    shard_ranks: int = Field(
        0, ge=0, description="fsdp: ranks that share one copy of the model; 0 = all"
    )
    cpu_offload: bool = Field(
        False, description="fsdp: weights, gradients and optimizer in the host's memory; CUDA only"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of matrix products; weights and their gradients' sums stay float32"
    )
    float32_head: bool = Field(
        False, description="with dtype = 'bfloat16': logits in float32 all the same"
    )
    fused_head: bool = Field(
        False, description="with dtype = 'bfloat16': log-probs by Liger's kernel; CUDA only"
    )
    checkpoint_activations: Annotated[int, BeforeValidator(_as_interval)] = Field(
        0, ge=0, description="blocks computed again in the backward pass: none, full, or each nth"
    )
    compile: bool = Field(False, description="each block by torch.compile; CUDA only")
    lora: LoraSettings | None = Field(
        None, description="train an adapter only (LoRA); none = all weights"
    )

    @property
    def published_adapter(self) -> LoraSettings | None:
        """What engines get in place of whole weights, if anything."""
        return self.lora if self.lora and self.lora.publish == "adapter" else None


class WeightSettings(Room):
    publish_every: int = Field(1, ge=1, description="optimizer updates between two publishes")
    transport: Literal["auto", "nccl", "gloo", "cuda_ipc", "disk"] = Field(
        "auto", description="auto: gloo on CPU, nccl between GPUs, cuda_ipc on a shared one"
    )
    overlap: bool = Field(True, description="send while the next forward and backward pass runs")
    only_changed: bool = Field(
        False, description="leave out buckets whose bytes the receivers have; reads all twice"
    )
    bucket_bytes: int = Field(8 << 20, ge=1 << 10, description="largest piece of one broadcast")
    ready_timeout_seconds: float = Field(10.0, gt=0, description="offer -> ready, per actor")
    transfer_timeout_seconds: float = Field(60.0, gt=0, description="one broadcast")
    loaded_timeout_seconds: float = Field(60.0, gt=0, description="broadcast -> live and proven")
    canary_tolerance: float = Field(
        0.0,
        ge=0,
        description="allowed |engine - learner| log-prob; 0 = 1e-3 (0.5 if one is bfloat16)",
    )


class CheckpointSettings(Room):
    every: int = Field(20, ge=0, description="steps between checkpoints; 0 = only when stopped")
    keep_last: int = Field(2, ge=1, description="newest checkpoints that stay")
    keep_every: int = Field(0, ge=0, description="those of every so many steps stay too; 0 = none")
    export_every: int = Field(
        0, ge=0, description="steps between models in RUN/exports/step_<k>; 0 = only RUN/model"
    )
