"""LoftQ: on a quantised base, the experts' factors start as what quantising has lost.

Paper: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659 (ICLR 2024).
With Q = quant(W) [O, D], which the base keeps, and W as it was before:

    W - dequant(Q) ~ U_r S_r V_r^T:   B = U_r S_r^(1/2) / s^(1/2)  [O, r],   A = S_r^(1/2) V_r^T / s^(1/2)  [r, D]

so dequant(Q) + s B A is as near to W as rank r comes. It is a correction of the base, which no gate may switch off: it
is not subtracted at the start, unlike in ``init: pissa``, and the router is ``single``, one LoRA that is always on.
Layers that are not quantised start as usual.

Differences from the paper: it alternates, quantising W - s B A and decomposing what that loses, T times; here the
base's weights are never changed, since adapters are loaded beside the base as anyone quantises it. So it is the paper's
algorithm with T = 1, and PEFT's ``replace_lora_weights_loftq``, which sets B A, and not s B A, to the loss.

``moelora train`` loads the base once more, unquantised, into the host's memory; ``moelora.adapt`` is given it:
``full=``.

Recipe line: ``init: {name: loftq}`` with ``experts: {num_experts: 1, r: 16, lora_alpha: 16}``,
``router: {name: single}`` and ``quantization_config: {load_in_4bit: true, bnb_4bit_quant_type: nf4}``
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from moelora.core.errors import ConfigError
from moelora.core.start import Start
from moelora.init.base import Init, halves, spectrum


class LoftQ(Init):
    """niter: rounds of a randomised decomposition, for large layers; None is exact.

    Raises ConfigError for a router other than single, for experts that are not just A and B, and for more ranks than a
    layer has directions: min(O, D).
    """

    probes = "weights"

    def __init__(self, *, niter: Annotated[int, Field(ge=1)] | None = None) -> None:
        self.niter = niter

    def refuse(self, name: str, router: str) -> None:
        if router != "single":
            raise ConfigError(
                f"init {name} corrects the base, which no gate may switch off; router '{router}' gates it"
            )

    @torch.no_grad()
    def __call__(self, experts: Any, start: Start) -> None:
        A, B = halves("loftq", experts, alone=True)
        assert start.full is not None
        weight = start.weight()
        if experts.r > min(weight.shape):
            raise ConfigError(
                f"init loftq takes {experts.r} directions and '{experts.site.name}' has {min(weight.shape)}; lower "
                "experts.r"
            )
        lost = start.full().to(weight) - weight
        if not lost.any():
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.zeros_(B)
            return
        U, S, V = spectrum(lost, experts.r, self.niter)
        root = (S / experts.scale.to(S)).sqrt()
        A.copy_(root.unsqueeze(1) * V)
        B.copy_(U * root)
