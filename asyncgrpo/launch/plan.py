"""Turns settings and a host into the processes of a run and its sizes, which --dry-run prints."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

from asyncgrpo.config import Config
from asyncgrpo.errors import ConfigError
from asyncgrpo.launch.nodes import Seat
from asyncgrpo.launch.placement import Cores, assign_cores, choose_transport, core_sharers
from asyncgrpo.rundir import Endpoints

LOOPBACK, LOOPBACK_DEVICE = "127.0.0.1", "lo"
CLI_MODULE, TORCHRUN_MODULE = "asyncgrpo.cli", "asyncgrpo.learner.torchrun"
VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the actor: no child to orphan
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRITON_F32_DEFAULT": "ieee",  # its attention in float32 as the learner's, not in TF32
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # of tensor_parallel: the actor has threads
    "PYTHONWARNINGS": "ignore",  # deprecations inside vLLM, nothing that a user could act on
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
Environment = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What a machine offers: its cores by number, its GPUs by CUDA_VISIBLE_DEVICES name."""

    cores: Cores
    gpu_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """One process to start. The learner is one process here: torchrun, which starts its ranks."""

    name: str  # "buffer", "actor-0", "learner"; also the prefix of its log lines
    argv: tuple[str, ...]
    environment: Mapping[str, str]  # only what is added to the launcher's own
    cores: Cores  # () = not pinned
    gpus: tuple[str, ...]
    log_file: Path
    nodes: tuple[str, ...] = ()  # of a Slurm job; () = the launcher's own machine

    @property
    def role(self) -> str:
        """buffer, actor or learner."""
        return self.name.partition("-")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All processes in the order of their start, and what the roles must know of each other."""

    specs: tuple[ProcessSpec, ...]
    warnings: tuple[str, ...]
    endpoints: Endpoints
    transport_reason: str = ""


def role_names(num_actors: int, num_learners: int) -> tuple[str, ...]:
    """Everyone with an own metrics endpoint, in the order of their ports."""
    actors = (f"actor-{index}" for index in range(num_actors))
    return ("buffer", *actors, *(f"learner-{rank}" for rank in range(num_learners)))


def make_plan(
    config: Config,
    host: Host,
    doors: Endpoints,
    run_dir: Path,
    *,
    seats: Mapping[str, Seat] | None = None,
    log_dir: Path | None = None,
) -> Plan:
    """The processes of one run, their cores or GPUs, and warnings worth reading.

    doors: as of preflight.held_endpoints.
    seats: None for one machine, whose cores and GPUs are shared out here; else who is on which
    nodes of a Slurm job, which binds cores and GPUs; {} when nobody does, and roles are started by
    hand. log_dir: default is run_dir/logs.

    ConfigError: more GPUs than the host has, more roles than GPUs, or weights that cannot travel as
    they should.
    """
    actors, learners = config.launch.actors, config.launch.learners
    gpus = assign_gpus(config, host) if seats is None else {}
    firsts = {name: ids[0] for name, ids in gpus.items()}
    if seats is not None and config.launch.gpus:  # whoever binds them, each role has its own
        firsts = {name: f"of {name}" for name in role_names(actors, learners)[1:]}
    transport, reason = choose_transport(config, firsts)
    cores: Mapping[str, Cores] = {}
    if seats is None and not gpus:
        cores = assign_cores(host.cores, actors, learners, config.actor.cores)
    draft = _Draft(config, run_dir, cores, gpus, seats, log_dir)
    actor_specs = (draft.actor(index) for index in range(actors))
    return Plan(
        specs=(draft.buffer(), draft.learner(doors.rendezvous), *actor_specs),
        warnings=tuple(_warnings(config, host, cores)),
        endpoints=replace(doors, cores=dict(cores), transport=transport),
        transport_reason=reason,
    )


def lone_actor(config: Config, host: Host) -> ProcessSpec:
    """An actor that has the host for itself; its environment must be set before torch is imported.

    ConfigError when launch.gpus asks for GPUs and there are not as many as an engine takes.
    """
    count = config.actor.tensor_parallel if config.launch.gpus else 0
    launch = {"actors": 1, "learners": 0, "gpus": count}
    config = config.model_copy(update={"launch": config.launch.model_copy(update=launch)})
    gpus = assign_gpus(config, host)
    cores = {} if gpus else {"actor-0": host.cores[: config.actor.cores]}
    return _Draft(config, Path(), cores, gpus).actor(0)


def hand_started(name: str, config: Config, run_dir: Path, rendezvous_port: int) -> ProcessSpec:
    """A role that somebody starts where and when he likes: "learner", or "actor-3"."""
    draft = _Draft(config, run_dir, {}, {}, seats={})
    if name == "learner":
        return draft.learner(rendezvous_port)
    return draft.actor(int(name.removeprefix("actor-")))


def render_plan(plan: Plan) -> str:
    """The plan as text: per process its cores or GPUs, log, environment and command line."""
    at = plan.endpoints
    addresses = (
        f"buffer   {at.buffer}\n"
        f"weights  {at.weights}, by {at.transport}: {plan.transport_reason}\n"
        f"store    {at.store[0]}:{at.store[1]}"
    )
    warnings = (f"warning: {line}" for line in plan.warnings)
    return "\n\n".join([*map(_render_spec, plan.specs), addresses, *warnings])


def render_sizes(config: Config) -> str:
    """A line for each size, with the settings that make it; each unit is named."""
    groups, size = config.buffer.groups_per_step, config.algo.group_size
    completions, length = groups * size, config.sampling.max_completion_tokens
    minibatches, passes = config.algo.minibatches, config.algo.passes
    steps, learners = config.run.max_steps, config.launch.learners
    longest = config.data.max_prompt_tokens + length
    ahead = config.buffer.max_staleness + 1
    row = config.learner.max_tokens_per_microbatch
    tokens = config.buffer.tokens_per_step
    drawn = config.sampling
    lines = {
        "sampling": f"temperature {drawn.temperature:g}, top_p {drawn.top_p:g}, "
        f"top_k {drawn.top_k}, at most {length} tokens; no penalties, no stop strings; "
        "each token with its log-prob",
        "batch": f"{groups} groups x {size} completions = {completions} completions, at most "
        f"x {length} = {completions * length} completion tokens"
        if tokens is None
        else f"the fewest groups, {config.min_groups} or more, with {tokens} completion tokens; "
        f"where groups are counted here, the guess of {groups}",
        "updates": f"{minibatches} x {passes} optimizer steps per batch (minibatches x passes), of "
        f"{completions / minibatches:g} completions each",
        "ranks": f"{learners}, with {groups / learners:g} groups each; micro-batches of at most "
        f"{row} tokens, {row // longest} or more sequences",
        "engines": f"{config.launch.actors}, with {config.actor.concurrency} groups x {size} = "
        f"{config.actor.concurrency * size} sequences in flight",
        "ahead": f"at most {ahead} batches = {ahead * groups} groups are started before they "
        "are trained (buffer.max_staleness + 1)",
        "run": f"{steps} batches = {steps * groups} groups = {steps * completions} completions "
        f"= {steps * minibatches * passes} optimizer steps"
        + (f", or {config.data.epochs} epochs if that is less" if config.data.epochs else ""),
    }
    return "\n".join(f"{name:<8} {text}" for name, text in lines.items())


@dataclass(frozen=True, slots=True)
class _Draft:
    """What all specs of one plan are made from."""

    config: Config
    run_dir: Path
    cores: Mapping[str, Cores]  # {} on GPUs
    gpus: Mapping[str, tuple[str, ...]]  # {} on CPU
    seats: Mapping[str, Seat] | None = None  # None: cores and GPUs are bound here
    log_dir: Path | None = None

    def buffer(self) -> ProcessSpec:
        """Never imports torch, never pinned."""
        return self._spec("buffer", self._role_words("buffer"), {"PYTHONUNBUFFERED": "1"}, ())

    def actor(self, index: int) -> ProcessSpec:
        """One engine with everything around it. A local model keeps it off the model hub."""
        name, model = f"actor-{index}", self.config.model.path
        environment = self._torch_environment([name], self.config.actor.threads)
        if self.config.actor.engine == "vllm":
            environment |= VLLM_ENVIRONMENT | self._cpu_engine_environment(name)
        if model == "tiny" or Path(model).is_dir():
            environment["HF_HUB_OFFLINE"] = "1"
        words = (*self._role_words("actor"), "--index", str(index))
        return self._spec(name, words, environment, [name])

    def learner(self, rendezvous_port: int) -> ProcessSpec:
        """torchrun with all ranks."""
        ranks = [f"learner-{rank}" for rank in range(self.config.launch.learners)]
        seat = (self.seats or {}).get("learner")
        num_nodes = len(seat.nodes) if seat else 1
        host = LOOPBACK if num_nodes == 1 else self.config.launch.host
        words = (
            *("-m", TORCHRUN_MODULE, "--nnodes", str(num_nodes)),
            *("--nproc-per-node", str(len(ranks) // num_nodes), "--rdzv-backend", "asyncgrpo"),
            *("--rdzv-endpoint", f"{host}:{rendezvous_port}"),
            *("--max-restarts", "0", "--monitor-interval", "0.2"),
            *self._role_words("learner"),
        )
        environment = self._torch_environment(ranks, self.config.learner.threads)
        # torchrun must have ended its ranks before the launcher's own grace is over.
        patience = max(1, int(self.config.launch.grace_seconds / 2))
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(patience)
        return self._spec("learner", words, environment, ranks)

    def _role_words(self, role: str) -> tuple[str, ...]:
        return ("-m", CLI_MODULE, "role", role, "--run-dir", str(self.run_dir))

    def _torch_environment(self, names: Sequence[str], threads: int) -> Environment:
        """Must be set before torch is imported."""
        if self.cores:
            threads = min(threads, *(len(self.cores[name]) for name in names))
        environment = {
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            # of groups within one machine; else they listen on what the host's name stands for
            "GLOO_SOCKET_IFNAME": LOOPBACK_DEVICE,
        }
        if self.seats is None or not self.config.launch.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus_of(names))
        if self.config.launch.on_loopback:
            environment["NCCL_SOCKET_IFNAME"] = LOOPBACK_DEVICE
        if any(name in sharers for sharers in core_sharers(self.cores).values() for name in names):
            # A thread that spins while it waits takes the core from its neighbour (20x slower).
            environment["OMP_WAIT_POLICY"] = "PASSIVE"
        return environment

    def _cpu_engine_environment(self, name: str) -> Environment:
        if self.config.launch.gpus:
            return {}
        cores, count = self.cores.get(name, ()), self.config.actor.tensor_parallel
        each = len(cores) // count
        parts = [cores[place * each : (place + 1) * each] for place in range(count)]
        bind = "|".join(",".join(map(str, part)) for part in parts) if each else "nobind"
        return {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": bind}

    def _gpus_of(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(gpu for name in names for gpu in self.gpus.get(name, ()))

    def _spec(
        self,
        name: str,
        words: tuple[str, ...],
        environment: Environment,
        members: Sequence[str],
    ) -> ProcessSpec:
        seat = (self.seats or {}).get(name)
        return ProcessSpec(
            name=name,
            argv=(*(seat.srun(name) if seat else ()), sys.executable, *words),
            environment=environment,
            cores=tuple(sorted({core for m in members for core in self.cores.get(m, ())})),
            gpus=self._gpus_of(members),
            log_file=(self.log_dir or self.run_dir / "logs") / f"{name}.log",
            nodes=tuple(node.name for node in seat.nodes) if seat else (),
        )


def assign_gpus(config: Config, host: Host) -> dict[str, tuple[str, ...]]:
    """Name -> its own GPUs, or with launch.share_gpus in turn; {} for a CPU run."""
    asked, there, width = config.launch.gpus, len(host.gpu_ids), config.actor.tensor_parallel
    if not asked:
        return {}
    if asked > there:
        raise ConfigError(f"launch.gpus={asked} must be <= {there}, the GPUs of this machine")
    if width > asked:
        raise ConfigError(
            f"actor.tensor_parallel={width} must be <= launch.gpus={asked} (there are {there}): "
            "each process of an engine needs a GPU of its own; lower it, or give more GPUs"
        )
    names = role_names(config.launch.actors, config.launch.learners)[1:]
    counts = {name: width if name.startswith("actor") else 1 for name in names}
    needed = sum(counts.values())
    if config.launch.share_gpus and config.launch.learners <= asked:
        turns, names = cycle(host.gpu_ids[:asked]), names[::-1]
        return {name: tuple(islice(turns, counts[name])) for name in names}
    if needed > asked:
        each = "" if width == 1 else f", an actor {width} (actor.tensor_parallel)"
        raise ConfigError(
            f"launch.actors={config.launch.actors} + launch.learners={config.launch.learners} "
            f"need one GPU each{each} = {needed}, but launch.gpus={asked}; start fewer of them, "
            f"set launch.gpus={needed} (there are {there}), or launch.share_gpus = true, with a "
            "GPU for each learner"
        )
    free = iter(host.gpu_ids)
    return {name: tuple(islice(free, counts[name])) for name in names}


def _warnings(config: Config, host: Host, cores: Mapping[str, Cores]) -> Iterator[str]:
    """Says who shares a core, whose threads do not fit and which door is open, in a line each."""
    launch = config.launch
    if shared := core_sharers(cores):
        who = "; ".join(f"core {core}: {', '.join(names)}" for core, names in shared.items())
        yield (
            f"launch.actors={launch.actors} + launch.learners={launch.learners} "
            f"processes on {len(host.cores)} cores share some ({who}); fewer of them run faster"
        )
    actor, width, rank = config.actor, config.actor.tensor_parallel, config.learner.threads
    wanted = {
        f"actor.threads={actor.threads} x actor.tensor_parallel={width}": actor.cores,
        f"learner.threads={rank}": rank,
    }
    for setting, threads in wanted.items():
        role = setting.partition(".")[0]
        given = min((len(c) for name, c in cores.items() if name.startswith(role)), default=threads)
        if given < threads:
            yield (
                f"{setting}, but each {role} gets {given} of {len(host.cores)} cores, so its "
                "threads are fewer or its processes wait for each other; lower them, or start "
                "fewer actors or learners"
            )
    if launch.share_gpus and not launch.gpus:
        yield "launch.share_gpus=true does nothing: launch.gpus=0 is a CPU run"
    if not (launch.on_loopback or launch.encrypted):
        yield (
            f"launch.insecure=true: whoever reaches {launch.host} can read prompts, send groups "
            "and end the run; without --insecure the run makes keys"
        )


def _render_spec(spec: ProcessSpec) -> str:
    if spec.gpus:
        place = f"GPU {', '.join(spec.gpus)}"
    else:
        place = f"cores {', '.join(map(str, spec.cores))}" if spec.cores else "any core"
    variables = [f"{key}={shlex.quote(value)}" for key, value in spec.environment.items()]
    return (
        f"{spec.name:<10} {place}\n"
        f"  log  {spec.log_file}\n"
        f"  env  {' '.join(variables)}\n"
        f"  run  {shlex.join(spec.argv)}"
    )
