"""Starts beside PEFT's own, and starts of models: what the tests of initialisers share."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import moelora
from moelora.core.start import Start
from moelora.core.tape import Site
from moelora.experts.lora import LoRA
from moelora.model.record import routed_layers
from tests import tiny

TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8}


def layer_of(weight: Tensor, num_experts: int = 1, r: int = 3, scale: float = 2.0) -> tuple[LoRA, Start]:
    """The experts of one float64 layer W [O, D], and what they start from."""
    out, wide = weight.shape
    experts = LoRA(Site("layer", 0, wide, out), num_experts, r).double()
    experts.scale.fill_(scale)
    return experts, Start(lambda: weight.clone())


def weight_of(out: int, wide: int, seed: int = 3) -> Tensor:
    return torch.randn(out, wide, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(experts: Any, scaled: bool = True) -> Tensor:
    """[E, O, D] what each expert starts from: s B A, or B A."""
    with torch.no_grad():
        A = experts.lora_A.unflatten(0, (experts.num_experts, -1))
        B = (experts.lora_B * (experts.scale if scaled else 1)).unflatten(1, (experts.num_experts, -1))
        return torch.einsum("oer,erd->eod", B, A)


def ours(init: Any, router: Any = "single", num_experts: int = 1, experts: Any = None, **more: Any) -> Any:
    """A tiny model with experts that start in some way, in training mode."""
    given = {"num_experts": num_experts, **LORA} if experts is None else experts
    config = {"experts": given, "router": router, "init": init, "target_modules": TARGETS}
    torch.manual_seed(0)
    return moelora.adapt(tiny.llama(), config, verbose=False, **more)


def peft(init: str, **more: Any) -> Any:
    """The same from PEFT."""
    torch.manual_seed(0)
    config = LoraConfig(init_lora_weights=init, target_modules=TARGETS, lora_dropout=0.0, **LORA, **more)
    return get_peft_model(tiny.llama(), config)


def assert_one_step_alike(mine: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    """Outputs, the gradients of all A and B, and the outputs after a step of SGD."""
    given, close = tiny.batch(), {"rtol": tolerance, "atol": tolerance}
    modules = dict(theirs.base_model.model.named_modules())
    optimisers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (mine, theirs)]
    for step in range(2):
        found, expected = mine(**given), theirs(**given)
        torch.testing.assert_close(found.logits, expected.logits, **close)
        for model, out in ((mine, found), (theirs, expected)):
            model.zero_grad()
            out.loss.backward()
        for layer in routed_layers(mine):
            other = modules[layer.site.name]
            for half in ("lora_A", "lora_B"):
                wanted = getattr(other, half)["default"].weight
                torch.testing.assert_close(getattr(layer.experts, half), wanted, **close)
                torch.testing.assert_close(getattr(layer.experts, half).grad, wanted.grad, **close)
                assert step or wanted.grad.abs().max() > 1e-3
        for optimiser in optimisers:
            optimiser.step()
