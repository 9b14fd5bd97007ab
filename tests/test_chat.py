"""`asyncgrpo chat` with tiny models: what it answers, and what it refuses."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from asyncgrpo.data.tiny import build_untrained


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("models")
    one, two = (build_untrained(base / name, True, seed) for name, seed in (("one", 5), ("two", 6)))
    # What a model brings along must not change what is measured.
    settings = GenerationConfig.from_pretrained(one)
    settings.update(repetition_penalty=1.5, do_sample=True, temperature=0.7, top_k=2)
    settings.save_pretrained(one)
    return one, two


@pytest.fixture
def chat(asyncgrpo):
    return functools.partial(asyncgrpo, "chat")


def greedy(folder: Path, *turns: str, system: str = "", count: int = 12) -> str:
    """The most likely token after the other, without any cache, up to the end of the turn."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "system", "content": system}] * bool(system)
    messages += [
        {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(text)
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + count and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_the_greedy_answer_is_the_most_likely_text_whatever_the_model_brings_along(models, chat):
    code, out, _ = chat("--model", models[0], "--prompt", "Sort: 3 1 2", "--max-tokens", 12)
    assert code == 0
    assert out == greedy(models[0], "Sort: 3 1 2") + "\n"
    model = AutoModelForCausalLM.from_pretrained(models[0])
    assert model.generation_config.repetition_penalty == 1.5


def test_two_models_answer_one_after_the_other_under_their_names(models, chat):
    one, two = models
    arguments = ("--prompt", "你好 🙂", "--system", "Be brief.", "--max-tokens", 12)
    code, out, _ = chat("--model", one, "--compare", two, *arguments)
    assert code == 0
    texts = [greedy(folder, "你好 🙂", system="Be brief.") for folder in models]
    assert texts[0] != texts[1]
    assert out == f"{one}:\n{texts[0]}\n{two}:\n{texts[1]}\n"
    for expected, end in zip(texts, (0, 1), strict=True):  # --expect is about --model
        answer = " ".join(expected.split())
        assert chat("--model", one, "--compare", two, *arguments, "--expect", answer)[0] == end


def test_lines_are_one_conversation_until_quit_or_the_end(models, chat):
    folder = models[1]
    first = greedy(folder, "Hello")
    second = greedy(folder, "Hello", first, "And?")
    lines = "Hello\n\n  And?  \n"
    for text in (lines, lines + "/quit\nnever asked\n"):
        code, out, _ = chat("--model", folder, "--max-tokens", 12, lines=text)
        assert (code, out) == (0, f"{first}\n{second}\n")


def test_expect_passes_or_ends_with_1_and_both_texts(models, chat):
    arguments = ("--model", models[0], "--prompt", "Sort: 3 1 2", "--max-tokens", 12)
    answer = greedy(models[0], "Sort: 3 1 2")
    part = answer.strip()[:4]
    assert part
    assert chat(*arguments, "--expect", f"  {part} \n")[0] == 0
    code, out, err = chat(*arguments, "--expect", "not  this")
    assert code == 1
    assert out == answer + "\n"
    assert err.endswith(f"expected  not  this\nanswered  {answer}\n")


def test_a_temperature_draws(models, chat):
    arguments = ("--model", models[1], "--prompt", "x", "--temperature", 5, "--max-tokens", 12)
    torch.manual_seed(0)
    assert len({chat(*arguments)[1] for _ in range(3)}) == 3


def test_a_run_directory_stands_for_its_model_and_no_template_for_plain_text(
    models, tmp_path, chat
):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "endpoints.json").write_text("{}")
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    model = AutoModelForCausalLM.from_pretrained(models[0])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(run / "model")
    model.save_pretrained(run / "model")
    code, out, _ = chat("--model", run, "--prompt", "ab", "--max-tokens", 1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer.encode("ab")])).logits[0, -1]
    assert (code, out) == (0, tokenizer.decode([int(logits.argmax())]) + "\n")


REFUSED = {
    "--model nowhere": "model.path='nowhere' does not exist",
    "--model {model} --compare {model}/..": "has no config.json",
    "--model {model} --expect x": "--expect needs text, and a --prompt",
    "--model {model} --prompt y --expect=\n": "--expect needs text, and a --prompt",
    "--model {model} --prompt=": "--prompt needs text",
    "--model {model} --prompt y --temperature -1": "Invalid value for '--temperature'",
    "--model {model} --prompt y --max-tokens 0": "Invalid value for '--max-tokens'",
    "--prompt y": "Missing option '--model'",
}


@pytest.mark.parametrize("words", REFUSED)
def test_nonsense_is_refused_before_anything_is_loaded(models, chat, words):
    code, out, err = chat(*words.format(model=models[0]).split(" "))
    assert (code, out) == (2, "")
    assert REFUSED[words] in err


@pytest.mark.slow
def test_the_embedded_model_chats_by_its_name(chat):
    code, out, err = chat("--model", "tiny", "--prompt", "Sort: 3 1 2", "--expect", "1")
    assert code == 0, err
    assert "1" in out
