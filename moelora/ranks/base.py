"""Ranks: how many ranks each expert really uses, layer by layer. One file per way of allocating them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Final

import torch
from pydantic import Field
from torch import Tensor, nn

from moelora.core.errors import ConfigError
from moelora.core.module import ExactBuffers
from moelora.core.start import Start
from moelora.core.step import Stepped, Trained
from moelora.core.tape import Site

PARTS: Final = ("lora_A", "lora_B", "allocator.E")
"""What is trained where something diagonal stands between A and B."""
Count = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(gt=0, lt=1)]


class Ranks(ExactBuffers, Stepped, ABC):
    """Stands between the factors of one site's experts and their use. It masks; nothing is ever resized.

    Subclasses take ``(site, num_experts, r)`` first and pass them on; recipe keys follow as keyword-only arguments. A
    rank is left out where its column of B is zero, and export drops it. State that decides which (masks, budgets) are
    persistent buffers, gates are parameters: both are saved with the router. What it changes from step to step it does
    in ``begin_step``, ``before_step`` and ``after_step`` of ``Stepped``, called on the first site's for all of them; a
    layer's own is ``layer.experts.allocator``, and its parameters are named ``allocator.NAME`` there.

    needs: what it needs of the experts, see ``Experts.gives``. starts: whether it sets lora_A and lora_B in ``fill``,
        by chance with a standard deviation of 0.02, and goes by their gradients, so that both are trained. counts:
        whether it wants to know how many tokens got to each of its experts. power: the scale is lora_alpha over the
        rank to this power, one half with use_rslora.
    """

    needs: ClassVar[tuple[str, ...]] = ("own_A",)
    starts: ClassVar[bool] = False
    counts: bool = False
    power: float = 1.0
    load: Tensor | None = None

    def __init__(self, site: Site, num_experts: int, r: int) -> None:
        super().__init__()
        self.site, self.num_experts, self.r = site, num_experts, r

    def begin(self, start: Start) -> None:
        """Set own parameters and buffers, under no_grad, and before the initialiser sets the experts' factors."""

    def fill(self, experts: nn.Module) -> None:
        """Where it ``starts`` them: set the experts' lora_A and lora_B, under no_grad, after the initialiser."""
        for half in PARTS[:2] if self.starts else ():
            nn.init.normal_(experts.get_parameter(half), std=0.02)

    def plan(self, others: Sequence[Ranks]) -> None:
        """Called on the first site's with all sites', itself first, when all have begun, under no_grad."""

    def count(self, load: Tensor) -> None:
        """Where it ``counts``: called before ``after_step`` with how many tokens of the step, over all processes, chose
        each unit [G] of the router."""
        self.load = load

    def shares(self) -> Tensor:
        """[R] how many tokens of this step got to each rank, 1 being the mean over the layer. What gradients say of an
        expert is divided by it, or experts for rare tokens would look unimportant. 1 where there is no such count."""
        load, self.load = self.load, None
        if load is None:
            return torch.ones(self.num_experts * self.r)
        share = load / load.mean().clamp(min=1e-12)
        return torch.where(share > 0, share, 1).repeat_interleave(self.num_experts * self.r // len(load))

    @abstractmethod
    def forward(self, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A [R, D], B [O, R], scale [R] with the ranks that are in use. Tensors alone: engines look for them here."""

    def within(self, name: str, key: str, value: int | None) -> None:
        """Raise ConfigError for a number of ranks that experts of rank r do not have."""
        if value is not None and value > self.r:
            raise ConfigError(f"ranks.{name}: {key} {value} is more than experts.r, which is {self.r}")

    def refuse(self, name: str, experts: nn.Module, kind: str, init: str, train: str) -> None:
        """Raise ConfigError where it ``starts`` experts that have other starts, or whose A and B are not trained."""
        if not self.starts:
            return
        if not {"lora_A", "lora_B"} <= {own for own, _ in experts.named_parameters(recurse=False)}:
            raise ConfigError(f"ranks {name} trains lora_A and lora_B, which experts '{kind}' lack; use experts: lora")
        if init != "kaiming":
            raise ConfigError(f"ranks {name} sets A and B at the start, and so would init {init}; leave one out")
        if train != "all":
            raise ConfigError(f"ranks {name} trains A, B and what is between them; experts.train: {train} does not")

    def rescaled(self, scale: Tensor, ranks: Tensor) -> Tensor:
        """The scale [R] of experts of these ranks [E] in place of r."""
        change = (self.r / ranks.clamp(min=1)) ** self.power
        return scale * change.to(scale.dtype).repeat_interleave(self.r)


@torch.no_grad()
def smoothed(state: dict[str, Tensor], key: str, share: Tensor, live: Tensor, betas: tuple[float, float]) -> Tensor:
    """Importance of numbers, from what they were worth in this step: I = ``key.now`` of the state, over their share.

    mean <- b1 mean + (1 - b1) I,  uncertainty <- b2 uncertainty + (1 - b2) |I - mean|;  given is their product.
    Both stay in the state, and as they are for ranks that are not live: which no token used in this step.
    """
    now = state.pop(f"{key}.now") / share.to(live.device)
    mean, unsure = (state.get(f"{key}.{part}", torch.zeros_like(now)) for part in ("mean", "uncertainty"))
    new = betas[0] * mean + (1 - betas[0]) * now
    state[f"{key}.mean"] = torch.where(live, new, mean)
    state[f"{key}.uncertainty"] = torch.where(live, betas[1] * unsure + (1 - betas[1]) * (now - new).abs(), unsure)
    return state[f"{key}.mean"] * state[f"{key}.uncertainty"]


def shorten(layer: Trained, parts: Mapping[str, Tensor]) -> None:
    """Make the step that was taken shorter, each rank's to a part [R] of it, where the state has ``NAME.old``."""
    for name, part in parts.items():
        old = layer.state.pop(f"{name}.old", None)
        if old is not None:
            part = part.to(old).unsqueeze(1) if name == "lora_A" else part.to(old)
            layer.set_value(name, torch.lerp(old, layer.value(name), part))


def masked(A: Tensor, B: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros in place of the ranks that ``keep`` [R] leaves out: in A, too, which routers may read."""
    return A * keep.unsqueeze(1).to(A.dtype), B * keep.to(B.dtype)


def learning(A: Tensor, B: Tensor, learns: Tensor) -> tuple[Tensor, Tensor]:
    """The same values; only the ranks that ``learns`` [R] names have gradients."""
    return torch.where(learns.unsqueeze(1), A, A.detach()), torch.where(learns, B, B.detach())
