"""Router z-loss: keeps router logits small, so that float32 softmax stays exact.

    L = mean over tokens of logsumexp(logits)^2

Paper: Zoph et al., ST-MoE, arXiv 2202.08906, eq. 5. Over valid tokens, per layer, mean over layers.

Recipe line: ``losses: {z: 0.001}``
"""

from __future__ import annotations

from torch import Tensor

from moelora.core.route import Route
from moelora.core.tape import View
from moelora.losses.base import Loss, token_mean


class Z(Loss):
    """Penalises large router logits."""

    needs = ("logits",)

    def __call__(self, route: Route, view: View) -> Tensor:
        assert route.logits is not None
        return token_mean(route.logits.logsumexp(-1).square(), view.mask)
