"""All settings as one: read from TOML and `--set room.key=value`, checked across sections."""

from __future__ import annotations

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
from asyncgrpo.hints import nearest
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
ENGINE_TOKENS = 2048  # of one engine step: vLLM's default
SPARE_SEQUENCES = 64  # of an engine, beside the training groups: evaluations and canaries


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

    @model_validator(mode="after")
    def _completions_to_groups(self) -> Config:
        """Resolves buffer.completions_per_step into buffer.groups_per_step."""
        buffer, completions, size = (
            self.buffer,
            self.buffer.completions_per_step,
            self.algo.group_size,
        )
        if completions is None:
            return self
        groups, rest = divmod(completions, size)
        if rest:
            fitting = " or ".join(str(n * size) for n in (groups, groups + 1) if n)
            raise ValueError(
                f"buffer.completions_per_step={completions} is not a multiple of "
                f"algo.group_size={size}; use {fitting}"
            )
        is_other = "groups_per_step" in buffer.model_fields_set and buffer.groups_per_step != groups
        if is_other or buffer.tokens_per_step:
            raise ValueError(
                f"buffer.completions_per_step={completions} is {groups} groups of algo.group_size, "
                "but groups_per_step or tokens_per_step says otherwise; keep one of the three"
            )
        # the only change of what is read, before anybody sees it
        self.__dict__["buffer"] = buffer.model_copy(update={"groups_per_step": groups})
        return self

    @model_validator(mode="after")
    def _cross_checks(self) -> Config:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterable[str]:
        """What could never work together."""
        batch, size, staleness = self.buffer, self.algo.group_size, self.buffer.max_staleness
        if size < 2 and ":" not in self.algo.advantage:
            yield (
                f"algo.group_size={size} must be >= 2 with {self.algo.advantage} advantages: "
                "they compare completions of one group; set algo.group_size to 4 or more"
            )
        if (every := self.weights.publish_every) > staleness + 1:
            yield (
                f"weights.publish_every={every} must be <= buffer.max_staleness + 1 = "
                f"{staleness + 1}: the gate would wait for weights that are published only after "
                f"a batch that it holds back (deadlock); set buffer.max_staleness >= {every - 1}"
            )
        if self.weights.only_changed and self.weights.transport == "disk":
            yield "weights.only_changed=true: 'disk' writes whole versions; set another transport"
        if batch.replay_ratio and (batch.tokens_per_step or not staleness):
            yield (
                f"buffer.replay_ratio={batch.replay_ratio} needs batches counted in groups (no "
                "tokens_per_step), and groups old enough: buffer.max_staleness >= 1"
            )
        if batch.replay_ratio and self.new_groups < self.min_groups:
            yield (
                f"buffer.replay_ratio={batch.replay_ratio} leaves {self.new_groups} new groups of "
                f"buffer.groups_per_step={batch.groups_per_step}, but at least {self.min_groups} "
                "are needed (ranks x algo.minibatches); use more groups per step"
            )
        if batch.groups_per_step < self.min_groups:
            yield (
                f"buffer.groups_per_step={batch.groups_per_step} must be >= launch.learners="
                f"{self.launch.learners} x algo.minibatches={self.algo.minibatches}: each "
                "optimizer step needs at least one group on each rank"
            )
        prompt, completion = self.data.max_prompt_tokens, self.sampling.max_completion_tokens
        if self.algo.overlong_buffer >= completion:
            yield (
                f"algo.overlong_buffer={self.algo.overlong_buffer} must be < "
                f"sampling.max_completion_tokens={completion}, whose last part it is"
            )
        if (row := self.learner.max_tokens_per_microbatch) < prompt + completion:
            yield (
                f"learner.max_tokens_per_microbatch={row} must be >= data.max_prompt_tokens + "
                f"sampling.max_completion_tokens = {prompt} + {completion} = {prompt + completion}"
                ", the longest sequence: raise it, or lower one of the two"
            )
        yield from self._unmet_needs()
        yield from self._adapter_problems()
        learners, shard_ranks = self.launch.learners, self.learner.shard_ranks
        if learners % max(shard_ranks, 1):
            fitting = ", ".join(str(n) for n in range(1, learners + 1) if learners % n == 0)
            yield (
                f"learner.shard_ranks={shard_ranks} must divide launch.learners={learners}: "
                f"use one of {fitting}, or 0 (all ranks share one copy)"
            )
        names = [block.name for block in self.eval]
        for name in names:
            if names.count(name) > 1:
                yield f"eval: two blocks are called {name!r}; give one of them another `name`"
        least, most = self.data.tasks.sequence_min, self.data.tasks.sequence_max
        if least > most:
            yield f"data.tasks.sequence_min={least} must be <= data.tasks.sequence_max={most}"

    def _adapter_problems(self) -> Iterable[str]:
        adapter, every = self.learner.published_adapter, self.algo.reference.sync_every
        if self.learner.lora and every:
            yield (
                f"algo.reference.sync_every={every} with learner.lora: an adapter has no weights "
                "of its own that a reference could take over; set algo.reference.sync_every = 0"
            )
        merged = "set learner.lora.publish = 'merged'"
        if adapter and adapter.quantize:
            yield (
                f"learner.lora.publish='adapter' with learner.lora.quantize={adapter.quantize!r}: "
                f"engines would add the adapter to a base that is not quantised; {merged}"
            )
        if adapter and adapter.r > MAX_ENGINE_RANK:
            yield (
                f"learner.lora.r={adapter.r} must be <= {MAX_ENGINE_RANK}, vLLM's limit, with "
                f"learner.lora.publish='adapter'; lower it, or {merged}"
            )

    def _unmet_needs(self) -> Iterable[str]:
        """Settings that do nothing, or cannot work, without another one."""
        learner, lora, width = self.learner, self.learner.lora, self.actor.tensor_parallel
        parts = {"learner.shard_ranks": learner.shard_ranks}
        offload = {"learner.cpu_offload": learner.cpu_offload}
        on_gpus = self.launch.gpus > 0
        packed = {
            "learner.lora.quantize": lora and lora.quantize,
            "learner.optimizer": learner.optimizer == "adamw_8bit" and learner.optimizer,
        }
        publish = learner.published_adapter and "adapter"
        in_vllm = {"actor.tensor_parallel": width > 1 and width, "learner.lora.publish": publish}
        on_cpu = {"algo.reference.on_cpu": self.algo.reference.on_cpu}
        only_cuda = {"learner.compile": learner.compile, **on_cpu}
        own = "algo.reference.path (without it the reference is the policy with its adapter off)"
        fused = {"learner.fused_head": learner.fused_head}
        asleep = {"actor.sleep": self.actor.sleep}
        halves = (
            f"learner.dtype = 'bfloat16' (now {learner.dtype!r}) and learner.float32_head = false "
            "(its kernel multiplies in bfloat16)"
        )
        shared = (
            f"launch.gpus >= 1 (now {self.launch.gpus}) and launch.share_gpus = true (now "
            f"{self.launch.share_gpus}; engines give their memory to a learner on the same GPU)"
        )
        every = self.weights.publish_every
        each = f"weights.publish_every = 1 (now {every}; engines wake up for each publish)"
        fsdp = "learner.parallel = 'fsdp' (DDP has no parts of a model)"
        ddp = "learner.parallel = 'ddp' (FSDP knows no 8- or 4-bit parts)"
        cuda = "CUDA, but launch.gpus=0 is a CPU run"
        vllm = (
            "actor.engine = 'vllm' (the toy engine, also that of --serial, is one process and "
            "takes whole weights)"
        )
        needs: list[tuple[str, bool, dict[str, Any]]] = [
            (fsdp, learner.parallel == "fsdp", {**parts, **offload}),
            (ddp, learner.parallel == "ddp", packed),
            (cuda, on_gpus, {**packed, **offload, **fused, **only_cuda}),
            (halves, learner.dtype == "bfloat16" and not learner.float32_head, fused),
            (vllm, self.actor.engine == "vllm", in_vllm),
            (shared, (on_gpus and self.launch.share_gpus) or self.actor.engine == "toy", asleep),
            (each, every == 1, asleep),
            (own, lora is None or self.algo.reference.path is not None, on_cpu),
        ]
        for need, is_met, settings in needs:
            for name, value in settings.items():
                if value and not is_met:
                    yield f"{name}={value!r} needs {need}; change that, or leave {name} out"

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
    def engine_sequences(self) -> int:
        """Sequences that an engine works on at once, at most: also of evaluations, and canaries."""
        return self.actor.concurrency * self.algo.group_size + SPARE_SEQUENCES

    @property
    def engine_tokens(self) -> int:
        """Tokens of one engine step, at most: vLLM's default, which may be too few for them."""
        return max(ENGINE_TOKENS, self.engine_sequences)

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
    asked = list(overrides)
    for override in asked:
        _apply_override(raw, override)
    try:
        return from_mapping(raw)
    except ConfigError as error:
        source = f"{path}{' with --set and options' if asked else ''}: " if path else ""
        raise ConfigError(f"{source}{error}") from None


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
        return {**loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
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
    branches = (TEXT, TABLE, TABLES, "literal[", "tuple[")  # of what a setting may be
    location = tuple(part for part in item["loc"] if not str(part).startswith(branches))
    key = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        *place, last = map(str, location)
        known = _fields_at(location[:-1])
        homes = [[room, last] for room in Config.model_fields if last in _fields_at((room,))]
        near = nearest(last, known)
        meant = [*place, near] if near else next(iter(homes), None)
        hint = f"did you mean {'.'.join(meant)}?" if meant else f"known here: {', '.join(known)}"
        return f"unknown setting {key}; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    named = location  # without the place in a list
    while named and isinstance(named[-1], int):
        named = named[:-1]
    setting = ".".join(map(str, named))
    field = _fields_at(named[:-1]).get(named[-1]) if named else None
    if item["type"] == "missing" and named != location:
        key, message = setting, "it has too few values"
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
    about = f" ({setting} is: {described})" if described else ""
    return f"{key}={item['input']!r} is not allowed: {message}{about}"
