"""Nystrom (NLoRA): every expert's three factors start as slices of the base weight, without any decomposition.

Paper: Guo et al., "NLoRA: Nystrom-Initiated Low-Rank Adaptation for Large Language Models", arXiv 2502.14482, and its
released code. For experts with a matrix between their factors (``experts: slora``), r rows and columns i of W [O, D]:

    A = W[i, :]  [r, D],   B = W[:, i]  [O, r],   M = W[i, i]  (core: raw),   or its pseudo-inverse  (core: pinv)

With ``pinv`` B M A is the Nystrom approximation of W: exact in these rows and columns, and everywhere if W has rank r.
Expert e takes rows and columns e r to (e + 1) r (``experts: slices``), or all take the first r (``same``). Training M
alone is the paper's IntTune: ``experts: {name: slora, train: middle}``. ``raw`` is the default since the released code
has it.

Difference from the released code: it adds s B M A to W as it is, so that the model starts as another model than the
base. Here the start is subtracted, s (B M A - B0 M0 A0), unless ``residual: false`` asks for the released behaviour.

Recipe line: ``init: {name: nystrom}`` with ``experts: {name: slora, num_experts: 4, r: 8, lora_alpha: 8}``
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from moelora.core.errors import ConfigError
from moelora.core.start import Start
from moelora.init.base import Init, Share, named, shares


class Nystrom(Init):
    """core, experts, residual: see above. In a pseudo-inverse, singular values below r eps of the largest are zero.

    Raises ConfigError for experts that are not A, B and a square matrix each between them, and where a layer has fewer
    rows and columns than its experts take: min(O, D).
    """

    def __init__(
        self, *, core: Literal["raw", "pinv"] = "raw", residual: bool = True, experts: Share = "slices"
    ) -> None:
        self.core, self.moves, self.experts = core, residual, experts

    @torch.no_grad()
    def __call__(self, experts: Any, start: Start) -> None:
        parameters = dict(experts.named_parameters(recurse=False))
        if parameters.keys() != {"lora_A", "lora_B", "middle"}:
            raise ConfigError(
                f"init nystrom sets lora_A, lora_B and the middle between them; experts '{named(experts)}' train "
                f"{', '.join(sorted(parameters)) or 'nothing'}; use experts: slora, or for two factors init: pissa"
            )
        weight = start.weight()
        i = shares("nystrom", self.experts, experts, min(weight.shape))
        parameters["lora_A"].copy_(weight[i.flatten()])
        parameters["lora_B"].copy_(weight[:, i.flatten()])
        middle = weight[i.unsqueeze(2), i.unsqueeze(1)]
        parameters["middle"].copy_(torch.linalg.pinv(middle) if self.core == "pinv" else middle)
