"""NOLA experts: factors that are weighted sums of random matrices which are drawn from a seed and never kept.

Paper: Koohpayegani et al., "NOLA: Compressing LoRA using Linear Combination of Random Basis", arXiv 2310.02556 (ICLR
2024); formulas from the released code for language models. With gates g of any router and k bases:

    A_e = A0_e + sum_i alpha_ei A_i,   B_e = sum_i beta_ei B_i,   y = W x + (lora_alpha / r) sum_e g_e B_e A_e x

Shapes: alpha, beta [E, k], all that is trained and saved: 2 E k numbers per layer whatever its width and r. A_i [r, D]
and B_i [O, r] ~ U(-1, 1) / sqrt(k), shared by the experts of a layer; A0_e ~ U(-1/sqrt(D), 1/sqrt(D)) is each expert's
own. alpha = beta = 0, so the model starts as the base model. The paper trains with learning rates of 1e-3 to 1e-2.

Numbers of bases are integer hashes of place and seed (``mixed``), made where the factors are, some at a time, in the
forward pass and again in the backward pass (dalpha_ei = <dA_e, A_i>): the same bit for bit on every device and in every
version of torch. They are k r (D + O) per layer each time, 5 ns each on a CPU; exports are plain LoRAs.

Differences from the released code: it reseeds torch's own generator; and it has one adapter, so one A0.

Recipe line: ``experts: {name: nola, num_experts: 8, r: 8, lora_alpha: 8, bases: 512}`` with ``router: {name: meteora}``
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moelora.core.factors import Factors
from moelora.core.start import Start
from moelora.core.tape import Site
from moelora.experts.base import Experts

CHUNK: Final = 1 << 22
"""Numbers of bases that are there at once, but for a basis that has more."""
PIECE: Final = 1 << 16
"""Numbers that a CPU makes at a time, in its cache."""


class NOLA(Experts):
    """bases: how many there are for A, and for B (k). seed: what they and A0 are made from, with the layer's place."""

    gives = ("own_A",)
    computed = True

    def __init__(
        self,
        site: Site,
        num_experts: int,
        r: int,
        *,
        bases: Annotated[int, Field(ge=1)] = 512,
        seed: Annotated[int, Field(ge=0, lt=2**15)] = 0,
    ) -> None:
        super().__init__(site, num_experts, r)
        self.seeds = [(seed << 16) + 3 * site.index + part for part in range(3)]  # 31 bits
        self.alpha = nn.Parameter(torch.empty(num_experts, bases))
        self.beta = nn.Parameter(torch.empty(num_experts, bases))

    def begin(self, start: Start) -> None:
        nn.init.zeros_(self.alpha)
        nn.init.zeros_(self.beta)

    def factors(self) -> Factors:
        E, r, wide, out = self.num_experts, self.r, self.site.in_features, self.site.out_features
        ((_, offset),) = drawn(self.seeds[0], 1, E * r * wide, self.alpha.device, 1 / math.sqrt(wide))
        A = _Summed.apply(self.alpha, self.seeds[1], r * wide).view(E * r, wide)
        B = _Summed.apply(self.beta, self.seeds[2], out * r).view(E, out, r)
        return Factors(A + offset.view_as(A).to(A), B.transpose(0, 1).flatten(1), self.scale)


class _Summed(torch.autograd.Function):
    """Weights [E, k] to the weighted sums [E, size] of k bases, float32 at least."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, seed: int, size: int) -> Tensor:
        ctx.seed, ctx.weights = seed, weights.new_empty(()).expand(weights.shape)
        wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
        found = wide.new_zeros(len(wide), size)
        for some, bases in drawn(seed, wide.shape[1], size, wide.device):
            found.addmm_(wide[:, some], bases.to(wide))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        pieces = drawn(ctx.seed, ctx.weights.shape[1], upstream.shape[1], upstream.device)
        products = [upstream @ bases.to(upstream).t() for _, bases in pieces]
        return torch.cat(products, 1).to(ctx.weights.dtype), None, None


def drawn(
    seed: int, count: int, size: int, device: torch.device, bound: float | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """``count`` rows of ``size`` numbers from U(-bound, bound), 1/sqrt(count) by default, some rows at a time."""
    first_key = int(mixed(torch.tensor([seed], dtype=torch.int32, device="cpu"), 0x1E3779B9))
    second_key = int(mixed(torch.tensor([first_key], dtype=torch.int32, device="cpu")))
    bound, step = 1 / math.sqrt(count) if bound is None else bound, max(1, CHUNK // size)
    for first in range(0, count, step):
        some = slice(first, min(first + step, count))
        rows, at = torch.empty(some.stop - some.start, size, device=device), first * size
        for piece in rows.view(-1).split(PIECE if rows.device.type == "cpu" else rows.numel()):
            places = torch.arange(at, at + len(piece), device=device).to(torch.int32)
            piece.copy_((mixed(places, first_key, second_key) >> 8).bitwise_and_(0xFFFFFF))
            at += len(piece)
        yield some, rows.mul_(2**-24).sub_(0.5).mul_(2 * bound)  # rounded once, so that no machine's way matters


def mixed(x: Tensor, first: int = 0, second: int = 0) -> Tensor:
    """A permutation of 32-bit numbers (int32, products wrap), another one for other keys; in place. Multipliers and
    shifts are those of Wellons' hash prospector."""
    x.bitwise_xor_(first)
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x21F0AAAD)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).bitwise_xor_(second).mul_(0x735A2D97)
    return x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
