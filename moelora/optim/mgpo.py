"""MGPO: every gradient is taken a little up the hill, along the momentum, so that training ends where it is flat.

Paper: Chang et al., "LoRA-MGPO: Mitigating Double Descent in Low-Rank Adaptation via Momentum-Guided Perturbation
Optimization", arXiv 2502.14538 (v2 and v3; Findings of EMNLP 2025). With A and B of all experts as one vector w, and
gradients g_t:

    eps_t = rho (v / ||v||) / n           v, n of the steps before; nothing in the first one
    g_t   = gradient at w + eps_t         one backward, all micro-batches; then w is put back, bit for bit
    v = mu v + (1 - mu) g_t,   n = beta n + (1 - beta) ||g_t||,   and torch's optimiser steps w by g_t

n is of the whole model. group: all has one ||v||, so that ||eps_t|| = rho / n; with expert each pair of each layer (per
gate, under SMoRA per rank) has its own, and its part of eps_t is that long. g_t is clipped before. Where a number's
gradient is exactly zero, as of an expert that no token used, v stays. A step that is skipped puts w back, too, and
keeps v and n. State: v, as large as A and B, and n; w is kept aside within a step, so no checkpoint holds w + eps.

Defaults: rho 0.05, beta 0.9, mu 0.9, as quoted from the paper (T5-base on GLUE); 0.01 and 0.8 for larger models.

The authors' code was not available. Ours: the sign is +, the ascent of sharpness-aware minimisation (a port has -, with
v for a descent); v is a buffer of mu, which is Adam's first moment at beta1 = mu; n starts as the first norm seen (1 in
the port); the norm of a model is that of its experts' A and B. For GGPO, which is version 1 and another algorithm, see
``ggpo``.

Recipe line: ``optim: {name: mgpo, rho: 0.05}``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.core.step import Now, Trained
from moelora.optim.base import Optim, apart, together

NAMES = ("lora_A", "lora_B")


class MGPO(Optim):
    """rho, beta, mu, group: see the module. Raises ConfigError for experts that do not train both A and B, and with
    group: expert for those that share them.
    """

    trains = NAMES

    def __init__(
        self,
        *,
        rho: Annotated[float, Field(ge=0)] = 0.05,
        beta: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        mu: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        group: Literal["all", "expert"] = "all",
    ) -> None:
        self.rho, self.beta, self.mu, self.group = rho, beta, mu, group

    def check(self, experts: Any) -> None:
        super().check(experts)
        if self.group == "expert" and "own_A" not in experts.gives:
            name = type(experts).__name__.lower()
            raise ConfigError(f"optim mgpo with group: expert, and experts '{name}' share A; take group: all")

    @torch.no_grad()
    def begin_step(self, layers: Sequence[Trained], now: Now) -> None:
        if "n" not in layers[0].state:
            return
        moments = [{name: layer.state[f"v_{name}"] for name in NAMES} for layer in layers]
        lengths = self.lengths(layers, moments, self.group)
        for layer, own, length in zip(layers, moments, lengths, strict=True):
            for name, v in own.items():
                far = length * layer.state["n"]
                factor = torch.where(far > 0, self.rho / far, 0.0).view(-1, 1, 1)
                value = layer.value(name)
                layer.state[f"w_{name}"] = value.clone()
                moved = self.split(layer, name, v, self.group) * factor
                layer.set_value(name, value + (moved[0] if self.group == "all" else together(name, moved)))

    @torch.no_grad()
    def before_step(self, layers: Sequence[Trained], now: Now) -> None:
        self.skip_step(layers, now)
        gradients = [{name: layer.gradient(name) for name in NAMES} for layer in layers]
        for layer, own, length in zip(layers, gradients, self.lengths(layers, gradients, "all"), strict=True):
            layer.state["n"] = torch.lerp(length, layer.state.get("n", length), self.beta)
            for name, gradient in own.items():
                v = layer.state.get(f"v_{name}", torch.zeros_like(gradient))
                layer.state[f"v_{name}"] = torch.where(gradient == 0, v, torch.lerp(gradient, v, self.mu))

    @torch.no_grad()
    def skip_step(self, layers: Sequence[Trained], now: Now) -> None:
        for layer in layers:
            for name in NAMES:
                if f"w_{name}" in layer.state:
                    layer.set_value(name, layer.state.pop(f"w_{name}"))

    @staticmethod
    def split(layer: Trained, name: str, tensor: Tensor, group: str) -> Tensor:
        """A tensor by groups of a layer, [E, ...] or [1, ...]."""
        return tensor.unsqueeze(0) if group == "all" else apart(layer, name, tensor)

    def lengths(self, layers: Sequence[Trained], tensors: Sequence[dict[str, Tensor]], group: str) -> list[Tensor]:
        """For each layer the norms of its groups, [E] or [1]."""
        norms = [
            torch.stack([self.split(layer, name, tensor, group).flatten(1).norm(dim=1) for name, tensor in own.items()])
            for layer, own in zip(layers, tensors, strict=True)
        ]
        if group == "all":
            whole = torch.cat([norm.to(norms[0].device) for norm in norms])
            norms = [whole.to(norm.device) for norm in norms]
        return [norm.norm(dim=0) for norm in norms]
