"""Load-balancing loss of Switch Transformers and Mixtral.

    L = G * sum_u f_u P_u,   f_u = choices of unit u per token (sums to k, no gradient),   P_u = mean probability

Paper: Fedus et al., arXiv 2101.03961, eq. 4; with f summing to k as in Mixtral, so that ``router_aux_loss_coef`` values
carry over.

A perfectly balanced router scores k. Where a router chooses by a threshold (AdaMoLE), P is the mean of what
probabilities exceed it by. Over valid tokens, f over those of all processes; mean over layers.

Recipe line: ``losses: {balance: 0.01}``
"""

from __future__ import annotations

from moelora.core.route import Route
from moelora.core.tape import View
from moelora.core.term import Product
from moelora.losses.base import Loss, product, token_mean


class Balance(Loss):
    """Pushes every unit towards the same share of tokens."""

    needs = ("probs",)

    def __call__(self, route: Route, view: View) -> Product:
        scores = route.probs if route.margin is None else route.margin
        assert scores is not None
        return product(route.chosen(), route.units * token_mean(scores, view.mask), view)
