"""Ways to compute one layer, y = base(x) + sum over chosen experts of gate * B_e A_e x, over the same numbers.

The base layer is frozen. x, gates and factors are differentiated, so that a backward pass is that of a layer in the
middle of a model. Every variant has its own formula in float64, from which its output and gradients must not deviate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, XLoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import Tensor, nn

from moelora.core.factors import Factors
from moelora.core.route import Route, dense_gates
from moelora.ops import routed_lora
from moelora.ops.path import Path
from tests.bench.measure import largest_error

OURS, OURS_DENSE, OURS_SORTED, OURS_GATHER = "moelora", "moelora, dense", "moelora, sorted", "moelora, gather"
BASE, LORA = "base layer alone", "PEFT LoRA of rank k*r"
LOOP, LOOP_WIDE = "PEFT X-LoRA", "PEFT X-LoRA, float32 factors"
INDEX_ADD, GROUPED, EAGER = "loop, index_add", "torch grouped_mm, sorted", "dense rank space, eager"
COMPILED = "dense rank space, torch.compile"


@dataclass(frozen=True)
class Shape:
    """T tokens, d input and n output features, E experts of rank r, k chosen.

    zipf: how uneven the experts' shares are; where it is not zero the last expert has no token at all.
    """

    T: int
    d: int
    E: int
    r: int
    k: int
    n: int = 0
    zipf: float = 0.0

    @property
    def outputs(self) -> int:
        return self.n or self.d

    def __str__(self) -> str:
        wide = f" n={self.n}" if self.n else ""
        skewed = f" zipf={self.zipf}" if self.zipf else ""
        return f"T={self.T} d={self.d}{wide} E={self.E} r={self.r} k={self.k}{skewed}"


@dataclass
class Variant:
    """One way. run: y [T, n]. leaves: what it differentiates. right: y in float64 from the leaves in float64."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]
    right: Callable[..., Tensor]

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.run()

    def both(self, upstream: Tensor) -> list[Tensor]:
        """The output and the gradients of the leaves."""
        out = self.run()
        return [out, *torch.autograd.grad(out, self.leaves, upstream)]

    def error(self, upstream: Tensor) -> float:
        """The largest deviation of output and gradients, and of the output without gradients."""
        wide = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        right = self.right(*wide)
        wanted = [right.detach(), *torch.autograd.grad(right, wide, upstream.double())]
        return max(largest_error(self.both(upstream), wanted), largest_error([self.forward()], wanted[:1]))


class Problem:
    """The numbers of one layer. with_base: whether y holds base(x)."""

    def __init__(self, s: Shape, dtype: torch.dtype, device: torch.device, with_base: bool, seed: int = 0) -> None:
        made = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=made, device=device)

        self.s, self.dtype, self.device, self.with_base = s, dtype, device, with_base
        self.x, self.A, self.B = (
            tensor.to(dtype).requires_grad_()
            for tensor in (normal(s.T, s.d), normal(s.E * s.r, s.d) / s.d**0.5, normal(s.outputs, s.E * s.r) / s.r)
        )
        scores = normal(s.T, s.E) - s.zipf * torch.arange(1, s.E + 1, device=device).log()
        if s.zipf:
            scores[:, -1] = float("-inf")
        best, self.index = scores.topk(s.k)
        self.weight = best.softmax(-1).requires_grad_()
        self.upstream = normal(s.T, s.outputs).to(dtype)
        self.layer = nn.Linear(s.d, s.outputs, bias=False, device=device, dtype=dtype).requires_grad_(False)
        self.scale = torch.ones(s.E * s.r, device=device)

    def base(self, x: Tensor) -> Tensor | None:
        return self.layer(x) if self.with_base else None

    def start(self, x: Tensor) -> Tensor:
        """What experts one by one are added to."""
        return self.layer(x) if self.with_base else x.new_zeros(x.shape[0], self.s.outputs)

    def gates(self, weight: Tensor) -> Tensor:
        """[T, E] from [T, k]."""
        return dense_gates(weight, self.index, self.s.E)

    def right(self, x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        u = (x @ A.t()) * self.gates(weight).repeat_interleave(self.s.r, 1)
        return u @ B.t() + self._right_base(x)

    def right_apart(self, x: Tensor, weight: Tensor, *factors: Tensor) -> Tensor:
        As, Bs = factors[: self.s.E], factors[self.s.E :]
        return self.right(x, weight, torch.cat(As), torch.cat(Bs, 1))

    def right_lora(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return x @ A.t() @ B.t() + self._right_base(x)

    def _right_base(self, x: Tensor) -> Tensor | float:
        return x @ self.layer.weight.double().t() if self.with_base else 0.0

    def apart(self, dtype: torch.dtype | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The factors of every expert on their own."""
        As, Bs = self.A.split(self.s.r), self.B.split(self.s.r, 1)
        made = [[p.detach().to(dtype or p.dtype).clone().requires_grad_() for p in parts] for parts in (As, Bs)]
        return made[0], made[1]


def ours(p: Problem, path: Path | None) -> Variant:
    def run() -> Tensor:
        factors, route = Factors(p.A, p.B, p.scale), Route(p.weight, p.s.E, p.index)
        return routed_lora.apply(p.x, factors, route, onto=p.base(p.x), path=path)

    return Variant(run, [p.x, p.weight, p.A, p.B], p.right)


def eager(p: Problem) -> Variant:
    def run() -> Tensor:
        gate = p.gates(p.weight).to(p.dtype).unsqueeze(-1)
        u = ((p.x @ p.A.t()).view(p.s.T, p.s.E, p.s.r) * gate).view(p.s.T, -1)
        return torch.addmm(p.layer(p.x), u, p.B.t()) if p.with_base else u @ p.B.t()

    return Variant(run, [p.x, p.weight, p.A, p.B], p.right)


def index_add(p: Problem) -> Variant:
    As, Bs = p.apart()

    def run() -> Tensor:
        out = p.start(p.x)
        for e in range(p.s.E):
            token, slot = (p.index == e).nonzero(as_tuple=True)
            part = F.linear(F.linear(p.x[token], As[e]), Bs[e])
            out = out.index_add_(0, token, part * p.weight[token, slot, None].to(p.dtype))
        return out

    return Variant(run, [p.x, p.weight, *As, *Bs], p.right_apart)


def grouped(p: Problem) -> Variant:
    s = p.s

    def run() -> Tensor:
        order = p.index.flatten().argsort(stable=True)
        ends = torch.bincount(p.index.flatten(), minlength=s.E).cumsum(0).int()
        token = order // s.k
        h = F.grouped_mm(p.x[token], p.A.view(s.E, s.r, s.d).transpose(1, 2), offs=ends)
        u = h * p.weight.flatten()[order].unsqueeze(-1).to(p.dtype)
        y = F.grouped_mm(u, p.B.t().reshape(s.E, s.r, s.outputs), offs=ends)
        return p.start(p.x).index_add_(0, token, y)

    return Variant(run, [p.x, p.weight, p.A, p.B], p.right)


class _Zeros(nn.Module):
    """Stands for a base layer where the mixture is measured alone."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.outputs)


def _peft_layer(p: Problem, rank: int) -> Any:
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = LoraLinear(p.layer, "0", config, r=rank, lora_alpha=rank)
    return layer.to(p.device, p.dtype)


def peft_lora(p: Problem) -> Variant:
    """PEFT's own layer with one adapter."""
    layer = _peft_layer(p, p.s.k * p.s.r)
    leaves = [p.x, layer.lora_A["0"].weight, layer.lora_B["0"].weight]
    return Variant(lambda: layer(p.x), leaves, p.right_lora)


def peft_xlora(p: Problem, wide: bool = False) -> Variant:
    """PEFT's own X-LoRA layer around its own LoRA layer; experts not chosen have gate zero. wide: float32 factors."""
    s, (As, Bs) = p.s, p.apart(torch.float32 if wide else None)
    layer = _peft_layer(p, s.r)
    for e in range(1, s.E):
        layer.update_layer(str(e), s.r, s.r, config=LoraConfig(r=s.r, lora_alpha=s.r, init_lora_weights=False))
    layer.set_adapter([str(e) for e in range(s.E)])
    for e in range(s.E):
        layer.lora_A[str(e)].weight, layer.lora_B[str(e)].weight = nn.Parameter(As[e]), nn.Parameter(Bs[e])
    if not p.with_base:
        layer.base_layer = _Zeros(s.outputs)
    config = XLoraConfig(hidden_size=s.d, adapters={})
    mixed = XLoraLinearLayer(SimpleNamespace(disabled=False), layer, layer.forward, 0, config)
    leaves = [layer.lora_A[str(e)].weight for e in range(s.E)] + [layer.lora_B[str(e)].weight for e in range(s.E)]

    def run() -> Tensor:
        scalings = p.gates(p.weight).to(p.dtype)[None, :, None]
        return mixed.forward(p.x.unsqueeze(0), scalings=scalings).squeeze(0)

    return Variant(run, [p.x, p.weight, *leaves], p.right_apart)


def variants(p: Problem, names: list[str]) -> dict[str, Variant]:
    """Those of the named ways that can compute the problem."""
    ways: dict[str, Callable[[], Variant]] = {
        BASE: lambda: Variant(lambda: p.layer(p.x), [p.x], p._right_base),
        LORA: lambda: peft_lora(p),
        LOOP: lambda: peft_xlora(p),
        LOOP_WIDE: lambda: peft_xlora(p, wide=True),
        INDEX_ADD: lambda: index_add(p),
        GROUPED: lambda: grouped(p),
        EAGER: lambda: eager(p),
        COMPILED: lambda: _compiled(eager(p)),
        OURS: lambda: ours(p, None),
        OURS_DENSE: lambda: ours(p, "dense"),
        OURS_SORTED: lambda: ours(p, "sorted"),
        OURS_GATHER: lambda: ours(p, "gather"),
    }
    unable = set[str]()
    if not p.with_base:
        unable |= {BASE, LORA}
    if p.dtype == torch.float32:
        unable.add(LOOP_WIDE)
    if p.s.r * p.dtype.itemsize % 16:
        unable.add(GROUPED)  # it wants rows of 16 bytes
    if p.s.r == 1:
        unable.add(OURS_SORTED)  # rank-wise choices share no segment worth a product
    return {name: ways[name]() for name in names if name not in unable}


def _compiled(variant: Variant) -> Variant:
    return Variant(torch.compile(variant.run, dynamic=False), variant.leaves, variant.right)
