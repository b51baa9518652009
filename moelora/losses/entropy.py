"""Entropy of the routing: pushes each token to one unit, or, with maximise, away from an early decision.

    L = mean over tokens of H(p_t),   H(p) = -sum_u p_u log p_u   (natural log; from 0 to log G)

Source: entropy minimisation as in Grandvalet and Bengio (NeurIPS 2004), maximisation as in Mnih et al., arXiv
1602.01783, there for policies.

p are the router's probabilities [T, G] before any choice of units. Over valid tokens, mean over layers. A weight is
never negative, so the sign is an option. Without maximise the term is +H: sharp choices and units that specialise, at
the risk of settling too early. With maximise it is -H: flat choices, against routers that settle on one unit early.

It looks at one token at a time: sharp tokens may all choose the same unit, which ``losses: {balance: ...}`` prevents.

Recipe line: ``losses: {entropy: 0.01}`` or ``losses: {entropy: {weight: 0.01, maximise: true}}``
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moelora.core.route import Route
from moelora.core.tape import View
from moelora.losses.base import Loss, token_entropy, token_mean


class Entropy(Loss):
    """maximise: False makes each token's probabilities sharper, True flatter (the term is then negative)."""

    needs = ("probs",)

    def __init__(self, weight: float, tokens: Literal["all", "answers"] = "all", *, maximise: bool = False) -> None:
        super().__init__(weight, tokens)
        self.sign = -1 if maximise else 1

    def __call__(self, route: Route, view: View) -> Tensor:
        assert route.probs is not None
        return self.sign * token_mean(token_entropy(route.probs), view.mask)
