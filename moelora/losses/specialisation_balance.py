"""Specialisation balance: even use of units over all tokens, and an entropy term for each token.

    L = sum_u P_u f_u + entropy_coef * mean_t H(p_t)

Paper: Li et al., LoRA-Mixer, arXiv 2507.00029 (ICLR 2026), eq. 3 and 5; called SBL in its first version, RSL in the
second. There is no released code.

P_u is the mean probability of unit u, f_u the share of tokens whose most probable unit is u (no gradient; ties go to
the lowest unit), H(p) = -sum_u p_u log p_u. Over valid tokens, f over those of all processes; mean over layers. A level
router has sum P f = 1/G, one that sends every token to one unit 1; H lies between 0 and log G.

The sign of the entropy is open, so entropy_coef has no default. The printed loss is alpha sum P f - lambda H; its
minimum has flat probabilities. The text says that it suppresses flat ones and makes experts specialise, which is the
opposite sign. With ``weight`` alpha, entropy_coef = -lambda / alpha is the printed equation (each token's entropy
rises), entropy_coef = +lambda / alpha what the text says (it falls).

scale_by_experts puts the factor G before sum P f, as in Switch, so that a level router has 1; the paper has none.

Recipe line: ``losses: {specialisation_balance: {weight: 0.1, entropy_coef: 0.1}}``
"""

from __future__ import annotations

from typing import Literal

import torch

from moelora.core.route import Route, dense_gates, top_k
from moelora.core.tape import View
from moelora.core.term import Product
from moelora.losses.base import Loss, product, token_entropy, token_mean


class SpecialisationBalance(Loss):
    """entropy_coef: times the mean token entropy; below zero flattens, above zero sharpens, required.

    scale_by_experts: multiply the balance part by the number of units.
    """

    needs = ("probs",)

    def __init__(
        self,
        weight: float,
        tokens: Literal["all", "answers"] = "all",
        *,
        entropy_coef: float,
        scale_by_experts: bool = False,
    ) -> None:
        super().__init__(weight, tokens)
        self.entropy_coef, self.scale_by_experts = entropy_coef, scale_by_experts

    def __call__(self, route: Route, view: View) -> Product:
        probs = route.probs
        assert probs is not None
        first = top_k(probs, 1)
        P = token_mean(probs, view.mask) * (route.units if self.scale_by_experts else 1)
        entropy = self.entropy_coef * token_mean(token_entropy(probs), view.mask)
        return product(dense_gates(torch.ones_like(probs[:, :1]), first, route.units), P, view, entropy)
