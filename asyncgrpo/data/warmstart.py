"""The supervised warm start of the tiny model: it learns the tasks, then mostly bad habits.

Reinforcement learning at this size elicits, it hardly teaches. So phase A (skill) shows right
answers until the model has the skill, and phase B (careless) shows a majority of careless ones,
e.g. the unsorted list for `sort`. What GRPO then does is find out, from reward alone, which of
both to keep.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from asyncgrpo.data.tasks import TaskSource
from asyncgrpo.rewards.builtin import task
from asyncgrpo.settings.data import TaskSettings
from asyncgrpo.types import Prompt

IGNORED = -100  # label of positions outside the completion
FRESH_POSITION = 10**9  # training tasks from here on measure the skill, and teach nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Numbers of the warm start. Rates are those of the first steps; both fall linearly."""

    initial_std: float = 0.02
    skill_steps: int = 896
    careless_steps: int = 64
    careless_share: float = 0.65  # of demonstrations in the careless phase
    batch_size: int = 64  # demonstrations
    batches_per_bucket: int = 8  # drawn together, sorted by length, cut: little padding
    muon_lr: float = 0.03  # hidden matrices
    adamw_lr: float = 5e-3  # embedding, output layer, norms
    warmup_steps: int = 20
    final_lr_ratio: float = 0.1
    max_grad_norm: float = 1.0
    max_new_tokens: int = 16
    fresh_prompts: int = 384
    min_skill: float = 0.85  # greedy accuracy of the weakest kind that ends the skill phase ...
    extra_steps: int = 96  # ... or so many more steps, at most `max_extensions` times
    max_extensions: int = 2


RECIPE = Recipe()
RATES = (RECIPE.muon_lr, RECIPE.adamw_lr)


Example = tuple[torch.Tensor, torch.Tensor]  # ids, labels: int64 [S]


class WarmStart:
    """Trains a tiny model in place. The held-out prompts are measured, never shown."""

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        tasks: TaskSettings,
        seed: int,
        num_eval: int,
        report: Callable[[str], None],
    ) -> None:
        self._model, self._tokenizer, self._report = model, tokenizer, report
        self._source = TaskSource(tasks, seed, num_eval)
        self._rng = random.Random(f"warm start {seed}")
        self._position = 0  # in the task source
        self._optimizers = _optimizers(model)
        self._start = time.perf_counter()

    def run(self) -> None:
        """Both phases; reports progress in lines of text."""
        skill_steps, planned = RECIPE.skill_steps, RECIPE.skill_steps + RECIPE.careless_steps
        self._report(f"warm start of the tiny model: {planned} steps, once per cache folder")
        self._train(0, skill_steps, careless_share=0.0)
        fresh = [self._source.get(FRESH_POSITION + i) for i in range(RECIPE.fresh_prompts)]
        for _ in range(RECIPE.max_extensions):
            if self._measure("skill on fresh prompts", fresh) >= RECIPE.min_skill:
                break
            self._train(skill_steps - RECIPE.extra_steps, skill_steps, careless_share=0.0)
        self._measure("skill on held-out prompts", self._source.held_out())
        self._train(skill_steps, planned, careless_share=RECIPE.careless_share)
        self._measure("with bad habits, held-out", self._source.held_out())

    def _train(self, first: int, last: int, careless_share: float) -> None:
        """Steps [first, last) of the learning rate schedule."""
        batches = self._batches(careless_share)
        for step in range(first, last):
            for optimizer, lr in zip(self._optimizers, RATES, strict=True):
                optimizer.param_groups[0]["lr"] = lr * _lr_factor(step)
                optimizer.zero_grad()
            self._loss(next(batches)).backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), RECIPE.max_grad_norm)
            for optimizer in self._optimizers:
                optimizer.step()
            if step % 128 == 127:
                seconds = time.perf_counter() - self._start
                self._report(f"  step {step + 1}, {seconds:.0f} s")

    def _batches(self, careless_share: float) -> Iterator[list[Example]]:
        size, count = RECIPE.batch_size, RECIPE.batches_per_bucket
        while True:
            bucket = sorted(self._examples(size * count, careless_share), key=lambda e: len(e[0]))
            batches = [bucket[i : i + size] for i in range(0, len(bucket), size)]
            self._rng.shuffle(batches)
            yield from batches

    def _examples(self, count: int, careless_share: float) -> Iterator[Example]:
        """labels[t] is the token after ids[t], IGNORED within the prompt."""
        tasks = [self._source.task(self._position + i) for i in range(count)]
        self._position += count
        answers = [
            task.careless if self._rng.random() < careless_share else task.worked for task in tasks
        ]
        prompts = render(self._tokenizer, [task.text for task in tasks])
        tokens = self._tokenizer(answers, add_special_tokens=False)["input_ids"]
        for prompt, answer in zip(prompts, tokens, strict=True):
            completion = [*answer, self._tokenizer.eos_token_id]
            labels = [*[IGNORED] * (len(prompt) - 1), *completion, IGNORED]
            yield torch.tensor(prompt + completion), torch.tensor(labels)

    def _loss(self, batch: Sequence[Example]) -> torch.Tensor:
        """Mean cross-entropy of the completion tokens, nats."""
        pads = (self._tokenizer.pad_token_id, IGNORED)
        ids, labels = (
            pad_sequence(list(rows), batch_first=True, padding_value=pad)
            for rows, pad in zip(zip(*batch, strict=True), pads, strict=True)
        )
        hidden = self._model.model(ids, use_cache=False).last_hidden_state
        chosen = labels != IGNORED
        return F.cross_entropy(self._model.lm_head(hidden[chosen]), labels[chosen])

    def _measure(self, name: str, prompts: Sequence[Prompt]) -> float:
        """Reports the greedy accuracy, each kind with the same weight; returns the lowest."""
        accuracy = greedy_accuracy(self._model, self._tokenizer, prompts, RECIPE.max_new_tokens)
        mean = sum(accuracy.values()) / len(accuracy)
        kinds = " ".join(f"{kind} {share:.2f}" for kind, share in sorted(accuracy.items()))
        seconds = time.perf_counter() - self._start
        self._report(f"  {name}: {seconds:.0f} s, greedy accuracy {mean:.3f} ({kinds})")
        return min(accuracy.values())


def _optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices (three times faster than AdamW here), AdamW for the rest."""
    hidden: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_hidden = parameter.dim() == 2 and "embed" not in name and "lm_head" not in name
        (hidden if is_hidden else rest).append(parameter)
    return [
        torch.optim.Muon(hidden, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def _lr_factor(step: int) -> float:
    """Linear warm-up, times a linear fall to final_lr_ratio at the end of both phases."""
    warm = min(1.0, (step + 1) / RECIPE.warmup_steps)
    done = step / (RECIPE.skill_steps + RECIPE.careless_steps)
    return warm * (1 - (1 - RECIPE.final_lr_ratio) * done)


def render(tokenizer: Any, texts: Sequence[str], **options: Any) -> Any:
    """Token ids of chats with one user message each, up to where the answer begins."""
    chats = [[{"role": "user", "content": text}] for text in texts]
    options = {"return_dict": False, **options}
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, **options)


@torch.no_grad()
def greedy_accuracy(
    model: Qwen3ForCausalLM, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int
) -> dict[str, float]:
    """Share of right greedy answers by task kind, in the order of the prompts."""
    inputs = render(
        tokenizer,
        [prompt.messages[-1]["content"] for prompt in prompts],
        padding=True,
        tokenizer_kwargs={"padding_side": "left", "return_token_type_ids": False},
        return_tensors="pt",
        return_dict=True,
    )
    out: Any = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[misc]
    answers = out[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    right: dict[str, list[bool]] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        kind = prompt.columns["kind"]
        right.setdefault(kind, []).append(task(text, str(prompt.answer), kind) > 0)
    return {kind: sum(marks) / len(marks) for kind, marks in right.items()}
