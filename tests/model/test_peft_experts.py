"""PEFT LoRA folders as experts: each one computes what PEFT does, and is written so that PEFT computes it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moelora
from moelora.core.errors import AdapterError
from moelora.io.peft import PREFIX, WEIGHTS, read_peft
from tests import tiny
from tests.adapters import BASES, TARGETS, base, logits, mixture, only, peft_folder, peft_logits

CLOSE = {"rtol": 5e-6, "atol": 5e-6}
MOVED = {"rtol": 2e-5, "atol": 2e-5}
"""For what PEFT takes out of the base weights and adds again: in float32 that leaves a rounding of the whole weight."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd scale": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 3, "use_rslora": True},
    "patterns": {
        "rank_pattern": {r"^(?!.*attn).*\.1\..*": 3, "q_proj": 2, "c_attn": 5, "q": 6, "query": 1, "x_proj": 2},
        "alpha_pattern": {"v_proj": 1, r".*\.0\.[a-z_.]*(attn|mlp|layer|attention|mixer)\..*": 5, "wo": 3},
    },
    "patterns rslora": {"use_rslora": True, "rank_pattern": {r".*\.0\..*": 6}, "alpha_pattern": {r".*\.1\..*": 3}},
    "dora": {"use_dora": True},
    "dora rslora biases": {"use_dora": True, "use_rslora": True, "bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "lora_alpha": 7},
    "lora_only": {"bias": "lora_only"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "one block": {"layers_to_transform": [1]},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa rslora": {"init_lora_weights": "pissa", "use_rslora": True, "r": 3},
    "pissa dora": {"init_lora_weights": "pissa", "use_dora": True},
    "olora": {"init_lora_weights": "olora"},
}
SOME = ["dora rslora biases", "lora_bias", "patterns", "pissa", "olora"]
NOT = {("gpt2", "olora")}  # PEFT cannot start it on a Conv1D that is not square
CASES = [
    *((kind, name) for kind in ("llama", "gpt2") for name in OPTIONS if (kind, name) not in NOT),
    *((kind, name) for kind in BASES for name in SOME if kind not in ("llama", "gpt2")),
]


def assert_golden(folders: list[Path], kind: str, out: Path, close: dict[str, float], r: int = 8, **more: Any) -> None:
    """Every expert alone gives PEFT's logits: as adapted, as saved and loaded, and as PEFT loads what was saved."""
    model = mixture(folders, kind, r, **more)
    moelora.save(model, out)
    again = moelora.load(base(kind), out).eval()
    plain = logits(base(kind).eval(), kind)
    for expert, folder in enumerate(folders):
        expected = peft_logits(folder, kind)
        assert (expected - plain).abs().max() > 1e-3
        found = logits(only(model, expert), kind)
        torch.testing.assert_close(found, expected, **close)
        assert torch.equal(logits(only(again, expert), kind), found)
        torch.testing.assert_close(peft_logits(out / "experts" / f"expert_{expert}", kind), expected, **close)


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_every_option_is_what_it_is_in_peft(kind: str, option: str, tmp_path: Path) -> None:
    given = OPTIONS[option]
    folders = [peft_folder(tmp_path / "a", kind, **given), peft_folder(tmp_path / "b", kind, r=2, seed=5)]
    close = MOVED if given.get("init_lora_weights") in ("pissa", "olora") else CLOSE
    assert_golden(folders, kind, tmp_path / "out", close)


@pytest.mark.parametrize("kind", BASES)
def test_the_patterns_of_these_tests_match(kind: str, tmp_path: Path) -> None:
    modules = read_peft(peft_folder(tmp_path, kind, **OPTIONS["patterns"])).modules.values()
    assert len({module.rank for module in modules}) > 1 and len({module.scale for module in modules}) > 2


def test_olora_of_a_square_conv1d_is_of_the_weight_as_it_is_stored(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", "gpt2", target_modules=["attn.c_proj"], init_lora_weights="olora")
    assert_golden([folder], "gpt2", tmp_path / "out", MOVED, target_modules=["attn.c_proj"])


@pytest.mark.parametrize("kind", ["llama", "qwen", "t5"])
def test_all_biases_where_they_are_of_adapted_layers(kind: str, tmp_path: Path) -> None:
    """Qwen2's are; Llama and T5 have none. The second expert has but one of the layers."""
    targets = ["q_proj", "k_proj", "v_proj"] if kind == "qwen" else TARGETS[kind]
    folders = [peft_folder(tmp_path / str(i), kind, seed=i, bias="all", target_modules=targets[i:]) for i in range(2)]
    assert_golden(folders, kind, tmp_path / "out", CLOSE, target_modules=targets)
    held = load_file(tmp_path / "out" / "experts" / "expert_1" / WEIGHTS)
    assert ("base_model.model.model.layers.0.self_attn.q_proj.bias" in held) == (kind == "qwen")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("qwen", "model.layers.0.self_attn.k_proj"),
        ("gpt2", "transformer.h.0.ln_1"),
        ("bert", "bert.embeddings.LayerNorm"),
        ("mamba", "backbone.layers.0.mixer.conv1d"),
    ],
)
def test_all_biases_where_a_trained_one_is_of_no_adapted_layer(kind: str, name: str, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, kind, bias="all")
    targets = ["c_attn", "c_proj", "c_fc"] if kind == "gpt2" else TARGETS[kind]
    with pytest.raises(AdapterError, match=f"bias: all has trained the bias of '{name}', which is not an adapted"):
        mixture([folder], kind, target_modules=targets)


def test_all_biases_of_which_those_elsewhere_are_the_base_model_s(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", "gpt2", bias="all")
    own, tensors = base("gpt2").state_dict(), load_file(folder / WEIGHTS)
    for name in [name for name in tensors if name.endswith(".bias") and "base_layer" not in name]:
        tensors[name] = own[name.removeprefix(PREFIX)].clone()
    save_file(tensors, folder / WEIGHTS)
    assert_golden([folder], "gpt2", tmp_path / "out", CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("option", ["odd scale", "dora rslora biases", "lora_bias", "pissa"])
def test_files_of_other_dtypes(option: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / "a", "qwen", dtype=dtype, **OPTIONS[option])]
    assert_golden(folders, "qwen", tmp_path / "out", MOVED if option == "pissa" else CLOSE)


def test_a_half_precision_base(tmp_path: Path) -> None:
    """PEFT rounds at other places, so logits agree as far as bfloat16 goes."""
    folders = [peft_folder(tmp_path / name, "qwen", **OPTIONS[name]) for name in ("dora rslora biases", "lora_bias")]
    model = mixture(folders, "qwen", model=base("qwen").bfloat16())
    plain = logits(base("qwen").bfloat16(), "qwen")
    for expert, folder in enumerate(folders):
        expected = peft_logits(folder, "qwen", base("qwen").bfloat16())
        found = logits(only(model, expert), "qwen")
        assert found.dtype == torch.bfloat16
        assert (found - expected).float().norm() < 0.02 * (expected - plain).float().norm()


def test_a_float64_base_computes_in_float64(tmp_path: Path) -> None:
    """PEFT computes the LoRA in float32 even there, and scale, stretch and shift are kept in float32 here."""
    folders = [peft_folder(tmp_path / name, "qwen", **OPTIONS[name]) for name in ("dora rslora biases", "lora_bias")]
    model = mixture(folders, "qwen", model=base("qwen", dtype=torch.float64))
    for expert, folder in enumerate(folders):
        found = logits(only(model, expert), "qwen")
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, peft_logits(folder, "qwen", base("qwen", dtype=torch.float64)), **CLOSE)


class Int8(nn.Linear):
    """A quantised layer: whole numbers, and one step for each row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.step = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.step).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.step, self.bias)


@pytest.mark.parametrize("option", ["plain", "dora", "dora rslora biases", "pissa", "olora"])
def test_a_quantised_base_is_asked_for_its_weights(option: str, tmp_path: Path) -> None:
    """DoRA, PiSSA and OLoRA are of the weights as they are used."""
    folder = peft_folder(tmp_path, "qwen", **OPTIONS[option])
    quantised, dense = base("qwen"), base("qwen")
    for path in read_peft(folder).modules:
        parent, _, child = path.rpartition(".")
        layer = Int8(dense.get_submodule(path))
        setattr(quantised.get_submodule(parent), child, layer)
        dense.get_submodule(path).weight.data = layer.weight * layer.step
    model = mixture([folder], "qwen", 8, model=quantised)
    torch.testing.assert_close(logits(only(model, 0), "qwen"), peft_logits(folder, "qwen", dense), **MOVED)


def test_a_module_that_an_adapter_lacks_gets_nothing_from_it(tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / "a"), peft_folder(tmp_path / "b", target_modules=["q_proj"])]
    assert_golden(folders, "llama", tmp_path / "out", CLOSE)


@pytest.mark.parametrize("router", ["xlora", "meteora", "lora_mixer", "smear"])
def test_a_router_trains_over_them_and_leaves_them_as_they_were(router: str, tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / str(i), r=2 + i, seed=i) for i in range(3)]
    model = mixture(folders, router=router).train()
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(tiny.trainable(model).values(), lr=0.05)
    losses = []
    for _ in range(12):
        loss = model(**tiny.given()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_peft_loras_enter_a_core_space(tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / "a", r=2), peft_folder(tmp_path / "b", r=3, lora_alpha=3, seed=3)]
    model = mixture(folders, r=5, experts={"name": "core", "lora_alpha": 5})
    for expert, folder in enumerate(folders):
        torch.testing.assert_close(logits(only(model, expert), "llama"), peft_logits(folder), rtol=2e-5, atol=2e-5)


def test_experts_that_train_start_as_the_adapters(tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / "a"), peft_folder(tmp_path / "b", r=2, seed=3, init_lora_weights="pissa")]
    model = mixture(folders, experts={"train": "all"})
    for expert, folder in enumerate(folders):
        torch.testing.assert_close(logits(only(model, expert), "llama"), peft_logits(folder), **MOVED)
    model.train()(**tiny.batch()).loss.backward()
    names = {name.rpartition(".")[2] for name in tiny.gradients(model)}
    assert names == {"lora_A", "lora_B", "theta"}


def test_a_folder_of_moelora_gives_its_experts_to_another_mixture(tmp_path: Path) -> None:
    """Also those that are more than LoRA, in the order of the entries."""
    folders = [peft_folder(tmp_path / "a", "qwen", use_dora=True), peft_folder(tmp_path / "b", "qwen", lora_bias=True)]
    moelora.save(mixture(folders, "qwen"), tmp_path / "out")
    third = peft_folder(tmp_path / "c", "qwen", bias="lora_only", seed=4)
    model = mixture([third, tmp_path / "out"], "qwen", experts={"num_experts": 3})
    for expert, folder in enumerate([third, *folders]):
        torch.testing.assert_close(logits(only(model, expert), "qwen"), peft_logits(folder, "qwen"), **CLOSE)
