"""All settings as one: read from TOML and `--set room.key=value`, checked across sections."""

from __future__ import annotations

import difflib
import json
import logging
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError, field_serializer, model_validator

from asyncgrpo.aliases import translate
from asyncgrpo.errors import ConfigError
from asyncgrpo.settings.algo import AlgoSettings
from asyncgrpo.settings.data import DataSettings
from asyncgrpo.settings.learner import CheckpointSettings, LearnerSettings, WeightSettings
from asyncgrpo.settings.reward import EvalBlocks, EvalSettings, RewardSettings
from asyncgrpo.settings.room import TABLE, TABLES, TEXT, Room
from asyncgrpo.settings.run import (
    ActorSettings,
    BufferSettings,
    LaunchSettings,
    ModelSettings,
    ObserveSettings,
    RunSettings,
    SamplingSettings,
)

log = logging.getLogger(__name__)
TASKS = "tasks"
NOTHING = (None, "", "none")
MAX_ENGINE_RANK = 512  # of vLLM's MaxLoRARanks


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
        if self.weights.only_changed and self.weights.transport == "disk":
            yield (
                'weights.only_changed=true cannot be with weights.transport="disk", which writes '
                "whole versions: set another transport, or weights.only_changed=false"
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
        on_gpu = self.launch.gpus and self.launch.share_gpus
        if self.actor.sleep and self.actor.engine == "vllm" and not on_gpu:
            yield (
                f"actor.sleep=true needs launch.gpus >= 1 (now {self.launch.gpus}) and "
                f"launch.share_gpus = true: an engine gives its GPU's memory to a learner there"
            )
        if self.actor.sleep and self.weights.publish_every > 1:
            yield (
                f"weights.publish_every={self.weights.publish_every} must be 1 with actor.sleep: "
                "engines wake up for each publish; set it to 1, or actor.sleep = false"
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
        only_cuda["fused_head"] = learner.fused_head
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

        if learner.fused_head and (learner.dtype == "float32" or learner.float32_head):
            yield (
                f"learner.fused_head=true needs learner.dtype = 'bfloat16' (now {learner.dtype!r}) "
                "and learner.float32_head = false: its kernel multiplies in bfloat16"
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
