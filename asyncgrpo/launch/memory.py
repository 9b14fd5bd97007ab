"""Estimates what each GPU of a run must hold, and what a change of a setting would save."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from asyncgrpo.config import Config
from asyncgrpo.settings.learner import LoraSettings

GIB = 1 << 30
FLOAT = 4  # bytes: the learner's weights, and its products unless learner.dtype is bfloat16
# What a process takes beside its tensors. On a GPU the CUDA context: 0.33 to 0.39 GiB of "non-torch
# memory" in vLLM's logs (vllm issues 14452 and 11251). On a CPU its resident memory with everything
# imported: measured for the learner; README's figure for the actor, less its KV cache.
CUDA_CONTEXT = 0.4 * GIB
ON_CPU = {"learner": 0.35 * GIB, "actor": 0.9 * GIB}
# 0.21 GiB with 1e9 parameters (vllm pull request 11349), 0.36 in a log of gpustack/runner's 251.
CUDA_GRAPHS = 0.4 * GIB
NF4_BYTES = 0.5 + 4 / 64  # half a byte per weight, a float32 scale per block of 64
EIGHT_BIT = 1 + 4 / 256  # bytes of a moment: a float32 scale per block of 256
REFERENCE = "reference model"  # on_cpu: while it computes it takes the place of gradients
STAYS = {  # of a process while the other one works, with actor.sleep
    "learner": ("weights", "DDP buckets", "optimizer", REFERENCE, "publishing", "process"),
    "actor": ("CUDA graphs", "publishing", "process"),
}

Line = tuple[str, float, str]  # what, bytes, how they are computed


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model that memory depends on."""

    parameters: int
    reference_parameters: int  # of the reference model
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    hidden_norms: int  # normalisations of the hidden state in one layer
    head_norms: bool  # whether queries and keys are normalised
    linears: Mapping[str, tuple[int, int]]  # of one layer: name -> inputs, outputs
    chunk_tokens: int  # tokens that meet the vocabulary at once, see PolicyHead

    @property
    def layer_weights(self) -> int:
        """Parameters of one layer that matter: those of its matrices."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    def adapted(self, lora: LoraSettings) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers of one layer that get an adapter."""
        every = lora.targets == "all-linear"
        return [sizes for name, sizes in self.linears.items() if every or name in lora.targets]

    def adapter(self, lora: LoraSettings) -> int:
        """Parameters of A and B."""
        return self.layers * sum(lora.r * sum(sizes) for sizes in self.adapted(lora))

    def kv_bytes(self, config: Config) -> int:
        """Keys and values of the longest sequence in the engine; its processes have a head each."""
        heads = max(self.kv_heads, config.actor.tensor_parallel)
        per_token = 2 * self.layers * heads * self.head_dim * engine_bytes(config)
        return per_token * config.max_sequence_tokens


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or the machine of a CPU run, with what each of its processes holds."""

    name: str
    lines: Mapping[str, tuple[Line, ...]]  # by role, such as "learner-0"

    @property
    def num_bytes(self) -> float:
        return sum(size for lines in self.lines.values() for _, size, _ in lines)


def engine_bytes(config: Config) -> int:
    """Of one weight, key or value in the engine."""
    return 2 if config.model.dtype == "bfloat16" else FLOAT


def longest_sequence(config: Config) -> int:
    """Tokens of the longest prompt with the longest training completion."""
    return config.data.max_prompt_tokens + config.sampling.max_completion_tokens


def row_tokens(config: Config) -> int:
    """The most tokens of one micro-batch: the budget, or all that a rank gets if that is less."""
    budget = config.learner.max_tokens_per_microbatch
    if config.buffer.tokens_per_step:
        return budget
    groups = -(-config.buffer.groups_per_step // config.min_groups)
    return min(budget, groups * config.algo.group_size * longest_sequence(config))


def score_elements(config: Config, shape: ModelShape) -> int:
    """Attention scores that one layer keeps per token for its backward pass.

    On CUDA enable_gqa is for flash attention, which has no float32, and for the plain kernel, which
    keeps them (documentation of torch's scaled_dot_product_attention).
    """
    plain = config.launch.gpus > 0 and config.learner.dtype == "float32"
    return shape.heads * longest_sequence(config) if plain and shape.heads != shape.kv_heads else 0


def layer_bytes(config: Config, shape: ModelShape) -> float:
    """What one layer keeps per token, as tests/test_memory.py counts it.

    An upper bound when learner.lora.targets leaves layers out.
    """
    lora, (size, stream) = config.learner.lora, _dtype_bytes(config)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # Of a norm: its input in float32, what it makes of it (for the gradient of its weight), and its
    # output, which the linear layers keep: autocast makes a copy for each of them.
    hidden = shape.hidden_norms * (FLOAT + (0 if lora else stream)) * shape.hidden
    heads = shape.head_norms * (FLOAT + (0 if lora else size)) * (queries + keys)
    outputs = shape.hidden_norms if size == stream else len(shape.linears) - 2
    # q, k, v and the output twice; gate, its activation, up, their product.
    kept = outputs * shape.hidden + 3 * queries + 2 * keys + 4 * shape.intermediate
    kept += score_elements(config, shape)
    if lora is None:
        return hidden + heads + size * kept
    adapted = shape.adapted(lora)
    dropped = sum(inputs for inputs, _ in adapted) if lora.dropout else 0
    kept += lora.r * len(adapted) + dropped  # each its own input ..
    return hidden + heads + size * kept + dropped  # .. and a mask of a byte


def _dtype_bytes(config: Config) -> tuple[int, int]:
    """Of what matrix products take, of what layers hand on: float32 with autocast, unlike FSDP."""
    size = 2 if config.learner.dtype == "bfloat16" else FLOAT
    return size, size if config.learner.parallel == "fsdp" else FLOAT


def learner_lines(config: Config, shape: ModelShape, *, is_first: bool) -> Iterator[Line]:
    """A rank at its worst moment, with the gradients of earlier micro-batches at hand.

    is_first: this rank publishes.
    """
    learner, algo = config.learner, config.algo
    lora, is_sharded = learner.lora, learner.parallel == "fsdp"
    parts = (learner.shard_ranks or config.launch.learners) if is_sharded else 1
    trained = total = shape.parameters
    if lora is not None:
        trained = shape.adapter(lora)
        total += trained

    def part(what: str, size: float, how: str) -> Line:
        how += f" / {parts} ranks" if parts > 1 else ""
        if learner.cpu_offload or (what == REFERENCE and algo.reference.on_cpu):
            return what, 0.0, f"{how} = {size / parts / GIB:.2f} GiB of the host"
        return what, size / parts, how

    size, how = float(FLOAT * total), f"4 bytes x {total:.3g}"
    if lora is not None and lora.quantize:
        packed = shape.layers * shape.layer_weights
        size -= (FLOAT - NF4_BYTES) * packed
        how = f"{NF4_BYTES:.3g} bytes x {packed:.3g}, 4 bytes x {total - packed:.3g}"
    yield part("weights", size, how)
    yield part("gradients", FLOAT * trained, f"4 bytes x {trained:.3g}")
    if config.launch.learners > 1 and not is_sharded:
        yield "DDP buckets", FLOAT * trained, "the gradients once more, to be reduced"
    each = EIGHT_BIT if learner.optimizer == "adamw_8bit" else FLOAT
    yield part("optimizer", 2 * each * trained, f"2 moments x {each:.3g} bytes x {trained:.3g}")
    if algo.kl_coef > 0 and (lora is None or algo.reference.path):
        count = shape.reference_parameters
        yield part(REFERENCE, FLOAT * count, f"4 bytes x {count:.3g}")
    moments = _moments(config, shape, parts)
    yield from max(moments, key=lambda lines: sum(size for _, size, _ in lines))
    yield from _process_lines(config, shape, "learner", publishes=is_first)


def _activations(config: Config, shape: ModelShape, kept: int) -> Line:
    """Of a micro-batch; kept: layers of which all is kept, the others are computed again."""
    (size, stream), per_layer = _dtype_bytes(config), layer_bytes(config, shape)
    tokens, scores = row_tokens(config), size * score_elements(config, shape)
    how = [f"{tokens} tokens x {kept} layers x {per_layer:.0f} bytes"] if kept else []
    how += [f"of these {scores} attention scores"] if scores and kept else []
    again, inputs = shape.layers - kept, stream * shape.hidden
    how += [f"inputs of {again} layers: {tokens} tokens x {inputs} bytes"] if again else []
    # The last norm, angles of the positions.
    ends = (FLOAT + 2 * stream) * shape.hidden + 2 * stream * shape.head_dim
    return "activations", tokens * (kept * per_layer + again * inputs + ends), ", ".join(how)


def _logits(config: Config, shape: ModelShape, head: int) -> Line:
    """Logits, log-softmax, probabilities, their product: float32 with any dtype.

    Or, in the backward pass, the gradient of the output layer: with several chunks a sum, a summand
    and the result; with autocast in float32 too. head: bytes of one of its elements.
    """
    tokens, output = row_tokens(config), shape.vocab * shape.hidden
    chunk = min(tokens, shape.chunk_tokens)
    is_rounded = head < _dtype_bytes(config)[1]
    each = max(head * (3 if tokens > chunk else 1), is_rounded * (head + FLOAT))
    logits, made = 4 * FLOAT * chunk * shape.vocab, 0 if config.learner.lora else each * output
    if made > logits:
        return "logits", made, f"{each} bytes x {output:.3g} (gradients of the output layer)"
    return "logits", logits, f"4 bytes x {shape.vocab} x 4 x {chunk} tokens"


def _moments(config: Config, shape: ModelShape, parts: int) -> Iterator[list[Line]]:
    """What a micro-batch adds, at each moment that may be the worst. parts: ranks of one copy."""
    learner, (size, _), weights = config.learner, _dtype_bytes(config), shape.layer_weights
    lora, tokens, every = learner.lora, row_tokens(config), learner.checkpoint_activations
    kept = shape.layers - (-(-shape.layers // every) if every else 0)
    held, again = [_activations(config, shape, kept)], layer_bytes(config, shape) if every else 0
    # Inside the backward pass of a layer: what was computed again, gradients of its products.
    inside = tokens * (again + size * (shape.intermediate + shape.hidden))
    what = "one layer again, and its gradients" if every else "gradients inside one layer"
    head = FLOAT if learner.float32_head else size
    output, outer = shape.vocab * shape.hidden, shape.parameters - shape.layers * weights
    logits = _logits(config, shape, head)
    if learner.parallel == "ddp":
        if size < FLOAT:
            quantized = lora is not None and lora.quantize
            copied = 0 if quantized else (kept if lora else shape.layers) * weights
            copied += output * (head < FLOAT)
            held.append(("rounded weights", size * copied, f"{size} bytes x {copied:.3g}"))
        yield [*held, logits]
        yield [*held, ("backward", inside, what)]
        return

    def gathered(layers: int) -> Line:
        how = f"{head} bytes x {outer:.3g}, {size} bytes x {layers} layers of {weights:.3g}"
        return "gathered weights", head * outer + layers * size * weights, how

    def reduced(own: int, count: int, where: str) -> Line:
        each = FLOAT + max(own, FLOAT / parts)  # copied into float32, replaced by a rank's part
        return "reduced", each * count, f"{each:.3g} bytes x {count:.3g} gradients {where}"

    waiting = 0 if lora else head * output  # the output layer's gradient is reduced at the end
    # Several ranks keep what they gathered last beside it: a layer's, and then that of the ends.
    yield [*held, gathered(int(parts > 1)), logits]
    table = ("logits", FLOAT * min(tokens, shape.chunk_tokens) * shape.vocab, "log-softmax")
    yield [*held, gathered(0), ("gathered again", (parts > 1) * head * outer, "its copy"), table]
    before = FLOAT * weights if every and not lora else 0  # of the layer before, on its way
    yield [*held, gathered(2), ("backward", inside + waiting + before, what)]
    if lora is None:
        rest = _activations(config, shape, kept - (not every))  # the layer's own are gone
        ends = ("backward", waiting, "gradient of the output layer")
        yield [rest, gathered(2), ends, reduced(size, weights, "of a layer")]
        yield [reduced(head, outer, "outside of layers, after all of these")]


def actor_lines(config: Config, shape: ModelShape) -> Iterator[Line]:
    """An engine, or its part of one GPU, in the midst of a step."""
    size, adapter = engine_bytes(config), config.learner.published_adapter
    parts = config.actor.tensor_parallel if config.launch.gpus else 1
    dealt = f" / {parts} GPUs" if parts > 1 else ""
    total = size * shape.parameters
    yield "weights", total / parts, f"{size} bytes x {shape.parameters:.3g}{dealt}"
    if adapter is not None:
        count = shape.adapter(adapter)
        yield "adapter", size * count, f"{size} bytes x {count:.3g}"
    if config.actor.engine == "vllm":
        cache, each = config.actor.kv_cache_bytes, shape.kv_bytes(config)
        how = f"{cache / each:.1f} sequences of {config.max_sequence_tokens} tokens"
        yield "KV cache", cache / parts, f"actor.kv_cache_bytes{dealt}: {how}"
        width = 3 * shape.intermediate // parts + 4 * shape.hidden
        tokens, rows = config.engine_tokens, config.engine_sequences
        how = f"{size} bytes x {tokens} tokens x {width}"
        yield "activations", size * tokens * width, how
        # vLLM's sampler: logits, these in float32, log-softmax, softmax and noise.
        width = 4 * FLOAT + size
        how = f"{width} bytes x {shape.vocab} x {rows} sequences"
        yield "logits", width * shape.vocab * rows, how
        if config.launch.gpus:
            yield "CUDA graphs", CUDA_GRAPHS, "an estimate"
    yield from _process_lines(config, shape, "actor", publishes=True)


def _process_lines(
    config: Config, shape: ModelShape, kind: str, *, publishes: bool
) -> Iterator[Line]:
    on_gpu, size = config.launch.gpus > 0, engine_bytes(config)
    adapter = config.learner.published_adapter
    sent = shape.parameters if adapter is None else shape.adapter(adapter)
    is_here = not on_gpu or config.weights.transport not in ("gloo", "disk")
    copies = config.weights.publish_every > 1 and config.weights.transport != "disk"
    if publishes and ((is_here and kind == "actor") or (copies and not on_gpu)):
        how = f"{size} bytes x {sent:.3g}: a flat copy of what is sent"
        yield "publishing", size * sent, how
    elif publishes and is_here:
        buckets = 2 * min(config.weights.bucket_bytes, size * sent)
        yield "publishing", buckets, "two buckets of weights.bucket_bytes"
    engine = config.actor.tensor_parallel * (kind == "actor")
    count = 1 + engine * (engine > 1)  # beside those of an engine the actor itself
    on_cpu = (count * ON_CPU[kind], "Python" + f" x {count} processes" * (count > 1))
    yield "process", *((CUDA_CONTEXT, "CUDA context") if on_gpu else on_cpu)


def estimate(config: Config, shape: ModelShape, places: Mapping[str, str]) -> tuple[Device, ...]:
    """All devices with what they hold. places: role -> device."""
    found: dict[str, dict[str, tuple[Line, ...]]] = {}
    for role, place in places.items():
        lines = actor_lines(config, shape)
        if role.startswith("learner"):
            lines = learner_lines(config, shape, is_first=role == "learner-0")
        found.setdefault(place, {})[role] = tuple(lines)
    if config.actor.sleep and config.launch.gpus:
        for roles in found.values():
            roles[list(roles)[-1]] += _turns(roles)
    return tuple(Device(name, lines) for name, lines in found.items())


def _turns(roles: Mapping[str, tuple[Line, ...]]) -> tuple[Line, ...]:
    """What the learners and engines of one GPU never hold at the same time."""
    given = dict.fromkeys(STAYS, 0.0)
    for role, lines in roles.items():
        kind = role.partition("-")[0]
        given[kind] += sum(size for what, size, _ in lines if what not in STAYS[kind])
    how = " or ".join(f"{size / GIB:.2f} GiB of the {kind}" for kind, size in given.items())
    return (("taking turns", -min(given.values()), how),) if all(given.values()) else ()


def remedies(
    config: Config, shape: ModelShape, device: Device, room: float
) -> list[tuple[str, float]]:
    """(what to set, bytes that it alone saves on the device), mildest first.

    room: bytes that the device has; of several values of a setting the first that suffices.
    """
    places = dict.fromkeys(device.lines, device.name)
    found: dict[str, float] = {}
    for setting, values in _candidates(config, shape).items():
        chosen, best = None, 0.0
        for value in values:
            (after,) = estimate(_changed(config, setting, value), shape, places)
            saved = device.num_bytes - after.num_bytes
            if device.num_bytes - best > room and saved > best:
                chosen, best = value, saved
        if best:
            found[f"{setting} = {chosen!r}"] = best
    return list(found.items())


def _candidates(config: Config, shape: ModelShape) -> dict[str, Iterable[object]]:
    """Setting -> what it may be set to, mildest first."""
    learner, lora, on_gpus = config.learner, config.learner.lora, config.launch.gpus > 0
    every = learner.checkpoint_activations or shape.layers
    may_shard = learner.optimizer != "adamw_8bit" and not (lora and lora.quantize)
    may_sleep = on_gpus and config.launch.share_gpus and config.weights.publish_every == 1
    half = config.sampling.max_completion_tokens // 2
    return {
        "learner.max_tokens_per_microbatch": _halves(row_tokens(config), longest_sequence(config)),
        "learner.checkpoint_activations": [n for n in (4, 2, 1) if n < every],
        "learner.parallel": ["fsdp"] if may_shard and config.launch.learners > 1 else [],
        "actor.kv_cache_bytes": _halves(
            config.actor.kv_cache_bytes, max(shape.kv_bytes(config), 1 << 20)
        ),
        "actor.sleep": [True] if may_sleep else [],
        "learner.dtype": ["bfloat16"],
        "model.dtype": ["bfloat16"],
        "weights.transport": ["gloo"],
        "learner.optimizer": ["adamw_8bit"] if on_gpus and learner.parallel == "ddp" else [],
        "learner.lora.r": [] if lora else [LoraSettings().r],
        "learner.lora.quantize": ["4bit"] if lora and on_gpus else [],
        "sampling.max_completion_tokens": [half] if half else [],
    }


def _changed(config: Config, setting: str, value: object) -> Config:
    room, *section, key = setting.split(".")
    if section:  # learner.lora
        lora = config.learner.lora or LoraSettings()
        key, value = "lora", lora.model_copy(update={key: value})
    own = getattr(config, room).model_copy(update={key: value})
    return config.model_copy(update={room: own})


def _halves(value: int, least: int) -> Iterator[int]:
    while value > least:
        value = max(value // 2, least)
        yield value
