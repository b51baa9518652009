"""EVA: principal components of a layer's inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from moelora.core.start import Start
from moelora.core.tape import Site
from moelora.experts.hydra import Hydra
from moelora.experts.lora import LoRA
from moelora.init.eva import EVA
from moelora.model.record import routed_layers
from tests import tiny
from tests.init.steps import LORA, TARGETS, ours, weight_of


def tokens(count: int, wide: int = 12, seed: int = 0) -> Tensor:
    """Inputs with an offset, each direction with a spread of its own."""
    spread = torch.logspace(1, -2, wide, dtype=torch.float64)
    rotated = torch.linalg.qr(weight_of(wide, wide, 99))[0]
    return (weight_of(count, wide, seed) * spread) @ rotated + 7 * weight_of(1, wide, 98)


def started(*parts: Tensor, experts: Any = None, share: Any = "slices", **options: Any) -> Any:
    made = LoRA(Site("layer", 0, 12, 5), 1, 3).double() if experts is None else experts
    init = EVA(experts=share, **options)
    seen, take = init.watch(made)
    for x in parts:
        if not take(x):
            break
    init(made, Start(lambda: weight_of(5, 12), seen=seen))
    return made


def components(x: Tensor, many: int) -> tuple[Tensor, Tensor]:
    """(V [many, D], S): of centred inputs, the largest entry of each positive."""
    _, S, V = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    V = V[:many]
    return V * V.gather(1, V.abs().argmax(1, keepdim=True)).sign(), S[:many]


def test_one_batch_gives_its_centred_principal_components() -> None:
    x = tokens(40)
    made = started(x)
    torch.testing.assert_close(made.lora_A.detach(), components(x, 3)[0], rtol=1e-5, atol=1e-5)
    assert (made.lora_B == 0).all()
    uncentred = torch.linalg.svd(x, full_matrices=False)[2][:3]
    assert float((uncentred @ made.lora_A.detach().t()).abs().max(1).values.min()) < 0.9


def test_batches_add_up_to_the_components_of_all_tokens() -> None:
    parts = [tokens(30, seed=seed) for seed in range(4)]  # with means of their own
    V, S = components(torch.cat(parts), 6)
    made = started(*parts, experts=LoRA(Site("layer", 0, 12, 5), 2, 3).double(), tau=1.0)
    torch.testing.assert_close(made.lora_A.detach(), V, rtol=2e-2, atol=2e-2)
    whitened = started(*parts, experts=LoRA(Site("layer", 0, 12, 5), 2, 3).double(), tau=1.0, whiten=True)
    torch.testing.assert_close(whitened.lora_A.norm(dim=1) ** -2, S, rtol=2e-2, atol=2e-2)


def test_all_experts_may_start_from_the_same_components_and_a_shared_factor_does() -> None:
    x = tokens(40)
    first = started(x).lora_A
    same = started(x, experts=LoRA(Site("layer", 0, 12, 5), 4, 3).double(), share="same")
    torch.testing.assert_close(same.lora_A, first.repeat(4, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(started(x, experts=Hydra(Site("layer", 0, 12, 5), 4, 3).double()).lora_A, first)


def test_it_stops_when_nothing_moves_and_skips_small_batches() -> None:
    seen, take = EVA(tau=0.99).watch(LoRA(Site("layer", 0, 12, 5), 1, 3))
    assert take(tokens(2)) and seen.count == 0
    assert take(tokens(40)), "one batch cannot tell"
    assert not take(tokens(40)), "the same again"
    seen, take = EVA(tau=0.999).watch(LoRA(Site("layer", 0, 12, 5), 1, 3))
    assert take(tokens(40)) and take(tokens(40, seed=1).flip(1)) and seen.count == 80


def peft(batches: list[dict[str, Tensor]], **options: Any) -> Any:
    config = LoraConfig(
        init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, **options), target_modules=TARGETS, **LORA
    )
    model = get_peft_model(tiny.llama(), config)
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


@pytest.mark.parametrize(
    ("here", "there"), [({}, {}), ({"tokens": "all", "whiten": True}, {"use_label_mask": False, "whiten": True})]
)
def test_it_starts_as_pefts(here: dict[str, Any], there: dict[str, Any]) -> None:
    batches = [tiny.batch(rows=6, length=9, seed=seed) for seed in range(3)]
    for given in batches:
        given["labels"][:, :2] = -100
    mine = ours({"name": "eva", "batches": 300, **here}, batches=batches * 100)
    modules = dict(peft(batches, **there).base_model.model.named_modules())
    for layer in routed_layers(mine):
        theirs = modules[layer.site.name]
        if here and "down_proj" not in layer.site.name:
            continue  # q and v have one input, and PEFT whitens it twice
        assert theirs.r["default"] == 4
        torch.testing.assert_close(layer.experts.lora_A, theirs.lora_A["default"].weight, rtol=1e-4, atol=1e-4)


def test_a_trained_one_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = ours("eva", router="softmax", num_experts=2, batches=[tiny.batch(rows=6, seed=seed) for seed in range(3)])
    with torch.no_grad(), moelora.disabled(model):
        expected = model.eval()(**tiny.batch()).logits
    with torch.no_grad():
        assert torch.equal(model(**tiny.batch()).logits, expected)
    sgd = torch.optim.SGD([p for p in model.train().parameters() if p.requires_grad], lr=0.5)
    model(**tiny.batch()).loss.backward()
    sgd.step()
    moelora.save(model.eval(), tmp_path / "own")
    again = moelora.load(tiny.llama(), tmp_path / "own").eval()
    with torch.no_grad():
        assert torch.equal(again(**tiny.batch()).logits, model(**tiny.batch()).logits)


def test_what_it_cannot_start_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no batch has the 3 tokens .*larger batches, init.tokens: all or a lower"):
        started(tokens(2))
    with pytest.raises(ConfigError, match=r"init eva takes 15 directions \(slices: 5 experts, r 3\) .* has 12"):
        started(tokens(40), experts=LoRA(Site("layer", 0, 12, 5), 5, 3))
    with pytest.raises(ConfigError, match=r"init eva sets lora_A and lora_B; experts 'core'"):
        ours("eva", router="comol", experts={"name": "core", "r": 4}, batches=[tiny.batch()])
