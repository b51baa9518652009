"""L2 preservation: holds the experts near the values they started from.

    L = sum over the layer's expert parameters of ||theta - theta_0||^2

Paper: Li et al., LoRA-Mixer, arXiv 2507.00029 (ICLR 2026), eq. 11, for training experts and router together after the
experts were trained alone.

theta_0 are the values after initialisation, or those of the adapters when the experts start from ``experts: {adapters:
[...]}``. They are saved with the adapter (which doubles its size) and come back with it, so a resumed run is held to
the same start. It reads the experts alone, so ``tokens`` has no meaning and is refused.

Differences from the paper: the term is the mean over adapted layers, theirs the sum: beta there is a weight of beta
times the number of adapted layers here. Parameters that do not train (``experts: {train: B}`` or ``none``) add 0.

Recipe line: ``losses: {l2_preservation: 0.1}`` with ``experts: {adapters: [out/a, out/b], num_experts: 2}``
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelora.core.route import Route
from moelora.core.tape import View
from moelora.losses.base import Loss


class L2Preservation(Loss):
    """Squared distance from the start. Raises ConfigError for ``tokens: answers``."""

    anchored = True
    of_tokens = "none"

    def __call__(self, route: Route, view: View) -> Tensor:
        assert view.factors is not None
        anchors = view.factors.anchors  # starts are float32 at least, so the difference is too
        return torch.stack([(now - start).square().sum() for now, start in anchors]).sum()
