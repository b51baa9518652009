"""One router for several layers: it is one module, trained, counted and saved once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import moelora
from moelora.core.errors import ConfigError
from moelora.model.adapt import parameter_counts
from moelora.model.record import routed_layers
from moelora.model.save import restore
from moelora.model.write import adapter_tensors
from tests import tiny

PLUGIN = '''
"""Top-k of a linear gate, one for the layers of a module that read as many features, with a balance bias."""
import torch
from moelora.core.route import Route, top_k
from moelora.routers.base import Router, linear_scores


class Joint(Router):
    gives = ("logits",)

    def __init__(self, site, num_experts, r):
        super().__init__(site, num_experts, r)
        self.weight = torch.nn.Parameter(torch.randn(num_experts, site.in_features))
        self.register_buffer("bias", torch.zeros(num_experts))
        self.prepared, self.loads = [], []

    @classmethod
    def group(cls, site, options):
        return f"{site.parent} {site.in_features}"

    def prepare(self, factors):
        self.prepared.append(factors)

    def forward(self, x, view):
        logits = linear_scores(self.weight, x)
        biased = logits + self.bias
        index = view.once(lambda: top_k(biased, 2))
        route = Route(logits.gather(1, index).softmax(-1), self.num_experts, index, logits)
        if self.training:
            view.count(route.load(view.mask))
        return route

    def after_step(self, load):
        self.loads.append(load)
        self.bias += 0.01 * torch.sign(load.mean() - load)
'''
FIRST = "model.layers.0.self_attn.q_proj.router"
SHARED = ("xlora", "joint")
KEYS = {
    "xlora": {f"{FIRST}.head.0.weight", f"{FIRST}.head.0.bias"},
    "joint": {
        f"model.layers.{block}.{name}.router.{value}"
        for block in range(2)
        for name in ("self_attn.q_proj", "mlp.down_proj")
        for value in ("weight", "bias")
    },
}
"""What router.safetensors holds: by the name of the first layer of each group."""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "joint.py"
    path.write_text(PLUGIN)
    return path


def build(method: str, plugin: Path, seed: int = 0, **more: Any) -> Any:
    config = {
        "router": {"name": "xlora", "xlora_dropout_p": 0.0} if method == "xlora" else method,
        "experts": {"num_experts": 4, "r": 2},
        "target_modules": tiny.TARGETS["llama"],
        **more,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        return tiny.shake(moelora.adapt(tiny.llama(), config, plugins=[plugin], verbose=False))


def routers(model: nn.Module) -> list[Any]:
    """Every router once, in the order of their first layers."""
    return list({id(layer.router): layer.router for layer in routed_layers(model)}.values())


def train(model: Any, steps: int = 2) -> None:
    adam = torch.optim.AdamW(tiny.trainable(model).values(), lr=0.05)
    for seed in range(steps):
        model(**tiny.batch(seed=seed)).loss.backward()
        adam.step()
        adam.zero_grad()


def test_the_groups(plugin: Path) -> None:
    assert [len(routers(build(method, plugin))) for method in SHARED] == [1, 4]
    for layer in routed_layers(build("joint", plugin)):
        first = layer.router.site.name
        assert first.rpartition(".")[0] == layer.site.parent
        assert first.endswith(("q_proj", "down_proj"))


@pytest.mark.parametrize("method", SHARED)
def test_parameters_are_there_once(method: str, plugin: Path) -> None:
    model = build(method, plugin)
    found = routers(model)
    own = [id(p) for router in found for p in router.parameters()]
    ids = [id(p) for p in model.parameters()]
    assert all(ids.count(one) == 1 for one in own)
    experts = sum(p.numel() for layer in routed_layers(model) for p in layer.experts.parameters())
    heads = sum(p.numel() for router in found for p in router.parameters())
    assert parameter_counts(model)[0] == experts + heads
    assert heads == {"xlora": 33 * 4, "joint": 2 * (32 + 40) * 4}[method]


@pytest.mark.parametrize("method", SHARED)
def test_the_table_counts_them_once(method: str, plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"router": method, "experts": {"num_experts": 4, "r": 2}, "target_modules": tiny.TARGETS["llama"]}
    model = moelora.adapt(tiny.llama(), config, plugins=[plugin])
    trains, total = parameter_counts(model)
    assert f"trainable {trains:,} of {total:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize("method", SHARED)
def test_a_trainers_optimiser_has_them_once(method: str, plugin: Path, tmp_path: Path) -> None:
    model = build(method, plugin)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    groups = Trainer(model=model, args=args).create_optimizer().param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in tiny.trainable(model).values()}


@pytest.mark.parametrize("method", SHARED)
def test_saved_once_and_loaded_bit_for_bit(method: str, plugin: Path, tmp_path: Path) -> None:
    model, batch = build(method, plugin), tiny.unlabelled(tiny.batch())
    train(model)
    expected = model.eval()(**batch).logits
    moelora.save(model, tmp_path)
    assert load_file(tmp_path / "router.safetensors").keys() == KEYS[method]
    loaded = moelora.load(tiny.llama(), tmp_path, plugins=[plugin])
    tiny.assert_same(adapter_tensors(loaded), adapter_tensors(model))
    assert len(routers(loaded)) == len(routers(model))
    assert torch.equal(loaded.eval()(**batch).logits, expected)
    resumed = build(method, plugin, seed=5)
    restore(resumed, tmp_path)
    tiny.assert_same(adapter_tensors(resumed), adapter_tensors(model))
    train(loaded.train())
    assert len(routers(loaded)) == len(routers(model))  # it still is one after training


@pytest.mark.parametrize("method", SHARED)
def test_a_state_dict_goes_into_another_model(method: str, plugin: Path) -> None:
    one, two = build(method, plugin), build(method, plugin, seed=5)
    two.load_state_dict(one.state_dict())
    tiny.assert_same(dict(one.state_dict()), dict(two.state_dict()))


@pytest.mark.parametrize("method", SHARED)
def test_a_gathered_state_without_the_repetitions_is_enough(method: str, plugin: Path, tmp_path: Path) -> None:
    # Engines that gather shards go by named_parameters, which names a shared one once.
    model = build(method, plugin)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    model.save_pretrained(tmp_path, state_dict=state)
    tiny.assert_same(adapter_tensors(moelora.load(tiny.llama(), tmp_path, plugins=[plugin])), adapter_tensors(model))


@pytest.mark.parametrize("method", SHARED)
def test_a_deep_copy_shares_within_itself(method: str, plugin: Path) -> None:
    model = build(method, plugin)
    twin = copy.deepcopy(model)
    assert len(routers(twin)) == len(routers(model))
    assert not {id(p) for p in routers(twin)} & {id(p) for p in routers(model)}


@pytest.mark.parametrize("method", SHARED)
def test_a_cast_leaves_them_shared(method: str, plugin: Path) -> None:
    model = build(method, plugin)
    before = {key: value.clone() for key, value in adapter_tensors(model).items() if key.endswith("bias")}
    model.to(torch.bfloat16).to(torch.float32)
    assert len(routers(model)) == {"xlora": 1, "joint": 4}[method]
    after = adapter_tensors(model)
    assert all(torch.equal(after[key], bias) == (method == "joint") for key, bias in before.items())  # X-LoRA: weights


def test_the_gradient_is_the_sum_over_the_layers(plugin: Path) -> None:
    """Against a model whose layers have a router each, of equal values."""
    shared = build("joint", plugin)
    apart = copy.deepcopy(shared)
    for layer in routed_layers(apart):
        layer.router = copy.deepcopy(layer.router)
    for model in (shared, apart):
        model(**tiny.batch()).loss.backward()
    total: dict[int, Tensor] = {}
    for mine, theirs in zip(routed_layers(shared), routed_layers(apart), strict=True):
        total[id(mine.router)] = total.get(id(mine.router), 0) + theirs.router.weight.grad
    for router in routers(shared):
        torch.testing.assert_close(router.weight.grad, total[id(router)], rtol=1e-5, atol=1e-7)


def test_a_shared_router_balances_once_per_step_by_all_its_tokens(plugin: Path) -> None:
    model, batch = build("joint", plugin), tiny.batch()
    valid = batch["attention_mask"].reshape(-1).bool()
    train(model, 1)
    for router in routers(model):
        router.loads.clear()
    model(**batch).loss.backward()
    loads = [route.load(valid) for route in tiny.routes(model, **batch)]
    torch.optim.SGD(tiny.trainable(model).values(), lr=0.1).step()
    for router in routers(model):
        own = [load for layer, load in zip(routed_layers(model), loads, strict=True) if layer.router is router]
        (found,) = router.loads
        assert torch.equal(found, torch.stack(own).sum(0))


def test_a_shared_router_is_prepared_for_each_of_its_layers(plugin: Path) -> None:
    config = {"router": "joint", "experts": {"num_experts": 4, "r": 2}, "target_modules": tiny.TARGETS["llama"]}
    adapted = moelora.adapt(tiny.llama(), config, plugins=[plugin], verbose=False)
    assert sorted(len(router.prepared) for router in routers(adapted)) == [1, 1, 2, 2]


def test_one_router_needs_as_many_experts_everywhere(plugin: Path) -> None:
    with pytest.raises(ConfigError, match="is one for several layers, which need as many experts each"):
        build("xlora", plugin, experts={"num_experts": [4, 2], "r": 2})
    for method in ("joint", "lora_mixer"):  # their groups lie within a block
        model = build(method, plugin, experts={"num_experts": [4, 3], "r": 2})
        assert [layer.router.num_experts for layer in routed_layers(model)] == [4, 4, 4, 3, 3, 3]
