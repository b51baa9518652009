"""Merged experts: the gates average the experts' parameters, and the token passes the one LoRA that results.

Paper: Muqeeth et al., "Soft Merging of Experts with Adaptive Routing" (SMEAR), arXiv 2306.03745, for
adapters; here for LoRA factors. With gates g:

    y = W x + (lora_alpha / r) (sum_e g_e B_e) (sum_e g_e A_e) x

The products B_e A_f of different experts are in it, unlike in ``experts: lora``. No merged matrix is ever made:
z = sum_e g_e (A_e x) [T, r], summed in float32 at least, then sum_e B_e (g_e z). Shapes: lora_A [E*r, D], lora_B
[O, E*r], as ``lora`` has them, and saved alike: alone, an expert is a plain LoRA. With a router of single ranks (units
narrower than an expert) the ranks are merged into one.

Differences from the paper: adapters there have a nonlinearity between their two matrices and biases; LoRAs have none.
Gates are whatever the router says, per token too; one mixture per sequence is ``router: smear``.

Recipe line: ``experts: {name: merged, num_experts: 8, r: 8, lora_alpha: 16}`` with ``router: {name: smear}``
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from moelora.experts.base import Decide
from moelora.experts.lora import LoRA
from moelora.ops import routed_lora
from moelora.ops.project import Image


class Merged(LoRA):
    """LoRA factors mixed before they are multiplied. Refused around a feed-forward block, where each chosen expert has
    an output of its own and there is nothing to merge.
    """

    apart = False
    pairs = False

    def forward(
        self,
        x: Tensor,
        decide: Decide,
        form: Literal["tokens", "each", "sum"] = "tokens",
        onto: Tensor | None = None,
        image: Image | None = None,
    ) -> Tensor:
        """The update [T, O] of tokens x [T, D]; see ``Experts.forward``."""
        assert form == "tokens"
        factors, image = self.composed(), image or Image(x)
        assert factors.A is not None
        h = image.under(factors.A)
        route = decide(factors, image)
        z = (h.unflatten(1, (route.units, -1)) * route.dense().unsqueeze(-1)).sum(1)
        update = routed_lora.apply(z.to(h.dtype), replace(factors, A=None), route, onto)
        return update.to(x.dtype) if onto is None else update
