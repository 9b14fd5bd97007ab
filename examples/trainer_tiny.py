"""Trains the embedded model on rows and rewards of this file: python trainer_tiny.py [STEPS]

Two actors and two learners on a CPU; 15 steps take about a minute. No `if __name__ == "__main__"`
is needed: the processes of a run never import this file.
"""

import random
import re
import sys

from asyncgrpo import Trainer

NUMBER = re.compile(r"-?\d+")


def last_number(text):
    return (NUMBER.findall(text) or [""])[-1]


def right(completions, answer, **columns):
    """The model may work its way to the answer: the last number counts."""
    pairs = zip(completions, answer, strict=True)
    return [1.0 if last_number(text) == truth else -1.0 for text, truth in pairs]


def make_row(rng):
    if rng.random() < 0.4:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        return {"prompt": f"Compute: {a} + {b}", "answer": str(a + b), "data_source": "sum"}
    digits = [rng.randint(0, 3) for _ in range(rng.randint(3, 6))]
    text = " ".join(map(str, digits))
    return {"prompt": f"Check: {text}", "answer": str(sum(digits) % 4), "data_source": "check"}


rng = random.Random(0)
unique = {row["prompt"]: row for row in (make_row(rng) for _ in range(600))}
rows = list(unique.values())

trainer = Trainer(
    {
        "run": {"name": "trainer", "max_steps": int(sys.argv[1]) if sys.argv[1:] else 15},
        "data": {"max_prompt_tokens": 32},
        "eval": {"every": 5, "num_prompts": 100},
    },
    reward_funcs=[right, "length_penalty"],
    train_dataset=rows[100:],
    eval_dataset=rows[:100],
    actors=2,
    learners=2,
)
result = trainer.fit()
before, after = result.accuracies
steps = [row for row in result.metrics() if "loss" in row]
print(f"{len(steps)} steps: held-out accuracy {before:.0%} -> {after:.0%}")
print(f"the model is in {result.model_path}")
