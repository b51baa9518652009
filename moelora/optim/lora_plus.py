"""LoRA+: B learns faster than A, by a constant factor.

Paper: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354 (ICML 2024). With the
schedule's learning rate lr:

    lr_A = lr,   lr_B = ratio * lr

Every optimiser of torch's takes it, with its own moments. Weight decay, which torch multiplies by the learning rate, is
ratio times as strong on B.

Defaults: ratio 16, the paper's 2^4; it advises about half the learning rate of LoRA.

Differences from the released code (and PEFT's): there every trained one-dimensional tensor, such as a bias, learns as
fast as B, and embeddings at 1e-6. Here it is lora_B of the experts alone, as in the paper; routers, gates, cores and
modules_to_save keep the schedule's rate.

Recipe line: ``optim: {name: lora_plus, ratio: 16}``
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moelora.optim.base import Optim


class LoRAPlus(Optim):
    """A learning rate of its own for every expert's lora_B. ratio: that of B by that of all else.

    Raises ConfigError for experts that have no lora_B, or do not train it.
    """

    trains = ("lora_B",)

    def __init__(self, *, ratio: Annotated[float, Field(gt=0)] = 16.0) -> None:
        self.ratio = ratio

    def rate(self, name: str) -> float:
        return self.ratio if name.endswith(".experts.lora_B") else 1.0
