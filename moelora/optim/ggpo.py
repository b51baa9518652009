"""GGPO: random noise on every adapted weight, larger in rows that are long or whose gradient is.

Paper: Chang et al., "LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation
Optimization", arXiv 2502.14538 (version 1). Forwards and backwards of a step are those of W + E, with one draw for all
its micro-batches:

    y = (W + E) x + experts(x),   E_ij ~ N(0, tau_i^2)

    law: additive   tau_i^2 = (sigma^2 ||W_i||^2 + beta^2 d_i^2) / D
         port       tau_i   = (sigma ||W_i|| + beta d_i^2) / sqrt(D)
    d_i = ||G_i||,  G = sum_e s (B_e dA_e + dB_e A_e)       of the step before, clipped; no noise in the first step

W [O, D] is the base layer's weight and i a row of it; a row of E is about sigma ||W_i|| long. The noise is one for all
experts of a layer, and no gradient goes through it. In evaluation there is none, and none is ever in a checkpoint: it
is made in the forward from a seed (seed, step, layer), and anew in recomputation and backward. It costs a product with
a matrix as large as W, and a draw of it, in forward and in backward. State: ||W_i|| and d_i, [O] each.

Defaults: law additive, which alone has one unit; sigma 0.03 and beta 0.01 from a third-party port, whose law port is.

The authors' code was not available. Differences from that port: it divides by O where the noise it is built on
(Flat-LoRA, arXiv 2409.14396) has D, as here. Its ||W_i|| is the mean of sampled rows, and the adapter's added; here it
is each row's own, of the base weight alone, since what of the adapter a token sees depends on its gates. d_i has the
gates in it, and is not divided by them. For its successor, another algorithm, see ``mgpo``.

Recipe line: ``optim: {name: ggpo, sigma: 0.03, beta: 0.01}``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from moelora.core.step import Now, Trained
from moelora.optim.base import Optim


class GGPO(Optim):
    """sigma, beta, law: see the module. seed: of the noise. Raises ConfigError for experts that are no sum of pairs."""

    trains = ("lora_A", "lora_B")
    pairs = True

    def __init__(
        self,
        *,
        sigma: Annotated[float, Field(ge=0)] = 0.03,
        beta: Annotated[float, Field(ge=0)] = 0.01,
        law: Literal["additive", "port"] = "additive",
        seed: Annotated[int, Field(ge=0, lt=4096)] = 0,
    ) -> None:
        self.sigma, self.beta, self.law, self.seed = sigma, beta, law, seed

    def deviation(self, layer: Trained) -> Tensor:
        """tau [O]."""
        long, d = self.sigma * layer.state["rows"], layer.state["d"]
        tau = torch.hypot(long, self.beta * d) if self.law == "additive" else long + self.beta * d**2
        return tau / layer.site.in_features**0.5

    @torch.no_grad()
    def begin_step(self, layers: Sequence[Trained], now: Now) -> None:
        for layer in layers:
            if "d" in layer.state:
                seed = (self.seed * 2**30 + now.step) * 2**20 + layer.site.index
                layer.set_noise(self.deviation(layer), seed)

    @torch.no_grad()
    def before_step(self, layers: Sequence[Trained], now: Now) -> None:
        self.skip_step(layers, now)
        for layer in layers:
            if "rows" not in layer.state:
                layer.state["rows"] = layer.base_weight().norm(dim=1)
            A, dA = layer.value("lora_A"), layer.gradient("lora_A")
            B, dB = layer.value("lora_B"), layer.gradient("lora_B")
            left = torch.cat([B, dB], 1) * layer.experts.scale.to(dB).repeat(2)
            right = torch.cat([dA, A.to(dA)])
            layer.state["d"] = ((left @ (right @ right.t())) * left).sum(1).clamp(min=0).sqrt()  # G is never made

    def skip_step(self, layers: Sequence[Trained], now: Now) -> None:
        for layer in layers:
            layer.set_noise(None)
