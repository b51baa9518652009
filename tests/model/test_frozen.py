"""experts.train says what learns; experts.adapters says what experts start from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import MoeloraError
from moelora.io.folder import MANIFEST
from moelora.model.record import routed_layers
from moelora.model.routed import RoutedModel
from tests import tiny

TARGETS = tiny.TARGETS["llama"]
OWN = {"num_experts": 2, "r": 3, "lora_alpha": 6}


def build(seed: int = 0, router: Any = "softmax", **experts: Any) -> Any:
    """A trained-looking mixture on the same base model, whatever the seed of its experts."""
    config = {"router": router, "experts": {**OWN, **experts}, "target_modules": TARGETS}
    return tiny.shake(tiny.adapt(tiny.llama(), config, seed), 0.4, seed)


def start(adapters: list[Any], base: Any = None, **more: Any) -> Any:
    """A new mixture from saved experts."""
    experts = {**OWN, "num_experts": 2 * len(adapters), "adapters": [str(folder) for folder in adapters]}
    config = {"router": "softmax", "target_modules": TARGETS, **more}
    return tiny.adapt(base or tiny.llama(), {**config, "experts": {**experts, **more.get("experts", {})}})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two saved mixtures of two experts each."""
    path = tmp_path_factory.mktemp("adapters")
    for name, seed in (("a", 1), ("b", 2)):
        moelora.save(build(seed), path / name)
    return [path / "a", path / "b"]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**tiny.unlabelled(tiny.given())).logits


# experts.train


def expected_to_train(train: str, name: str) -> bool:
    if ".router." in name:
        return True
    return ".experts." in name and (train == "all" or (train == "B" and name.endswith("lora_B")))


@pytest.mark.parametrize("train", ["all", "B", "none"])
@pytest.mark.parametrize("method", ["softmax", "comol", "xlora", "hydra", "mixlora"])
def test_just_these_parameters_learn(method: str, train: str, tmp_path: Path) -> None:
    experts = {**tiny.METHODS[method]["experts"], "train": train}
    model = tiny.adapted("llama", method, experts=experts)
    moelora.save(model, tmp_path)
    for same in (model, moelora.load(tiny.llama(), tmp_path).train()):
        before = {name: p.detach().clone() for name, p in same.named_parameters()}
        assert {n for n, p in same.named_parameters() if p.requires_grad} == {
            name for name in before if expected_to_train(train, name)
        }
        same(**tiny.given()).loss.backward()
        for name, p in same.named_parameters():
            assert (p.grad is not None) == expected_to_train(train, name), name
        torch.optim.SGD([p for p in same.parameters() if p.requires_grad], lr=0.1).step()
        moved = {name for name, p in same.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if expected_to_train(train, name)}


@pytest.mark.parametrize("train", ["B", "none"])
def test_frozen_experts_leave_the_gradients_of_the_others_as_they_are(train: str) -> None:
    whole, part = build(), build(train=train)
    for model in (whole, part):
        model(**tiny.given()).loss.backward()
    found = tiny.gradients(part)
    assert found
    tiny.assert_same(found, {name: grad for name, grad in tiny.gradients(whole).items() if name in found})


def test_frozen_experts_stay_so_in_every_mode_and_after_a_cast() -> None:
    model = build(train="none")
    for change in (lambda m: m.train(), lambda m: m.eval(), lambda m: m.to(torch.bfloat16)):
        change(model)
        assert not any(p.requires_grad for layer in routed_layers(model) for p in layer.experts.parameters())
    with moelora.disabled(model):
        pass
    assert not any(p.requires_grad for layer in routed_layers(model) for p in layer.experts.parameters())


def test_nothing_at_all_to_train_is_still_a_model() -> None:
    model = tiny.adapted("llama", "uniform", experts={**tiny.METHODS["uniform"]["experts"], "train": "none"})
    assert not tiny.trainable(model)
    assert model(**tiny.batch()).loss.isfinite()


# experts.adapters


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [0, 0]])
def test_experts_are_those_of_the_folders_in_their_order_bit_for_bit(folders: list[Path], order: list[int]) -> None:
    model = start([folders[i] for i in order])
    sources = [moelora.load(tiny.llama(), folders[i]) for i in order]
    for layer, *theirs in zip(*(routed_layers(m) for m in [model, *sources]), strict=True):
        assert torch.equal(layer.experts.lora_A, torch.cat([one.experts.lora_A for one in theirs]))
        assert torch.equal(layer.experts.lora_B, torch.cat([one.experts.lora_B for one in theirs], dim=1))


def test_one_chosen_expert_is_the_model_it_came_from(folders: list[Path]) -> None:
    model = start(folders, router={"name": "static", "weights_fn": "free"})
    with torch.no_grad():
        for layer in routed_layers(model):
            layer.router.theta.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))  # the second of b
    source = moelora.load(tiny.llama(), folders[1])
    with torch.no_grad():
        for layer in routed_layers(source):
            layer.experts.lora_B[:, :3] = 0  # b's second expert alone, at gate one
            layer.router = type(layer.router)(layer.site, 2, 3)
            layer.experts.lora_B[:, 3:] *= 2  # softmax of equal logits: 1/2
            layer.router.weight.zero_()
    torch.testing.assert_close(logits(model), logits(source), rtol=1e-5, atol=1e-5)


def test_routers_prepare_with_the_loaded_experts(folders: list[Path]) -> None:
    """Arrow reads its prototypes off the experts: zero for those that were just initialised."""
    fresh = start([], router="arrow", experts={"num_experts": 4})
    loaded = start(folders, router="arrow")
    for layer in routed_layers(fresh):
        assert (layer.router.prototypes == 0).all()
    for layer in routed_layers(loaded):
        assert (layer.router.prototypes.norm(dim=1) - 1).abs().max() < 1e-5


def test_saved_again_it_needs_the_folders_no_more(folders: list[Path], tmp_path: Path) -> None:
    own = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]
    model = start(own, experts={"train": "none"})
    model(**tiny.given()).loss.backward()
    torch.optim.SGD(tiny.trainable(model).values(), lr=0.1).step()
    moelora.save(model, tmp_path / "out")
    for folder in own:
        shutil.rmtree(folder)
    loaded = moelora.load(tiny.llama(), tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.moelora.config.experts.adapters == [str(folder) for folder in own]  # where they were from
    assert tiny.trainable(loaded).keys() == tiny.trainable(model).keys()
    moelora.save(loaded, tmp_path / "again")
    assert torch.equal(logits(moelora.load(tiny.llama(), tmp_path / "again")), logits(model))


def test_the_scale_counts_however_it_was_written(tmp_path: Path) -> None:
    # lora_alpha / sqrt(r) there, lora_alpha / r here: the same number.
    moelora.save(build(use_rslora=True, r=4, lora_alpha=3), tmp_path / "a")
    start([tmp_path / "a"], experts={"r": 4, "lora_alpha": 6})
    moelora.save(build(router={"name": "smora", "top_k": 4, "block_size": 2}, r=4, lora_alpha=8), tmp_path / "b")
    start([tmp_path / "b"], experts={"r": 4, "lora_alpha": 8})  # SMoRA: alpha / top_k


# Refusals


def refused(folders: list[Any], base: Any = None, **more: Any) -> str:
    """The message of a failed start, which leaves the model as it was."""
    base = base or tiny.llama()
    keys, cls, before = list(base.state_dict()), type(base), {n: p.clone() for n, p in base.named_parameters()}
    with pytest.raises(MoeloraError) as caught:
        start(folders, base, **more)
    assert type(base) is cls and not isinstance(base, RoutedModel) and list(base.state_dict()) == keys
    assert all(p.requires_grad and torch.equal(p, before[name]) for name, p in base.named_parameters())
    return str(caught.value)


@pytest.fixture
def copied(folders: list[Path], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(folders[0], tmp_path / "a"))


def test_a_higher_rank(folders: list[Path]) -> None:
    message = refused(folders, experts={"r": 2, "lora_alpha": 4})
    assert "rank 3, but r is 2 here; set experts.r to 3" in message and str(folders[0]) in message


def test_a_lower_rank_is_filled_up(folders: list[Path]) -> None:
    wide, exact = start(folders, experts={"r": 5, "lora_alpha": 10}), start(folders)
    for one, two in zip(routed_layers(wide), routed_layers(exact), strict=True):
        blocks = one.experts.lora_A.unflatten(0, (4, 5)), one.experts.lora_B.unflatten(1, (4, 5))
        assert torch.equal(blocks[0][:, :3].flatten(0, 1), two.experts.lora_A)
        assert torch.equal(blocks[1][:, :, :3].flatten(1, 2), two.experts.lora_B)
        assert (blocks[0][:, 3:] == 0).all() and (blocks[1][:, :, 3:] == 0).all()


def test_experts_keep_their_own_scale(folders: list[Path], tmp_path: Path) -> None:
    moelora.save(build(lora_alpha=9), tmp_path / "c")
    model = start([folders[0], tmp_path / "c"], experts={"lora_alpha": 15})
    for layer in routed_layers(model):
        assert layer.experts.scale.tolist() == [2.0] * 6 + [3.0] * 6
    moelora.save(model, tmp_path / "out")
    loaded = moelora.load(tiny.llama(), tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    third = start([tmp_path / "out"], experts={"num_experts": 4})  # and once more, from the mixture of both
    assert all(layer.experts.scale.tolist() == [2.0] * 6 + [3.0] * 6 for layer in routed_layers(third))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_another_number(folders: list[Path], count: int) -> None:
    message = refused(folders, experts={"num_experts": count})
    assert "4 experts in" in message and f"num_experts is {count}" in message


@pytest.mark.parametrize("targets", [["q_proj"], ["k_proj", "o_proj", "up_proj"]])
def test_other_layers(folders: list[Path], targets: list[str]) -> None:
    message = refused(folders, target_modules=targets)
    assert "which is not an adapted layer here; add it to target_modules" in message


def test_a_layer_that_the_experts_lack_gets_nothing(folders: list[Path]) -> None:
    model = start(folders, target_modules=[*TARGETS, "up_proj"])
    for layer in routed_layers(model):
        lacks = layer.site.name.endswith("up_proj")
        assert layer.experts.ranks == [0 if lacks else layer.experts.r] * layer.experts.num_experts
        assert bool((layer.experts.lora_B == 0).all()) == lacks


@pytest.mark.parametrize("method", ["comol", "hydra"])
def test_experts_that_are_no_loras(folders: list[Path], method: str, tmp_path: Path) -> None:
    moelora.save(tiny.adapted("llama", method), tmp_path / "c")
    assert "its experts are not plain LoRAs" in refused([folders[0], tmp_path / "c"])


def test_an_expert_kind_that_cannot_start_from_loras(folders: list[Path]) -> None:
    assert "experts 'hydra' cannot start from LoRA adapters" in refused(folders, experts={"name": "hydra"})


DESCRIPTION = "experts/expert_1/adapter_config.json"
WEIGHTS = "experts/expert_1/adapter_model.safetensors"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *[(name, damage) for name in (WEIGHTS, DESCRIPTION) for damage in ("absent", "cut", "changed")],
        (MANIFEST, "absent"),
        (MANIFEST, "cut"),
    ],
)
def test_a_damaged_folder(folders: list[Path], copied: Path, name: str, damage: str) -> None:
    content = (copied / name).read_bytes()
    middle = len(content) // 2
    (copied / name).unlink()
    if damage == "cut":
        (copied / name).write_bytes(content[:middle])
    if damage == "changed":
        (copied / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert str(copied) in refused([folders[1], copied])


def test_a_changed_description(folders: list[Path], copied: Path) -> None:
    # It is read for the expert's scale, so it must be what was written.
    values = json.loads((copied / DESCRIPTION).read_text())
    (copied / DESCRIPTION).write_text(json.dumps({**values, "bias": "all"}))
    assert "the file was changed" in refused([folders[1], copied])


def test_no_such_folder(folders: list[Path], tmp_path: Path) -> None:
    assert "absent" in refused([folders[0], tmp_path / "absent"])


def test_one_expert_of_a_folder_is_a_peft_lora(folders: list[Path]) -> None:
    one = start([folders[0] / "experts" / "expert_1"], experts={"num_experts": 1})
    both = start([folders[0]])
    for alone, two in zip(routed_layers(one), routed_layers(both), strict=True):
        assert torch.equal(alone.experts.lora_A, two.experts.lora_A[3:])
        assert torch.equal(alone.experts.lora_B, two.experts.lora_B[:, 3:])


def test_another_base_model_is_allowed_and_said(folders: list[Path]) -> None:
    with pytest.warns(UserWarning, match="made for other weights than this model's, of 'LlamaForCausalLM'"):
        start(folders, tiny.llama(seed=7))


@pytest.mark.parametrize("adapters", ["out/a", [1], None])
def test_adapters_is_a_list_of_folders(adapters: Any) -> None:
    with pytest.raises(MoeloraError, match=r"adapter\.experts\.adapters"):
        tiny.adapt(tiny.llama(), {"experts": {"adapters": adapters}})


@pytest.mark.parametrize("train", ["A", "router", True])
def test_train_is_one_of_four_words(train: Any) -> None:
    with pytest.raises(MoeloraError, match=r"adapter\.experts\.train: input should be 'all', 'B', 'middle' or 'none'"):
        tiny.adapt(tiny.llama(), {"experts": {"train": train}})
