"""All settings: one pydantic model per room, read from TOML and `--set room.key=value`."""

from __future__ import annotations

import difflib
import ipaddress
import json
import logging
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_serializer,
    model_validator,
)

from asyncgrpo.algo import AlgoSettings
from asyncgrpo.aliases import translate
from asyncgrpo.errors import ConfigError
from asyncgrpo.room import Room, Unbounded

log = logging.getLogger(__name__)
HELD_OUT = "held-out"  # the evaluation that nobody gave a name
TASKS = "tasks"
NOTHING = (None, "", "none")
MAX_ENGINE_RANK = 512  # of vLLM's MaxLoRARanks


class RunSettings(Room):
    seed: int = Field(0, ge=0, lt=2**31, description="seed of prompts, sampling and toy runs")
    max_steps: int = Field(60, ge=1, description="batches (learner steps) until the run is done")
    dir: str | None = Field(None, description="run directory; default runs/<time>-<name>")
    name: str = Field("run", description="short name, part of the default run directory")


class ModelSettings(Room):
    path: str = Field("tiny", description="'tiny' (embedded), a local folder, or a hub name")
    tiny_seed: int = Field(0, ge=0, description="which embedded model; each is made once")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of engine weights")


class TaskSettings(Room):
    """Generated verifiable tasks (data.train = "tasks"); weights choose how often each is drawn."""

    kinds: dict[str, float] = Field(
        default={
            "add": 2.0,
            "sort": 1.2,
            "palindrome": 1.5,
            "reverse": 0.8,
            "expression": 1.0,
            "check": 2.0,
        },
        description="kind -> weight; kinds are listed in asyncgrpo/data/tasks.py",
    )
    max_operand: int = Field(20, ge=1, description="largest operand of add and sub")
    sequence_min: int = Field(3, ge=1, description="fewest items of sort and check")
    sequence_max: int = Field(6, ge=1, description="most items of sort and check")
    letters: int = Field(12, ge=2, le=26, description="alphabet size of palindrome and reverse")
    modulus: int = Field(4, ge=2, le=10, description="check: sum modulo this")
    long_tail: float = Field(
        0.0,
        ge=0,
        le=5,
        description="0 = uniform sizes; else sigma of lognormal item counts (median 6)",
    )


class FewShot(Room):
    """One worked exchange that stands before the question."""

    user: str = Field(..., min_length=1, description="its question")
    assistant: str = Field(..., min_length=1, description="the answer to follow")


class TemplateSettings(Room):
    """What is put around a record's question; the model's own chat template follows."""

    system: str = Field("", description="system prompt; takes the place of the record's own")
    few_shot: tuple[FewShot, ...] = Field((), description="exchanges before the question")
    user_field: str = Field("", description="column with the question; default: found by its name")
    answer_field: str = Field("", description="column with the truth; default: found by its name")
    suffix: str = Field("", description="instruction after the question; never added twice")


class SourceSettings(Room):
    """One of several training sets."""

    path: str = Field(..., min_length=1, description="file, glob, folder or hub name")
    name: str = Field("", description="part of the prompt ids; default: the file's name")
    weight: float | None = Field(None, gt=0, description="share in the mix; default: its size")
    sample_ratio: float = Field(
        1.0, gt=0, le=1000, description="0.1: a tenth of its prompts; 2: each twice"
    )
    template: TemplateSettings | None = Field(None, description="default: data.template")


def _kind_of_train(value: object) -> str:
    return TEXT if isinstance(value, str) else TABLES


# Which form of data.train or eval an error is about.
TEXT, TABLE, TABLES = "<text>", "<table>", "<tables>"
Train = Annotated[
    Annotated[str, Field(min_length=1), Tag(TEXT)]
    | Annotated[tuple[SourceSettings, ...], Tag(TABLES)],
    Discriminator(_kind_of_train),
]


class DataSettings(Room):
    train: Train = Field(
        "tasks", description="'tasks' (generated), a file, glob, folder or hub name, or tables"
    )
    eval: str | None = Field(
        "tasks", description="held-out prompts: 'tasks', a file, glob, folder or hub name, or none"
    )
    tasks: TaskSettings = TaskSettings()
    template: TemplateSettings = TemplateSettings()
    chat_template: bool = Field(True, description="false: plain text, without the model's template")
    shuffle: bool = Field(True, description="shuffle files anew each epoch, by run.seed")
    epochs: int | None = Field(None, ge=1, description="stop after so many epochs; none = endless")
    max_prompt_tokens: int = Field(256, ge=1, description="what longer prompts are measured by")
    overlong_prompt: Literal["drop", "truncate_left", "error"] = Field(
        "drop", description="drop and count it, keep its last max_prompt_tokens tokens, or stop"
    )

    def template_of(self, path: str) -> TemplateSettings:
        """The template of the table in train that has this path, else the one for all."""
        tables = () if isinstance(self.train, str) else self.train
        own = [table.template for table in tables if table.path == path and table.template]
        return own[0] if own else self.template

    @model_validator(mode="after")
    def _weights_for_all_or_none(self) -> DataSettings:
        weights = [] if isinstance(self.train, str) else [source.weight for source in self.train]
        if not isinstance(self.train, str) and not weights:
            raise ValueError("train=[] holds no table; give at least one with a path")
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError(
                f"train: the weights are {weights}; give a weight to every table, or to none "
                "(then each counts by its number of prompts)"
            )
        return self


class SamplingSettings(Room):
    temperature: float = Field(1.0, gt=0, le=10, description="of training samples")
    top_p: float = Field(1.0, gt=0, le=1, description="1 = off; below it ratios are approximate")
    top_k: int = Field(0, ge=0, description="0 = off; above it ratios are approximate")
    max_completion_tokens: int = Field(16, ge=1, description="limit of one completion")


Scope = Literal["sample", "group"]


class RewardFunction(Room):
    use: str = Field(
        ..., description="built-in name, 'package.module:function' or 'file.py:function'"
    )
    weight: float = Field(1.0, description="its score counts so many times")
    name: str = Field("", description="name in metrics; default: the last part of `use`")
    scope: Scope | None = Field(
        None,
        description="group: called once with lists; sample: once per completion with plain values; "
        "default: sample when it has a parameter `completion` or `response`",
    )
    options: dict[str, Any] = Field({}, description="keyword arguments, such as extract='strict'")

    @property
    def label(self) -> str:
        return self.name or self.use.split(":")[-1].split(".")[-1]


def _as_functions(route: Any) -> Any:
    """A route as a list of functions: it may be a name, {name: weight}, a table, or a list."""
    if isinstance(route, str):
        return [{"use": route}]
    if isinstance(route, Mapping):
        is_table = not route or "use" in route
        return [route] if is_table else [{"use": name, "weight": w} for name, w in route.items()]
    if isinstance(route, list | tuple):
        return [function for part in route for function in _as_functions(part)]
    return [route]


Route = Annotated[tuple[RewardFunction, ...], BeforeValidator(_as_functions), Field(min_length=1)]


class JudgeSettings(Room):
    """What completions are scored by, and which of them are correct."""

    functions: Annotated[tuple[RewardFunction, ...], BeforeValidator(_as_functions)] = Field(
        (RewardFunction(use="task"), RewardFunction(use="length_penalty")),
        description="score every record; default: task and length_penalty, or none with routes",
    )
    routes: dict[str, Route] = Field(
        {},
        description="data_source -> judge: a name, {name: weight}, a table as in functions, or a "
        "list; 'default' is for all other sources",
    )
    correct_above: float = Field(
        0.0,
        description="a completion is correct when its first judge (of its route, else of "
        "functions) scores above this",
    )

    @model_validator(mode="before")
    @classmethod
    def _routes_replace_the_default_functions(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("routes") and "functions" not in raw:
            return {**raw, "functions": ()}
        return raw

    @model_validator(mode="after")
    def _distinct_labels(self) -> JudgeSettings:
        labels = [function.label for function in self.functions]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f"functions: two are called {label!r}; give one of them another `name`"
                )
        return self


class RewardSettings(JudgeSettings):
    workers: int = Field(1, ge=1, description="scoring processes beside each actor")
    timeout_seconds: float = Field(30.0, gt=0, description="per group; then the worker is replaced")
    on_error: Literal["drop_group", "zero", "value"] = Field(
        "drop_group",
        description="when a function raises, returns junk, hangs or dies: drop the group, or let "
        "the call score zero or error_value",
    )
    error_value: float | None = Field(None, description="with on_error = 'value'")
    max_error_rate: float = Field(
        0.25, ge=0, le=1, description="the run stops above this share of the last error_window"
    )
    error_window: int = Field(32, ge=1, description="groups that an actor scored last")

    @property
    def error_score(self) -> float | None:
        """What a failed call scores; None: its group is dropped."""
        return {"drop_group": None, "zero": 0.0, "value": self.error_value}[self.on_error]

    @model_validator(mode="after")
    def _error_value_belongs_to_value(self) -> RewardSettings:
        if (self.on_error == "value") != (self.error_value is not None):
            raise ValueError(
                f"on_error={self.on_error!r} with error_value={self.error_value}: set both "
                "on_error = 'value' and error_value, or neither"
            )
        return self


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
    take_timeout_seconds: float = Field(600.0, gt=0, description="longest wait for one batch")


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


class EvalSampling(Room):
    temperature: float = Field(0.0, ge=0, le=10, description="0 = greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="1 = off")
    top_k: int = Field(0, ge=0, description="0 = off")
    max_completion_tokens: int | None = Field(None, ge=1, description="default: sampling's")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


class EvalSettings(Room):
    """One evaluation: which held-out prompts, how often, drawn and scored how."""

    name: str = Field(HELD_OUT, pattern=r"^[\w.-]+$", description="in evals.jsonl and metrics")
    data: str | None = Field(None, description="held-out prompts; default: data.eval")
    every: int = Field(10, ge=0, description="steps between evaluations; 0 = only before and after")
    num_prompts: int = Field(
        318, ge=1, description="held-out prompts, at most; of more records a sample by run.seed"
    )
    num_samples: int = Field(1, ge=1, description="completions per prompt")
    k: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_as_list)] = Field(
        (), description="a number or a list: pass@k, the chance that one of k samples is correct"
    )
    sampling: EvalSampling = EvalSampling()
    reward: JudgeSettings | None = Field(
        None, description="functions, routes and correct_above in place of those of [reward]"
    )
    timeout_seconds: float = Field(300.0, gt=0, description="of one evaluation")

    @model_validator(mode="after")
    def _samples_suffice(self) -> EvalSettings:
        if self.num_samples > 1 and not self.sampling.temperature:
            raise ValueError(
                f"num_samples={self.num_samples} with sampling.temperature=0: greedy completions "
                "of one prompt are all the same; set sampling.temperature above 0, or num_samples=1"
            )
        if max(self.k, default=1) > self.num_samples:
            raise ValueError(
                f"k={max(self.k)} must be <= num_samples={self.num_samples}: pass@k is estimated "
                f"from at least k samples; set num_samples >= {max(self.k)}"
            )
        return self


def _kind_of_eval(value: object) -> str:
    return TABLE if isinstance(value, Mapping | EvalSettings) else TABLES


if TYPE_CHECKING:
    EvalBlocks = tuple[EvalSettings, ...]
else:  # a single [eval] table is one block
    EvalBlocks = Annotated[
        Annotated[EvalSettings, Tag(TABLE)] | Annotated[tuple[EvalSettings, ...], Tag(TABLES)],
        Discriminator(_kind_of_eval),
        AfterValidator(lambda eval: eval if isinstance(eval, tuple) else (eval,)),
    ]


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


class Config(Room):
    """The whole run. Cross checks refuse what could never work, before any process starts."""

    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    sampling: SamplingSettings = SamplingSettings()
    reward: RewardSettings = RewardSettings()
    actor: ActorSettings = ActorSettings()
    buffer: BufferSettings = BufferSettings()
    algo: AlgoSettings = AlgoSettings()
    learner: LearnerSettings = LearnerSettings()
    weights: WeightSettings = WeightSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    eval: EvalBlocks = (EvalSettings(),)
    launch: LaunchSettings = LaunchSettings()
    observe: ObserveSettings = ObserveSettings()

    @model_validator(mode="before")
    @classmethod
    def _completions_to_groups(cls, raw: Any) -> Any:
        """Resolves buffer.completions_per_step into buffer.groups_per_step."""
        rooms = (
            [raw.get(room) or {} for room in ("buffer", "algo")] if isinstance(raw, dict) else []
        )
        if not rooms or not all(isinstance(room, dict) for room in rooms):
            return raw  # wrong types are reported by the field itself
        completions = rooms[0].get("completions_per_step")
        group_size = rooms[1].get("group_size", AlgoSettings().group_size)
        if not isinstance(completions, int) or not isinstance(group_size, int) or group_size < 1:
            return raw
        if completions % group_size:
            down = completions // group_size * group_size
            fitting = " or ".join(str(n) for n in (down, down + group_size) if n)
            raise ValueError(
                f"buffer.completions_per_step={completions} is not a multiple of "
                f"algo.group_size={group_size}; use {fitting}"
            )
        groups = raw["buffer"].get("groups_per_step", completions // group_size)
        if groups != completions // group_size or raw["buffer"].get("tokens_per_step"):
            raise ValueError(
                f"buffer.completions_per_step={completions} is {completions // group_size} groups "
                "of algo.group_size, but groups_per_step or tokens_per_step says otherwise; keep "
                "one of the three"
            )
        return {**raw, "buffer": {**raw["buffer"], "groups_per_step": groups}}

    @model_validator(mode="after")
    def _cross_checks(self) -> Config:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterable[str]:
        size, staleness = self.algo.group_size, self.buffer.max_staleness
        if size < 2 and ":" not in self.algo.advantage:
            yield (
                f"algo.group_size={size} must be >= 2 with {self.algo.advantage} advantages: "
                "they compare completions of one group; set algo.group_size to 4 or more"
            )
        if self.weights.publish_every > staleness + 1:
            yield (
                f"weights.publish_every={self.weights.publish_every} must be <= "
                f"buffer.max_staleness + 1 = {staleness + 1}: the gate would wait for weights that "
                "are published only after a batch that the gate does not let start (deadlock); "
                f"set buffer.max_staleness >= {self.weights.publish_every - 1}"
            )
        if self.buffer.replay_ratio and (self.buffer.tokens_per_step or not staleness):
            yield (
                f"buffer.replay_ratio={self.buffer.replay_ratio} needs batches counted in groups "
                "and buffer.max_staleness >= 1: leave tokens_per_step out, and let groups be old "
                "enough to be trained again"
            )
        if self.buffer.replay_ratio and self.new_groups < self.min_groups:
            yield (
                f"buffer.replay_ratio={self.buffer.replay_ratio} leaves {self.new_groups} new "
                f"groups of buffer.groups_per_step={self.buffer.groups_per_step}, but at least "
                f"{self.min_groups} are needed (ranks x algo.minibatches); use more groups per step"
            )
        if self.buffer.groups_per_step < self.launch.learners:
            yield (
                f"buffer.groups_per_step={self.buffer.groups_per_step} must be >= "
                f"launch.learners={self.launch.learners}: each rank needs at least one group; "
                "use fewer learners or more groups"
            )
        if self.buffer.groups_per_step < self.min_groups:
            yield (
                f"algo.minibatches={self.algo.minibatches} must be <= buffer.groups_per_step / "
                f"launch.learners = {self.buffer.groups_per_step} / {self.launch.learners}: each "
                "optimizer step needs a group on each rank"
            )
        if self.algo.overlong_buffer >= self.sampling.max_completion_tokens:
            yield (
                f"algo.overlong_buffer={self.algo.overlong_buffer} must be < "
                f"sampling.max_completion_tokens={self.sampling.max_completion_tokens}: it is the "
                "last part of a completion"
            )
        longest = self.data.max_prompt_tokens + self.sampling.max_completion_tokens
        if self.learner.max_tokens_per_microbatch < longest:
            yield (
                f"learner.max_tokens_per_microbatch={self.learner.max_tokens_per_microbatch} must "
                f"be >= data.max_prompt_tokens + sampling.max_completion_tokens = "
                f"{self.data.max_prompt_tokens} + {self.sampling.max_completion_tokens} = {longest}"
                ", the longest sequence: raise it, or lower one of the two"
            )
        yield from self._parallel_problems()
        lora, every = self.learner.lora, self.algo.reference.sync_every
        if lora and lora.quantize and not self.launch.gpus:
            yield (
                f"learner.lora.quantize={lora.quantize!r} needs CUDA, but launch.gpus=0 is a CPU "
                "run; set launch.gpus, or leave it out (LoRA on the weights as they are)"
            )
        if lora and every:
            yield (
                f"algo.reference.sync_every={every} with learner.lora: an adapter has no weights "
                "of its own that a reference could take over; set algo.reference.sync_every = 0"
            )
        yield from self._engine_problems()
        names = [block.name for block in self.eval]
        for name in names:
            if names.count(name) > 1:
                yield f"eval: two blocks are called {name!r}; give one of them another `name`"
        if self.data.tasks.sequence_min > self.data.tasks.sequence_max:
            yield (
                f"data.tasks.sequence_min={self.data.tasks.sequence_min} must be <= "
                f"data.tasks.sequence_max={self.data.tasks.sequence_max}"
            )

    def _engine_problems(self) -> Iterable[str]:
        adapter, count = self.learner.published_adapter, self.actor.tensor_parallel
        only_vllm: dict[str, Any] = {"actor.tensor_parallel": count > 1 and count}
        only_vllm["learner.lora.publish"] = adapter and adapter.publish
        for name, value in only_vllm.items():
            if value and self.actor.engine == "toy":
                yield (
                    f"{name}={value!r} needs actor.engine = 'vllm': the toy engine is one process "
                    "and takes whole weights; leave one of the two out"
                )
        if adapter and adapter.quantize:
            yield (
                f"learner.lora.publish='adapter' with learner.lora.quantize={adapter.quantize!r}: "
                "engines would add the adapter to a base that is not quantised, another model; set "
                "learner.lora.publish = 'merged'"
            )
        if adapter and adapter.r > MAX_ENGINE_RANK:
            yield (
                f"learner.lora.r={adapter.r} must be <= {MAX_ENGINE_RANK}, vLLM's limit, with "
                "learner.lora.publish='adapter'; lower it, or set learner.lora.publish = 'merged'"
            )

    def _parallel_problems(self) -> Iterable[str]:
        learner, count = self.learner, self.launch.learners
        is_8bit = learner.optimizer == "adamw_8bit"
        only_fsdp = {"shard_ranks": learner.shard_ranks, "cpu_offload": learner.cpu_offload}
        only_ddp = {
            "lora.quantize": learner.lora and learner.lora.quantize,
            "optimizer": is_8bit and learner.optimizer,
        }
        only_cuda = {"compile": learner.compile, "cpu_offload": learner.cpu_offload}
        if learner.parallel == "fsdp" and count % max(learner.shard_ranks, 1):
            fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            yield (
                f"learner.shard_ranks={learner.shard_ranks} must divide launch.learners={count}: "
                f"use one of {fitting}, or 0 (all ranks share one copy)"
            )
        for name, value in (only_fsdp if learner.parallel == "ddp" else only_ddp).items():
            if value:
                other = "fsdp" if learner.parallel == "ddp" else "ddp"
                why = "has no parts of a model" if other == "fsdp" else "knows no 8- or 4-bit parts"
                yield (
                    f"learner.{name}={value!r} with learner.parallel={learner.parallel!r}, which "
                    f"{why}; set learner.parallel = {other!r}, or leave it out"
                )
        for name, value in {**only_cuda, "optimizer": only_ddp["optimizer"]}.items():
            if value and not self.launch.gpus:
                yield (
                    f"learner.{name}={value!r} needs CUDA, but launch.gpus=0 is a CPU run; set "
                    "launch.gpus, or leave it out"
                )

    @field_serializer("eval")
    def _one_block_as_a_table(self, blocks: tuple[EvalSettings, ...]) -> Any:
        return blocks[0] if len(blocks) == 1 else blocks

    @property
    def evals(self) -> tuple[EvalSettings, ...]:
        """The evaluations that have data, which is filled in where it is that of data.eval."""
        return tuple(
            block.model_copy(update={"data": data})
            for block in self.eval
            if (data := block.data or self.data.eval) not in NOTHING
        )

    @property
    def rewards(self) -> dict[str, RewardSettings]:
        """What scores training (the name "") and each evaluation, with its own judges if any."""
        own = {block.name: dict(block.reward or {}) for block in self.evals}
        return {name: self.reward.model_copy(update=new) for name, new in {"": {}, **own}.items()}

    @property
    def num_held_out_tasks(self) -> int:
        """Generated tasks that are kept for evaluations."""
        return max((block.num_prompts for block in self.evals if block.data == TASKS), default=0)

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt with the longest completion, of training and all evaluations."""
        own = [block.sampling.max_completion_tokens or 0 for block in self.evals]
        return self.data.max_prompt_tokens + max(self.sampling.max_completion_tokens, *own, 0)

    @property
    def min_groups(self) -> int:
        """The fewest groups of a batch: one for each rank and minibatch."""
        return self.launch.learners * self.algo.minibatches

    @property
    def new_groups(self) -> int:
        """Groups of a batch that were not trained before."""
        return math.ceil(self.buffer.groups_per_step / (1 + self.buffer.replay_ratio))

    @property
    def canary_tolerance(self) -> float:
        """Allowed difference of one log-prob between engine and learner, in nats."""
        are_exact = self.model.dtype == self.learner.dtype == "float32"
        return self.weights.canary_tolerance or (1e-3 if are_exact else 0.5)


def preset_files() -> dict[str, Path]:
    """The settings files that come with asyncgrpo, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.toml"))}


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Reads TOML, a preset or a config.json, then applies `room.key=value` (TOML, or text)."""
    raw = _read_file(Path(path)) if path is not None else {}
    for override in overrides:
        _apply_override(raw, override)
    return from_mapping(raw)


def from_mapping(raw: Mapping[str, Any]) -> Config:
    """Builds a Config from nested dicts; ConfigError names each wrong key, value and remedy."""
    settings, notices = translate(raw, {room: _fields_at((room,)) for room in Config.model_fields})
    for notice in notices:
        log.warning("%s", notice)
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        path = preset_files().get(str(path), path)
    if not path.is_file():
        near = [*sorted(str(found) for found in path.parent.glob("*.toml")), *preset_files()]
        raise ConfigError(f"config file {path} does not exist; there are: {', '.join(near)}")
    kind, loads = ("JSON", json.loads) if path.suffix == ".json" else ("TOML", tomllib.loads)
    try:
        return dict(loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config file {path} is not valid {kind}: {error}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"--set {override!r} must look like room.key=value, e.g. learner.lr=1e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # bare words are text: --set actor.engine=toy
    keys = key.strip().split(".")
    place: Any = raw
    while len(keys) > 1:
        name = keys.pop(0)
        if place.get(name) is None:  # none in a config.json: a section that is not set
            place[name] = {}
        place = place[name]
        if isinstance(place, list):
            if len(keys) < 2 or keys[0] not in map(str, range(len(place))):
                raise ConfigError(
                    f"--set {override!r}: {name} is a list of {len(place)} tables; write "
                    f"{name}.0.{keys[-1]} for the first of them"
                )
            place = place[int(keys.pop(0))]
        if not isinstance(place, dict):
            raise ConfigError(f"--set {override!r}: {name} is a value, not a section")
    place[keys[0]] = value


def _fields_at(location: tuple[Any, ...]) -> Mapping[str, Any]:
    """The fields of the section at a location such as ("data", "train", 0, "template")."""
    models: list[Any] = [Config]
    for part in location:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if fields:  # others are places in a list and keys of a mapping
            models = [model for field in fields for model in _rooms_in(field.annotation)]
    return models[0].model_fields if models else {}


def _rooms_in(annotation: Any) -> list[Any]:
    """The sections that a field's type mentions, also inside tuples and unions."""
    if isinstance(annotation, type) and issubclass(annotation, Room):
        return [annotation]
    return [room for part in get_args(annotation) for room in _rooms_in(part)]


def _explain(item: Any) -> str:
    """One pydantic error as: which setting, its value, what is allowed, what to change."""
    location = tuple(part for part in item["loc"] if part not in (TEXT, TABLE, TABLES))
    key = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        known = list(_fields_at(location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
        if near:
            hint = f"did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?"
        else:
            home = [
                f"{room}.{location[-1]}"
                for room in Config.model_fields
                if location[-1] in _fields_at((room,))
            ]
            hint = f"did you mean {home[0]}?" if home else f"known here: {', '.join(known)}"
        return f"unknown setting {key}; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    field = _fields_at(location[:-1]).get(location[-1]) if location else None
    if item["type"] == "tuple_type":
        tables = field is not None and _rooms_in(field.annotation)
        message = "Input should be a list" + " of tables" * bool(tables)
    if not location:
        return str(message)
    if item["type"] == "model_type":
        message = "it must be a section with settings, such as {name = value}"
    if item["type"] == "value_error":
        return f"{key}: {message}"
    described = getattr(field, "description", None)
    about = f" ({key} is: {described})" if described else ""
    return f"{key}={item['input']!r} is not allowed: {message}{about}"
