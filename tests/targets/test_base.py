"""What a site says of its place in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moelora.core.tape import Site
from moelora.model.record import routed_layers
from moelora.targets.base import block_of, describe
from moelora.targets.named import select
from tests import tiny

MODELS = {**tiny.MODELS, "mamba": tiny.mamba}


def sites(kind: str, **rules: Any) -> list[Site]:
    return select(MODELS[kind](), **{"target_modules": "all-linear", **rules})


@pytest.mark.parametrize(
    ("kind", "count", "first", "last"),
    [
        ("llama", 14, "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
        ("gpt2", 8, "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"),
        ("t5", 2 * 6 + 2 * 10, "encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.2.DenseReluDense.wo"),
        ("mamba", 8, "backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.out_proj"),
    ],
)
def test_place_and_width(kind: str, count: int, first: str, last: str) -> None:
    found = sites(kind)
    assert {site.count for site in found} == {len(found)} == {count}
    assert [site.index for site in found] == list(range(count))
    assert {site.hidden_size for site in found} == {tiny.HIDDEN}
    assert {site.blocks for site in found} == {2}
    by_name = {site.name: site for site in found}
    assert by_name[first].block == 0 and by_name[last].block == 1
    assert {site.block for site in found} == {0, 1}
    assert by_name[first].parent == first.rpartition(".")[0]


def test_the_output_head_of_bert_lies_in_no_block() -> None:
    found = {site.name: site for site in sites("bert")}
    assert found["bert.pooler.dense"].block is None and found["bert.pooler.dense"].blocks == 0
    assert found["bert.encoder.layer.1.output.dense"].block == 1


def test_counts_are_those_of_the_chosen_layers() -> None:
    found = sites("llama", target_modules=["q_proj", "up_proj"], layers_to_transform=[1])
    assert [(site.index, site.count, site.block, site.blocks) for site in found] == [(0, 2, 1, 2), (1, 2, 1, 2)]


def test_an_adapted_model_carries_the_same_sites() -> None:
    model = tiny.adapted("llama", "smora")
    expected = sites("llama", target_modules=tiny.TARGETS["llama"])
    assert model.moelora.sites == expected == [layer.site for layer in routed_layers(model)]


def test_blocks_are_counted_as_deep_as_their_stack_is() -> None:
    assert {site.blocks for site in select(tiny.llama(num_hidden_layers=5), ["q_proj"])} == {5}
    both = select(tiny.t5(num_decoder_layers=3), ["wo"])
    assert {(site.stream, site.blocks) for site in both} == {("input", 2), ("decoder", 3)}  # each stack by itself


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", None, 3),
        ("layers.3.self_attn.q_proj", None, 3),
        ("model.layers.3.experts.7.w1", None, 3),
        ("model.layers.3.experts.7.w1", "experts", 7),
        ("model.layers.12.experts.7.w1", ["h", "layers"], 12),
        ("model.norm", None, None),
        ("lin", None, None),
        ("model.layers.3", None, None),  # the block itself, not something in it
        ("model.layers.3.q_proj", "h", None),
    ],
)
def test_the_block_of_a_path(name: str, pattern: Any, expected: int | None) -> None:
    assert block_of(name, pattern) == expected


def test_a_model_that_says_nothing_of_itself() -> None:
    (site,) = describe(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), ["0"])
    assert site == Site("0", 0, 3, 4, "input", 1, None, 0, None) and site.parent == ""
    (site,) = describe(tiny.Toy(3, 4), ["lin"])
    assert site.hidden_size == 4


def test_a_composite_config_answers_for_its_text_model() -> None:
    class Outer:
        def get_text_config(self) -> Any:
            return tiny.llama().config

    model = nn.ModuleDict(
        {"language_model": nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 3))])})}
    )
    model.config = Outer()
    (site,) = describe(model, ["language_model.layers.0.0"])
    assert (site.hidden_size, site.block, site.blocks) == (tiny.HIDDEN, 0, 1)
    assert torch.equal(model.language_model.layers[0][0].weight, model.get_submodule(site.name).weight)
