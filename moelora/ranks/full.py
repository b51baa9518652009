"""Full: every expert uses all its ranks, as plain LoRA does.

    Delta = s B A

Paper: Hu et al., LoRA, arXiv 2106.09685. A [R, D], B [O, R] pass as they are; nothing is saved for it.

Recipe line: ``ranks: {name: full}``
"""

from __future__ import annotations

from torch import Tensor

from moelora.ranks.base import Ranks


class Full(Ranks):
    """The default: no layer has an allocator."""

    needs = ()

    def forward(self, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return A, B, scale
