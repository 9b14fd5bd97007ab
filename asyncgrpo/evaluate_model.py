"""Evaluates a model alone (`asyncgrpo eval`): an actor answers held-out prompts, nobody learns."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress

from asyncgrpo.actor.judge import InlineJudge, Judge, JudgePool
from asyncgrpo.actor.loop import IDLE_SECONDS, ActorLoop
from asyncgrpo.actor.process import load_engine, load_tokenizer, stop_token_ids, vocab_size
from asyncgrpo.buffer.evaluation import Evaluations
from asyncgrpo.buffer.journal import Journal
from asyncgrpo.buffer.leases import LeaseBook
from asyncgrpo.config import Config
from asyncgrpo.data.prompts import held_out_sets
from asyncgrpo.errors import ConfigError, RewardError, RunError
from asyncgrpo.evaluate import is_correct
from asyncgrpo.launch.environment import detect_host
from asyncgrpo.launch.model_folder import (
    EMBEDDED,
    check_model_folder,
    check_tensor_parallel,
    quick_tokenizer,
)
from asyncgrpo.launch.plan import lone_actor
from asyncgrpo.rewards.registry import load_rewards
from asyncgrpo.types import Group
from asyncgrpo.wire.codec import Packet, groups_from

UNPUBLISHED = -1  # version of an engine that has the weights of its model folder


class Desk:
    """The buffer's side of the one evaluation block of some settings: the actor's client."""

    def __init__(self, config: Config) -> None:
        """Refuses what `launch` refuses (BadInput); starts nothing."""
        check_model_folder(config.model.path)
        check_tensor_parallel(config.model.path, config.actor.tensor_parallel)
        if not config.evals:
            raise ConfigError("--data names nothing; give a file, folder, hub name, or 'tasks'")
        ((name, prompts),) = held_out_sets(config).items()
        self._reward = config.rewards[name]
        try:
            load_rewards(self._reward).check(prompts)
        except RewardError as error:
            if config.evals[0].reward or {"functions", "routes"} & config.reward.model_fields_set:
                raise
            raise RewardError(
                "these records need a reward: give --config with reward.functions or "
                "reward.routes, or --set reward.functions='[\"math\"]' (the default is for "
                f"generated tasks: {error})"
            ) from None
        quick_tokenizer(config.model.path)  # can it be read?
        self.num_prompts, self._max_prompt_tokens = len(prompts), config.data.max_prompt_tokens
        self._timeout_seconds = config.reward.timeout_seconds
        journal = Journal()
        leases = LeaseBook(config, journal)
        self._evaluations = Evaluations(config, lambda num, block: prompts, leases, journal)
        request = Packet(kind="evaluate", fields={"version": UNPUBLISHED, "blocks": [name]})
        opened = self._evaluations.ask("", request, ["actor"], time.monotonic())
        welcome = Packet(kind="welcome", fields={"credit": len(prompts), "life": 1})
        self._inbox = [welcome, *(packet for _, packet in opened)]
        self._last_id = 0
        self.groups: list[Group] = []
        self.failed: Counter[str] = Counter()  # reason -> prompts

    def post(self, packet: Packet) -> int:
        """Takes what the actor sends."""
        self._last_id += 1
        if packet.kind == "put":
            (group,) = groups_from(packet)
            self.groups.append(group)
            self._evaluations.answer(group)
            self._inbox.append(Packet(kind="stored", request_id=self._last_id))
        elif packet.kind == "fail":
            self.failed[packet.fields["reason"]] += 1
            self._evaluations.drop(packet.fields["lease_id"])
        return self._last_id

    def poll(self, timeout_seconds: float) -> list[Packet]:
        """What the actor has not got yet."""
        arrived, self._inbox = self._inbox, []
        time.sleep(0.0 if arrived else timeout_seconds)
        return arrived

    def call(
        self,
        packet: Packet,
        timeout_seconds: float,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Packet:
        """Takes it, and has nothing to say."""
        return Packet(kind="noted", request_id=self.post(packet))

    def reports(self) -> list[dict[str, Any]]:
        """The report, once all prompts are answered or have failed."""
        self._evaluations.replies(time.monotonic())
        return self._evaluations.news()

    def unanswered(self) -> list[str]:
        """Why prompts were not answered, a line per reason."""
        causes = {
            "prompt_too_long": f"not answered: data.max_prompt_tokens={self._max_prompt_tokens} is "
            "too small for them",
            "refused_by_engine": "not answered: the engine refused them (see the warnings above)",
            "reward_contract": "answered, but not scored: a reward function failed (see the "
            "warnings above); repair it, or set reward.on_error",
            "reward_lost": "answered, but not scored: their reward function took more than "
            f"reward.timeout_seconds={self._timeout_seconds:g} or ended its process; make it "
            "quicker, raise the limit, or set reward.on_error",
        }
        return [
            f"{count} of {self.num_prompts} prompts were {causes.get(reason, reason)}"
            for reason, count in self.failed.items()
        ]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every completion, for a file."""
        for group in self.groups:
            prompt, first = group.lease.prompt, next(iter(group.reward_parts.values())).tolist()
            correct = is_correct(first, self._reward.correct_above)
            for index, completion in enumerate(group.completions):
                parts = {name: float(part[index]) for name, part in group.reward_parts.items()}
                yield {
                    "prompt_id": prompt.prompt_id,
                    "data_source": prompt.data_source,
                    "messages": list(prompt.messages),
                    "answer": prompt.answer,
                    "sample": index,
                    "completion": completion.text,
                    "correct": correct[index],
                    "reward": float(group.rewards[index]),
                    "reward_parts": {n: None if math.isnan(s) else s for n, s in parts.items()},
                    "num_tokens": len(completion.token_ids),
                    "finish_reason": completion.finish_reason,
                }


def run(config: Config, desk: Desk) -> dict[str, Any]:
    """Loads the model and has the desk's prompts answered; the report as plain values.

    RunError when not one of them was answered.
    """
    if config.actor.engine == "vllm":
        spec = lone_actor(config, detect_host())
        os.environ.update(spec.environment)  # before torch is imported
        warnings.simplefilter("ignore")  # as PYTHONWARNINGS, for which it is too late
        if spec.cores:
            os.sched_setaffinity(0, spec.cores)
    start_judge = JudgePool if config.actor.engine == "vllm" else InlineJudge
    judge = start_judge(config.rewards)  # works while the engine loads
    actor = _load_actor(config, desk, judge)
    console, total = Console(stderr=True), desk.num_prompts
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("evaluating", total=total)
        while not (reports := desk.reports()):
            actor.tick(IDLE_SECONDS)
            progress.update(task, completed=len(desk.groups) + desk.failed.total())
    judge.close()
    if not desk.groups:
        raise RunError("; ".join(desk.unanswered()))
    return reports[0]


def _load_actor(config: Config, desk: Desk, judge: Judge) -> ActorLoop:
    from asyncgrpo.weights.local import LocalLink  # torch

    if config.model.path == EMBEDDED:
        from asyncgrpo.data.tiny import ensure_tiny

        seed, held_out = config.model.tiny_seed, config.num_held_out_tasks
        folder = str(ensure_tiny(config.data.tasks, seed=seed, num_eval=held_out))
        model = config.model.model_copy(update={"path": folder})
        config = config.model_copy(update={"model": model})
    tokenizer = load_tokenizer(config.model.path)
    return ActorLoop(
        "actor",
        config,
        engine=load_engine(config, stop_token_ids(config, tokenizer)),
        tokenizer=tokenizer,
        vocab_size=vocab_size(config.model.path),
        client=desk,
        receiver=LocalLink(config),  # without a sender: the weights stay
        judge=judge,
    )
