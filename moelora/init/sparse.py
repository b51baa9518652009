"""Sparse random A, zero B: FlyLoRA's start, where a frozen A spreads the input over the ranks like a fly's neurons.

    every row of A: round(density * D) entries, at least one, at random places, ~ N(0, 1/r^2);  the others 0;   B = 0

Paper: Zou et al., "FlyLoRA", arXiv 2510.08396 (NeurIPS 2025), where density is top_k / r. r is the number of rows of A,
the standard deviation 1/r. Zeros stay zero only where A is frozen: ``experts: {train: B}``.

Recipe line: ``init: {name: sparse, density: 0.25}`` with ``experts: {r: 32, train: B}``
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from moelora.core.start import Start
from moelora.init.base import Init, halves


class Sparse(Init):
    """density: share of entries of each row of A that are not zero.

    Raises ConfigError for experts that are not just A and B.
    """

    def __init__(self, *, density: Annotated[float, Field(gt=0, le=1)] = 0.25) -> None:
        self.density = density

    @torch.no_grad()
    def __call__(self, experts: nn.Module, start: Start) -> None:
        A, B = halves("sparse", experts)
        ranks, wide = A.shape
        chosen = torch.rand_like(A).argsort(1)[:, : max(1, round(self.density * wide))]
        A.zero_().scatter_(1, chosen, torch.randn_like(A)[:, : chosen.shape[1]] / ranks)
        nn.init.zeros_(B)
