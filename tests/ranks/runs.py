"""Steps of a tiny model with an allocator, as the trainer takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moelora.core.step import Now
from moelora.model.layer import RoutedLinear
from moelora.model.record import routed_layers
from moelora.model.routed import after_step
from moelora.train.engine import Engine
from moelora.train.stepping import Stepping
from tests import tiny


def model_with(ranks: Any, method: str = "meteora", dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A llama of two blocks whose q_proj and down_proj have experts; lora_B is as the methods leave it."""
    config = {**tiny.METHODS[method], "target_modules": ["q_proj", "down_proj"], "ranks": ranks}
    experts = {**config.get("experts", {}), **more.pop("experts", {})}
    return tiny.adapt(more.pop("base", None) or tiny.llama(0, dtype), {**config, "experts": experts, **more}).train()


class Run:
    """One training run. steps: how many it has. after ``step`` the gradients of that step are still there."""

    def __init__(self, model: Any, steps: int = 10, lr: float = 0.05, optimizer: Any = None) -> None:
        self.model, self.steps, self.lr, self.done = model, steps, lr, 0
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer or torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)
        self.engine = Engine(model, model, self.optimizer)
        self.stepping = Stepping(model, self.engine, None)

    def begin(self) -> Now:
        now = Now(self.done, self.steps, self.lr)
        self.stepping.begin(now)
        self.optimizer.zero_grad()
        return now

    def step(self, seed: int | None = None, times: int = 1) -> Run:
        for _ in range(times):
            now = self.begin()
            self.model(**tiny.given(seed=self.done + 1 if seed is None else seed)).loss.backward()
            self.stepping.before(now)
            self.optimizer.step()
            after_step(self.model)  # loads, as torch's hook does it
            self.stepping.after(now)
            self.done += 1
        return self


def experts_of(model: Any) -> list[Any]:
    """The experts of all layers."""
    return [layer.experts for layer in routed_layers(model)]


def plain(layer: RoutedLinear, x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor) -> Tensor:
    """What stacked factors add to tokens x, with the layer's own gates of whole experts; scale: one, or of each."""
    gates: list[Tensor] = []
    hook = layer.router.register_forward_hook(lambda _, __, route: gates.append(route.dense()))
    layer(x)
    hook.remove()
    experts = layer.experts.num_experts
    scale = torch.as_tensor(scale, dtype=x.dtype).expand(experts)
    update = torch.zeros(len(x), B.shape[0], dtype=x.dtype)
    for e, (rows, columns) in enumerate(zip(A.chunk(experts), B.chunk(experts, 1), strict=True)):
        update = update + gates[0][:, e : e + 1] * scale[e] * (x @ rows.t() @ columns.t())
    return update
