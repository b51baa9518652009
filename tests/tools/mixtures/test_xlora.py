"""Folders of the package xlora, against its formulas.

Layout and formulas were read from EricLBuehler/xlora at 8217992: ``xlora_insertion.py`` (save_pretrained writes
xlora_config.json without ``device``, names of the adapters as a list, the classifier through safetensors' save_model,
and a PEFT folder per adapter), ``xlora_classifier.py`` (``inner`` and ``last``), ``xlora_config.py``.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import moelora
from moelora.core.errors import AdapterError
from moelora.io.peft import read_peft
from moelora.tools.mixtures import import_mixture
from tests import tiny
from tests.adapters import peft_folder

NAMES = ["math", "law", "code"]
EXPERTS: list[dict[str, Any]] = [
    {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    {"r": 2, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 7},
    {"r": 3, "target_modules": ["v_proj"], "use_rslora": True},
]
SITES, WIDE = 6, 6  # q, v and down in two blocks


def folder_of(path: Path, depth: int = 1, biased: bool = True, inside: bool = True, **options: Any) -> Path:
    """What xlora's save_pretrained writes. inside: with the experts."""
    path.mkdir()
    for index, name in enumerate(NAMES):
        peft_folder(path / name if inside else path.parent / name, seed=index, **EXPERTS[index])
    settings = {
        "hidden_size": tiny.HIDDEN, "base_model_id": "org/base", "adapters": NAMES, "enable_softmax": True,
        "enable_softmax_topk": False, "layerwise_scalings": False, "xlora_depth": depth, "xlora_size": WIDE,
        "enable_relu_and_dropout": True, "use_bias": biased, "xlora_dropout_p": 0.2, "use_trainable_adapters": False,
        "softmax_temperature": 1.0, "top_k_lora": None, "scaling_pass_value": 0.0, "global_scaling_weight": 1.0,
        **options,
    }  # fmt: skip
    (path / "xlora_config.json").write_text(json.dumps(settings))
    last = len(NAMES) * (SITES if settings["layerwise_scalings"] else 1)
    widths = [tiny.HIDDEN, *[WIDE] * (depth - 1), last]
    made, state = torch.Generator().manual_seed(depth), {}
    for index in range(depth):
        name = "last" if index == depth - 1 else f"inner.{3 * index}"
        state[f"{name}.weight"] = torch.randn(widths[index + 1], widths[index], generator=made)
        if biased:
            state[f"{name}.bias"] = torch.randn(widths[index + 1], generator=made)
    save_file(state, path / "xlora_classifier.safetensors")
    (path / "state.json").write_text(json.dumps({key: value.tolist() for key, value in state.items()}))
    return path


@torch.no_grad()
def oracle(path: Path, experts: list[Path]) -> Tensor:
    """Logits of the formulas, token by token."""
    settings = json.loads((path / "xlora_config.json").read_text())
    state = {key: torch.tensor(value) for key, value in json.loads((path / "state.json").read_text()).items()}
    base, given = tiny.llama().eval(), tiny.unlabelled(tiny.batch())
    hidden = base(**given, output_hidden_states=True).hidden_states[-1]
    layers = [*sorted({key.rsplit(".", 1)[0] for key in state if key.startswith("inner")}), "last"]
    adapters = [read_peft(expert) for expert in experts]
    targeted = {module for adapter in adapters for module in adapter.modules}
    sites = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name in targeted]

    def scalings(state_of_token: Tensor, site: int) -> list[float]:
        value = state_of_token
        for layer in layers:
            value = state[f"{layer}.weight"] @ value + state.get(f"{layer}.bias", torch.zeros(()))
            value = value.clamp(min=0) if layer != "last" else value
        own = value[3 * site : 3 * site + 3] if settings["layerwise_scalings"] else value
        if settings["enable_softmax"]:
            own = (own / settings["softmax_temperature"]).softmax(0)
        kept = own.topk(settings["top_k_lora"] or 3).indices.tolist()
        return [float(own[e]) if e in kept else 0.0 for e in range(3)]

    def hook(site: int, name: str) -> Any:
        def add(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            y = y.clone()
            for row in range(y.shape[0]):
                for t in range(y.shape[1]):
                    weights = scalings(hidden[row, t], site)
                    for adapter, weight in zip(adapters, weights, strict=True):
                        if name in adapter.modules:
                            lora, x = adapter.read(name), args[0][row, t]
                            scale = lora.scale * settings["global_scaling_weight"]
                            y[row, t] += lora.B @ (lora.A @ (weight * x)) * scale
            return y

        return add

    for site, name in enumerate(sites):
        base.get_submodule(name).register_forward_hook(hook(site, name))
    return base(**given).logits


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(**tiny.unlabelled(tiny.batch()), use_cache=False).logits


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 1},
        {"depth": 2, "softmax_temperature": 0.5, "layerwise_scalings": True},
        {"depth": 3, "top_k_lora": 2, "global_scaling_weight": 1.5, "xlora_dropout_p": 0.0},
        {"depth": 2, "enable_softmax": False, "biased": False, "layerwise_scalings": True},
        {"depth": 1, "enable_relu_and_dropout": False},
    ],
)
def test_equals_the_formulas(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = folder_of(tmp_path / "x", **options)
    model = import_mixture(tiny.llama(), folder, verbose=False)
    expected = oracle(folder, [folder / name for name in NAMES])
    torch.testing.assert_close(logits(model), expected, rtol=2e-5, atol=2e-5)
    assert (logits(tiny.llama()) - expected).abs().max() > 0.1
    moelora.save(model, tmp_path / "ours")
    assert torch.equal(logits(moelora.load(tiny.llama(), tmp_path / "ours")), logits(model))


def test_experts_that_the_caller_gives(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", inside=False)
    experts = [tmp_path / name for name in NAMES]
    model = import_mixture(tiny.llama(), folder, experts, verbose=False)
    torch.testing.assert_close(logits(model), oracle(folder, experts), rtol=2e-5, atol=2e-5)
    early = json.loads((folder / "xlora_config.json").read_text())
    (folder / "xlora_config.json").write_text(json.dumps({k: v for k, v in early.items() if k != "adapters"}))
    assert torch.equal(logits(import_mixture(tiny.llama(), folder, experts, verbose=False)), logits(model))
    assert "adapters: found None, expected the names of the experts" in refused(folder)


def refused(folder: Path) -> str:
    model = tiny.llama()
    with pytest.raises(AdapterError) as caught:
        import_mixture(model, folder, verbose=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"enable_softmax_topk": True, "top_k_lora": 2},
            "enable_softmax_topk: found True, .* over all tokens of a batch",
        ),
        ({"enable_relu_and_dropout": False}, "enable_relu_and_dropout: found false, expected true, or xlora_depth: 1"),
        ({"scaling_pass_value": 0.3}, "scaling_pass_value: found 0.3, expected 0"),
        ({"adapters": ["math", "../law", "code"]}, "adapters: found .* as folders are named"),
        ({"adapters": ["math", "math", "code"]}, "adapters: found"),
        ({"adapters": ["math", "law", ".."]}, "adapters: found"),
        ({"adapters": ["math", "law", "art"]}, "art: file: found nothing, expected the expert 'art'; give the folders"),
        ({"use_bias": False}, r"inner\.0\.bias: found a tensor that this router has not"),
        ({"xlora_depth": 3}, r"inner\.3\.weight: found nothing, expected a tensor of shape \[6, 6\]"),
        ({"xlora_depth": 1}, r"inner\.0\.bias: found a tensor that this router has not"),
        ({"use_mean_pool": True}, "use_mean_pool: found True, expected null, false or empty"),
    ],
)
def test_settings_are_refused_by_name(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    folder = folder_of(tmp_path / "x", depth=2, **values)
    if values.get("xlora_depth", 2) != 2:  # the file stays as it was
        shutil.copy(folder_of(tmp_path / "y", depth=2) / "xlora_classifier.safetensors", folder)
    if "use_bias" in values:
        shutil.copy(folder_of(tmp_path / "y", depth=2) / "xlora_classifier.safetensors", folder)
    assert re.search(message, refused(folder))


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x")
    (folder / "xlora_classifier.safetensors").rename(folder / "xlora_classifier.pt")
    found = refused(folder)
    assert "a pickle, which can run code and is never opened" in found and "weights_only=True" in found
