"""Spectrum: keeps the singular values that experts train small.

    L = sum over experts e and ranks i of sigma_ei^2

Paper: Wang et al., KaSA, arXiv 2412.06071 (ICLR 2025), eq. 9 and 10: its beta is ``weight``, 1e-4 in the released code.

Shapes: sigma [E*r]. Summed over experts, so each is held as it would be alone; mean over layers, as in the released
code, where PEFT has the sum: its beta is ours divided by the number of layers. It reads the experts alone, so
``tokens`` has no meaning and is refused.

Recipe line: ``losses: {spectrum: 0.0001}`` with ``experts: {name: kasa, num_experts: 4, r: 8}``
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelora.core.route import Route
from moelora.core.tape import View
from moelora.losses.base import Loss


class Spectrum(Loss):
    """Squared singular values. Raises ConfigError for ``tokens: answers`` and for experts without any."""

    needs = ("sigma",)
    of_tokens = "none"

    def __call__(self, route: Route, view: View) -> Tensor:
        assert view.factors is not None
        sigma = view.factors.parts["sigma"]
        return sigma.to(torch.promote_types(sigma.dtype, torch.float32)).square().sum()
