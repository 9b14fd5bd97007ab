"""The actor process: wires an engine, a judge, the buffer and the weights to one loop."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from asyncgrpo.actor.judge import JudgePool
from asyncgrpo.actor.loop import IDLE_SECONDS, ActorLoop
from asyncgrpo.config import Config
from asyncgrpo.launch.memory_report import memory_explained
from asyncgrpo.observe.exporter import serve_metrics
from asyncgrpo.protocols import Engine
from asyncgrpo.rundir import RunDir, leave
from asyncgrpo.wire.keys import read_keys
from asyncgrpo.wire.sockets import DealerClient

if TYPE_CHECKING:
    from asyncgrpo.actor.vllm_engine import VllmEngine

log = logging.getLogger(__name__)
SHOW_SECONDS = 1.0


def run_actor(run: RunDir, index: int, restart: int, stopping: Callable[[], bool]) -> NoReturn:
    """Generates until stopped, and ends the process. `restart` counts the actor's earlier lives."""
    name = f"actor-{index}"
    start = time.perf_counter()
    cores = run.endpoints.cores.get(name)
    if cores:
        os.sched_setaffinity(0, cores)
    judge = JudgePool(run.config.rewards)  # first: its workers start while the engine loads
    tokenizer = load_tokenizer(run.config.model.path)
    with memory_explained(run.config, name):
        engine = load_engine(run.config, stop_token_ids(run.config, tokenizer), index, restart)
    from asyncgrpo.weights.receiver import CollectiveReceiver  # torch; after the engine's set-up

    keys = read_keys(run, "client")
    inbox = None
    if run.endpoints.transport == "nccl" and run.config.actor.tensor_parallel > 1:
        inbox = cast("VllmEngine", engine).open_inbox()  # the toy engine is one process
    receiver = CollectiveReceiver(run.config, name, run.endpoints.weights, keys, inbox)
    exporter = serve_metrics(run, name)
    loop = ActorLoop(
        name,
        run.config,
        engine=engine,
        tokenizer=tokenizer,
        vocab_size=vocab_size(run.config.model.path),
        client=DealerClient(run.endpoints.buffer, name, "the buffer", keys),
        receiver=receiver,
        judge=judge,
        observe=exporter.observe,
    )
    log.info("ready after %.1f s, pid %d", time.perf_counter() - start, os.getpid())
    shown_at = 0.0
    while not stopping():
        loop.tick(IDLE_SECONDS)
        if time.monotonic() - shown_at >= SHOW_SECONDS:
            exporter.show(loop.counters)
            shown_at = time.monotonic()
    loop.leave(run.config.launch.grace_seconds / 2)  # the launcher waits as long as its grace
    judge.close()
    exporter.close()
    leave(0)


def load_tokenizer(model_path: str) -> Any:
    """The model's own tokenizer, with its chat template."""
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    return AutoTokenizer.from_pretrained(model_path)


def vocab_size(model_path: str) -> int:
    """Of the model, as the learner counts; a tokenizer may know fewer words."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model_path).get_text_config().vocab_size)


def stop_token_ids(config: Config, tokenizer: Any) -> list[int]:
    """End-of-sequence ids of the tokenizer and of the model's generation settings."""
    ids = {tokenizer.eos_token_id} - {None}
    settings = Path(config.model.path) / "generation_config.json"
    if settings.is_file():
        more = json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id")
        ids |= set(more if isinstance(more, list) else [more]) - {None}
    return sorted(ids)


def load_engine(config: Config, stop_ids: list[int], index: int = 0, restart: int = 0) -> Engine:
    """The engine of the settings; the environment must be set before (launch/plan.py)."""
    seed = (config.run.seed + 1) * 10_007 + index * 101 + restart
    if config.actor.engine == "vllm":
        for noisy in ("vllm", "torch._library.triton"):  # that there is no Triton is no news here
            logging.getLogger(noisy).setLevel(logging.ERROR)
        from asyncgrpo.actor.vllm_engine import VllmEngine

        return VllmEngine(config, config.model.path, seed, stop_ids)
    return load_toy_engine(config, stop_ids)


def load_toy_engine(config: Config, stop_ids: list[int]) -> Engine:
    """The slow engine, in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    from asyncgrpo.actor.toy_engine import ToyEngine

    torch.set_num_threads(config.actor.threads)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    return ToyEngine(config, model, stop_ids)
