"""LayRA: experts in the outer blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moelora
from moelora.core.errors import ConfigError, TargetError
from moelora.model.record import routed_layers
from tests import tiny


def blocks_of(model: Any) -> list[tuple[int | None, str]]:
    return [(layer.site.block, layer.site.stream) for layer in routed_layers(model)]


def with_targets(targets: Any, layers: int = 6, **more: Any) -> Any:
    config = {"target_modules": ["q_proj", "down_proj"], "router": "softmax", "experts": {"num_experts": 2, "r": 2}}
    return tiny.adapt(tiny.llama(num_hidden_layers=layers), {**config, "targets": targets, **more})


def test_only_the_first_and_the_last_blocks_have_experts() -> None:
    model = with_targets({"name": "layra", "first": 1, "last": 2})
    assert [block for block, _ in blocks_of(model)] == [0, 0, 4, 4, 5, 5]
    sites = [layer.site for layer in routed_layers(model)]
    assert [site.index for site in sites] == list(range(6)) and {site.count for site in sites} == {6}
    inner = [name for name in tiny.trainable(model) if any(f".layers.{block}." in name for block in (1, 2, 3))]
    assert not inner and len(tiny.trainable(model)) == 3 * 6


def test_either_end_may_be_left_out_and_all_blocks_are_as_without_it() -> None:
    assert {b for b, _ in blocks_of(with_targets({"name": "layra", "first": 2, "last": 0}))} == {0, 1}
    assert {b for b, _ in blocks_of(with_targets({"name": "layra", "first": 0, "last": 2}))} == {4, 5}
    every, named = with_targets("layra"), with_targets("named")
    tiny.assert_same(dict(every.state_dict()), dict(named.state_dict()))
    assert every.moelora.config.targets == {"name": "layra", "first": 4, "last": 4}


def test_a_stack_of_an_encoder_decoder_has_its_own_ends() -> None:
    base = tiny.t5(num_layers=4, num_decoder_layers=3)
    config = {"target_modules": ["q"], "targets": {"name": "layra", "first": 1, "last": 1}}
    found = [layer.site.name for layer in routed_layers(tiny.adapt(base, config))]
    assert [name.split(".")[0] + name.split(".")[2] for name in found] == [
        *("encoder0", "encoder3"), *("decoder0",) * 2, *("decoder2",) * 2
    ]  # fmt: skip


def test_layers_in_no_block_have_none_and_other_rules_hold() -> None:
    base = tiny.bert()
    model = tiny.adapt(base, {"target_modules": "all-linear", "targets": {"name": "layra", "first": 1, "last": 0}})
    assert {block for block, _ in blocks_of(model)} == {0}
    targets = {"name": "layra", "first": 2, "last": 2}
    assert {b for b, _ in blocks_of(with_targets(targets, layers_to_transform=[1, 2, 5]))} == {1, 5}
    with pytest.raises(
        TargetError, match=r"targets layra leaves none of 2 layers, such as 'model.layers.2.*block 2 of 6"
    ):
        with_targets({"name": "layra", "first": 1, "last": 1}, layers_to_transform=[2])


def test_it_comes_back_from_a_folder(tmp_path: Path) -> None:
    model = tiny.shake(with_targets({"name": "layra", "first": 1, "last": 1})).eval()
    moelora.save(model, tmp_path / "out")
    again = moelora.load(tiny.llama(num_hidden_layers=6), tmp_path / "out").eval()
    assert blocks_of(again) == blocks_of(model)
    with torch.no_grad():
        assert torch.equal(again(**tiny.batch()).logits, model(**tiny.batch()).logits)


def test_no_block_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"targets.layra: first 0 and last 0 leave no block"):
        with_targets({"name": "layra", "first": 0, "last": 0})
