"""From a record's question to the tokens the model sees: template, chat template, length limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from asyncgrpo.errors import DataError
from asyncgrpo.settings.data import DataSettings, TemplateSettings
from asyncgrpo.types import Message, Prompt

AS_IT_IS = TemplateSettings()


def with_template(prompt: Prompt, template: TemplateSettings) -> Prompt:
    """The prompt as: system prompt, few-shot exchanges, the record's messages with the suffix."""
    has_system = prompt.messages[0]["role"] == "system"
    system, turns = prompt.messages[:has_system], list(prompt.messages[has_system:])
    if template.system:
        system = ({"role": "system", "content": template.system},)
    if asked := [index for index, turn in enumerate(turns) if turn["role"] == "user"]:
        last = turns[asked[-1]]
        turns[asked[-1]] = {**last, "content": with_suffix(last["content"], template.suffix)}
    shots = [
        {"role": role, "content": content}
        for shot in template.few_shot
        for role, content in (("user", shot.user), ("assistant", shot.assistant))
    ]
    return replace(prompt, messages=(*system, *shots, *turns))


def with_suffix(text: str, suffix: str) -> str:
    """The text with an instruction after it, set off by a space; as it is if it ends so already."""
    if not suffix or text.rstrip().endswith(suffix.strip()):
        return text
    return text + suffix if suffix[0].isspace() else f"{text} {suffix}"


def render(tokenizer: Any, messages: Sequence[Message], data: DataSettings) -> str:
    """The prompt as text, the beginning of the model's answer included.

    Without data.chat_template: the contents of the messages, one per paragraph.
    """
    if not data.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    return str(_templated(tokenizer, messages, tokenize=False))


def tokenise(tokenizer: Any, messages: Sequence[Message], data: DataSettings) -> list[int]:
    """The token ids of `render`; ids are exactly those that the engine gets."""
    if not data.chat_template:
        return list(tokenizer.encode(render(tokenizer, messages, data)))
    return list(_templated(tokenizer, messages, tokenize=True, return_dict=False))


def _templated(tokenizer: Any, messages: Sequence[Message], **options: bool) -> Any:
    if getattr(tokenizer, "chat_template", "") is None:
        raise DataError(
            "the model's tokenizer has no chat template; use an instruction-tuned model, add a "
            "chat_template to its tokenizer, or set data.chat_template=false for plain text"
        )
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, **options)


def fit(token_ids: list[int], data: DataSettings, prompt_id: str) -> list[int] | None:
    """The ids within data.max_prompt_tokens; None when the prompt is to be dropped.

    truncate_left keeps the last tokens: the head of the chat template is lost with the rest.
    Raises DataError for an over-long prompt with data.overlong_prompt="error".
    """
    limit = data.max_prompt_tokens
    if len(token_ids) <= limit:
        return token_ids
    if data.overlong_prompt == "truncate_left":
        return token_ids[-limit:]
    if data.overlong_prompt == "error":
        raise DataError(
            f"prompt {prompt_id} has {len(token_ids)} tokens, data.max_prompt_tokens={limit} are "
            'allowed and data.overlong_prompt="error"; raise the limit, shorten the prompt, or set '
            'data.overlong_prompt to "drop" or "truncate_left"'
        )
    return None
