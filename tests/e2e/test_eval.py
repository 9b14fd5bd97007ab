"""`asyncgrpo eval` with the real engine, beside the toy engine on the same model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from asyncgrpo.data.tiny import build_untrained


def completions(folder: Path, engine: str, *options: str) -> dict[tuple[str, int], dict]:
    out = folder / "rows.jsonl"
    command = [sys.executable, "-m", "asyncgrpo.cli", "eval", "--model", str(folder)]
    command += ["--data", "tasks", "--num-prompts", "24", "--engine", engine, "--out", str(out)]
    command += ["--set", "data.max_prompt_tokens=32", "--max-tokens", "12", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 prompts" in done.stdout
    assert done.stderr == ""
    rows = map(json.loads, out.read_text().splitlines())
    return {(row["prompt_id"], row["sample"]): row for row in rows}


@pytest.mark.engine
def test_the_real_engine_answers_greedily_as_the_toy_engine_and_samples_apart(tmp_path):
    folder = build_untrained(tmp_path / "model", True, 5)
    greedy = completions(folder, "vllm")
    assert greedy == completions(folder, "toy")
    assert len(greedy) == 24
    sampled = completions(folder, "vllm", "-k", "2")
    assert len(sampled) == 48
    assert any(
        row["completion"] != sampled[name, 1]["completion"]
        for (name, sample), row in sampled.items()
        if sample == 0
    )
