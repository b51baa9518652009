"""Loss and exact-match accuracy per task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from moelora.data.prompts import Prompt, render_prompt
from moelora.model.routed import RoutedModel


@dataclass
class TokenSums:
    """Per task, over the tokens that carry loss: [tasks, 3] of summed loss, correct predictions, tokens."""

    tasks: list[str]
    sums: Tensor

    def metrics(self) -> dict[str, dict[str, float]]:
        """``{task: {"loss", "token_accuracy"}}`` for tasks that were seen."""
        found = {}
        for task, (loss, correct, tokens) in zip(self.tasks, self.sums.tolist(), strict=True):
            if tokens:
                found[task] = {"loss": loss / tokens, "token_accuracy": correct / tokens}
        return found

    @property
    def loss(self) -> float:
        """Mean loss over all tokens of all tasks."""
        return float(self.sums[:, 0].sum() / self.sums[:, 2].sum().clamp(min=1))


@torch.no_grad()
def token_sums(model: nn.Module, batches: Iterable[Mapping[str, Any]], tasks: Sequence[str]) -> TokenSums:
    """Sums of the next-token loss by task. A batch holds input_ids, labels, task_ids [B, S], and what the model needs.

    Exact over batches of any size: every token counts once. Nothing is generated.
    """
    sums: Tensor | None = None
    for batch in batches:
        labels, task_ids = batch["labels"], batch["task_ids"]
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
        target = labels[:, 1:].to(logits.device)
        predicted = logits[:, :-1].float()
        loss = F.cross_entropy(predicted.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="none")
        counts = (target != -100).flatten()
        correct = (predicted.argmax(-1) == target).flatten() & counts
        columns = torch.stack([loss, correct.float(), counts.float()], dim=1).double()
        task = task_ids[:, 1:].flatten().to(logits.device)
        kept = counts & (task >= 0)
        if sums is None:
            sums = torch.zeros(len(tasks), 3, dtype=torch.float64, device=logits.device)
        sums.index_add_(0, task[kept], columns[kept])
    return TokenSums(list(tasks), torch.zeros(len(tasks), 3) if sums is None else sums)


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch_size: int = 64,
    task_id: int | None = None,
    **generation: Any,
) -> list[str]:
    """Generated completions of prompts (strings or messages), greedy unless ``generation`` says otherwise.

    Prompts are sorted by length and padded on the left; the model's mode is restored afterwards. task_id: the task of
    all prompts, for routers that route by it.
    """
    texts = [render_prompt(prompt, tokenizer) for prompt in prompts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers = [""] * len(texts)
    config = GenerationConfig(
        **{"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id, **generation}
    )
    config.eos_token_id = model.generation_config.eos_token_id or tokenizer.eos_token_id
    was_training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    try:
        steps = range(0, len(order), batch_size)
        for start in tqdm(steps, desc="Generating", disable=len(steps) < 4, leave=False):
            rows = order[start : start + batch_size]
            batch = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False)
            batch = {key: value.to(model.device) for key, value in batch.items() if key != "token_type_ids"}
            if task_id is not None and isinstance(model, RoutedModel):
                batch["task_ids"] = batch["input_ids"].new_full((len(rows),), task_id)
            out = model.generate(**batch, generation_config=config)
            new = out[:, batch["input_ids"].shape[1] :]
            for i, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = text
    finally:
        tokenizer.padding_side = side
        model.train(was_training)
    return answers


def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    task_id: int | None = None,
) -> float:
    """Share of prompts whose greedy completion equals the answer, surrounding space aside. task_id: as ``complete``."""
    longest = max((len(ids) for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"]), default=0)
    given = complete(model, tokenizer, prompts, max_new_tokens=longest + 4, task_id=task_id)
    return sum(a.strip() == b.strip() for a, b in zip(given, answers, strict=True)) / max(1, len(answers))
