"""Plain LoRAs out of experts: what one expert, or a mixture with gates that never change, adds to a layer.

With constant gates g every parameterisation is one product B A (scales and gates inside B):

    blocks      B = [g_e s_e B_e]             A = [A_e]              rank: sum of the experts' ranks
    shared A    B = sum_e g_e s_e B_e         A                      rank: r
    core        B = s B                       A = (sum_e g_e M_e) A  rank: r
    merged      B = sum_e g_e s_e B_e         A = sum_e g_e A_e      rank: r
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from moelora.core.errors import ConfigError
from moelora.core.factors import Factors
from moelora.core.route import Route
from moelora.core.tape import Tape
from moelora.experts.base import Experts
from moelora.experts.merged import Merged
from moelora.io.peft import LoRATensors
from moelora.model.adapters import alone
from moelora.model.layer import RoutedLinear
from moelora.model.record import adaptation, routed_layers
from moelora.model.sources import bias_of, dense_weight
from moelora.routers.single import Single

RANDOM = 64
"""Random tokens that a check looks at."""


@dataclass(frozen=True)
class PlainLoRA:
    """The update x -> scale * B A x of one layer. A [r, D], B [O, r]; r may be 0.

    vectors: what an expert has besides, by the names of ``Experts.own_vectors`` (DoRA, biases).
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """The update [..., O] of x [..., D], in x's dtype."""
        return self.scale * ((x @ self.A.to(x).t()) @ self.B.to(x).t())

    def folded(self) -> PlainLoRA:
        """The same with the scale inside B, in float32 at least."""
        wide = torch.promote_types(self.B.dtype, torch.float32)
        return PlainLoRA(self.A.to(wide), self.B.to(wide) * self.scale)

    def trimmed(self, masked: bool = False) -> PlainLoRA:
        """Without ranks that add nothing because both their halves are zero, as padding is. masked: or one of them, as
        of ranks that an allocator leaves out; others may just not have learned yet."""
        A, B = (self.A != 0).any(1), (self.B != 0).any(0)
        used = A & B if masked else A | B
        return self if bool(used.all()) else replace(self, A=self.A[used], B=self.B[:, used])

    def padded(self, rank: int) -> PlainLoRA:
        """With ranks of zeros up to ``rank``."""
        more = rank - self.rank
        pad = torch.nn.functional.pad
        return PlainLoRA(pad(self.A, (0, 0, 0, more)), pad(self.B, (0, more)), self.scale)

    @torch.no_grad()
    def truncated(self, rank: int) -> tuple[PlainLoRA, float]:
        """The closest LoRA of at most ``rank``, scale 1, float32 at least, and its relative error (Frobenius norm)."""
        if rank >= self.rank:
            return self, 0.0
        left, right = torch.linalg.qr(self.B.double() * self.scale), torch.linalg.qr(self.A.double().t())
        U, S, V = torch.linalg.svd(left.R @ right.R.t(), full_matrices=False)
        root = S[:rank].sqrt()
        B, A = left.Q @ (U[:, :rank] * root), (root.unsqueeze(1) * V[:rank]) @ right.Q.t()
        error = float(S[rank:].norm() / S.norm()) if float(S.norm()) > 0 else 0.0
        wide = torch.promote_types(self.B.dtype, torch.float32)
        return PlainLoRA(A.to(wide), B.to(wide)), error


def fold(experts: Experts, gates: Tensor) -> PlainLoRA:
    """The update of experts whose gates [G] are the same for every token, with what every token gets; scale 1."""
    return with_fixed(experts, _folded(experts, gates))


@torch.no_grad()
def with_fixed(experts: Experts, lora: PlainLoRA) -> PlainLoRA:
    """A LoRA and the update that every token gets (KaSA), which comes last."""
    if experts.fixed_A is None or experts.fixed_B is None:
        return lora
    lora = lora.folded()
    B = torch.cat([lora.B, experts.fixed_B.to(lora.B)], 1)
    return PlainLoRA(torch.cat([lora.A, experts.fixed_A.to(lora.A)]), B)


@torch.no_grad()
def _folded(experts: Experts, gates: Tensor) -> PlainLoRA:
    factors = _factors(experts)
    A, B = factors.A, factors.B
    assert A is not None
    wide = torch.promote_types(B.dtype, torch.float32)
    gates, scaled = gates.to(B.device, wide), B.to(wide) * factors.scale.to(wide)
    if factors.core is not None:
        return PlainLoRA(torch.einsum("g,gij->ij", gates, factors.core.to(wide)) @ A.to(wide), scaled)
    units = scaled.unflatten(1, (len(gates), -1))
    if isinstance(experts, Merged):
        rows = A.to(wide).unflatten(0, (len(gates), -1))
        return PlainLoRA(torch.einsum("g,gwd->wd", gates, rows), torch.einsum("g,ogw->ow", gates, units))
    if A.shape[0] == B.shape[1]:
        masked = experts.allocator is not None
        kept = (gates != 0).repeat_interleave(units.shape[2])
        return PlainLoRA(A.to(wide)[kept], (units * gates.unsqueeze(-1)).flatten(1)[:, kept]).trimmed(masked)
    return PlainLoRA(A.to(wide), torch.einsum("g,ogw->ow", gates, units))


@torch.no_grad()
def single_expert(experts: Experts, index: int) -> PlainLoRA:
    """One expert alone, its gate 1: its own tensors and its own scale. All its ranks, for routers of single ranks."""
    return with_fixed(experts, _alone(experts, index))


def _alone(experts: Experts, index: int) -> PlainLoRA:
    vectors, count = experts.own_vectors(index), experts.num_experts
    factors = _factors(experts, finished=not vectors)
    A, B, scale = factors.A, factors.B, factors.scale
    assert A is not None
    if factors.core is not None:
        core = factors.core[index]
        return PlainLoRA(core @ A.to(core.dtype), B, _one(scale))
    if A.shape[0] == B.shape[1]:
        A = A.unflatten(0, (count, -1))[index]
    B, scale = B.unflatten(1, (count, -1))[:, index], scale.unflatten(0, (count, -1))[index]
    lora = PlainLoRA(A, B, _one(scale), vectors).trimmed(masked=experts.allocator is not None)
    if vectors and not lora.rank:
        raise ConfigError(
            f"expert {index} has a bias and no LoRA at '{experts.site.name}', and PEFT has such biases beside LoRA only"
        )
    return lora


def constant_gates(model: nn.Module, task: int | None) -> dict[str, Tensor] | None:
    """[G] the gates of every token, by module path; None where they depend on the token.

    Raises ConfigError where they depend on the task and none is given.
    """
    layers = routed_layers(model)
    found = {layer.site.name: gates for layer in layers if (gates := _gates(layer, task)) is not None}
    if len(found) == len(layers):
        return found
    if task is None and by_task(model):
        name = adaptation(model).config.router["name"]
        raise ConfigError(f"router '{name}' gives every task other gates: say which task is meant (--task)")
    return None


def by_task(model: nn.Module) -> bool:
    """Whether gates depend on the task, and on nothing else."""
    layers = routed_layers(model)
    return all(_gates(layer, 0) is not None for layer in layers) and any(
        _gates(layer, None) is None for layer in layers
    )


@torch.no_grad()
def _gates(layer: RoutedLinear, task: int | None) -> Tensor | None:
    gates = None if layer.router.around == "ffn" else layer.router.constant_gates(task)
    if gates is None:
        return None
    weight = gates.unsqueeze(0).to(layer.experts.scale.device)
    return layer.experts.admit(Route(weight, len(gates))).weight[0]


def own_expert(layer: RoutedLinear, index: int) -> int | None:
    """Which expert of a layer goes with expert ``index`` of the model: the only one where one is always on for all."""
    if isinstance(layer.router, Single):
        return 0
    return index if index < layer.experts.num_experts else None


def one_hot(layer: RoutedLinear, index: int, tokens: int = 1) -> Route:
    """The route of tokens that take one expert, gate 1."""
    gates = torch.zeros(tokens, layer.experts.num_experts, dtype=_dtype(layer))
    gates[:, index] = 1
    return Route(gates.to(layer.experts.scale.device), layer.experts.num_experts)


@torch.no_grad()
def expert_error(layer: RoutedLinear, index: int, lora: PlainLoRA | None) -> float:
    """How far a LoRA (None: no update) is from one expert of a layer: ||difference|| / ||update|| on random tokens.

    That is close to the relative error of the weights (Frobenius norm). Where the update is zero, ||difference||.
    """
    x, route = random_tokens(layer), one_hot(layer, index, RANDOM)
    update = layer.experts.under(x, layer.experts(x, lambda *_: route))
    if lora is None or not lora.vectors:
        return _relative(torch.zeros_like(update) if lora is None else lora(x), update)
    weight, bias = dense_weight(layer.base_layer).to(x), bias_of(layer.base_layer)
    bias = x.new_zeros(layer.out_features) if bias is None else bias.to(x)
    beside = layer.experts.beside(layer.experts.composed(), route, x @ weight.t() + bias)
    found = alone(LoRATensors(lora.A, lora.B, lora.scale, **lora.vectors), x.cpu(), weight.cpu(), bias.cpu())[0]
    return _relative(found.to(x), update if beside is None else update + beside)


@torch.no_grad()
def mixture_error(layer: RoutedLinear, task: int | None, lora: PlainLoRA | None) -> float:
    """How far a LoRA is from what a layer with constant gates adds, its own router asked; as ``expert_error``."""
    x = random_tokens(layer)
    nothing = nn.Linear(layer.in_features, layer.out_features, False, x.device, x.dtype)
    nothing.weight.zero_()
    update = routed(layer, nothing, x, task)
    return _relative(torch.zeros_like(update) if lora is None else lora(x), update)


@torch.no_grad()
def routed(layer: RoutedLinear, base: nn.Module, x: Tensor, task: int | None) -> Tensor:
    """What a layer makes of tokens x [T, D] of one task, ``base`` in the place of its base layer; without dropout."""
    own, training = layer.base_layer, layer.training
    tape = Tape(task=None if task is None else torch.tensor([task], device=x.device))
    layer.base_layer = base
    layer.eval()
    try:
        with layer.port.on(tape):
            y: Tensor = layer(x.unsqueeze(0))
        return y.squeeze(0)
    finally:
        layer.base_layer = own
        layer.train(training)


def random_tokens(layer: RoutedLinear) -> Tensor:
    """[RANDOM, D] float64, the same ones every time."""
    made = torch.Generator().manual_seed(layer.site.index)
    x = torch.randn(RANDOM, layer.in_features, generator=made, dtype=torch.float64)
    return x.to(layer.experts.scale.device)


def _relative(found: Tensor, update: Tensor) -> float:
    size = float(update.norm())
    return float((found - update).norm()) / (size if size > 0 else 1.0)


def refuse_more_than_lora(layers: list[RoutedLinear], what: str) -> None:
    """Raise ConfigError where experts are more than B A x: DoRA, or a bias."""
    for layer in layers:
        factors = layer.experts.composed()
        for beside, kind in ((factors.stretch, "DoRA"), (factors.shift, "a bias")):
            if beside is not None:
                raise ConfigError(
                    f"{what}: the experts of '{layer.site.name}' have {kind}, and this export is of plain LoRA only; "
                    "--to peft writes each with what it has, --to merged holds all where gates are constant"
                )


def _factors(experts: Experts, finished: bool = True) -> Factors:
    """As they are evaluated, whatever mode the model is in."""
    was = experts.training
    experts.eval()
    factors = experts.composed() if finished else experts.low_rank()
    experts.train(was)
    if factors.A is None:
        raise ConfigError(f"experts of '{experts.site.name}' give no A, so there is no LoRA to write")
    return factors


def _one(scale: Tensor) -> float:
    """The scale of one expert. Raises ConfigError where its ranks have several."""
    first = float(scale[0])
    if bool((scale != scale[0]).any()):
        raise ConfigError("an expert whose ranks have scales of their own is no plain LoRA")
    return first


def _dtype(layer: RoutedLinear) -> torch.dtype:
    return torch.promote_types(next(layer.experts.parameters()).dtype, torch.float32)
