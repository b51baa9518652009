"""Full: every expert uses all its ranks, as plain LoRA does.

    Delta = s B A

Paper: Hu et al., LoRA, arXiv 2106.09685. A [R, D], B [O, R] pass as they are; nothing is saved for it.

Recipe line: ``ranks: {name: full}``
"""

from __future__ import annotations

from moelora.core.factors import Factors
from moelora.ranks.base import Ranks


class Full(Ranks):
    """The default: no layer has an allocator."""

    needs = ()

    def forward(self, factors: Factors) -> Factors:
        """The factors as they are."""
        return factors
