"""Flexora: blocks chosen by a short bilevel training, against the same done by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.model.config import resolve
from moelora.model.record import routed_layers
from moelora.model.sites import decided
from moelora.recipe import check_recipe
from moelora.targets.flexora import Flexora, weights
from moelora.targets.named import select
from moelora.train.run import RECIPE, train
from tests import tiny

BATCHES = [tiny.batch(seed=seed) for seed in range(6)]
SMALL = {"steps": 3, "validation": 2, "r": 2, "lr": 0.05, "lr_sgd": 0.5, "lr_alpha": 0.1}
LAYERS = 4


def base() -> Any:
    return (
        tiny.llama(0, torch.float64, num_hidden_layers=LAYERS, attn_implementation="eager").eval().requires_grad_(False)
    )


def by_hand(unroll: int, alphas: Tensor | None = None) -> tuple[Tensor, Any]:
    """alpha after the steps of SMALL, or the held-out loss after one round from given alphas."""
    model, made = base(), torch.Generator().manual_seed(0)
    sites = select(model, ["q_proj", "v_proj"])
    theta = []
    for site in sites:
        A = (2 * torch.rand(2, site.in_features, generator=made) - 1) / math.sqrt(site.in_features)
        theta += [A.double(), torch.zeros(site.out_features, 2, dtype=torch.float64)]

    def loss(theta: list[Tensor], omega: Tensor, batch: Any) -> Tensor:
        def hook(index: int, block: int) -> Any:
            A, B = theta[2 * index : 2 * index + 2]
            return lambda _, args, y: y + 2 * omega[block] * (args[0] @ A.t() @ B.t())

        hooks = [model.get_submodule(s.name).register_forward_hook(hook(i, s.block)) for i, s in enumerate(sites)]
        found = model(**batch).loss
        for one in hooks:
            one.remove()
        return found

    def omega(alpha: Tensor) -> Tensor:
        return LAYERS * torch.exp(alpha) / torch.exp(alpha).sum()

    held_out, train = BATCHES[:2], [*BATCHES[2:]] * 3
    alpha = torch.zeros(LAYERS) if alphas is None else alphas
    leaves = [value.requires_grad_() for value in theta]
    lower, upper = torch.optim.AdamW(leaves, 0.05, weight_decay=0), torch.optim.Adam([alpha], 0.1)
    for _ in range(3):
        alpha.requires_grad_()
        if unroll:
            moved = leaves
            for _ in range(unroll):
                batch = train.pop(0)
                slopes = torch.autograd.grad(loss(moved, omega(alpha), batch), moved, create_graph=True)
                moved = [value - 0.5 * slope for value, slope in zip(moved, slopes, strict=True)]
            leaves = [value.detach().requires_grad_() for value in moved]
        else:
            slopes = torch.autograd.grad(loss(leaves, omega(alpha.detach()), train.pop(0)), leaves)
            for value, slope in zip(leaves, slopes, strict=True):
                value.grad = slope
            lower.step()
            moved = [value.detach() for value in leaves]
        total = sum(loss(moved, omega(alpha), batch) for batch in held_out) / 2
        if alphas is not None:
            return total, torch.autograd.grad(total, alpha)[0]
        alpha.grad = torch.autograd.grad(total, alpha)[0]
        alpha.requires_grad_(False)
        upper.step()
    return alpha, None


@pytest.mark.parametrize("unroll", [0, 1, 2])
def test_alpha_is_that_of_the_formulas(unroll: int) -> None:
    model = base()
    sites = select(model, ["q_proj", "v_proj"])
    flexora = Flexora(**SMALL, unroll_steps=unroll)
    assert flexora.batches == 2 + 3 * max(1, unroll)
    with torch.enable_grad():
        found = flexora.search(model, sites, BATCHES)
    expected, _ = by_hand(unroll)
    assert list(found) == list(range(LAYERS)) and max(abs(a) for a in found.values()) > 0.05
    torch.testing.assert_close(torch.tensor(list(found.values())), expected, rtol=1e-4, atol=1e-6)


def test_the_unrolled_gradient_is_that_of_differences() -> None:
    alpha = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
    _, gradient = by_hand(2, alpha.clone())
    step = 3e-3  # transformers computes losses in float32
    for block in range(LAYERS):
        away = step * torch.eye(LAYERS, dtype=torch.float64)[block]
        losses = [float(by_hand(2, alpha + sign * away)[0].detach()) for sign in (1, -1)]
        assert float(gradient[block]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-2)


def test_weights_have_a_mean_of_one_whatever_is_added_to_all() -> None:
    alpha = torch.randn(5)
    assert torch.equal(weights(torch.zeros(5)), torch.ones(5))
    torch.testing.assert_close(weights(alpha).mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights(alpha + 3), weights(alpha))


def chosen(monkeypatch: pytest.MonkeyPatch, alpha: list[float], **options: Any) -> list[int]:
    monkeypatch.setattr(Flexora, "search", lambda *_: dict(zip((1, 2, 5), alpha, strict=True)))
    blocks: list[int] = Flexora(**SMALL, **options).choose(base(), [], BATCHES)["blocks"]
    return blocks


def test_blocks_above_zero_are_chosen_or_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, [0.1, -0.2, 0.3]) == [1, 5]
    assert chosen(monkeypatch, [-0.1, -0.2, -0.05]) == [5]
    assert chosen(monkeypatch, [0.1, -0.2, 0.3], count=1) == [5]
    assert chosen(monkeypatch, [0.1, -0.2, 0.3], count=3) == [1, 2, 5]


CONFIG: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj"],
    "router": {"name": "smora", "top_k": 2},
    "experts": {"r": 4},
    "targets": {"name": "flexora", **SMALL, "count": 2},
}


def test_what_was_chosen_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = moelora.adapt(tiny.llama(num_hidden_layers=LAYERS), CONFIG, batches=BATCHES)
    blocks = model.moelora.config.targets["blocks"]
    assert f"targets flexora chose blocks {blocks}\n" in capsys.readouterr().out
    moelora.adapt(tiny.llama(), {**CONFIG, "targets": {"name": "flexora", "blocks": [0]}}, batches=BATCHES)
    assert "chose" not in capsys.readouterr().out


@pytest.mark.parametrize("unroll", [0, 1])
def test_a_model_is_adapted_in_the_chosen_blocks_and_loads_without_data(unroll: int, tmp_path: Path) -> None:
    config = {**CONFIG, "targets": {**CONFIG["targets"], "unroll_steps": unroll}}
    model = tiny.llama(num_hidden_layers=LAYERS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    torch.manual_seed(0)
    moelora.adapt(model, config, verbose=False, batches=iter(BATCHES))
    blocks = model.moelora.config.targets["blocks"]
    assert len(blocks) == 2 and {layer.site.block for layer in routed_layers(model)} == set(blocks)
    again = tiny.llama(num_hidden_layers=LAYERS)
    torch.manual_seed(0)
    moelora.adapt(again, {**config, "targets": {**config["targets"], "blocks": blocks}}, verbose=False)
    tiny.assert_same(dict(model.state_dict()), dict(again.state_dict()))  # nothing of the choice is left
    base_state = {k.replace("base_layer.", ""): v for k, v in model.state_dict().items() if not _added(k)}
    tiny.assert_same(base_state, before)
    assert all(not module._forward_hooks for module in model.modules())
    moelora.save(tiny.shake(model), tmp_path / "out")
    loaded = moelora.load(tiny.llama(num_hidden_layers=LAYERS), tmp_path / "out")
    tiny.assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    torch.set_rng_state(state)


def _added(name: str) -> bool:
    return ".experts." in name or ".router." in name


def test_without_data_or_labels_or_enough_of_them_it_says_so() -> None:
    with pytest.raises(
        ConfigError, match=r"targets flexora looks at data to choose layers.*give moelora.adapt some batch"
    ):
        moelora.adapt(tiny.llama(), CONFIG, verbose=False)
    with pytest.raises(ConfigError, match=r"expected more than validation \(2\), found 2 with labels of 2 batches"):
        moelora.adapt(tiny.llama(), CONFIG, verbose=False, batches=BATCHES[:2])
    with pytest.raises(ConfigError, match="found 0 with labels of 5 batches"):
        moelora.adapt(tiny.llama(), CONFIG, verbose=False, batches=[tiny.unlabelled(batch) for batch in BATCHES])


def test_what_is_chosen_needs_no_data_and_the_rest_is_as_given() -> None:
    config = resolve({**CONFIG, "targets": {"name": "flexora", "blocks": [1]}}, Methods())
    assert decided(tiny.llama(), config, Methods(), None) is config
    found = decided(tiny.llama(), resolve(CONFIG, Methods()), Methods(), BATCHES)
    assert {**found.targets, "blocks": None} == resolve(CONFIG, Methods()).targets


def recipe(out: Path, **targets: Any) -> Any:
    adapter = {**CONFIG, "targets": {"name": "flexora", **SMALL, "count": 1, **targets}}
    training = {"output_dir": str(out), "max_steps": 4, "save_steps": 2, "max_length": 48, "report_to": "none"}
    quiet = {"logging_steps": 1, "eval_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 4}
    data = {"builtin": True, "max_rows": 8, "max_eval_rows": 2}
    return check_recipe({"adapter": adapter, "data": data, "training": {**training, **quiet}})


def losses(result: Any) -> list[float]:
    return [entry["loss"] for entry in result.history if "loss" in entry]


def test_a_run_chooses_writes_it_down_and_is_the_run_on_these_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(recipe(tmp_path / "a"))
    blocks = yaml.safe_load((tmp_path / "a" / RECIPE).read_text())["adapter"]["targets"]["blocks"]
    assert len(blocks) == 1 and {layer.site.block for layer in routed_layers(first.model)} == set(blocks)

    def again(*_: Any) -> None:
        raise AssertionError("chosen a second time")

    monkeypatch.setattr(Flexora, "choose", again)
    same = train(recipe(tmp_path / "b", blocks=blocks))
    assert losses(same) == losses(first)
    (tmp_path / "a" / "checkpoint-4").rename(tmp_path / "gone")
    resumed = train(recipe(tmp_path / "a"), resume=True)
    assert losses(resumed) == losses(first)
