"""The sizes of a run in numbers: what one batch, one optimizer step and the whole run hold."""

from __future__ import annotations

from asyncgrpo.config import Config


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
