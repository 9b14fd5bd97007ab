"""`asyncgrpo chat`: talk to a trained model, and to its base beside it. Imports late."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer


class Talker:
    """One model and the conversation with it so far."""

    def __init__(self, folder: str, system: str, temperature: float, max_tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from asyncgrpo.actor.process import load_tokenizer, stop_token_ids
        from asyncgrpo.config import from_mapping

        logging.set_verbosity_error()
        self._messages = [{"role": "system", "content": system}] if system else []
        self._tokenizer = load_tokenizer(folder)
        on_gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if on_gpu else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model = model.to("cuda" if on_gpu else "cpu").eval()
        stop_ids = stop_token_ids(from_mapping({"model": {"path": folder}}), self._tokenizer)
        # Said in full, as for the engine: a model's own generation settings may penalise or cut.
        self._options: dict[str, Any] = {"max_new_tokens": max_tokens, "repetition_penalty": 1.0}
        self._options |= {"eos_token_id": stop_ids, "pad_token_id": stop_ids[0]}
        drawn = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        self._options |= drawn if temperature else {"do_sample": False}

    def answer(self, text: str) -> str:
        """The model's answer, which is printed while it is generated."""
        import torch
        from transformers import TextStreamer

        from asyncgrpo.data.templates import tokenise
        from asyncgrpo.settings.data import DataSettings

        self._messages.append({"role": "user", "content": text})
        data = DataSettings(chat_template=self._tokenizer.chat_template is not None)
        ids = torch.tensor([tokenise(self._tokenizer, self._messages, data)])
        ids = ids.to(self._model.device)
        printer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), streamer=printer, **self._options
        )
        answer: str = self._tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": answer})
        return answer


def chat(
    model: Annotated[str, typer.Option(help="folder, run directory, hub name, or tiny")],
    compare: Annotated[str | None, typer.Option(help="another one, asked the same")] = None,
    prompt: Annotated[str | None, typer.Option(help="ask this and end")] = None,
    expect: Annotated[str | None, typer.Option(help="else end with 1: part of the answer")] = None,
    system: Annotated[str, typer.Option(help="system prompt")] = "",
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="of one answer")] = 512,
) -> None:
    """Streams the answers of a model, and of another beside it, through its chat template.

    Without --prompt it asks for lines until /quit. --expect is about the answer of --model; white
    space counts as one space.
    """
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("--prompt needs text")
    if expect is not None and (prompt is None or not expect.strip()):
        raise typer.BadParameter("--expect needs text, and a --prompt whose answer may hold it")
    folders = {name: _folder(name) for name in (model, compare) if name}
    talkers = {n: Talker(f, system, temperature, max_tokens) for n, f in folders.items()}
    for line in filter(None, iter(_line, "/quit") if prompt is None else [prompt]):
        answers = []
        for name, talker in talkers.items():
            if compare:
                typer.secho(f"{name}:", bold=True)
            answers.append(talker.answer(line))
        if expect and " ".join(expect.split()) not in " ".join(answers[0].split()):
            typer.echo(f"expected  {expect}\nanswered  {answers[0]}", err=True)
            raise typer.Exit(1)


def _folder(path: str) -> str:
    """Where a model can be loaded from; ModelError, as at a launch, when it cannot."""
    from asyncgrpo.launch.model_folder import EMBEDDED, check_model_folder

    if path == EMBEDDED:
        from asyncgrpo.data.tiny import ensure_tiny
        from asyncgrpo.settings.data import TaskSettings

        return str(ensure_tiny(TaskSettings(), report=lambda text: typer.echo(text, err=True)))
    if (Path(path) / "endpoints.json").is_file():  # a run directory
        path = str(Path(path) / "model")
    return str(check_model_folder(path) or path)


def _line() -> str:
    """The next line; /quit at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return "/quit"
