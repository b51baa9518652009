"""How prompts become text: the tokenizer's chat template, or plainly, contents on lines of their own."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from moelora.core.errors import DataError
from moelora.data.formats import Message
from moelora.data.progress import quiet_if_small

Prompt = str | list[Message]
"""A plain text, or messages for a chat template."""


def uses_chat(tokenizer: PreTrainedTokenizerBase, chat_template: bool | str) -> bool:
    """Whether prompts are messages, from the recipe's ``chat_template``. Raises DataError when there is none to use."""
    has = bool(tokenizer.chat_template)
    if chat_template is True and not has:
        raise DataError("data.chat_template: true, but the tokenizer has none; use a chat model's, or false")
    return has if chat_template == "auto" else bool(chat_template)


def plain(messages: list[Message]) -> str:
    """Messages as lines, ending with a line break, for models without a chat template."""
    return "".join(f"{message['content']}\n" for message in messages)


def as_prompts(data: Dataset, chat: bool) -> list[Prompt]:
    """The prompt of every row, as messages or plain text."""
    return [messages if chat else plain(messages) for messages in data["prompt"]]


def as_trl(data: Dataset, chat: bool) -> Dataset:
    """Rows in TRL's columns: prompt and completion as messages (chat) or strings; plain texts keep ``text``."""
    if chat:
        return data

    def flatten(row: dict[str, Any]) -> dict[str, str]:
        return {"said": plain(row["prompt"]), "answer": "".join(message["content"] for message in row["completion"])}

    with quiet_if_small(len(data)):
        flat = data.map(flatten, remove_columns=["prompt", "completion"], desc="Writing plain prompts")
    return flat.rename_columns({"said": "prompt", "answer": "completion"})


def render_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text a model is asked to continue."""
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
