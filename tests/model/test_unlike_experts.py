"""Experts unlike each other in one layer, mixed: ranks, scales, DoRA, biases, dtypes, and layers that some lack."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import moelora
from moelora.core.errors import ConfigError
from moelora.io.peft import CONFIG, PREFIX, WEIGHTS
from moelora.model.record import routed_layers
from tests import tiny
from tests.adapters import TARGETS, base, cast, choose, mixture, only, peft_folder

NEAR = {"rtol": 1e-6, "atol": 1e-6}
"""In float64, for scales, stretches and shifts that are kept in float32."""
Gate = Callable[[Tensor, list[bool]], Tensor]
"""From a token x [D] and which experts have the layer to the gates [E]."""


def added(folder: Path, path: str, W: Tensor, b: Tensor | None, x: Tensor) -> Tensor | None:
    """What one adapter adds to y = W x + b for one token x [D], by the formulas; None where it has nothing."""
    config, start = json.loads((folder / CONFIG).read_text()), f"{PREFIX}{path}."
    own = {name.removeprefix(start): t.to(x) for name, t in load_file(folder / WEIGHTS).items() if start in name}
    if not own:
        return None
    A, B = own["lora_A.weight"], own["lora_B.weight"]
    s = config["lora_alpha"] / (len(A) ** 0.5 if config["use_rslora"] else len(A))
    y = s * (B @ (A @ x))
    if "lora_B.bias" in own:
        y = y + s * own["lora_B.bias"]
    if "lora_magnitude_vector" in own:
        V = W + s * B @ A
        y = own["lora_magnitude_vector"] / V.square().sum(1).sqrt() * (V @ x) - W @ x
    if "base_layer.bias" in own:
        y = y + own["base_layer.bias"] - b
    return y


class Mixed(nn.Module):
    """A layer as the formula has it, token by token: its base, and every adapter's addition times its gate."""

    def __init__(self, layer: Any, path: str, folders: Sequence[Path], gate: Gate, parameter: Tensor) -> None:
        super().__init__()
        self.layer, self.path, self.folders, self.gate = layer, path, folders, gate
        self.parameter = nn.Parameter(parameter.clone())

    def forward(self, x: Tensor) -> Tensor:
        W = self.layer.weight.t() if isinstance(self.layer, Conv1D) else self.layer.weight
        b, rows = self.layer.bias, []
        for token in x.reshape(-1, x.shape[-1]):
            own = [added(folder, self.path, W, b, token) for folder in self.folders]
            gates = self.gate(token, [y is not None for y in own], self.parameter)
            y = W @ token if b is None else W @ token + b
            rows.append(y + sum(g * u for g, u in zip(gates, own, strict=True) if u is not None))
        return torch.stack(rows).view(*x.shape[:-1], -1)


def oracle(model: Any, folders: Sequence[Path], gate: Any, parameters: dict[str, Tensor]) -> Any:
    """The base model with ``Mixed`` in place of every layer named in ``parameters``, all else frozen."""
    model.requires_grad_(False)
    for path, parameter in parameters.items():
        parent, _, child = path.rpartition(".")
        layer = Mixed(model.get_submodule(path), path, folders, gate, parameter)
        setattr(model.get_submodule(parent), child, layer)
    return model


def static(x: Tensor, has: list[bool], theta: Tensor) -> Tensor:
    return theta


def meteora(x: Tensor, has: list[bool], Wg: Tensor) -> Tensor:
    logits = Wg @ x
    chosen = logits.topk(2).indices
    return torch.zeros_like(logits).index_put((chosen,), logits[chosen].softmax(0))


def masked_softmax(x: Tensor, has: list[bool], Wg: Tensor) -> Tensor:
    if not any(has):
        return torch.zeros(len(has))
    return (Wg @ x).masked_fill(~torch.tensor(has), -torch.inf).softmax(0)


UNLIKE: list[dict[str, Any]] = [
    {"r": 4, "use_dora": True, "bias": "lora_only"},
    {"r": 2, "lora_bias": True, "lora_alpha": 7, "use_rslora": True},
    {"r": 3, "lora_alpha": 1},
]


def unlike(tmp_path: Path, kind: str = "qwen", count: int = 3, targets: Sequence[list[str]] = ()) -> list[Path]:
    """A DoRA that has trained biases, one with a bias of its own, and a plain one."""
    more = [{"target_modules": names} for names in targets] or [{}] * count
    every = zip(UNLIKE[:count], more, strict=True)
    return [peft_folder(tmp_path / f"a{i}", kind, seed=i, **{**own, **m}) for i, (own, m) in enumerate(every)]


def routers(model: Any, name: str) -> dict[str, Tensor]:
    """The parameter of this name of every router, by layer."""
    return {layer.site.name: getattr(layer.router, name) for layer in routed_layers(model)}


def compare(model: Any, reference: Any, name: str, kind: str, close: dict[str, float]) -> None:
    """Loss and logits, and the gradients of the routers."""
    given = tiny.batch(kind)
    found, expected = model(**given), reference(**given)
    found.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits, **close)
    plain = base(kind, dtype=found.logits.dtype)(**given).logits
    assert (expected.logits - plain).abs().max() > 1e-2
    for path, parameter in routers(model, name).items():
        wanted = reference.get_submodule(path).parameter.grad
        torch.testing.assert_close(
            parameter.grad, wanted, rtol=close["rtol"], atol=close["atol"] * float(wanted.abs().max())
        )


@pytest.mark.parametrize("kind", ["qwen", "gpt2"])
def test_two_experts_mixed(kind: str, tmp_path: Path) -> None:
    folders = unlike(tmp_path, kind, 2)
    model = choose(mixture(folders, kind, model=base(kind, dtype=torch.float64)), 0.3, 0.7)
    reference = oracle(base(kind, dtype=torch.float64), folders, static, routers(model, "theta"))
    compare(model, reference, "theta", kind, NEAR)


def test_a_router_by_token(tmp_path: Path) -> None:
    folders = unlike(tmp_path)
    model = mixture(folders, "qwen", model=base("qwen", dtype=torch.float64), router="meteora")
    reference = oracle(base("qwen", dtype=torch.float64), folders, meteora, routers(model, "weight"))
    compare(model, reference, "weight", "qwen", NEAR)


@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_in_half_precision(how: str, tmp_path: Path) -> None:
    """Outputs, and gradients of the gates, as far as bfloat16 goes."""
    folders = unlike(tmp_path)
    rounded = base("qwen").bfloat16().double() if how == "bf16" else base("qwen", dtype=torch.float64)
    model = mixture(folders, "qwen", model=base("qwen").bfloat16() if how == "bf16" else base("qwen"), router="meteora")
    reference = oracle(rounded, folders, meteora, {k: v.double() for k, v in routers(model, "weight").items()})
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = model(**tiny.batch())
    expected = reference(**tiny.batch())
    found.loss.backward()
    expected.loss.backward()
    change = expected.logits - base("qwen", dtype=torch.float64)(**tiny.batch()).logits
    assert (found.logits.double() - expected.logits).norm() < 0.03 * change.norm()
    ours = torch.cat([w.grad.double().flatten() for w in routers(model, "weight").values()])
    theirs = torch.cat([reference.get_submodule(p).parameter.grad.flatten() for p in routers(model, "weight")])
    assert (ours - theirs).norm() < 0.1 * theirs.norm()


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    folders = unlike(tmp_path)
    found = []
    for on in (False, True):
        model = mixture(folders, "qwen", router="meteora").train()
        if on:
            tiny.checkpointing(model)
        model(**tiny.batch()).loss.backward()
        found.append(tiny.gradients(model))
    tiny.assert_same(*found)


@torch.no_grad()
def test_generation_with_a_cache(tmp_path: Path) -> None:
    folders = unlike(tmp_path)
    model = mixture(folders, "qwen", router="meteora")
    ids = tiny.batch(padded=False)["input_ids"]
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, uncached = (model.generate(input_ids=ids, use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached, uncached) and cached.shape == (3, 13)
    assert not torch.equal(cached, base("qwen").eval().generate(input_ids=ids, **how))
    past = model(input_ids=cached[:, :-1], use_cache=True).past_key_values
    step, whole = model(input_ids=cached[:, -1:], past_key_values=past).logits, model(input_ids=cached).logits
    torch.testing.assert_close(step[:, 0], whole[:, -1], rtol=2e-5, atol=2e-5)


# Layers that some adapters lack


LACKING = [["q_proj", "o_proj"], ["q_proj", "v_proj"], ["o_proj"]]


@pytest.mark.parametrize("absent", ["keep", "redistribute"])
def test_experts_that_lack_a_layer(absent: str, tmp_path: Path) -> None:
    """Its gate is kept, and adds nothing; or is given to the others, as softmax over those alone does.

    v_proj is of one expert only, which then is always on, and no adapter has k_proj.
    """
    folders = unlike(tmp_path, targets=LACKING)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    more = {"router": "softmax", "target_modules": targets, "experts": {"absent": absent}}
    model = mixture(folders, "qwen", model=base("qwen", dtype=torch.float64), **more)
    gate = masked_softmax if absent == "redistribute" else lambda x, has, Wg: (Wg @ x).softmax(0)
    weights = routers(model, "weight")
    reference = oracle(base("qwen", dtype=torch.float64), folders, gate, weights)
    given = tiny.batch()
    found, expected = model(**given), reference(**given)
    torch.testing.assert_close(found.logits, expected.logits, **NEAR)
    found.loss.backward()
    expected.loss.backward()
    for path, weight in weights.items():
        wanted = reference.get_submodule(path).parameter.grad
        wanted = torch.zeros_like(weight) if wanted is None else wanted
        assert (weight.grad.abs().max() > 1e-6) == ("k_proj" not in path and (absent == "keep" or "v_proj" not in path))
        torch.testing.assert_close(weight.grad, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()) + 1e-15)


@pytest.mark.parametrize("absent", ["keep", "redistribute"])
def test_absent_is_saved(absent: str, tmp_path: Path) -> None:
    folders = unlike(tmp_path, targets=LACKING)
    more = {"router": "softmax", "target_modules": TARGETS["qwen"], "experts": {"absent": absent}}
    model = mixture(folders, "qwen", **more)
    moelora.save(model, tmp_path / "out")
    again = moelora.load(base("qwen"), tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(**tiny.batch()).logits, model(**tiny.batch()).logits)
    for one, two in zip(routed_layers(model), routed_layers(again), strict=True):
        assert one.experts.ranks == two.experts.ranks
        assert (one.experts.present is None) == (two.experts.present is None) == (absent == "keep")


def test_an_expert_with_nothing_but_a_bias_in_a_layer_has_it(tmp_path: Path) -> None:
    more = {"target_modules": ["q_proj"], "bias": "all"}
    folders = [peft_folder(tmp_path / "a", "qwen", **more), peft_folder(tmp_path / "b", "qwen", seed=1)]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = mixture(folders, "qwen", router="softmax", target_modules=targets, experts={"absent": "redistribute"})
    for layer, route in zip(routed_layers(model), tiny.routes(model, **tiny.batch()), strict=True):
        name = layer.site.name.rpartition(".")[2]
        expected = {"k_proj": [True, False], "o_proj": [False, True]}.get(name, [True, True])
        assert route.dense().gt(0).all(0).tolist() == expected == route.dense().gt(0).any(0).tolist()


def test_a_choice_of_experts_that_all_lack_the_layer_adds_nothing(tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / "a", target_modules=["v_proj"]), peft_folder(tmp_path / "b", seed=1)]
    more = {"target_modules": ["q_proj", "v_proj", "down_proj"], "experts": {"absent": "redistribute"}}
    model = mixture(folders, router={"name": "meteora", "top_k": 1}, **more)
    with torch.no_grad():
        for layer in routed_layers(model):
            layer.router.weight.zero_()  # equal logits: the first expert is chosen
    for layer, route in zip(routed_layers(model), tiny.routes(model, **tiny.batch()), strict=True):
        assert (route.dense().sum(1) == float(layer.site.name.endswith("v_proj"))).all()


def test_top_k_keeps_the_sum_of_its_gates(tmp_path: Path) -> None:
    folders = unlike(tmp_path, targets=LACKING)
    more = {"router": {"name": "softmax", "top_k": 2, "renorm": False}, "target_modules": TARGETS["qwen"]}
    keep, spread = (mixture(folders, "qwen", **more, experts={"absent": a}) for a in ("keep", "redistribute"))
    for layer, one, two in zip(
        routed_layers(keep), tiny.routes(keep, **tiny.batch()), tiny.routes(spread, **tiny.batch()), strict=True
    ):
        if layer.site.block or layer.site.name.endswith("o_proj"):
            continue  # later layers see other inputs
        has = torch.tensor([layer.site.name.rpartition(".")[2] in names for names in LACKING])
        left = one.dense() * has
        some = left.sum(1) > 0
        torch.testing.assert_close(two.dense().sum(1)[some], one.dense().sum(1)[some])
        torch.testing.assert_close(
            two.dense()[some], (left / left.sum(1, keepdim=True) * one.dense().sum(1, keepdim=True))[some]
        )
        assert some.any() and not two.dense()[~some].any()


def test_gates_of_padded_ranks_are_spread_over_real_ones(tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / "a", r=4), peft_folder(tmp_path / "b", r=1, seed=2)]
    more = {"router": {"name": "smora", "top_k": 5}, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = mixture(folders, **more, model=base(dtype=torch.float64), experts={"absent": "redistribute"})
    layer = routed_layers(model)[0]
    x = torch.randn(6, 32, dtype=torch.float64)
    with torch.no_grad():
        score = (x @ layer.router.weight.t()).sigmoid()
        kept = torch.zeros_like(score).scatter(1, score.topk(5).indices, 1.0) * score
        real = torch.tensor([True] * 4 + [True] + [False] * 3)
        assert (kept[:, ~real] > 0).any()
        gate = 5 * kept * real / (kept * real).sum(1, keepdim=True)
        scale = torch.tensor([2.0] * 5 + [0.0] * 3, dtype=torch.float64)
        A, B = layer.experts.lora_A, layer.experts.lora_B
        expected = layer.base_layer(x) + (scale * gate * (x @ A.t())) @ B.t()
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("absent", ["keep", "redistribute"])
def test_around_a_feed_forward_block_an_expert_is_there_if_it_has_any_of_its_layers(
    absent: str, tmp_path: Path
) -> None:
    lacks = [["up_proj"], ["gate_proj", "down_proj"], ["q_proj"]]
    folders = [peft_folder(tmp_path / f"a{i}", seed=i, target_modules=names) for i, names in enumerate(lacks[:2])]
    third = peft_folder(tmp_path / "c", seed=5, target_modules=["gate_proj"], layers_to_transform=[1])
    more = {"router": {"name": "mixlora", "top_k": 3}, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    model = mixture([*folders, third], **more, experts={"absent": absent})
    first, second = tiny.routes(model, **tiny.batch())
    assert (first.dense()[:, :2] > 0).all() and (first.dense()[:, 2] > 0).all() == (absent == "keep")
    assert (second.dense() > 0).all()
    torch.testing.assert_close(first.dense().sum(1), torch.ones(21))


# What they are kept in


def test_frozen_experts_keep_the_dtype_of_the_files(tmp_path: Path) -> None:
    half = [peft_folder(tmp_path / name, dtype=torch.bfloat16, seed=i, r=3) for i, name in enumerate("ab")]
    other = peft_folder(tmp_path / "c", dtype=torch.float16, seed=5, target_modules=["v_proj"])
    for layer in routed_layers(mixture([*half, other])):
        mixed = layer.site.name.endswith("v_proj")
        assert layer.experts.lora_A.dtype == layer.experts.lora_B.dtype == (torch.float32 if mixed else torch.bfloat16)
        for index, folder in enumerate(half):
            tensors, start = load_file(folder / WEIGHTS), f"{PREFIX}{layer.site.name}.lora_"
            rows = slice(4 * index, 4 * index + 3)
            assert torch.equal(layer.experts.lora_A[rows], tensors[f"{start}A.weight"].to(layer.experts.lora_A.dtype))
            assert torch.equal(
                layer.experts.lora_B[:, rows], tensors[f"{start}B.weight"].to(layer.experts.lora_A.dtype)
            )
            assert not layer.experts.lora_A[4 * index + 3].any() and not layer.experts.lora_B[:, 4 * index + 3].any()


def test_halves_of_two_dtypes(tmp_path: Path) -> None:
    folder = cast(peft_folder(tmp_path / "a", dtype=torch.bfloat16), torch.float16, "lora_B")
    model = mixture([folder])
    assert routed_layers(model)[0].experts.lora_A.dtype == torch.float32


def test_experts_that_train_are_float32(tmp_path: Path) -> None:
    model = mixture([peft_folder(tmp_path / "a", dtype=torch.bfloat16)], experts={"train": "all"})
    assert {layer.experts.lora_B.dtype for layer in routed_layers(model)} == {torch.float32}


def test_padding_stays_zero_in_training(tmp_path: Path) -> None:
    """Neither half gets a gradient there, so a trained expert is saved at its own rank."""
    folders = [peft_folder(tmp_path / "a", r=4), peft_folder(tmp_path / "b", r=2, seed=1, target_modules=["q_proj"])]
    model = mixture(folders, router="meteora", experts={"train": "all"}).train()
    adam = torch.optim.AdamW(tiny.trainable(model).values(), lr=0.05, weight_decay=0.1)
    for seed in range(3):
        model(**tiny.batch(seed=seed)).loss.backward()
        adam.step()
        adam.zero_grad()
    for layer in routed_layers(model):
        own = 2 if layer.site.name.endswith("q_proj") else 0
        assert not layer.experts.lora_A[4 + own :].any() and not layer.experts.lora_B[:, 4 + own :].any()
    moelora.save(model, tmp_path / "out")
    again = moelora.load(base(), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.eval()(**tiny.batch()).logits, model.eval()(**tiny.batch()).logits)


def test_a_cast_of_the_model_leaves_stretch_and_shift_as_they_are(tmp_path: Path) -> None:
    model = mixture(unlike(tmp_path), "qwen")
    before = [(layer.experts.stretch.clone(), layer.experts.shift.clone()) for layer in routed_layers(model)]
    model.bfloat16()
    for layer, (stretch, shift) in zip(routed_layers(model), before, strict=True):
        assert torch.equal(layer.experts.stretch, stretch) and torch.equal(layer.experts.shift, shift)
    with torch.no_grad():
        assert only(model, 0)(**tiny.batch()).logits.isfinite().all()


def test_experts_switched_off_are_the_base_model(tmp_path: Path) -> None:
    model = mixture(unlike(tmp_path), "qwen")
    with torch.no_grad(), moelora.disabled(model):
        assert torch.equal(model(**tiny.batch()).logits, base("qwen")(**tiny.batch()).logits)


def test_gates_of_single_ranks_cannot_have_them(tmp_path: Path) -> None:
    model = mixture(unlike(tmp_path), "qwen", router={"name": "smora", "top_k": 4})
    with pytest.raises(ConfigError, match="take the gate of a whole expert; this router has 12 gates for 3 experts"):
        model(**tiny.batch())
    whole = mixture(unlike(tmp_path), "qwen", router={"name": "smora", "top_k": 4, "block_size": 4})
    assert whole(**tiny.batch()).loss.isfinite()
