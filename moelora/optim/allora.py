"""ALLoRA: every row of A and B learns at a rate of its own, the slower the longer the row already is.

Paper: Huang and Balestriero, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", arXiv 2410.09692. For a row m
of a factor, with the learning rate lr:

    lr_m = lr f(m),   f(m) = (||m||_2 + eta^(-1/p))^(-p)        p = exponent; 1 / sqrt(||m|| + 1/eta^2) at 1/2

A row of zeros has f = eta; f falls as ||m||^-p. It is computed anew for every step from the rows before it. mode lr:
the row's whole step, weight decay included, is multiplied by f after torch's optimiser has taken it. mode grad: its
gradient is. With SGD the two are one; Adam divides by the size of gradients, so there the second does next to nothing.

Shapes: rows of A [r, D] and of B [O, r] of each expert, whatever the router gates. An unused expert stays as it is.

Defaults: eta 2, exponent 1/2 and both factors, from third-party code; the authors published none. The abstract says the
rate is inverse to the norm (exponent 1); it has no dropout and no scale, that is ``lora_alpha`` equal to r. Its
motivation is about B, whose rows start at zero (targets: B).

Differences from third-party code: it computes f once, or averages it over the rows.

Recipe line: ``optim: {name: allora, eta: 2}``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from moelora.core.step import Now, Trained
from moelora.optim.base import Optim


class ALLoRA(Optim):
    """eta: a row of zeros learns at eta times the rate. mode: what is multiplied, the step (lr) or the gradient (grad).

    targets: both factors, or B alone. Raises ConfigError for experts that have no lora_B, or do not train it.
    """

    trains = ("lora_B",)

    def __init__(
        self,
        *,
        eta: Annotated[float, Field(gt=0)] = 2.0,
        exponent: Annotated[float, Field(gt=0)] = 0.5,
        mode: Literal["lr", "grad"] = "lr",
        targets: Literal["both", "B"] = "both",
    ) -> None:
        self.eta, self.exponent, self.mode = eta, exponent, mode
        self.targets = ("lora_A", "lora_B") if targets == "both" else ("lora_B",)

    def factors(self, layer: Trained, name: str, value: Tensor) -> Tensor:
        """f of every row, as a tensor that multiplies ``value``."""
        width = value.shape[1] if name == "lora_A" else layer.experts.r
        norms = value.unflatten(1, (-1, width)).norm(dim=2, keepdim=True)
        factors = (norms + self.eta ** (-1 / self.exponent)) ** -self.exponent
        return factors.expand(-1, -1, width).flatten(1)

    @torch.no_grad()
    def before_step(self, layers: Sequence[Trained], now: Now) -> None:
        for layer in layers:
            for name in (name for name in self.targets if name in layer.names):
                value = layer.value(name)
                if self.mode == "lr":
                    layer.state[name] = value.clone()  # until after_step: no checkpoint is written in between
                else:
                    layer.set_gradient(name, layer.gradient(name) * self.factors(layer, name, value))

    @torch.no_grad()
    def after_step(self, layers: Sequence[Trained], now: Now) -> None:
        for layer in layers if self.mode == "lr" else ():
            for name in (name for name in self.targets if name in layer.names):
                old, new = layer.state.pop(name), layer.value(name)
                layer.set_value(name, old + self.factors(layer, name, old) * (new - old))
