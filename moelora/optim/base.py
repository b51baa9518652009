"""Optim: what happens to the gradients of an expert's A and B between backward and step. One file per method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.core.step import Now, Stepped, Trained


class Optim(Stepped, ABC):
    """A method beside torch's optimiser; one for the whole model. Recipe keys are keyword-only arguments.

    It takes part in steps by ``begin_step``, ``before_step``, ``skip_step`` and ``after_step`` of ``Stepped``, for
    layers whose experts train. What it keeps is each layer's ``state``.

    trains: names of the experts' tensors without whose training it has nothing to do. pairs: whether it reckons with
        experts that are pairs B A and nothing else.
    """

    trains: ClassVar[tuple[str, ...]] = ()
    pairs: ClassVar[bool] = False

    def rate(self, name: str) -> float:
        """What the learning rate of a parameter is multiplied by. name: as in the adapted model."""
        return 1.0

    def check(self, experts: Any) -> None:
        """Raise ConfigError for experts it is not for. experts: a layer's, perhaps without values."""
        missing = [name for name in self.trains if name not in trained_names(experts)]
        if missing:
            have = f"have no {missing[0]}" if not hasattr(experts, missing[0]) else f"do not train {missing[0]}"
            raise ConfigError(
                f"optim {self.name} acts on {' and '.join(self.trains)}, and experts "
                f"'{type(experts).__name__.lower()}' {have} here; set experts.train, choose other experts, or "
                "optim: plain"
            )
        gates = [name for name in trained_names(experts) if name.startswith("allocator.")]
        if self.pairs and (gates or not experts.pairs):
            found = f"{gates[0]} between A and B" if gates else f"experts '{type(experts).__name__.lower()}'"
            raise ConfigError(
                f"optim {self.name} reckons with experts that are pairs B A and nothing else, and found {found}; "
                "choose experts: lora, and no ranks with gates, or another optim"
            )

    @property
    def name(self) -> str:
        """As a recipe has it."""
        return type(self).__module__.rpartition(".")[2]


@dataclass
class Pair:
    """The LoRA pairs of a layer, one for every gate, and their gradients: A, dA [E, r, D], B, dB [E, O, r].

    One gate multiplies all of a pair, so its gradients come from one gradient G [O, D] of its update s B A:
    dA = s B^T G, dB = s G A^T. Of a router that chooses single ranks (SMoRA), every rank is a pair, r = 1.

    ranks: [E, r], which have a gradient; the others are at rest, zero in A and B here, and stay as they are. live: [E],
    pairs that have such ranks: an expert that no token of the global batch used has nothing to learn. scale: [E], s.
    state: what the method keeps, every tensor [E, ...]; of pairs that are not live it is put back.
    """

    A: Tensor
    B: Tensor
    dA: Tensor
    dB: Tensor
    scale: Tensor
    live: Tensor
    ranks: Tensor
    state: dict[str, Tensor]


class PairOptim(Optim):
    """An Optim that changes the gradients of every pair by itself, given nothing but the pair.

    whole_step: what it gives is no gradient for torch's optimiser but the step of A and B, to be multiplied by the
        learning rate alone; torch's optimiser has the other parameters (routers).
    """

    trains: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    pairs = True
    whole_step: bool = False

    @abstractmethod
    def change(self, pair: Pair, now: Now) -> tuple[Tensor, Tensor]:
        """The gradients of A and B that the optimiser gets, shaped as ``pair.dA`` and ``pair.dB``; or their step."""

    def shrink(self, now: Now) -> float:
        """What A and B are multiplied by in a whole step: decoupled weight decay."""
        return 1 - now.lr * now.decay

    @torch.no_grad()
    def before_step(self, layers: Sequence[Trained], now: Now) -> None:
        for layer in layers:
            pair = pair_of(layer)
            kept = dict(layer.state)
            dA, dB = self.change(pair, now)
            for key, value in pair.state.items():
                old = kept.get(key, torch.zeros_like(value))
                # contiguous, as a checkpoint gives it back: products of transposed tensors round differently
                layer.state[key] = torch.where(_wide(pair.live, value), value, old).contiguous()
            rest = ~pair.ranks
            found = {"lora_A": dA.masked_fill(rest.unsqueeze(-1), 0), "lora_B": dB.masked_fill(rest.unsqueeze(-2), 0)}
            for name in (name for name in found if name in layer.names):
                change = together(name, found[name])
                if self.whole_step:
                    value = layer.value(name)
                    layer.set_value(name, torch.where(change == 0, value, self.shrink(now) * value - now.lr * change))
                    change = torch.zeros_like(change)  # and so torch's optimiser leaves it alone
                layer.set_gradient(name, change)


def trained_names(experts: Any) -> list[str]:
    """The experts' tensors that train."""
    return [name for name, parameter in experts.named_parameters() if parameter.requires_grad]


def pair_of(layer: Trained) -> Pair:
    """The pairs of a layer with lora_A [R, D] and lora_B [O, R]; gradients of a frozen one are zero."""
    dA, dB = (
        apart(layer, name, layer.gradient(name) if name in layer.names else torch.zeros_like(layer.value(name)))
        for name in ("lora_A", "lora_B")
    )
    A, B = (apart(layer, name, layer.value(name)) for name in ("lora_A", "lora_B"))
    ranks = (dA != 0).any(2) | (dB != 0).any(1)
    scale = layer.experts.scale.view(layer.units, -1)[:, 0].to(dB)
    A, B = A.to(dB).masked_fill(~ranks.unsqueeze(-1), 0), B.to(dB).masked_fill(~ranks.unsqueeze(-2), 0)
    return Pair(A, B, dA, dB, scale, ranks.any(1), ranks, dict(layer.state))


def apart(layer: Trained, name: str, tensor: Tensor) -> Tensor:
    """lora_A [R, D] as [E, r, D], lora_B [O, R] as [E, O, r]: one for every pair of a layer."""
    if name == "lora_A":
        return tensor.unflatten(0, (layer.units, -1))
    return tensor.unflatten(1, (layer.units, -1)).transpose(0, 1)


def together(name: str, pairs: Tensor) -> Tensor:
    """What ``apart`` was given."""
    return pairs.flatten(0, 1) if name == "lora_A" else pairs.transpose(0, 1).flatten(1, 2)


def inverse(gram: Tensor, ridge: float) -> Tensor:
    """(gram + ridge * t I)^-1 of symmetric matrices [E, r, r], t the mean of what is not zero on their diagonal.

    In float64 by eigendecomposition; directions in which nothing is stay zero, so a matrix of zeros gives zeros.
    """
    wide = gram.double()
    values, vectors = torch.linalg.eigh(wide)
    diagonal = wide.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.sum(-1, keepdim=True) / (diagonal != 0).sum(-1, keepdim=True).clamp(min=1)
    least = torch.finfo(gram.dtype).eps * gram.shape[-1] * values[..., -1:]
    raised = values.clamp(min=0) + ridge * mean
    inverted = torch.where(raised > least, 1 / raised, 0.0)
    return ((vectors * inverted.unsqueeze(-2)) @ vectors.mT).to(gram.dtype)


def _wide(flags: Tensor, like: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (like.dim() - 1))
