"""AdapterConfig: short forms, defaults, and errors that name the place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.model.config import AdapterConfig, ExpertsConfig, resolve

FULL = {
    "experts": {
        "name": "lora",
        "num_experts": 4,
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "train": "all",
        "adapters": [],
        "absent": "keep",
        "modules_from": "agree",
    },
    "router": {"name": "meteora", "top_k": 1, "temperature": 2.0},
    "ranks": {"name": "full"},
    "targets": {"name": "named"},
    "init": {"name": "kaiming"},
    "losses": {"z": {"weight": 0.1, "tokens": "answers"}},
    "target_modules": ["q_proj"],
    "exclude_modules": None,
    "layers_to_transform": [0],
    "layers_pattern": None,
    "modules_to_save": [],
}


def fault(config: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(config, Methods())
    return str(caught.value)


def test_a_full_configuration_is_left_as_it_is() -> None:
    assert resolve(FULL, Methods()).model_dump() == FULL


def test_nothing_given_is_plain_lora_on_every_linear_layer() -> None:
    config = resolve({}, Methods())
    assert config.router == {"name": "single"} and config.init == {"name": "kaiming"} and config.losses == {}
    assert config.target_modules == "all-linear" and config.experts.num_experts == 1 and config.experts.r == 8


def test_a_name_stands_for_a_method_with_its_defaults() -> None:
    config = resolve({"router": "smora", "init": "kaiming"}, Methods())
    assert config.router == {
        "name": "smora",
        "top_k": 8,
        "block_size": 1,
        "score_fn": "sigmoid",
        "bias_in_gate": True,
        "bias_update_rate": 1e-5,
    }


def test_a_number_stands_for_a_loss_with_its_weight() -> None:
    config = resolve({"router": "smora", "losses": {"z": 1, "balance": {"weight": 0.5}}}, Methods())
    assert config.losses == {"z": {"weight": 1.0, "tokens": "all"}, "balance": {"weight": 0.5, "tokens": "all"}}


def test_resolving_twice_changes_nothing() -> None:
    once = resolve({"router": "smora", "losses": {"z": 0.1}}, Methods())
    assert resolve(once, Methods()) == once
    assert resolve(once.model_dump(), Methods()) == once


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_is_read_as_yaml(kind: type, tmp_path: Path) -> None:
    path = tmp_path / "adapter.yaml"
    path.write_text(yaml.safe_dump(FULL))
    assert resolve(kind(path), Methods()).model_dump() == FULL


@pytest.mark.parametrize("content", ["", "3", "[router]"])
def test_a_file_without_a_mapping(content: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.yaml"
    path.write_text(content)
    assert "expected a mapping of keys to values" in fault(path)


@pytest.mark.parametrize("content", ["router: {name: smora", "a: b: c", "\tx: 1"])
def test_a_file_that_is_not_yaml(content: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.yaml"
    path.write_text(content)
    assert "adapter.yaml" in fault(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "adapter.yaml" in fault(tmp_path / "adapter.yaml")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"routr": "smora"}, "adapter: unknown key 'routr'; did you mean 'router'?"),
        ({"experts": {"r": 0}}, "adapter.experts.r: input should be greater than or equal to 1, found 0"),
        ({"experts": {"lora_dropout": 1.0}}, "adapter.experts.lora_dropout: input should be less than 1, found 1.0"),
        ({"experts": {"lora_alpha": 0}}, "adapter.experts.lora_alpha: input should be greater than 0, found 0"),
        ({"experts": {"name": "lroa"}}, "experts: no method named 'lroa'; did you mean 'lora'"),
        ({"router": {"top_k": 1}}, "adapter.router: expected a method name or {name: ..., option: ...}, found"),
        ({"router": 3}, "adapter.router: expected a method name or {name: ..., option: ...}, found 3"),
        ({"router": {"name": "smora", "topk": 3}}, "routers.smora: unknown key 'topk'; did you mean 'top_k'?"),
        ({"init": "kaimng"}, "init: no method named 'kaimng'; did you mean 'kaiming'"),
        ({"losses": ["z"]}, "adapter.losses: expected loss names with weights, found ['z']"),
        ({"target_modules": 3}, "adapter.target_modules"),
        ({"router": "smora", "experts": {"r": 4}}, "routers.smora: top_k 8 is more than the 4 ranks"),
    ],
)
def test_faults(config: dict[str, Any], expected: str) -> None:
    assert fault(config).startswith(expected)


def test_a_misspelt_key_of_the_experts_offers_the_common_keys_too() -> None:
    # r, lora_alpha and the like are not options of the parameterisation, but they are what people misspell here.
    assert "did you mean 'num_experts'" in fault({"experts": {"num_expert": 3}})


def test_values_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        AdapterConfig().router = {}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("adapters", "labels"),
    [
        (["out/sql", "org/french@v2"], ["sql", "french"]),
        (["org/all/sql@0123abc", "here/french/"], ["sql", "french"]),
        (["one/lora", "two/lora"], []),
        (["out/mixture"], []),
        ([], []),
    ],
)
def test_experts_are_called_by_their_adapters(adapters: list[str], labels: list[str]) -> None:
    assert ExpertsConfig(num_experts=2, adapters=adapters).labels == labels
