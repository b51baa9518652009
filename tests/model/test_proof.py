"""The proof at load: a stack that does not compute what the files say is refused, and a true one never."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moelora
from moelora.core.errors import AdapterError
from moelora.experts.base import Experts
from moelora.io.peft import CONFIG, PREFIX, WEIGHTS
from moelora.model import adapters
from moelora.model.layer import RoutedLinear
from tests import tiny
from tests.adapters import base, mixture, peft_folder

R = 4
WHERE = "model.layers.1.self_attn.v_proj"
Corrupt = Callable[[Experts], Any]


def swap(tensor: Tensor, axis: int = 0) -> None:
    """Exchange what the first two experts have."""
    one, two = tensor.narrow(axis, 0, R), tensor.narrow(axis, R, R)
    kept = one.clone()
    one.copy_(two)
    two.copy_(kept)


def times(factor: float, part: Callable[[Experts], Tensor]) -> Corrupt:
    return lambda experts: part(experts).mul_(factor)


def rows(experts: Experts) -> Tensor:
    """The rows of A of expert 1."""
    return experts.lora_A.data[R : 2 * R]


def columns(experts: Experts) -> Tensor:
    return experts.lora_B.data[:, R : 2 * R]


CORRUPT: dict[str, tuple[int, Corrupt]] = {
    "wrong scale": (1, times(1 + 1e-6, lambda e: e.scale[R : 2 * R])),
    "scale of one rank": (1, times(1 + 1e-6, lambda e: e.scale[R + 2 : R + 3])),
    "scale by the square root": (1, times(R**0.5, lambda e: e.scale[R : 2 * R])),
    "swapped experts": (0, lambda e: (swap(e.lora_A.data), swap(e.lora_B.data, 1))),
    "swapped A": (0, lambda e: swap(e.lora_A.data)),
    "swapped scales": (0, lambda e: swap(e.scale)),
    "one row off": (1, lambda e: rows(e).copy_(rows(e).roll(1, 0))),
    "one column off": (1, lambda e: columns(e).copy_(columns(e).roll(1, 1))),
    "A the other way round": (1, lambda e: rows(e).copy_(rows(e).flip(0))),
    "A transposed": (1, lambda e: rows(e)[:, :R].copy_(rows(e)[:, :R].t().clone())),
    "features in another order": (1, lambda e: rows(e).copy_(rows(e).flip(1))),
    "one output off": (1, lambda e: columns(e).copy_(columns(e).roll(1, 0))),
    "halved precision": (1, lambda e: columns(e).copy_(columns(e).bfloat16())),
    "one entry of B": (1, times(1 + 1e-5, lambda e: columns(e)[3, 2])),
    "one entry of A": (1, times(1 + 1e-5, lambda e: rows(e)[2, 5])),
    "an entry lost": (1, times(0, lambda e: columns(e)[0, 0])),
    "padding that is not zero": (2, lambda e: (e.lora_A.data[-1].fill_(1), e.lora_B.data[:, -1].fill_(1e-6))),
    "DoRA's stretch lost": (0, times(0, lambda e: e.stretch[0])),
    "DoRA's stretch a little off": (0, times(1 + 1e-4, lambda e: e.stretch[0])),
    "stretch of another expert": (1, lambda e: e.stretch[1].copy_(e.stretch[0])),
    "bias lost": (1, times(0, lambda e: e.shift[1])),
    "bias at the wrong scale": (1, times(2, lambda e: e.shift[1])),
    "one entry of the bias": (1, times(1 + 1e-3, lambda e: e.shift[1][4])),
    "not a number": (0, times(float("nan"), lambda e: e.stretch[0, 0])),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A DoRA, one with a bias, and one of a lower rank."""
    top = tmp_path_factory.mktemp("adapters")
    options: list[dict[str, Any]] = [
        {"use_dora": True, "bias": "lora_only"},
        {"lora_bias": True, "lora_alpha": 7},
        {"r": 3},
    ]
    return [
        peft_folder(top / name, "qwen", seed=i, **o) for (i, o), name in zip(enumerate(options), "abc", strict=True)
    ]


@pytest.mark.parametrize("fault", CORRUPT)
def test_a_fault_in_one_layer_is_found(fault: str, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expert, corrupt = CORRUPT[fault]
    stack = adapters._stack

    def faulty(layer: RoutedLinear, *given: Any) -> None:
        stack(layer, *given)
        if layer.site.name == WHERE:
            corrupt(layer.experts)

    model, before = base("qwen"), base("qwen")
    monkeypatch.setattr(adapters, "_stack", faulty)
    with pytest.raises(AdapterError) as caught:
        mixture(folders, "qwen", model=model)
    said = (
        f"{folders[expert]}: as expert {expert} of '{WHERE}' it does not compute what it does alone: largest difference"
    )
    assert str(caught.value).startswith(said)
    tiny.assert_same(model.state_dict(), before.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters()) and type(model) is type(before)
    monkeypatch.undo()
    mixture(folders, "qwen", model=model)


def test_a_fault_after_saving_is_found_at_load(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moelora.save(mixture(folders, "qwen"), tmp_path)
    stack = adapters._stack
    monkeypatch.setattr(adapters, "_stack", lambda layer, *given: (stack(layer, *given), rows(layer.experts).neg_()))
    with pytest.raises(AdapterError, match=r"experts/expert_1: as expert 1 of 'model.layers.0.self_attn.q_proj'"):
        moelora.load(base("qwen"), tmp_path)


def test_what_the_layer_computes_is_what_is_proven(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a copy of it: a fault in the experts' own code is found, too."""
    monkeypatch.setattr(Experts, "beside", lambda *_: torch.zeros(()))
    with pytest.raises(AdapterError, match="as expert 0 of"):
        mixture(folders, "qwen")


# True stacks


class Wide(nn.Module):
    """One layer of a usual width."""

    def __init__(self, wide: int, out: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.lin = nn.Linear(wide, out, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lin(x)
        return found


def written(
    folder: Path, wide: int, out: int, r: int, alpha: float, size: float, dtype: torch.dtype, **config: Any
) -> Path:
    """An adapter of that layer with entries of about this size, its magnitudes and biases about 1."""
    folder.mkdir()
    parts = {"lora_A.weight": size * torch.randn(r, wide), "lora_B.weight": size * torch.randn(out, r)}
    if config.get("use_dora"):
        parts["lora_magnitude_vector"] = 0.5 + torch.rand(out)
    if config.get("lora_bias"):
        parts["lora_B.bias"] = torch.randn(out)
    if config.get("bias"):
        parts["base_layer.bias"] = torch.randn(out)
    tensors = {f"{PREFIX}lin.{name}": part.to(dtype) for name, part in parts.items()}
    save_file(tensors, folder / WEIGHTS)
    plain = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": ["lin"]}
    (folder / CONFIG).write_text(json.dumps({**plain, **config}))
    return folder


KINDS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"lora_bias": True},
    {"bias": "lora_only"},
    {"use_dora": True},
    {"use_dora": True, "bias": "lora_only", "use_rslora": True},
]


@pytest.mark.parametrize("config", KINDS, ids=lambda config: " ".join(config) or "plain")
@pytest.mark.parametrize(("r", "alpha"), [(64, 1e4), (7, 3), (1, 1e-3)])
def test_no_adapter_is_refused_for_its_numbers(r: int, alpha: float, config: dict[str, Any], tmp_path: Path) -> None:
    sizes = [(1.0, torch.float32), (1e-7, torch.float16), (1e-3, torch.float16), (1.0, torch.bfloat16)]
    sizes += [] if config.get("use_dora") else [(1e-18, torch.float32), (1e18, torch.float32)]
    folders = [written(tmp_path / str(i), 4096, 48, r, alpha, *given, **config) for i, given in enumerate(sizes)]
    for dtype in (torch.float32, torch.bfloat16):
        mixture(folders, r=r, model=Wide(4096, 48, dtype), target_modules=["lin"])


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_one_entry_of_a_wide_layer(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative change of 1e-5 in one of 265 thousand numbers."""
    folder, stack = written(tmp_path / "a", 4096, 48, 64, 16, 1.0, torch.float32), adapters._stack

    def faulty(layer: RoutedLinear, *given: Any) -> None:
        stack(layer, *given)
        getattr(layer.experts, part).data[7, 7] *= 1 + 1e-5

    monkeypatch.setattr(adapters, "_stack", faulty)
    with pytest.raises(AdapterError, match="as expert 0 of 'lin'"):
        mixture([folder], r=64, model=Wide(4096, 48), target_modules=["lin"])


def test_a_small_output_beside_a_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output is held against its own size."""
    folder, stack = written(tmp_path / "a", 8, 4, 2, 4, 1.0, torch.float32), adapters._stack
    model = mixture([folder], r=2, model=Wide(8, 4), target_modules=["lin"])
    tensors = {f"{PREFIX}lin.lora_A.weight": model.lin.experts.lora_A.data.clone()}
    tensors[f"{PREFIX}lin.lora_B.weight"] = model.lin.experts.lora_B.data * torch.tensor([[1e6], [1.0], [1.0], [1e-9]])
    save_file(tensors, folder / WEIGHTS)

    def faulty(layer: RoutedLinear, *given: Any) -> None:
        stack(layer, *given)
        layer.experts.lora_B.data[3] *= 1.001

    mixture([folder], r=2, model=Wide(8, 4), target_modules=["lin"])
    monkeypatch.setattr(adapters, "_stack", faulty)
    with pytest.raises(AdapterError, match="as expert 0 of 'lin'"):
        mixture([folder], r=2, model=Wide(8, 4), target_modules=["lin"])


def test_a_row_that_cannot_be_normalised(tmp_path: Path) -> None:
    """DoRA divides by the norm of the changed weight; in PEFT the output is then not a number."""
    folder = written(tmp_path / "a", 8, 4, 2, 4, 1.0, torch.float32, use_dora=True)
    model, tensors = Wide(8, 4), load_file(folder / WEIGHTS)
    tensors[f"{PREFIX}lin.lora_B.weight"][1] = 0
    save_file(tensors, folder / WEIGHTS)
    with torch.no_grad():
        model.lin.weight[1] = 0
    with pytest.raises(AdapterError, match="as expert 0 of 'lin' it does not compute what it does alone"):
        mixture([folder], r=2, model=model, target_modules=["lin"])
