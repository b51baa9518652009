"""Core orthogonality: keeps the core matrices of CoMoL's experts apart.

    L = mean over i != j of cos(vec M_i, vec M_j)^2

Source: a version of CoMoL's code (arXiv 2603.00573) beyond the released commit, where it is an optional flag; the paper
does not have it.

It is 0 when all cores are orthogonal as vectors, 1 when they are equal up to a factor, and 0 for one expert. Cores that
are zero count as orthogonal. Shapes: core [E, r, r]; with E > r^2 it cannot reach 0. It reads the experts alone, so
``tokens`` has no meaning and is refused; mean over layers.

Recipe line: ``losses: {core_orthogonality: 0.01}`` with ``experts: {name: core, num_experts: 8, r: 16}``
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.core.route import Route
from moelora.core.tape import View
from moelora.losses.base import Loss


class CoreOrthogonality(Loss):
    """Penalises cores that point the same way. Raises ConfigError for ``tokens: answers``."""

    needs = ("core",)
    of_tokens = "none"

    def __call__(self, route: Route, view: View) -> Tensor:
        assert view.factors is not None and view.factors.core is not None
        core = view.factors.core
        unit = F.normalize(core.to(torch.promote_types(core.dtype, torch.float32)).flatten(1), dim=-1)
        pairs = len(unit) * (len(unit) - 1) / 2
        return (unit @ unit.t()).triu(diagonal=1).square().sum() / max(1.0, pairs)
