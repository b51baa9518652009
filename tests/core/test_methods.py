"""Methods: names, options and plugin files."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import moelora
from moelora.core.errors import ConfigError
from moelora.core.methods import AXES, Methods
from moelora.core.tape import Site
from moelora.routers.meteora import MeteoRA
from moelora.routers.smora import SMoRA
from tests import tiny

SITE = Site("layer", 0, 5, 7)

PLUGIN = '''
from typing import Annotated
import torch
from pydantic import Field
from moelora.core.route import Route
from moelora.routers.base import Router, linear_scores


class Everyone(Router):
    """Every expert, equally."""

    def __init__(self, site, num_experts, r, *, share: Annotated[float, Field(gt=0)] = 1.0):
        super().__init__(site, num_experts, r)
        self.share = share

    def forward(self, x, view):
        return Route(x.new_full((x.shape[0], self.num_experts), self.share), self.num_experts)
'''


def fault(spec: dict[str, Any], axis: str = "routers", methods: Methods | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        (methods or Methods()).check(axis, spec)
    return str(caught.value)


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "everyone.py"
    path.write_text(PLUGIN)
    return path


@pytest.mark.parametrize("axis", AXES)
def test_every_shipped_method_can_be_found(axis: str) -> None:
    methods = Methods()
    names = methods.names(axis)
    assert names and "base" not in names and names == sorted(names)
    for name in names:
        method = methods.find(axis, name)
        assert method.__module__ == f"moelora.{axis}.{name}"
        assert method.__doc__


def test_names_of_the_first_methods() -> None:
    assert {"smora", "meteora", "single"} <= set(Methods().names("routers"))
    assert {"balance", "z", "supervised_gate"} <= set(Methods().names("losses"))


def test_unknown_method_offers_near_misses() -> None:
    message = fault({"name": "smra"})
    assert message.startswith("routers: no method named 'smra'; did you mean 'smora'") and "--plugin" in message


def test_base_is_not_a_method() -> None:
    assert "no method named 'base'" in fault({"name": "base"})


def test_options_are_the_keyword_only_arguments() -> None:
    options = Methods().options("routers", "smora")
    assert set(options) == {"top_k", "block_size", "score_fn", "bias_in_gate", "bias_update_rate"}
    assert all(option.kind is inspect.Parameter.KEYWORD_ONLY for option in options.values())
    assert Methods().options("routers", "single") == {}


def test_check_fills_in_the_defaults() -> None:
    assert Methods().check("routers", {"name": "meteora", "top_k": 1}) == {
        "name": "meteora",
        "top_k": 1,
        "temperature": 1.0,
    }


def test_unknown_option_offers_near_misses() -> None:
    message = fault({"name": "smora", "topk": 4})
    assert message.startswith("routers.smora: unknown key 'topk'; did you mean 'top_k'?")
    assert "unknown key 'top_k'" in fault({"name": "single", "top_k": 4})


def test_framework_arguments_are_not_options() -> None:
    assert "unknown key 'num_experts'" in fault({"name": "smora", "num_experts": 4})
    assert "unknown key 'site'" in fault({"name": "smora", "site": 4})
    assert "unknown key 'weight'" in fault({"name": "balance", "weight": 4}, "losses")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"name": "smora", "top_k": "8"}, "routers.smora.top_k: input should be a valid integer, found '8'"),
        ({"name": "smora", "top_k": 8.0}, "routers.smora.top_k: input should be a valid integer, found 8.0"),
        ({"name": "smora", "top_k": True}, "routers.smora.top_k: input should be a valid integer, found True"),
        ({"name": "smora", "bias_in_gate": 1}, "routers.smora.bias_in_gate: input should be a valid boolean, found 1"),
        ({"name": "smora", "score_fn": "tanh"}, "routers.smora.score_fn: input should be 'sigmoid' or 'softmax'"),
        ({"name": "smora", "top_k": 0}, "routers.smora.top_k: input should be greater than or equal to 1, found 0"),
        ({"name": "meteora", "temperature": 0}, "routers.meteora.temperature: input should be greater than 0, found 0"),
    ],
)
def test_wrong_type_or_range(spec: dict[str, Any], expected: str) -> None:
    assert fault(spec).startswith(expected)


def test_build_passes_framework_arguments_first() -> None:
    router = Methods().build("routers", {"name": "smora", "top_k": 2}, SITE, 3, 4)
    assert isinstance(router, SMoRA) and (router.num_experts, router.r, router.top_k) == (3, 4, 2)
    assert router.site is SITE


def test_a_plugin_is_a_method(plugin: Path) -> None:
    methods = Methods([plugin])
    assert "everyone" in methods.names("routers") and "everyone" not in methods.names("losses")
    assert methods.check("routers", {"name": "everyone"}) == {"name": "everyone", "share": 1.0}
    assert "did you mean 'share'?" in fault({"name": "everyone", "shar": 2.0}, methods=methods)
    assert "greater than 0" in fault({"name": "everyone", "share": 0.0}, methods=methods)
    assert "everyone" not in Methods().names("routers")  # known to its own caller only


def test_an_adapted_model_runs_a_plugin(plugin: Path) -> None:
    config = {"router": {"name": "everyone", "share": 0.5}, "experts": {"num_experts": 2, "r": 2, "lora_alpha": 2}}
    model = moelora.adapt(tiny.Toy(), {"target_modules": ["lin"], **config}, plugins=[str(plugin)], verbose=False)
    tiny.shake(model)
    layer, x = model.lin, torch.randn(4, 5, dtype=torch.float64)
    expected = layer.base_layer(x) + 0.5 * x @ layer.experts.lora_A.t() @ layer.experts.lora_B.t()
    torch.testing.assert_close(model(x), expected)


def test_a_plugin_of_a_shipped_name_takes_its_place(plugin: Path) -> None:
    replaced = plugin.rename(plugin.with_name("single.py"))
    assert Methods([replaced]).find("routers", "single").__name__ == "Everyone"


def test_a_plugin_may_derive_from_a_shipped_method(tmp_path: Path) -> None:
    path = tmp_path / "hot.py"
    path.write_text("from moelora.routers.meteora import MeteoRA\n\n\nclass Hot(MeteoRA):\n    pass\n")
    router = Methods([path]).build("routers", {"name": "hot", "top_k": 1}, SITE, 3, 4)
    assert isinstance(router, MeteoRA) and type(router).__name__ == "Hot"


@pytest.mark.parametrize(
    "content",
    ["", "x = 1\n", "from moelora.routers.smora import SMoRA\n", PLUGIN + PLUGIN.replace("Everyone", "Two")],
)
def test_a_plugin_with_no_or_two_methods_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.py: expected one class derived from one of Experts, Router"):
        Methods([path])


def test_a_plugin_that_is_not_a_python_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "method.txt").write_text(PLUGIN)
    for name in ("method.txt", "absent.py", "."):
        with pytest.raises(ConfigError, match="expected an existing Python file"):
            Methods([tmp_path / name])


def test_two_plugins_of_one_file_name_on_different_axes(tmp_path: Path, plugin: Path) -> None:
    other = tmp_path / "losses" / "everyone.py"
    other.parent.mkdir()
    other.write_text(
        "from moelora.losses.base import Loss\n\n\nclass Zero(Loss):\n"
        "    def __call__(self, route, view):\n        return route.weight.sum() * 0\n"
    )
    methods = Methods([plugin, other])
    assert methods.find("routers", "everyone").__name__ == "Everyone"
    assert methods.find("losses", "everyone").__name__ == "Zero"
