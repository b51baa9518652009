"""A model whose logits are there while TRL computes its loss, for auxiliary losses that read them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


def with_logits(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model, which gives what TRL's fused head would, from logits: they are all there at once, and the model's own
    ``__call__`` sees them."""

    def call(*, fused_lm_head: bool = False, **inputs: Any) -> Any:
        out = model(**inputs)
        if not fused_lm_head:
            return out
        shifted = inputs.get("shift_labels")
        labels = inputs["labels"][:, 1:] if shifted is None else shifted
        logits = out.logits[:, : labels.shape[1]].float()
        mask = labels != -100
        logp = logits.log_softmax(-1)
        chosen = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1) * mask
        return SimpleNamespace(
            log_probs=chosen * mask,
            entropy=entropy,
            is_top1=(logits.argmax(-1) == labels) & mask,
            label_mask=mask,
            aux_loss=getattr(out, "aux_loss", None),
        )

    return call
