"""The pass without experts that routers reading ``"hidden"`` are planned from (X-LoRA).

It is the base model's backbone alone, without its output head, without gradients and without kept activations; with a
cache it keeps a twin of its own (``moelora.model.cache``), since its keys are not those of the adapted pass.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from moelora.core.errors import MoeloraError
from moelora.model.cache import NAMES, Companion

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Keyword arguments of attention kernels that backbones pass on without naming them."""


@torch.no_grad()
def last_hidden(model: nn.Module, given: dict[str, Any], companion: Companion) -> Tensor:
    """[B, S, d] last hidden state of the base model; the companion's twin moves on by these tokens.

    Raises MoeloraError when the base model's backbone gives none.
    """
    backbone: Any = model.base_model
    known = inspect.signature(backbone.forward).parameters
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    taken = {key: value for key, value in given.items() if key in known or (open_ended and key in PACKING)}
    cache_name = next((name for name in NAMES if name in known), None)
    if cache_name is not None:
        taken[cache_name] = companion.twin
    for key in ("output_hidden_states", "output_attentions", "labels"):
        taken.pop(key, None)
    out = backbone(**{**taken, "return_dict": True})
    hidden = getattr(out, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        raise MoeloraError(f"{type(backbone).__name__} gives no last_hidden_state [B, S, d] for a router to read")
    companion.twin = getattr(out, cache_name, None) if cache_name is not None else None
    return hidden
