"""Targets by name, compared with PEFT itself on the same models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import GPT2Model, LlamaModel

import moelora
from moelora.core.errors import TargetError
from moelora.targets.named import select
from tests import tiny

pytestmark = [
    # PEFT warns that it corrects fan_in_fan_out for Conv1D, which is what we want of it,
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    # and asks transformers by a name that is going away.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def peft_names(model: Any, **rules: Any) -> list[str]:
    """The modules that PEFT turns into LoRA layers."""
    task = "SEQ_CLS" if "SequenceClassification" in type(model).__name__ else None
    wrapped = get_peft_model(model, LoraConfig(r=2, task_type=task, **rules))
    return [name for name, module in wrapped.base_model.model.named_modules() if isinstance(module, LoraLayer)]


def names(model: nn.Module, **rules: Any) -> list[str]:
    return [site.name for site in select(model, **rules)]


RULES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["mlp.down_proj", "k_proj"]}),
    ("llama", {"target_modules": ["model.layers.1.self_attn.o_proj"]}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": r".*self_attn\.(q|k)_proj"}),
    ("llama", {"target_modules": r"model\.layers\.0\..*_proj"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.0.mlp.up_proj"]}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]}),
    ("gpt2", {"target_modules": ["c_attn"]}),
    ("gpt2", {"target_modules": ["c_proj"]}),
    ("gpt2", {"target_modules": ["mlp.c_proj", "c_fc"]}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": r"transformer\.h\.1\..*c_(attn|fc)"}),
    ("gpt2", {"target_modules": ["c_proj"], "exclude_modules": ["attn.c_proj"]}),
    ("gpt2", {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": [1], "layers_pattern": "h"}),
    ("gpt2", {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": 1}),
    ("bert", {"target_modules": ["query", "value"]}),
    ("bert", {"target_modules": ["dense"]}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": r"bert\.encoder\..*\.(intermediate|output)\.dense"}),
    ("bert", {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]}),
    ("bert", {"target_modules": ["query", "dense"], "layers_to_transform": [0]}),
    ("bert", {"target_modules": ["query", "dense"], "layers_to_transform": [1], "layers_pattern": "layer"}),
    ("t5", {"target_modules": ["q", "v"]}),
    ("t5", {"target_modules": ["SelfAttention.q", "wo"]}),
    ("t5", {"target_modules": "all-linear"}),
    ("t5", {"target_modules": r"decoder\..*\.EncDecAttention\.[kv]"}),
    ("t5", {"target_modules": "all-linear", "exclude_modules": r"encoder\..*"}),
    ("t5", {"target_modules": ["q", "wo"], "layers_to_transform": [1]}),
    ("t5", {"target_modules": ["q", "wo"], "layers_to_transform": [1], "layers_pattern": "block"}),
    ("t5", {"target_modules": ["q", "wo"], "layers_to_transform": [0], "layers_pattern": "layer"}),
]


@pytest.mark.parametrize(("kind", "rules"), RULES, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(RULES)])
def test_equals_peft(kind: str, rules: dict[str, Any]) -> None:
    expected = peft_names(tiny.MODELS[kind](), **rules)
    assert expected
    assert names(tiny.MODELS[kind](), **rules) == expected


@pytest.mark.parametrize(
    ("cls", "config", "rules"),
    [
        (
            GPT2Model,
            tiny.gpt2().config,
            {"target_modules": ["c_attn"], "layers_to_transform": 1, "layers_pattern": "h"},
        ),
        (LlamaModel, tiny.llama().config, {"target_modules": "all-linear"}),
        (
            LlamaModel,
            tiny.llama().config,
            {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        ),
    ],
)
def test_equals_peft_without_a_head(cls: Any, config: Any, rules: dict[str, Any]) -> None:
    # Here the list of blocks stands at the root: no dot before its name.
    assert names(cls(config), **rules) == peft_names(cls(config), **rules)


class Experts(nn.Module):
    """A stack whose blocks hold numbered parts, as base models that are mixtures themselves do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 4)}) for _ in range(3))})
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    "rules", [{"layers_to_transform": [1]}, {"layers_to_transform": [1], "layers_pattern": "layers"}]
)
def test_the_first_number_is_the_block(rules: dict[str, Any]) -> None:
    model = nn.ModuleDict({"model": Experts()})
    found = names(model, target_modules=["w1"], **rules)
    assert found == [f"model.layers.1.experts.{i}.w1" for i in range(3)]
    assert found == peft_names(nn.ModuleDict({"model": Experts()}), target_modules=["w1"], **rules)


def test_sites_carry_the_shapes_of_linear_and_conv1d() -> None:
    for kind, target, shape in (("llama", "down_proj", (40, 32)), ("gpt2", "c_fc", (32, 128))):
        sites = select(tiny.MODELS[kind](), [target])
        assert [(site.in_features, site.out_features) for site in sites] == [shape, shape]
        assert [site.index for site in sites] == [0, 1]


def test_streams_of_an_encoder_decoder() -> None:
    streams = {site.name: site.stream for site in select(tiny.t5(), "all-linear")}
    for name, stream in streams.items():
        reads_encoder = name.startswith("encoder.") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert stream == ("input" if reads_encoder else "decoder"), name
    assert set(streams.values()) == {"input", "decoder"}
    assert {site.stream for site in select(tiny.llama(), "all-linear")} == {"input"}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["q_prj"], "target_modules: 'q_prj' matches no layer; did you mean 'q_proj'"),
        (["q_proj", "vproj"], "target_modules: 'vproj' matches no layer; did you mean 'v_proj'"),
        (["proj"], "target_modules: 'proj' matches no layer"),
        ("q_proj", "'q_proj' matches no layer; did you mean 'q_proj'"),
        (r".*\.c_attn", r"matches no layer"),
        ("q_(proj", "'q_(proj' is not a regular expression"),
    ],
)
def test_nothing_matched(target: Any, expected: str) -> None:
    with pytest.raises(TargetError) as caught:
        select(tiny.llama(), target)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "rules",
    [
        {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [7]},
        {"target_modules": "all-linear", "exclude_modules": r".*"},
    ],
)
def test_everything_taken_away(rules: dict[str, Any]) -> None:
    with pytest.raises(TargetError, match=r"leaves no layer of LlamaForCausalLM.*known: .*q_proj"):
        select(tiny.llama(), **rules)


@pytest.mark.parametrize(
    ("kind", "target", "found"),
    [
        ("llama", ["embed_tokens"], "'model.embed_tokens' is a Embedding"),
        ("llama", ["q_proj", "input_layernorm"], "'model.layers.0.input_layernorm' is a LlamaRMSNorm"),
        ("llama", ["mlp"], "'model.layers.0.mlp' is a LlamaMLP"),
        ("gpt2", ["wte"], "'transformer.wte' is a Embedding"),
        ("gpt2", r".*\.(c_attn|ln_1)", "'transformer.h.0.ln_1' is a LayerNorm"),
    ],
)
def test_unsupported_layers_are_named(kind: str, target: Any, found: str) -> None:
    with pytest.raises(TargetError) as caught:
        select(tiny.MODELS[kind](), target)
    assert found in str(caught.value) and "supported: Linear, Conv1D" in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_the_output_head_is_refused(kind: str) -> None:
    with pytest.raises(TargetError, match="'lm_head' is the output head"):
        select(tiny.MODELS[kind](), ["lm_head"])


def test_attention_that_reads_its_weight_directly_is_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert names(model, target_modules="all-linear") == ["1"]
    with pytest.raises(TargetError, match=r"'0\.out_proj' is the output projection of MultiheadAttention"):
        select(model, ["out_proj"])


def test_a_bad_target_leaves_the_model_untouched() -> None:
    model = tiny.llama()
    keys, cls = list(model.state_dict()), type(model)
    with pytest.raises(TargetError):
        moelora.adapt(model, {"target_modules": ["q_proj", "embed_tokens"]})
    assert type(model) is cls and list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
