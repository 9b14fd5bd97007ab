"""One run of benchmarks/staleness.py: trains the tiny model on data of an exact age.

The batch of step s is sampled by the weights of step s - lag (the first weights while s < lag).
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: processes side by side, one core each

import numpy as np
import torch
from common import group_of, shard_of
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from asyncgrpo.actor.process import load_tokenizer
from asyncgrpo.config import Config, from_mapping
from asyncgrpo.data.prompts import open_prompts
from asyncgrpo.data.tiny import ensure_tiny
from asyncgrpo.data.warmstart import greedy_accuracy, render
from asyncgrpo.evaluate import is_correct
from asyncgrpo.learner.update import PolicyUpdater
from asyncgrpo.protocols import NamedTensors
from asyncgrpo.rewards.registry import load_rewards
from asyncgrpo.types import Completion, Group

BYPASS = {"correction": ["bypass"]}
METHODS: dict[str, dict[str, Any]] = {  # algo settings; tis is decoupled by its other name
    "none": {"correction": ["none"]},
    "bypass": BYPASS,
    "decoupled": {"correction": ["decoupled"]},
    "gspo": {**BYPASS, "loss": "gspo", "gspo": {"clip_low": 0.05, "clip_high": 0.05}},
    "cispo": {**BYPASS, "loss": "cispo"},
    "tis_sequence": {"correction": ["tis_sequence"]},
    "icepop": {"correction": ["icepop", "decoupled"]},
    "m2po": {"correction": ["m2po", "decoupled"]},
    "opsm": {"correction": ["opsm", "decoupled"]},
    "geometric_mask": {"correction": ["geometric_mask", "decoupled"]},
    "geometric_mask_wide": {
        "correction": ["geometric_mask", "decoupled"],
        "geometric_mask": {"low": 0.5, "high": 2.0},
    },
    "sapo": {**BYPASS, "loss": "sapo"},
    "topr": {**BYPASS, "loss": "topr"},
    "vespo": {**BYPASS, "loss": "vespo"},
    "dppo_tv": {**BYPASS, "loss": "dppo_tv"},
}
# One optimizer step per batch would make p = pi: none and decoupled's clip could not act.
MINIBATCHES = 2
MAX_LOGPROB_ERROR = 1e-4  # nats, sampler against learner on the same weights
GROUPS_PER_ROUND = 64
MAX_GROUPS_PER_STEP = 128  # a policy that answers all alike would be sampled forever
EVAL_EVERY, NUM_EVAL = 10, 318


class Experiment:
    """One run: a method at one lag with one seed."""

    def __init__(self, config: Config, lag: int) -> None:
        self._config, self._lag = config, lag
        self._prompts, self._rewards = open_prompts(config), load_rewards(config.reward)
        self._position = 0  # in the prompt stream
        self._tokenizer = load_tokenizer(config.model.path)
        self._sampler = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
        torch.manual_seed(config.run.seed)

    def run(self) -> dict[str, float]:
        """Trains while there is anything to learn from: step -> held-out accuracy, to the last."""
        config, updater = self._config, PolicyUpdater(self._config)
        weights: deque[list[tuple[str, torch.Tensor]]] = deque(maxlen=self._lag + 1)
        curve, step = {}, 0
        while step < config.run.max_steps:
            weights.append([(name, tensor.clone()) for name, tensor in updater.weights()])
            if step % EVAL_EVERY == 0:
                curve[str(step)] = self._accuracy(weights[-1])
            self._load(weights[0])
            groups = self._batch(step - len(weights) + 1)
            if len(groups) < config.algo.minibatches:
                break  # all answers to a prompt are alike
            row, lag = updater.update(shard_of(step, groups)), min(step, self._lag)
            assert row["staleness/mean"] == row["staleness/max"] == lag, row
            # p is computed before the first optimizer step: on the weights that sampled
            assert lag or row["logprob_diff_max"] < MAX_LOGPROB_ERROR, row["logprob_diff_max"]
            step += 1
        return {**curve, str(step): self._accuracy(updater.weights())}

    @torch.no_grad()
    def _load(self, weights: NamedTensors) -> None:
        own = dict(self._sampler.named_parameters())
        for name, tensor in weights:
            own.pop(name).copy_(tensor)
        assert not own, f"weights lack {', '.join(own)}"

    def _batch(self, policy_version: int) -> list[Group]:
        """Groups of mixed correctness; uniform ones are replaced, as the buffer does."""
        size, kept = self._config.buffer.groups_per_step, []
        for _ in range(0, MAX_GROUPS_PER_STEP, GROUPS_PER_ROUND):
            kept += filter(self._is_mixed, self._groups(GROUPS_PER_ROUND, policy_version))
            if len(kept) >= size:
                break
        return kept[:size]

    def _groups(self, count: int, policy_version: int) -> Iterator[Group]:
        prompts = [self._prompts.get(self._position + index) for index in range(count)]
        self._position += count
        rows = render(self._tokenizer, [prompt.messages[-1]["content"] for prompt in prompts])
        size = self._config.algo.group_size
        made = self._sample(rows, size, policy_version)
        for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            completions = made[index * size : (index + 1) * size]
            texts = self._tokenizer.batch_decode(
                [completion.token_ids for completion in completions], skip_special_tokens=True
            )
            scores = self._rewards.score(prompt, texts)
            yield group_of(prompt, row, completions, scores.parts, scores.rewards)

    @torch.no_grad()
    def _sample(
        self, prompts: Sequence[list[int]], copies: int, policy_version: int
    ) -> list[Completion]:
        """`copies` completions of each prompt, at temperature 1."""
        end = self._tokenizer.eos_token_id
        inputs = self._tokenizer.pad(
            {"input_ids": prompts}, padding_side="left", return_tensors="pt"
        )
        out = self._sampler.generate(
            **inputs,
            **{"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
            max_new_tokens=self._config.sampling.max_completion_tokens,
            num_return_sequences=copies,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
        table = torch.stack(out.logits, 1).float().log_softmax(-1)
        logprobs = table.gather(-1, tokens[..., None])[..., 0].numpy()
        made = []
        for ids, scores in zip(tokens.tolist(), logprobs, strict=True):
            length = ids.index(end) + 1 if end in ids else len(ids)
            made.append(
                Completion(
                    token_ids=np.array(ids[:length], np.int32),
                    behavior_logprobs=scores[:length],
                    versions=np.full(length, policy_version, np.int32),
                    finish_reason="stop" if end in ids else "length",
                )
            )
        return made

    def _is_mixed(self, group: Group) -> bool:
        scores = [float(score) for score in next(iter(group.reward_parts.values()))]
        return 0 < sum(is_correct(scores, self._config.reward.correct_above)) < len(scores)

    def _accuracy(self, weights: NamedTensors) -> float:
        """Of greedy answers to the held-out prompts."""
        self._load(weights)
        held_out = self._prompts.held_out(NUM_EVAL)
        limit = self._config.sampling.max_completion_tokens
        by_kind = greedy_accuracy(self._sampler, self._tokenizer, held_out, limit)
        counts = Counter(prompt.columns["kind"] for prompt in held_out)
        right = sum(by_kind[kind] * count for kind, count in counts.items())
        return round(right / len(held_out), 4)


def config_of(method: str, seed: int, steps: int, lr: float, folder: str) -> Config:
    """The run's settings; all that is not named here has the project's default."""
    return from_mapping(
        {
            "run": {"seed": seed, "max_steps": steps},
            "model": {"path": folder, "tiny_seed": seed},
            "data": {"max_prompt_tokens": 32},
            "buffer": {"groups_per_step": 32, "max_staleness": 64},
            "algo": {"group_size": 8, "minibatches": MINIBATCHES, **METHODS[method]},
            "learner": {"lr": lr, "max_tokens_per_microbatch": 8192},
            "launch": {"learners": 1},
            "eval": {"num_prompts": NUM_EVAL},
        }
    )


def run_one(method: str, lag: int, seed: int, steps: int, lr: float) -> dict[str, Any]:
    """One run from a warm-started model; what the JSON holds of it."""
    transformers_logging.disable_progress_bar()
    logging.getLogger("asyncgrpo").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    start = time.perf_counter()
    folder = str(ensure_tiny(Config().data.tasks, seed=seed, report=lambda line: None))
    curve = Experiment(config_of(method, seed, steps, lr, folder), lag).run()
    accuracy, seconds = [*curve.values()][-1], round(time.perf_counter() - start, 1)
    found = {"method": method, "lag": lag, "seed": seed, "algo": METHODS[method]}
    return {**found, "accuracy": accuracy, "curve": curve, "seconds": seconds}
