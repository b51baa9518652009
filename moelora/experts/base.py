"""Experts: low-rank factors from parameters. One file per parameterisation; it says what ``factors`` are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.core.errors import ConfigError
from moelora.core.factors import Factors
from moelora.core.module import ExactBuffers
from moelora.core.route import Route
from moelora.core.start import Start
from moelora.core.step import Stepped
from moelora.core.tape import Site
from moelora.ops import routed_lora
from moelora.ops.project import Image

Decide = Callable[[Factors, Image], Route]
"""From the factors, and the tokens with what is known of them in rank space, to the route."""


class Experts(ExactBuffers, Stepped, ABC):
    """All experts of one site, stacked. Parameters belong to this module and are read only inside its forward.

    Subclasses take ``(site, num_experts, r)`` first and pass them on; recipe keys follow as keyword-only arguments.

    gives: what routers and losses may need of it: ``"own_A"`` when every expert has its own rows of A and columns of B
        (R = num_experts * r), ``"shared_A"`` when all have one A (R = r), ``"core"`` when it fills ``Factors.core``.
    computed: whether ``factors`` computes them, so that nothing asks for them but the forward that uses them.
    apart: whether every expert has an output of its own, as a router around feed-forward blocks asks for.
    pairs: whether every expert is its lora_A and lora_B, and its update is added with its gate: so the gradients of
        both come from one gradient of their product, as methods of ``optim`` reckon.
    allocator: the ``Ranks`` that stand between ``factors`` and their use, or None.
    whole: whether they make something of the base layer's output (``Factors.stretch``), for which they need the gate of
        a whole expert, beside a single layer.
    start_A, start_B: the factors at the start, [R, D] and [O, R], where their update is subtracted, else None.
    fixed_A, fixed_B: an update [q, D], [O, q] that every token gets, whatever its gates, and that is part of the base
        layer then; it never trains. None without.
    affine: (rows [N, D] W^T, the bias [O] or None) of the base layer, without gradients; given by the layer.

    Experts that started from adapters may differ from each other, and have more than low-rank factors:

    ranks: the rank of each; its rows beyond that are zero. used: [E] int32, the same where they are not all r.
    present: [R] bool, rows of experts that have this layer, or None: an expert without it keeps its gate. vectors: what
        adapters hold beside A and B, by PEFT's names, as they were saved.
    stretch, shift: [E, O] or None, what these make of the base layer's output, see ``Factors``.
    """

    gives: tuple[str, ...]
    computed: ClassVar[bool] = False
    apart: ClassVar[bool] = True
    pairs: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    affine: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    scale: Tensor
    start_A: Tensor | None
    start_B: Tensor | None
    fixed_A: Tensor | None
    fixed_B: Tensor | None
    present: Tensor | None
    used: Tensor | None
    stretch: Tensor | None
    shift: Tensor | None

    def __init__(self, site: Site, num_experts: int, r: int) -> None:
        super().__init__()
        self.site, self.num_experts, self.r = site, num_experts, r
        self.anchored: tuple[str, ...] = ()
        self.ranks = [r] * num_experts
        self.vectors: list[dict[str, Tensor]] = [{} for _ in range(num_experts)]
        self.register_buffer("scale", torch.ones(num_experts * r), persistent=False)
        for name in ("present", "used", "stretch", "shift"):
            self.register_buffer(name, None, persistent=False)
        self.allocator: Any = None
        for name in ("start_A", "start_B", "fixed_A", "fixed_B"):
            self.register_buffer(name, None)

    def meet(self, others: Sequence[Experts]) -> None:
        """Called on the first site's experts with all sites', itself first: for what a whole model has once."""

    def begin(self, start: Start) -> None:
        """Set all own parameters and saved buffers, under no_grad; an initialiser then sets lora_A, lora_B and core."""
        own = sorted({name for name, _ in self.named_parameters(recurse=False)} - {"lora_A", "lora_B", "core"})
        if own:
            raise ConfigError(f"experts {type(self).__name__} have {own}, which nothing sets; set them in its begin()")

    @abstractmethod
    def factors(self) -> Factors:
        """The stacked factors; ``self.scale`` is the per-rank scale the layer has set."""

    @property
    def stored(self) -> bool:
        """Whether ``composed`` gives an A that is a parameter as it is."""
        return not self.computed and self.allocator is None and self.start_A is None

    def forward(
        self,
        x: Tensor,
        decide: Decide,
        form: Literal["tokens", "each", "sum"] = "tokens",
        onto: Tensor | None = None,
        image: Image | None = None,
    ) -> Tensor:
        """The update [T, O] of tokens x [T, D], mixed as ``decide`` says.

        form: ``"each"``: the update of every chosen expert apart, [T, k, O], without its gate. ``"sum"``: x [T, k, D]
        holds one row per chosen expert. onto: the base layer's output [T, O], to which all that the experts make of it
        is added, tokens only; without it the low-rank update alone is given. image: what is known of x already.
        """
        factors, image = self.composed(), image or Image(x)
        if form != "tokens":
            apply = routed_lora.apply_each if form == "each" else routed_lora.apply_sum
            return apply(x, factors, decide(factors, image))
        if factors.A is not None and image.first:
            image.beside(factors.A)
        route = decide(factors, image)
        h = image.known(factors.A)
        given, left = (x, factors) if h is None else (h, replace(factors, A=None))
        update = routed_lora.apply(given, left, route, onto)
        beside = None if onto is None else self.beside(factors, route, onto)
        return update if beside is None else update + beside

    def composed(self) -> Factors:
        """``factors()`` as they are used, with the ranks of experts from adapters, and what losses may read."""
        factors = self.finished(self.low_rank())
        pairs = tuple((self.get_parameter(name), getattr(self, f"anchor_{name}")) for name in self.anchored)
        ranks, parts = factors.ranks if self.used is None else self.used, cast(Mapping[str, Tensor], self._parameters)
        return replace(factors, num_experts=self.num_experts, ranks=ranks, parts=parts, anchors=pairs)

    def low_rank(self) -> Factors:
        """``factors()`` with the allocator's ranks, less the update at the start."""
        factors = self.factors()
        if self.allocator is not None:
            A, B, scale = self.allocator(factors.A, factors.B, factors.scale)
            factors = replace(factors, A=A, B=B, scale=scale)
        if self.start_A is not None and self.start_B is not None:
            factors = _less(factors, self.start_A, self.start_B)
        return factors

    def own_vectors(self, index: int) -> dict[str, Tensor]:
        """What PEFT would keep of an expert beside A and B, by its names."""
        return self.vectors[index]

    def finished(self, factors: Factors) -> Factors:
        """Low-rank factors with what the experts make of the base layer's output."""
        if self.shift is None:
            return factors
        B = factors.B
        if self.stretch is not None:
            B = B * (1 + self.stretch.t()).repeat_interleave(self.r, 1)  # float32 at least, whatever the files have
        return replace(factors, B=B, stretch=self.stretch, shift=self.shift)

    def under(self, x: Tensor, y: Tensor) -> Tensor:
        """The base layer's output y [..., O] of x [..., D], with the update that every token gets."""
        if self.fixed_A is None or self.fixed_B is None:
            return y
        return y + F.linear(F.linear(x, self.fixed_A.to(x.dtype)), self.fixed_B.to(x.dtype)).to(y.dtype)

    def admit(self, route: Route) -> Route:
        """The route with the gates of absent experts spread over the present ones, in proportion; their sum stays."""
        if self.present is None:
            return route
        here = self.present.view(route.units, -1).any(1)
        kept = route.weight * (here if route.index is None else here[route.index])
        whole, left = route.weight.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
        nothing = left == 0
        return route._replace(weight=kept * (whole / left.masked_fill(nothing, 1)).masked_fill(nothing, 1))

    def beside(self, factors: Factors, route: Route, y: Tensor) -> Tensor | None:
        """What the experts add besides their low-rank update, [T, O], from the base layer's output y [T, O].

        Raises ConfigError for a router that gates anything but whole experts.
        """
        stretch, shift = factors.stretch, factors.shift
        if stretch is None and shift is None:
            return None
        if route.units != self.num_experts:
            raise ConfigError(
                f"'{self.site.name}' has experts with a bias or a magnitude (DoRA), which take the gate of a whole "
                f"expert; this router has {route.units} gates for {self.num_experts} experts; choose another router"
            )
        gate, parts = route.dense(), []
        if stretch is not None:
            parts.append((gate.to(stretch.dtype) @ stretch) * y.to(stretch.dtype))
        if shift is not None:
            parts.append(gate.to(shift.dtype) @ shift)
        return sum(parts[1:], parts[0]).to(y.dtype)

    def widen(self, dtype: torch.dtype) -> None:
        """Give saved buffers, which do not follow a cast, the dtype of the parameters; float32 at least."""
        for module in self.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                    setattr(module, name, buffer.to(torch.promote_types(buffer.dtype, dtype)))

    def keep_start(self) -> None:
        """Room for the factors at the start, whose update is subtracted from now on."""
        wide, out, ranks = self.site.in_features, self.site.out_features, self.num_experts * self.r
        like = next(self.parameters())
        self.start_A, self.start_B = like.new_zeros(ranks, wide), like.new_zeros(out, ranks)

    @torch.no_grad()
    def set_start(self) -> None:
        """Take the factors of this moment as the start."""
        if self.start_A is not None and self.start_B is not None:
            factors = self.factors()
            assert factors.A is not None
            self.start_A.copy_(factors.A)
            self.start_B.copy_(factors.B)

    def keep_anchors(self) -> None:
        """Room for a copy of every parameter as it was at the start, for losses that pull back to it."""
        parameters = dict(self.named_parameters(recurse=False))
        self.anchored = tuple(parameters)
        for name, parameter in parameters.items():
            self.register_buffer(f"anchor_{name}", parameter.detach().clone())

    @torch.no_grad()
    def set_anchors(self) -> None:
        """Take the parameters of this moment as the start."""
        parameters = dict(self.named_parameters())
        for name in self.anchored:
            getattr(self, f"anchor_{name}").copy_(parameters[name])


def _less(factors: Factors, A: Tensor, B: Tensor) -> Factors:
    """Factors of ``B A - B0 A0``, the ranks of both side by side, so that any block of ranks has its own start's."""
    assert factors.A is not None
    return replace(
        factors,
        A=torch.stack([factors.A, A.to(factors.A)], 1).flatten(0, 1),
        B=torch.stack([factors.B, -B.to(factors.B)], 2).flatten(1, 2),
        scale=factors.scale.repeat_interleave(2),
    )
