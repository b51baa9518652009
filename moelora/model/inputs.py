"""What a forward's arguments say of its tokens: which are real, which carry loss, and how many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss


def masks_of(given: dict[str, Any]) -> dict[str, Tensor]:
    """Valid tokens per stream, from the masks that the model itself reads."""
    found = {"input": given.get("attention_mask"), "decoder": given.get("decoder_attention_mask")}
    labels = given.get("labels")
    if found["decoder"] is None and isinstance(labels, Tensor) and labels.dim() == 2:
        found["decoder"] = labels.ne(-100)
    return {stream: mask.bool() for stream, mask in found.items() if isinstance(mask, Tensor) and mask.dim() == 2}


def answers_of(model: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    """Per stream, which tokens' predictions carry loss, from [B, S] labels."""
    labels, shifted = given.get("labels"), given.get("shift_labels")
    if isinstance(shifted, Tensor) and shifted.dim() == 2:
        return {"input": shifted.ne(-100)}
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return {}
    if two_streams(model):
        return {"decoder": labels.ne(-100)}
    unnamed = getattr(model, "loss_type", "") is None and model.can_generate()  # type: ignore[operator]
    if not (_causal(model) or unnamed):  # transformers gives an unnamed loss (GPT2LMHeadModel) the causal one
        return {"input": labels.ne(-100)}
    return {"input": torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).ne(-100)}


def token_share(model: nn.Module, given: dict[str, Any]) -> Tensor | float:
    """This batch's part of the tokens that the trainer's loss is normalised by; 1 without gradient accumulation.

    A trainer that passes ``num_items_in_batch`` divides the summed token loss of each micro-batch by the tokens of
    all of them (over processes too). Auxiliary means weighted by the same shares add up to their mean over the whole
    batch.
    """
    total = given.get("num_items_in_batch")
    labels = given.get("shift_labels", given.get("labels"))
    if total is None or labels is None:
        return 1.0
    if "shift_labels" not in given and _causal(model) and not two_streams(model):  # as transformers' trainer counts
        labels = labels[..., 1:]
    return labels.ne(-100).sum() / total


def two_streams(model: nn.Module) -> bool:
    """Whether it is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _causal(model: nn.Module) -> bool:
    """Whether the model's loss, by its name, compares a token's prediction with the label of the next."""
    return LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
