"""One run of benchmarks/staleness.py: trains the tiny model on data of an exact age.

The batch of step s is sampled by the weights of step s - lag (the first weights while s < lag).
"""

from __future__ import annotations

import logging
import math
import os
import statistics
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
MAX_GROUPS_PER_ROUND = 64
MAX_GROUPS_PER_STEP = 128  # a policy that answers all alike would be sampled forever
EVAL_EVERY, NUM_EVAL = 10, 318
REPORTED = (  # metrics of the learner, averaged over the second half of the run
    *("ess", "objective/kl", "objective/entropy", "grad_norm"),
    *("clip_low_share", "clip_high_share", "cap_share", "masked_share"),
)


class Sampler:
    """Draws completions at temperature 1 with weights handed to it."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
        self._tokenizer, self._limit = tokenizer, config.sampling.max_completion_tokens
        torch.manual_seed(config.run.seed)

    @torch.no_grad()
    def load(self, weights: NamedTensors) -> None:
        own = dict(self.model.named_parameters())
        for name, tensor in weights:
            own.pop(name).copy_(tensor)
        assert not own, f"weights lack {', '.join(own)}"

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[list[int]], copies: int, policy_version: int
    ) -> list[list[Completion]]:
        """`copies` completions of each prompt."""
        inputs = self._tokenizer.pad(
            {"input_ids": prompts}, padding_side="left", return_tensors="pt"
        )
        out = self.model.generate(
            **inputs,
            **dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0),
            max_new_tokens=self._limit,
            num_return_sequences=copies,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
        table = torch.stack(out.logits, 1).float().log_softmax(-1)
        logprobs = table.gather(-1, tokens[..., None])[..., 0].numpy()
        made = []
        for ids, scores in zip(tokens.tolist(), logprobs, strict=True):
            ended = self._tokenizer.eos_token_id in ids
            ids = ids[: ids.index(self._tokenizer.eos_token_id) + 1] if ended else ids
            made.append(
                Completion(
                    token_ids=np.array(ids, np.int32),
                    behavior_logprobs=scores[: len(ids)],
                    versions=np.full(len(ids), policy_version, np.int32),
                    finish_reason="stop" if ended else "length",
                )
            )
        return [made[first : first + copies] for first in range(0, len(made), copies)]


class Experiment:
    """One run: a method at one lag with one seed."""

    def __init__(self, config: Config, lag: int) -> None:
        self._config, self._lag = config, lag
        self._prompts, self._rewards = open_prompts(config), load_rewards(config.reward)
        self._position = 0  # in the prompt stream
        self._num_generated = self._num_trained = 0  # groups
        self._share_kept = 1.0  # of the groups sampled last; decides how many are sampled next
        self._rows: list[dict[str, float]] = []  # metrics of each learner step
        self._curve: dict[str, float] = {}  # step -> held-out accuracy
        self._by_kind: dict[str, float] = {}
        self._tokenizer = load_tokenizer(config.model.path)
        self._sampler = Sampler(config, self._tokenizer)

    def run(self) -> None:
        """Trains to the end, or until there is nothing left to learn from."""
        config, updater = self._config, PolicyUpdater(self._config)
        weights: deque[list[tuple[str, torch.Tensor]]] = deque(maxlen=self._lag + 1)
        for step in range(config.run.max_steps):
            weights.append([(name, tensor.clone()) for name, tensor in updater.weights()])
            if step % EVAL_EVERY == 0:
                self._evaluate(step, weights[-1])
            self._sampler.load(weights[0])
            groups = self._batch(step - len(weights) + 1)
            if len(groups) < config.algo.minibatches:
                break  # nothing left to learn from: all answers to a prompt are alike
            self._rows.append(updater.update(shard_of(step, groups)))
            self._check(step)
        self._evaluate(len(self._rows), list(updater.weights()))

    def _batch(self, policy_version: int) -> list[Group]:
        """Groups of mixed correctness; uniform ones are replaced, as the buffer does."""
        size, kept, generated = self._config.buffer.groups_per_step, [], 0
        while len(kept) < size and generated < MAX_GROUPS_PER_STEP:
            wanted = math.ceil((size - len(kept)) / max(self._share_kept, 0.1))
            groups = list(self._groups(min(wanted, MAX_GROUPS_PER_ROUND), policy_version))
            mixed = [group for group in groups if self._is_mixed(group)]
            generated += len(groups)
            kept += mixed
            self._share_kept = 0.5 * self._share_kept + 0.5 * len(mixed) / len(groups)
        self._num_generated += generated
        self._num_trained += len(kept[:size])
        return kept[:size]

    def _groups(self, count: int, policy_version: int) -> Iterator[Group]:
        prompts = [self._prompts.get(self._position + index) for index in range(count)]
        self._position += count
        rows = render(self._tokenizer, [prompt.messages[-1]["content"] for prompt in prompts])
        size = self._config.algo.group_size
        sampled = self._sampler.sample(rows, size, policy_version)
        for prompt, row, completions in zip(prompts, rows, sampled, strict=True):
            texts = self._tokenizer.batch_decode(
                [completion.token_ids for completion in completions], skip_special_tokens=True
            )
            scores = self._rewards.score(prompt, texts)
            yield group_of(prompt, row, completions, scores.parts, scores.rewards)

    def _is_mixed(self, group: Group) -> bool:
        scores = [float(score) for score in next(iter(group.reward_parts.values()))]
        return 0 < sum(is_correct(scores, self._config.reward.correct_above)) < len(scores)

    def _check(self, step: int) -> None:
        """The lag is what it should be; at lag 0 sampler and learner agree on every log-prob."""
        row, lag = self._rows[-1], min(step, self._lag)
        assert row["staleness/mean"] == row["staleness/max"] == lag, row
        # p is computed before the first optimizer step: on the weights that sampled
        assert lag or row["logprob_diff_max"] < MAX_LOGPROB_ERROR, row["logprob_diff_max"]

    def _evaluate(self, step: int, weights: NamedTensors) -> None:
        self._sampler.load(weights)
        held_out = self._prompts.held_out(NUM_EVAL)
        limit = self._config.sampling.max_completion_tokens
        self._by_kind = greedy_accuracy(self._sampler.model, self._tokenizer, held_out, limit)
        counts = Counter(prompt.columns["kind"] for prompt in held_out)
        right = sum(self._by_kind[kind] * count for kind, count in counts.items())
        self._curve[str(step)] = round(right / len(held_out), 4)

    def result(self) -> dict[str, Any]:
        """What the JSON holds of the run; metrics are means over its second half."""
        later = self._rows[len(self._rows) // 2 :]
        fresh = self._rows if self._lag == 0 else self._rows[:1]
        return {
            "accuracy": self._curve[str(len(self._rows))],
            "curve": self._curve,
            "by_kind": {kind: round(share, 3) for kind, share in self._by_kind.items()},
            "steps": len(self._rows),
            "max_logprob_error_at_lag_0": max(row["logprob_diff_max"] for row in fresh),
            "share_of_groups_trained": round(self._num_trained / self._num_generated, 3),
            "metrics": {
                name: float(f"{statistics.mean(row[name] for row in later):.4g}")
                for name in REPORTED
            },
        }


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
    experiment = Experiment(config_of(method, seed, steps, lr, folder), lag)
    experiment.run()
    found = {"method": method, "lag": lag, "seed": seed, "algo": METHODS[method]}
    return found | experiment.result() | {"seconds": round(time.perf_counter() - start, 1)}
