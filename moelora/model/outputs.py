"""Auxiliary terms of the model's logits, where layers have no say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moelora.core.errors import DataError, MoeloraError
from moelora.core.tape import Tape
from moelora.losses.base import Loss

LABELS = ("labels", "shift_labels", "num_items_in_batch")
"""What a model computes its own loss from."""


def output_terms(
    losses: Mapping[str, Loss], tape: Tape, stream: str, out: Any, base: Callable[[], Any]
) -> dict[str, Tensor]:
    """The terms of losses that read logits. stream: of the tokens that logits are of. base: the base model's output.

    Raises MoeloraError for an output without logits, DataError where a loss counts answers and there are no labels.
    """
    wanted = {name: loss for name, loss in losses.items() if loss.reads == "logits"}
    if not wanted:
        return {}
    logits = _logits(out, next(iter(wanted)))

    @functools.cache
    def without() -> Tensor:
        with torch.no_grad():
            return _logits(base(), next(iter(wanted)))

    def term(loss: Loss) -> Tensor:
        kept = _kept(loss.tokens, tape, stream, logits)
        with torch.autocast(logits.device.type, enabled=False):
            return loss.of_logits(_rows(logits, kept), lambda: _rows(without(), kept))

    return {name: term(loss) for name, loss in wanted.items()}


def _kept(tokens: str, tape: Tape, stream: str, logits: Tensor) -> Tensor | None:
    """[B, S] the tokens that count, or None for all."""
    mask, answers = tape.mask.get(stream), tape.answers.get(stream)
    if tokens == "answers":
        if answers is None:
            raise DataError("a loss with tokens: answers needs labels [B, S] in the batch; without them, tokens: all")
        mask = answers if mask is None else answers & mask
    if mask is not None and mask.shape != logits.shape[:-1]:
        if mask.dim() == logits.dim() - 1:
            raise MoeloraError(
                f"a loss reads the logits of all tokens, and the model gave those of {tuple(logits.shape[:-1])} for "
                f"{tuple(mask.shape)} tokens; leave out logits_to_keep while training"
            )
        return None  # a classifier's: one row a text
    return mask


def _rows(logits: Tensor, kept: Tensor | None) -> Tensor:
    rows = logits.flatten(0, -2) if kept is None else logits[kept]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _logits(out: Any, name: str) -> Tensor:
    logits = getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        raise MoeloraError(
            f"losses.{name} reads the model's logits, and the caller has it compute a loss without any. With TRL, use "
            "moelora.MoeLoraTrainer in place of SFTTrainer; in a loop of your own, leave out fused heads and "
            "return_dict=False"
        )
    return logits
