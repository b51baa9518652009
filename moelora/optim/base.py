"""Optim: what happens to the gradients of an expert's A and B between backward and step. One file per method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moelora.core.step import Now, Stepped, Trained


class Optim(Stepped, ABC):
    """A method beside torch's optimiser; one for the whole model. Recipe keys are keyword-only arguments.

    It takes part in steps by ``begin_step``, ``before_step`` and ``after_step`` of ``Stepped``, for layers whose
    experts train. What it keeps is each layer's ``state``.

    whole_step: its gradients are the whole step, with moments of its own, so that torch's optimiser has to be SGD
        (``training.optim: sgd``), whose weight decay is then the decoupled one.
    """

    whole_step: ClassVar[bool] = False

    def rate(self, name: str) -> float:
        """What the learning rate of a parameter is multiplied by. name: as in the adapted model."""
        return 1.0


@dataclass
class Pair:
    """The LoRA pairs of a layer's experts, and their gradients: A, dA [E, r, D], B, dB [E, O, r].

    scale: [E], what an expert's update is multiplied by: s B A. live: [E], whether its gradients are not all zero: an
    expert that no token of the global batch used has nothing to learn, and is left as it is. state: what the method
    keeps, every tensor [E, ...]; of experts that are not live it is put back.
    """

    A: Tensor
    B: Tensor
    dA: Tensor
    dB: Tensor
    scale: Tensor
    live: Tensor
    state: dict[str, Tensor]


class PairOptim(Optim):
    """An Optim that changes the gradients of every pair by itself, given nothing but the pair."""

    @abstractmethod
    def change(self, pair: Pair, now: Now) -> tuple[Tensor, Tensor]:
        """The gradients of A and B that the optimiser gets, shaped as ``pair.dA`` and ``pair.dB``."""

    @torch.no_grad()
    def before_step(self, layers: Sequence[Trained], now: Now) -> None:
        for layer in layers:
            if {"lora_A", "lora_B"} <= set(layer.names):
                pair = pair_of(layer)
                kept = dict(layer.state)
                dA, dB = self.change(pair, now)
                for key, value in pair.state.items():
                    old = kept.get(key, torch.zeros_like(value))
                    layer.state[key] = torch.where(_wide(pair.live, value), value, old)
                layer.set_gradient("lora_A", (dA * _wide(pair.live, dA)).flatten(0, 1))
                layer.set_gradient("lora_B", (dB * _wide(pair.live, dB)).transpose(0, 1).flatten(1, 2))


def pair_of(layer: Trained) -> Pair:
    """The pairs of a layer whose experts train lora_A [E * r, D] and lora_B [O, E * r]."""
    experts = layer.experts.num_experts
    A, dA = (tensor.unflatten(0, (experts, -1)) for tensor in (layer.value("lora_A"), layer.gradient("lora_A")))
    B, dB = (
        tensor.unflatten(1, (experts, -1)).transpose(0, 1)
        for tensor in (layer.value("lora_B"), layer.gradient("lora_B"))
    )
    live = (dA != 0).flatten(1).any(1) | (dB != 0).flatten(1).any(1)
    scale = layer.experts.scale.view(experts, -1)[:, 0].to(A)
    return Pair(A, B, dA, dB, scale, live, dict(layer.state))


def _wide(flags: Tensor, like: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (like.dim() - 1))
