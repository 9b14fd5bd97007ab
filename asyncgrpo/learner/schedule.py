"""The learning rate as a function of the step, the KL coefficient as one of the KL before."""

from __future__ import annotations

import math
from collections.abc import Callable

from asyncgrpo.settings.algo import AlgoSettings
from asyncgrpo.settings.learner import LearnerSettings

# Ziegler et al., arXiv 1909.08593 section 2.2: one step never changes the coefficient by more.
MAX_KL_ERROR = 0.2
# share of the way from warm-up to max_steps, in [0, 1] -> share of the way from floor to peak
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate(step: int, settings: LearnerSettings, max_steps: int) -> float:
    """Learning rate of optimizer update number `step` (0 is the first).

    Rises linearly from lr / warmup to lr over the first `warmup` updates, which are warmup_steps,
    or with warmup_ratio that share of max_steps, rounded up. Then follows the schedule and reaches
    lr * min_lr_ratio at step max_steps (constant stays at lr).
    """
    ratio = settings.warmup_ratio
    warmup = settings.warmup_steps if ratio is None else math.ceil(ratio * max_steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    # max: a warm-up as long as the run leaves no steps to decay over, which would divide by zero.
    decay_steps = max(max_steps - warmup, 1)
    progress = min((step - warmup) / decay_steps, 1.0)
    height = SCHEDULES[settings.schedule](progress)
    return settings.lr * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * height)


def adapted_coefficient(
    coefficient: float, kl: float, num_completions: int, algo: AlgoSettings
) -> float:
    """The next KL coefficient; unchanged without algo.kl_target.

    beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), Ziegler et al., arXiv 1909.08593.
    """
    if algo.kl_target is None:
        return coefficient
    error = min(max(kl / algo.kl_target - 1.0, -MAX_KL_ERROR), MAX_KL_ERROR)
    return coefficient * (1.0 + error * num_completions / algo.kl_horizon)
