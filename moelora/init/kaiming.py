"""Kaiming-uniform A, zero B: the model starts as the base model, bit for bit.

    A ~ U(-1/sqrt(D), 1/sqrt(D)),   B = 0,   every core (CoMoL) ~ U(-1/sqrt(r), 1/sqrt(r))

What else experts have (gates, coefficients, frozen bases) starts as their own file says.

Paper: Hu et al., LoRA, arXiv 2106.09685 (their released code: Kaiming uniform with a = sqrt(5)); cores as in CoMoL's.

Recipe line: ``init: {name: kaiming}``
"""

from __future__ import annotations

import math

import torch
from torch import nn

from moelora.core.start import Start
from moelora.init.base import Init


class Kaiming(Init):
    """LoRA's own initialisation, per expert."""

    @torch.no_grad()
    def __call__(self, experts: nn.Module, start: Start) -> None:
        parameters = dict(experts.named_parameters())
        if "lora_A" in parameters:
            nn.init.kaiming_uniform_(parameters["lora_A"], a=math.sqrt(5))
        if "lora_B" in parameters:
            nn.init.zeros_(parameters["lora_B"])
        if "core" in parameters:
            nn.init.uniform_(parameters["core"], -1, 1).div_(math.sqrt(parameters["core"].shape[-1]))
