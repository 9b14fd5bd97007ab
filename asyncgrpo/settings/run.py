"""Settings of the run and its processes: engines, buffer, launcher and what is observed."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from asyncgrpo.settings.room import Room, Unbounded


class RunSettings(Room):
    seed: int = Field(0, ge=0, lt=2**31, description="seed of prompts, sampling and toy runs")
    max_steps: int = Field(60, ge=1, description="batches (learner steps) until the run is done")
    dir: str | None = Field(None, description="run directory; default runs/<time>-<name>")
    name: str = Field("run", description="short name, part of the default run directory")


class ModelSettings(Room):
    path: str = Field("tiny", description="'tiny' (embedded), a local folder, or a hub name")
    tiny_seed: int = Field(0, ge=0, description="which embedded model; each is made once")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of engine weights")


class SamplingSettings(Room):
    temperature: float = Field(1.0, gt=0, le=10, description="of training samples")
    top_p: float = Field(1.0, gt=0, le=1, description="1 = off; below it ratios are approximate")
    top_k: int = Field(0, ge=0, description="0 = off; above it ratios are approximate")
    max_completion_tokens: int = Field(16, ge=1, description="limit of one completion")


class ActorSettings(Room):
    engine: Literal["vllm", "toy"] = Field("vllm", description="toy: a slow torch sampler")
    concurrency: int = Field(16, ge=1, description="groups in flight per actor, at most")
    adaptive_concurrency: bool = Field(
        False, description="find out how many by the use of the KV cache, up to concurrency"
    )
    kv_cache_bytes: int = Field(64 << 20, ge=1 << 20, description="KV cache of one engine")
    kv_on_update: Literal["keep", "recompute"] = Field(
        "keep", description="keep keys and values across a weight update, or compute them anew"
    )
    sleep: bool = Field(
        False, description="the engine gives its GPU's memory to the learner while that trains"
    )
    threads: int = Field(1, ge=1, description="OpenMP threads of one CPU engine")
    tensor_parallel: int = Field(
        1, ge=1, description="GPUs of one machine that share an engine; on CPU processes"
    )

    @property
    def cores(self) -> int:
        """Of one CPU engine."""
        return self.threads * self.tensor_parallel


class BufferSettings(Room):
    groups_per_step: int = Field(
        16, ge=1, description="batch size in groups; with tokens_per_step only a first guess"
    )
    completions_per_step: int | None = Field(
        None, ge=2, description="batch size in completions instead; group_size must divide it"
    )
    tokens_per_step: int | None = Field(
        None, ge=1, description="batch size in completion tokens instead: the groups that reach it"
    )
    max_staleness: int = Field(4, ge=0, description="bound in policy versions, per token")
    order: Literal["arrival", "ticket", "window"] = Field(
        "arrival",
        description="arrival: oldest version first; ticket: strictly in lease order; window: as "
        "arrival, but at most `window` leases ahead of work that is still being made",
    )
    window: int = Field(32, ge=1, description="leases that a group may be ahead of earlier work")
    staleness_action: Literal["drop", "mask", "downweight", "wait"] = Field(
        "drop",
        description="a group with tokens past the bound: drop it, mask those tokens, or halve "
        "their weight per version (up to twice the bound); wait: a batch waits for work that "
        "would get too old",
    )
    credit: int = Field(8, ge=1, description="unacknowledged groups an actor may have on the wire")
    replay_ratio: float = Field(
        0.0,
        ge=0,
        le=8,
        description="groups of a batch that were trained before, per new one, none past the bound",
    )
    lease_deadline_seconds: Unbounded = Field(600.0, gt=0, description="then a lease is taken back")
    take_timeout_seconds: float = Field(
        600.0, gt=0, description="longest wait of anybody for the buffer"
    )


def _reachable(text: str) -> str:
    """One IPv4 address: it is listened on, and told to others."""
    try:
        if not ipaddress.IPv4Address(text).is_unspecified:
            return text
    except ValueError:
        pass
    raise ValueError(
        f"{text!r} must be the IPv4 address of this machine that the others reach; use 127.0.0.1 "
        "when all runs on this one"
    )


def _reachable_or_auto(text: str) -> str:
    return text if text == "auto" else _reachable(text)


Address = Annotated[str, AfterValidator(_reachable)]


class LaunchSettings(Room):
    host: Address = Field("127.0.0.1", description="address of buffer, weights and their store")
    encrypt: Literal["auto", True, False] = Field(
        "auto", description="CURVE keys of the run for buffer and weights; auto: off loopback"
    )
    insecure: bool = Field(False, description="allow to leave loopback without keys")
    actors: int = Field(2, ge=1, le=1024, description="processes that generate, one engine each")
    learners: int = Field(2, ge=1, le=1024, description="ranks that train")
    gpus: int = Field(0, ge=0, description="GPUs to use; 0 = CPU run")
    max_restarts: int = Field(
        3, ge=0, description="of one process within restart_window_seconds; then the run stops"
    )
    restart_window_seconds: float = Field(3600.0, gt=0, description="older restarts do not count")
    share_gpus: bool = Field(False, description="more processes than GPUs; needs gloo for weights")
    grace_seconds: float = Field(5.0, gt=0, description="between SIGTERM and SIGKILL")
    start_timeout_seconds: float = Field(180.0, gt=0, description="until the first batch is there")
    stall_seconds: float = Field(
        600.0, gt=0, description="without a group, step or evaluation; then who waits is written"
    )
    on_stall: Literal["warn", "abort"] = Field("warn", description="what a stall report does")
    buffer_port: int = Field(0, ge=0, le=65535, description="0 = any free port")
    weights_port: int = Field(0, ge=0, le=65535, description="0 = any free port")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="of the buffer; +1, +2 .. others; 0 any"
    )

    @property
    def encrypted(self) -> bool:
        """Whether buffer and weights admit only who has the keys of the run."""
        needed = not (self.on_loopback or self.insecure)
        return needed if self.encrypt == "auto" else self.encrypt

    @property
    def on_loopback(self) -> bool:
        """Whether no other machine can reach the run."""
        return ipaddress.IPv4Address(self.host).is_loopback

    @model_validator(mode="after")
    def _no_open_door_by_accident(self) -> LaunchSettings:
        if not (self.on_loopback or self.encrypted or self.insecure):
            raise ValueError(
                f"encrypt=false with host={self.host}: anybody who reaches this address could read "
                "prompts and send groups; leave encrypt at auto, or add --insecure"
            )
        return self


class ObserveSettings(Room):
    metrics_host: Annotated[str, AfterValidator(_reachable_or_auto)] = Field(
        "127.0.0.1",
        description="address of the metrics endpoints; auto: each machine's own, as launch.host's",
    )
    trajectories: bool = Field(
        True,
        description="write trajectories/step_<k>.jsonl: what was trained, and what was dropped",
    )
    token_log: bool = Field(
        False, description="write tokens/step_<k>.rank<r>.npz: every log-prob, version and mask"
    )
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="who gets the rows of metrics.jsonl too; optional installs"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING"] = Field("INFO", description="of all roles")
