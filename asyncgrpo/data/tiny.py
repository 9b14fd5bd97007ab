"""The embedded tiny model: a 0.33 M parameter Qwen3 that is made on this machine, then cached.

python -m asyncgrpo.data.tiny --seed 0        prints progress, then the model's folder
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from asyncgrpo.data.tasks import HELD_OUT_PROMPTS
from asyncgrpo.data.tiny_tokenizer import CHAT_TEMPLATE, build_tokenizer
from asyncgrpo.data.warmstart import RECIPE, WarmStart
from asyncgrpo.settings.data import TaskSettings

FORMAT = 1  # raise it when the same settings should no longer give the same model
UNTRAINED_STD = 0.2  # of random weights: large enough that logits differ clearly
MODEL_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's CPU attention takes
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


def build_untrained(folder: Path, tied: bool = True, seed: int = 0) -> Path:
    """Saves a tiny model with random weights and its tokenizer; returns the folder. Fast."""
    tokenizer = build_tokenizer()
    model = _random_model(tokenizer, tied, seed, std=UNTRAINED_STD)
    _save(model, tokenizer, folder)
    return folder


def ensure_tiny(
    tasks: TaskSettings,
    cache: Path | None = None,
    report: Callable[[str], None] = print,
    *,
    seed: int = 0,
    num_eval: int = HELD_OUT_PROMPTS,
) -> Path:
    """The folder of the warm-started tiny model; built on first use (30-60 s), then cached.

    cache: where folders are kept; default $ASYNCGRPO_CACHE, else ~/.cache/asyncgrpo.
    num_eval: held-out prompts that the warm start must not see, at least HELD_OUT_PROMPTS.
    Uses as many threads as torch is set to. Concurrent builders do not disturb each other.
    ConfigError for tasks that cannot be drawn.
    """
    num_eval = max(num_eval, HELD_OUT_PROMPTS)
    tokenizer = build_tokenizer()
    place = cache or Path(os.environ.get("ASYNCGRPO_CACHE") or Path.home() / ".cache/asyncgrpo")
    folder = place / f"tiny-{_fingerprint(tokenizer, tasks, seed, num_eval)}"
    if (folder / "config.json").is_file():
        report(f"tiny model found: {folder}")
        return folder
    place.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=place))
    try:
        model = _random_model(tokenizer, True, seed, std=RECIPE.initial_std)
        WarmStart(model, tokenizer, tasks, seed, num_eval, report).run()
        _save(model, tokenizer, building)
        building.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise  # not the other builder that was faster, whose model is as good as ours
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _fingerprint(
    tokenizer: PreTrainedTokenizerFast, tasks: TaskSettings, seed: int, num_eval: int
) -> str:
    """Everything that the weights depend on: another value must give another folder."""
    parts = {
        "format": FORMAT,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "template": CHAT_TEMPLATE,
        "model": MODEL_SHAPE,
        "recipe": asdict(RECIPE),
        "tasks": tasks.model_dump(),
        "seed": seed,
        "num_eval": num_eval,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def model_config(
    tokenizer: PreTrainedTokenizerFast, tied: bool = True, std: float = UNTRAINED_STD
) -> Qwen3Config:
    """Of the embedded model; std: of random weights."""
    return Qwen3Config(
        **MODEL_SHAPE,
        vocab_size=len(tokenizer),
        tie_word_embeddings=tied,
        attention_dropout=0.0,
        initializer_range=std,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _random_model(
    tokenizer: PreTrainedTokenizerFast, tied: bool, seed: int, std: float
) -> Qwen3ForCausalLM:
    """float32; normal weights of the given std, norms 1; the caller's random state is kept."""
    config = model_config(tokenizer, tied, std)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).float()


def _save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds or finds the model; the last line on stdout is its folder."""
    parser = argparse.ArgumentParser(prog="python -m asyncgrpo.data.tiny", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of weights and demonstrations")
    parser.add_argument("--tasks", default="{}", help="data.tasks settings as JSON")
    parser.add_argument("--num-eval", type=int, default=HELD_OUT_PROMPTS, help="held-out prompts")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(2)
    transformers_logging.disable_progress_bar()
    report = functools.partial(print, flush=True)
    tasks = TaskSettings.model_validate_json(chosen.tasks)
    report(ensure_tiny(tasks, None, report, seed=chosen.seed, num_eval=chosen.num_eval))


if __name__ == "__main__":
    main()
