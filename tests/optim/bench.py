"""One float64 layer of three experts whose gradients tests give, stepped as training steps it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moelora.core.methods import Methods
from moelora.core.step import Now
from moelora.train.engine import Engine
from moelora.train.stepping import Stepping
from tests import tiny

EXPERTS, RANK, WIDE, OUT, SCALE = 3, 2, 9, 7, 1.5


class Bench:
    """lr, decay: of every step. zero: B starts as zero. down, up, delta: A [E, r, D], B [E, O, r], s B A [E, O, D]."""

    def __init__(
        self,
        spec: dict[str, Any] | str,
        optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        lr: float = 0.1,
        decay: float = 0.0,
        seed: int = 0,
        router: Any = "softmax",
        zero: bool = False,
        **options: Any,
    ) -> None:
        experts = {"num_experts": EXPERTS, "r": RANK, "lora_alpha": SCALE * RANK, **options.pop("experts", {})}
        self.model, self.layer = tiny.toy({"router": router, "experts": experts}, WIDE, OUT, seed)
        self.experts = self.layer.experts
        if zero:
            with torch.no_grad():
                self.experts.lora_B.zero_()
        self.method = Methods().build("optim", {"name": spec} if isinstance(spec, str) else spec)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = optimizer(trained, lr=lr, weight_decay=decay, **options)
        self.engine = Engine(self.model, self.model, self.optimizer)
        self.stepping = Stepping(self.model, self.engine, self.method)
        self.lr, self.decay, self.steps = lr, decay, 0

    @property
    def now(self) -> Now:
        return Now(self.steps, 100, self.lr, self.decay)

    @property
    def down(self) -> Tensor:
        return self.experts.lora_A.detach().clone().unflatten(0, (self.layer.router.units, -1))

    @property
    def up(self) -> Tensor:
        return self.experts.lora_B.detach().clone().unflatten(1, (self.layer.router.units, -1)).transpose(0, 1)

    @property
    def delta(self) -> Tensor:
        """The updates s B A [E, O, D]."""
        return SCALE * self.up @ self.down

    @property
    def state(self) -> dict[str, Tensor]:
        return {name.rpartition("/")[2]: value for name, value in self.stepping.tensors().items()}

    def put(self, A: Tensor, B: Tensor) -> None:
        with torch.no_grad():
            self.experts.lora_A.copy_(A.flatten(0, 1))
            self.experts.lora_B.copy_(B.transpose(0, 1).flatten(1, 2))

    def give(self, dA: Tensor, dB: Tensor) -> None:
        """Gradients, as a backward pass leaves them."""
        for parameter in self.engine.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        if self.experts.lora_A.requires_grad:
            self.experts.lora_A.grad = dA.flatten(0, 1).clone()
        self.experts.lora_B.grad = dB.transpose(0, 1).flatten(1, 2).clone()

    def given(self) -> tuple[Tensor, Tensor]:
        """The gradients that are there now."""
        dA, dB = self.experts.lora_A.grad, self.experts.lora_B.grad
        assert dA is not None and dB is not None
        units = self.layer.router.units
        return dA.clone().unflatten(0, (units, -1)), dB.clone().unflatten(1, (units, -1)).transpose(0, 1)

    def gradients(self, G: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the pairs whose updates have these gradients [E, O, D]."""
        return SCALE * self.up.mT @ G, SCALE * G @ self.down.mT

    def step(self, G: Tensor) -> None:
        """One step of training, with the gradients that come from G [E, O, D]."""
        self.stepping.begin(self.now)
        self.give(*self.gradients(G))
        self.stepping.before(self.now)
        self.optimizer.step()
        self.stepping.after(self.now)
        self.steps += 1


def full(seed: int = 0, experts: int = EXPERTS) -> Tensor:
    """Gradients of updates [E, O, D]."""
    return torch.randn(experts, OUT, WIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unused(G: Tensor, expert: int = 1) -> Tensor:
    """The same, had no token used an expert."""
    G = G.clone()
    G[expert] = 0
    return G
