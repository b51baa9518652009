"""What every parameterisation of experts has to pass, whatever its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

import moelora
from moelora.core.route import Route
from moelora.model.layer import RoutedLinear
from moelora.model.record import routed_layers
from moelora.model.write import adapter_tensors
from moelora.tools.export import export_lora, export_peft
from tests import tiny

CLOSE = {"rtol": 0, "atol": 1e-5}


def toy(experts: dict[str, Any], router: Any = "softmax", **more: Any) -> tuple[Any, RoutedLinear]:
    """An adapted ``tiny.Toy`` whose experts all have random parameters, and its one layer."""
    model = disturbed(tiny.adapt(tiny.Toy(), {"experts": experts, "router": router, "target_modules": ["lin"], **more}))
    return model, model.lin


def best(scores: Tensor, top: int) -> list[Tensor]:
    """The gates of one token, of its scores [E]: a softmax over the ``top`` best, written out; zero for the rest."""
    chosen = sorted(range(len(scores)), key=lambda e: -scores[e].item())[:top]
    total = sum(scores[e].exp() for e in chosen)
    return [scores[e].exp() / total if e in chosen else scores.new_zeros(()) for e in range(len(scores))]


def llama(experts: dict[str, Any], router: Any = "meteora", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """An adapted llama, as it starts."""
    config = {"experts": experts, "router": router, "target_modules": tiny.TARGETS["llama"], **more}
    return tiny.adapt(tiny.llama(dtype=dtype), config)


@torch.no_grad()
def disturbed(model: Any, noise: float = 0.5) -> Any:
    """The model with noise on every parameter of its experts, as if they had been trained."""
    made, seen = torch.Generator().manual_seed(9), set()
    for layer in routed_layers(model):
        for parameter in layer.experts.parameters():
            if parameter not in seen:
                seen.add(parameter)
                parameter += noise * torch.randn(parameter.shape, generator=made, dtype=torch.float64)
    return model


def trained(model: Any, steps: int = 2) -> Any:
    """The model after some steps of AdamW, which all its trained parameters took part in."""
    before = {name: parameter.detach().clone() for name, parameter in tiny.trainable(model).items()}
    optimizer = torch.optim.AdamW(tiny.trainable(model).values(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        model.train()(**tiny.batch(seed=step)).loss.backward()
        optimizer.step()
    still = [name for name, parameter in tiny.trainable(model).items() if torch.equal(parameter, before[name])]
    assert not still, f"did not move: {still}"
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of all real tokens, in evaluation mode."""
    batch = tiny.batch()
    found: Tensor = model.eval()(**tiny.unlabelled(batch)).logits
    return found[batch["attention_mask"].bool()]


def assert_starts_as_the_base_model(model: Any) -> None:
    """Bit for bit."""
    found = logits(model)
    with moelora.disabled(model):
        assert torch.equal(found, logits(model))


def assert_comes_back(model: Any, folder: Path) -> Any:
    """Bit for bit, into another base model. Gives what came back."""
    moelora.save(model, folder)
    assert not (folder / "experts").exists()  # they are no plain LoRAs
    torch.manual_seed(123)
    again = moelora.load(tiny.llama(), folder)
    tiny.assert_same(adapter_tensors(again), adapter_tensors(model))
    assert torch.equal(logits(again), logits(model))
    return again


def assert_checkpointing_changes_nothing(model: Any) -> None:
    """No gradient, in no bit."""
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            tiny.checkpointing(model)
        model.zero_grad()
        model.train()(**tiny.batch()).loss.backward()
        found.append(tiny.gradients(model))
    tiny.assert_same(*found)


def assert_exports_exactly(model: Any, folder: Path) -> None:
    """Every expert as a plain PEFT LoRA: what PEFT computes with it is the model with its gates on that expert."""
    count = model.moelora.config.experts.num_experts
    assert export_peft(model, folder).worst[1] < 1e-6
    base = logits(tiny.llama())
    for index in range(count):
        for layer in routed_layers(model):
            layer.router.forward = lambda x, _, own=index: Route(torch.eye(count)[[own]].expand(len(x), -1), count)
        expected = logits(model)
        assert (expected - base).abs().max() > 0.01
        peft = PeftModel.from_pretrained(tiny.llama(), folder / f"expert_{index}")
        torch.testing.assert_close(logits(peft), expected, **CLOSE)


def assert_mixture_exports_exactly(model: Any, folder: Path) -> None:
    """A mixture with constant gates as one plain LoRA."""
    assert export_lora(model, folder).worst[1] < 1e-6
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny.llama(), folder)), logits(model), **CLOSE)
