from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncgrpo.data import tiny
from asyncgrpo.data.tasks import TaskSource
from asyncgrpo.data.tiny import build_tokenizer, build_untrained, ensure_tiny, main
from asyncgrpo.data.warmstart import RECIPE, greedy_accuracy, render
from asyncgrpo.settings.data import TaskSettings

TOKENIZER = build_tokenizer()


class Stopped(Exception):
    """Raised where the warm start would begin."""


@pytest.fixture
def no_training(monkeypatch):
    """Takes the training out of the warm start: the model is saved as it was drawn."""
    monkeypatch.setattr(tiny.WarmStart, "run", lambda self: None)


@given(st.text(max_size=50))
def test_any_text_comes_back_from_its_tokens(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


def test_the_saved_tokenizer_is_the_same_tokenizer(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nSort: 3 1 2<|im_end|>\n<|im_start|>assistant\n三"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.chat_template == TOKENIZER.chat_template
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_a_chat_is_plain_chatml_with_two_tokens_of_overhead():
    chat = [{"role": "user", "content": "Check: 3 1 2"}]
    text = TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nCheck: 3 1 2<|im_end|>\n<|im_start|>assistant\n"
    tokens = TOKENIZER.convert_ids_to_tokens(render(TOKENIZER, ["Check: 3 1 2"])[0])
    assert tokens == [
        "<|im_start|>user\n",
        "Check: ",
        "3",
        "Ġ1",
        "Ġ2",
        "<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_prompts_of_the_default_tasks_are_short():
    held_out = TaskSource(TaskSettings(), 0, 318).held_out()
    rows = render(TOKENIZER, [prompt.messages[0]["content"] for prompt in held_out])
    sizes = [len(row) for row in rows]
    assert min(sizes) >= 6
    assert max(sizes) <= 18
    assert 7 <= sum(sizes) / len(sizes) <= 10


@pytest.mark.parametrize("tied", [True, False])
def test_an_untrained_model_loads_and_gives_clearly_uneven_logits(tmp_path, tied):
    folder = build_untrained(tmp_path / "model", tied=tied, seed=3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.tie_word_embeddings is tied
    names = {name for name, _ in model.named_parameters()}
    assert ("lm_head.weight" in names) is not tied
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    logits = model(torch.tensor(render(tokenizer, ["Sort: 3 1 2"]))).logits[0, -1]
    assert len(logits) == len(tokenizer) == model.config.vocab_size
    assert float(logits.detach().std()) > 0.5


def test_the_seed_chooses_the_weights_and_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    weights = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_untrained(tmp_path / name, seed=seed)
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] != weights["c"]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_is_built_once_and_found_again(tmp_path, no_training, monkeypatch):
    lines: list[str] = []
    folder = ensure_tiny(TaskSettings(), tmp_path, lines.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]
    assert {"config.json", "generation_config.json", "model.safetensors"} <= {
        path.name for path in folder.iterdir()
    }

    def stop(self):
        raise Stopped

    monkeypatch.setattr(tiny.WarmStart, "run", stop)
    assert ensure_tiny(TaskSettings(), tmp_path, lines.append) == folder
    assert lines[-1] == f"tiny model found: {folder}"
    for other in ({"seed": 1}, {"num_eval": 400}):
        with pytest.raises(Stopped):
            ensure_tiny(TaskSettings(), tmp_path, lines.append, **other)
    with pytest.raises(Stopped):
        ensure_tiny(TaskSettings(modulus=5), tmp_path, lines.append)
    assert ensure_tiny(TaskSettings(), tmp_path, lines.append, num_eval=8) == folder


def test_a_failed_build_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop(self):
        raise Stopped

    monkeypatch.setattr(tiny.WarmStart, "run", stop)
    with pytest.raises(Stopped):
        ensure_tiny(TaskSettings(), tmp_path, print)
    assert list(tmp_path.iterdir()) == []


def test_of_two_builders_the_slower_one_takes_the_model_of_the_faster(tmp_path, monkeypatch):
    calls = []

    def build_meanwhile(self):
        calls.append(self)
        if len(calls) == 1:
            ensure_tiny(TaskSettings(), tmp_path, print)

    monkeypatch.setattr(tiny.WarmStart, "run", build_meanwhile)
    folder = ensure_tiny(TaskSettings(), tmp_path, print)
    assert len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_the_command_ends_with_the_folder_on_its_last_line(
    tmp_path, no_training, monkeypatch, capsys
):
    monkeypatch.setenv("ASYNCGRPO_CACHE", str(tmp_path))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    main(["--seed", "4", "--tasks", '{"modulus": 5}'])
    folder = capsys.readouterr().out.splitlines()[-1]
    assert AutoModelForCausalLM.from_pretrained(folder).config.tie_word_embeddings is True


@pytest.mark.slow
def test_the_warm_start_has_the_skill_and_mostly_bad_habits(tmp_path):
    environment = {**os.environ, "ASYNCGRPO_CACHE": str(tmp_path), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "asyncgrpo.data.tiny", "--seed", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *lines, folder = done.stdout.splitlines()
    (skill,) = (line for line in lines if "skill on held-out prompts" in line)
    assert float(skill.partition("greedy accuracy ")[2].split()[0]) >= 0.9
    accuracy = greedy_accuracy(
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        TaskSource(TaskSettings(), 0, 318).held_out(),
        RECIPE.max_new_tokens,
    )
    assert 0.25 <= sum(accuracy.values()) / len(accuracy) <= 0.6
