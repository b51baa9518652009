"""L2 preservation: squared distance from the experts' start, and where that start is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moelora
from moelora.core.errors import ConfigError
from moelora.model.record import routed_layers
from moelora.model.save import restore
from tests import tiny

LOSSES = {"l2_preservation": 0.5}


def made(method: str = "meteora", seed: int = 0, **more: Any) -> Any:
    """A float64 model with experts as they start: lora_B is not shaken afterwards."""
    more = {"dtype": torch.float64, "losses": LOSSES, **more}
    base = tiny.llama(0, more.pop("dtype"))
    return tiny.adapt(base, {**tiny.METHODS[method], "target_modules": tiny.TARGETS["llama"], **more}, seed)


def term(model: nn.Module) -> Tensor:
    with moelora.collect(model) as collected:
        model(**tiny.batch())
    return collected.terms[0]["l2_preservation"]


@torch.no_grad()
def move(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    """Move every expert parameter; what was added, by name."""
    made, moved = torch.Generator().manual_seed(seed), {}
    for name, p in model.named_parameters():
        if ".experts." in name:
            moved[name] = torch.randn(p.shape, generator=made, dtype=torch.float64).to(p.dtype)
            p += moved[name]
    return moved


def anchors(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if ".anchor_" in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["meteora", "comol"])
def test_it_is_zero_at_the_start(method: str, dtype: torch.dtype) -> None:
    """L6. Also in a float64 model, whose parameters a float32 copy could not hold."""
    model = made(method, dtype=dtype)
    assert term(model).item() == 0
    for layer in routed_layers(model):
        held = dict(layer.experts.named_buffers())
        for name, p in layer.experts.named_parameters():
            assert torch.equal(held[f"anchor_{name}"], p) and held[f"anchor_{name}"].dtype == p.dtype


@pytest.mark.parametrize("method", ["meteora", "comol"])
def test_value_and_gradient_are_those_of_the_formula(method: str) -> None:
    """Mean over sites of sum ||theta - theta0||^2, gradient 2 (theta - theta0) / sites times the weight."""
    model = made(method)
    before = {name: p.detach().clone() for name, p in tiny.trainable(model).items()}
    moved, sites = move(model), len(routed_layers(model))
    total = 0.0
    for name in moved:
        pairs = zip(model.get_parameter(name).flatten().tolist(), before[name].flatten().tolist(), strict=True)
        total += sum((now - start) ** 2 for now, start in pairs)
    assert term(model).item() == pytest.approx(total / sites, rel=1e-6)

    batch = tiny.batch()
    plain, held = (torch.autograd.grad(loss, list(tiny.trainable(model).values())) for loss in losses(model, batch))
    for name, without, with_term in zip(tiny.trainable(model), plain, held, strict=True):
        expected = without + (0.5 * 2 * moved[name] / sites if name in moved else 0)
        torch.testing.assert_close(with_term, expected, rtol=1e-6, atol=1e-7, msg=name)


def losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The model's loss without and with the term."""
    with moelora.collect(model):
        without = model(**batch).loss
    return without, model(**batch).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anchors_survive_saving_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = made(dtype=dtype)
    start = anchors(model)
    move(model)
    moelora.save(model, tmp_path)
    again = moelora.load(tiny.llama(0, dtype), tmp_path).train()
    assert start
    tiny.assert_same(anchors(again), start)
    assert torch.equal(term(again), term(model)) and term(again) > 0
    assert all(b.dtype == dtype for b in anchors(again).values())


def test_a_resumed_run_is_held_to_the_same_start(tmp_path: Path) -> None:
    model = made()
    start = anchors(model)
    move(model)
    moelora.save(model, tmp_path)
    resumed = made(seed=9)  # another start, as a second process without the first one's random state would have
    assert any(not torch.equal(value, start[name]) for name, value in anchors(resumed).items())
    restore(resumed, tmp_path)
    tiny.assert_same(anchors(resumed), start)
    assert torch.equal(term(resumed), term(model))


def test_experts_from_adapters_are_held_to_those(tmp_path: Path) -> None:
    parts = []
    for number in range(2):
        config = {**tiny.METHODS["single"], "target_modules": tiny.TARGETS["llama"]}
        alone = tiny.shake(tiny.adapt(tiny.llama(), config, number), 0.5, number)
        moelora.save(alone, tmp_path / str(number))
        parts.append(routed_layers(alone))
    folders = [str(tmp_path / str(number)) for number in range(2)]
    experts = {"num_experts": 2, "r": 4, "lora_alpha": 8, "adapters": folders}
    model = made(router={"name": "meteora", "top_k": 1}, experts=experts, dtype=torch.float32)
    assert term(model).item() == 0
    for layer, *ones in zip(routed_layers(model), *parts, strict=True):
        assert torch.equal(layer.experts.anchor_lora_A, torch.cat([one.experts.lora_A for one in ones], 0))
        assert torch.equal(layer.experts.anchor_lora_B, torch.cat([one.experts.lora_B for one in ones], 1))
        assert layer.experts.anchor_lora_B.any()


def test_anchors_do_not_train_and_keep_their_precision() -> None:
    model = made(dtype=torch.float32)
    start = anchors(model)
    assert not any(".anchor_" in name for name in tiny.trainable(model))
    model.to(torch.bfloat16)
    tiny.assert_same(anchors(model), start)


def test_checkpointing_changes_nothing() -> None:
    grads = []
    for on in (False, True):
        model = made()
        move(model)
        if on:
            tiny.checkpointing(model)
        model(**tiny.batch(), use_cache=False).loss.backward()
        grads.append(tiny.gradients(model))
    tiny.assert_same(*grads)


@pytest.mark.parametrize("train", ["B", "none"])
def test_parameters_that_do_not_train_add_nothing(train: str) -> None:
    model = made(experts={"num_experts": 3, "r": 4, "train": train})
    sgd = torch.optim.SGD(tiny.trainable(model).values(), lr=1.0)
    for _ in range(2):
        sgd.zero_grad()
        model(**tiny.batch()).loss.backward()
        sgd.step()
    assert (term(model) > 0) == (train == "B")


def test_no_other_loss_keeps_a_start() -> None:
    assert not anchors(made(losses={"balance": 0.1}))


def test_it_counts_no_tokens() -> None:
    with pytest.raises(ConfigError, match=r"losses\.l2_preservation is about the experts and counts no tokens"):
        made(losses={"l2_preservation": {"weight": 1.0, "tokens": "answers"}})


def test_blocks_routed_as_one_are_refused() -> None:
    # Only the first layer of such a block has terms: the experts of the others would drift unseen.
    with pytest.raises(ConfigError, match=r"losses\.l2_preservation reads the experts of every layer"):
        tiny.adapted("llama", "mixlora", target_modules=tiny.FFN_TARGETS["llama"], losses=LOSSES)
