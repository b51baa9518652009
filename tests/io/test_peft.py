"""PEFT folders: all that PEFT writes, in every layout since 0.3, is read as PEFT reads it, or refused by name."""

from __future__ import annotations

import gc
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from moelora.core.errors import AdapterError
from moelora.io import peft as io
from moelora.io.peft import CONFIG, WEIGHTS, PeftAdapter, read_peft, warn_if_untrained
from tests import tiny
from tests.io.written import NAME, Q0, by_hand, edit, held, loaded, raw, refused, rename, resave, written

PATTERNS: dict[str, Any] = {
    "rank_pattern": {r".*\.gate_proj": 5, f"^{Q0}": 3, "layers.1.mlp.down_proj": 2, "q_proj": 6},
    # PEFT sorts these when it writes them, so that down_proj comes first in the file.
    "alpha_pattern": {"self_attn.q_proj": 32, "_proj": 1, r"layers\.0\.mlp\.down_proj": 7, "down_proj": 9},
}
EXPRESSIONS: dict[str, Any] = {
    "rank_pattern": {r"layers\.(0|2)\..*q_proj": 3, r".*\.1\.(self_attn\.q|mlp\.down)_proj": 2, r".*gate_\w{4,}": 5},
    "alpha_pattern": {r"(?!.*mlp).*q_proj": 32, r"[a-g]+_proj": 1.5},
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "names as patterns": ("llama", PATTERNS),
    "names as patterns, rslora": ("llama", {**PATTERNS, "use_rslora": True}),
    "expressions as patterns": ("llama", EXPRESSIONS),
    "fp16": ("llama", {"half": True}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "not initialised": ("llama", {"init_lora_weights": False}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "mica": ("llama", {"init_lora_weights": "mica"}),
    "eva": ("llama", {"init_lora_weights": "eva"}),
    "settings without meaning here": (
        "llama",
        {"lora_dropout": 0.1, "task_type": "CAUSAL_LM", "layers_to_transform": [1], "lora_alpha": 3},
    ),
    "dora": ("llama", {"use_dora": True}),
    "dora, patterns, rslora": ("llama", {**PATTERNS, "use_dora": True, "use_rslora": True}),
    "lora_bias": ("llama", {"lora_bias": True, "target_modules": ["q_proj"]}),
    "bias lora_only": ("llama", {"bias": "lora_only"}),
    "bias all": ("llama", {"bias": "all"}),
    "dora, bias all": ("llama", {"use_dora": True, "bias": "all"}),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head", "input_layernorm"]}),
    "modules_to_save by the end of a word": ("llama", {"modules_to_save": ["head", "layernorm", "layers.1.mlp"]}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "targets by an expression": ("llama", {"target_modules": r".*layers\.[01]\.(self_attn\.[qk]|mlp\.up)_proj"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2, dora, lora_only": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True, "bias": "lora_only"},
    ),
    "gpt2, bias all": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "bert classifier": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "bert classifier, bias all": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}),
    "bert classifier, lora_only": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "lora_only"}),
    "t5": ("t5", {"target_modules": ["q", "wo"], "bias": "all"}),
    "mamba": ("mamba", {"target_modules": ["in_proj", "x_proj"], "bias": "all", "task_type": "CAUSAL_LM"}),
}


def base_of(name: str, options: dict[str, Any]) -> Any:
    dtype = torch.float16 if options.get("half") else torch.float32
    return tiny.mamba() if name == "mamba" else tiny.MODELS[name](dtype=dtype, **biased(name, options))


def biased(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"attention_bias": True} if name == "llama" and {"bias", "lora_bias"} & options.keys() else {}


def assert_same(found: PeftAdapter, model: PeftModel) -> None:
    """Every number is the one that PEFT computes with, and every tensor of the file has its place."""
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    state = {name.removeprefix("base_model.model."): value for name, value in model.state_dict().items()}
    assert {name for name, module in found.modules.items() if module.rank} == layers.keys() and layers
    for name, layer in layers.items():
        lora, module = found.read(name), found.modules[name]
        assert (lora.scale, module.rank) == (layer.scaling["default"], layer.r["default"]), name
        assert module.features == (layer.in_features, layer.out_features)
        assert torch.equal(lora.A, layer.lora_A["default"].weight) and torch.equal(
            lora.B, layer.lora_B["default"].weight
        )
        assert lora.A.dtype == lora.B.dtype == layer.lora_A["default"].weight.dtype
        bias = layer.lora_B["default"].bias
        assert (lora.bias is None) == (bias is None) and (bias is None or torch.equal(lora.bias, bias))
        assert (lora.magnitude is not None) == ("default" in layer.lora_magnitude_vector)
        if lora.magnitude is not None:
            assert torch.equal(lora.magnitude, layer.lora_magnitude_vector["default"].weight)
    for name, module in found.modules.items():
        if "base_bias" in module.entries:
            lora = found.read(name)
            whole = state[f"{name}.base_layer.bias" if name in layers else f"{name}.bias"]
            assert torch.equal(lora.base_bias, whole), name
            assert name in layers or (lora.A.shape, lora.B.shape) == ((0, 0), (len(whole), 0))
    copy = ".modules_to_save.default."
    saved = {name.replace(copy, "."): value for name, value in state.items() if copy in name}
    for name in found.full:
        assert torch.equal(found.read_full(name), {**state, **saved}[name]), name
    entries = [entry.name for module in found.modules.values() for entry in module.entries.values()]
    entries += [entry.name for entry in found.full.values()]
    left = held(found.folder).keys() - set(entries)
    assert len(entries) == len(set(entries))
    assert all(".original_module." in name or ".modules_to_save." in name for name in left), left


@pytest.mark.parametrize("name", OPTIONS)
def test_what_peft_writes_is_read_as_peft_reads_it(tmp_path: Path, name: str) -> None:
    model, options = OPTIONS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's
        written(tmp_path, base_of(model, options), **options)
        expected = loaded(tmp_path, base_of(model, options), options.get("half", False))
    assert_same(read_peft(tmp_path), expected)


@pytest.mark.parametrize("options", [{}, PATTERNS, {**PATTERNS, "use_rslora": True}, EXPRESSIONS])
def test_delta_weights_are_those_of_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    found = read_peft(written(tmp_path, **options))
    model = loaded(tmp_path, tiny.llama())
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            lora = found.read(name)
            assert torch.equal(lora.B @ lora.A * lora.scale, layer.get_delta_weight("default")), name


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("llama", {"model.embed_tokens.weight", "lm_head.weight"}),
        ("gpt2", {"transformer.wte.weight", "lm_head.weight"}),
        ("t5", {"shared.weight", "lm_head.weight"}),
        ("mamba", {"backbone.embeddings.weight", "lm_head.weight"}),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_resized_vocabularies(tmp_path: Path, model: str, names: set[str], saved: bool) -> None:
    """PEFT saves both embeddings unasked, and where they are in modules_to_save each of them three times."""
    targets = {"llama": ["q_proj"], "gpt2": ["c_attn"], "t5": ["q"], "mamba": ["in_proj"]}[model]
    modules = sorted(name.split(".")[-2] for name in names)
    if saved and model != "llama":
        modules = modules[-1:]  # tied
    base = base_of(model, {})
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70, mean_resizing=False)
    folder = tmp_path / "adapter"
    written(folder, base, target_modules=targets, modules_to_save=modules if saved else None)
    found = read_peft(folder)
    assert names >= found.full.keys() >= (names if model == "llama" or not saved else set())
    assert len(found.full) >= 1
    for name in found.full:
        assert torch.equal(found.read_full(name), held(folder)[f"base_model.model.{name}"])
        assert found.full[name].shape == (70, 32)
    if saved:
        assert len(held(folder)) > 2 * len(found.modules) + len(found.full)  # copies there, and left alone


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_moved_the_base_are_marked(tmp_path: Path, start: str) -> None:
    found = read_peft(written(tmp_path, init_lora_weights=start))
    assert found.moved == start and torch.equal(found.read(Q0).A, held(tmp_path)[NAME % "A"])
    assert read_peft(edit(tmp_path, init_lora_weights=True)).moved is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("init_lora_weights", {"init_lora_weights": "pissa_niter_2"}),
        ("init_lora_weights", {"init_lora_weights": "lora_ga"}),
        ("trainable_token_indices", {"trainable_token_indices": [1, 2]}),
        ("layer_replication", {"layer_replication": [(0, 2), (1, 2)]}),
        ("alora_invocation_tokens", {"alora_invocation_tokens": [1]}),
        ("embed_tokens.", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("a weight of the base layer", {"target_modules": ["lm_head", "q_proj"]}),
    ],
)
def test_what_peft_writes_and_cannot_be_an_expert_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    refused(written(tmp_path, **options), name)


@pytest.mark.parametrize(
    ("options", "off"),
    [
        ({"use_dora": True}, {"use_dora": False}),
        ({"lora_bias": True, "target_modules": ["q_proj"], "bias": "none"}, {"lora_bias": False}),
        ({"modules_to_save": ["input_layernorm"]}, {"modules_to_save": None}),
        ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": None}),
        ({"bias": "all"}, {"bias": "none"}),
        ({"bias": "lora_only"}, {"bias": "none"}),
        ({}, {"use_dora": True}),
        ({}, {"lora_bias": True}),
    ],
    ids=str,
)
def test_a_configuration_that_says_otherwise(tmp_path: Path, options: dict[str, Any], off: dict[str, Any]) -> None:
    refused(edit(written(tmp_path, **options), **off), WEIGHTS, "base_model.model.")


def test_a_rank_that_patterns_give_twice_which_peft_cannot_read_back_either(tmp_path: Path) -> None:
    written(tmp_path, rank_pattern={"q_proj": 6, f"^{Q0}": 3})  # sorted when written, so the other one wins
    refused(tmp_path, NAME % "A", "[6, 32]", "rank 3")
    with pytest.raises(RuntimeError, match="size mismatch"):
        loaded(tmp_path, tiny.llama())


A, B = torch.randn(4, 6), torch.randn(5, 4)
HALVES = {"q.lora_A.weight": A, "q.lora_B.weight": B}


def test_names_with_the_adapter_in_between(copied: Path) -> None:
    expected = read_peft(copied).read(Q0)
    found = read_peft(rename(copied, lambda name: name.replace(".weight", ".default.weight"))).read(Q0)
    assert torch.equal(found.A, expected.A) and torch.equal(found.B, expected.B)


@pytest.mark.parametrize("name", ["", ".default", ".weight", ".default.weight"])
def test_magnitudes_by_all_their_names(tmp_path: Path, name: str) -> None:
    tensors = {**HALVES, f"q.lora_magnitude_vector{name}": torch.ones(5)}
    assert read_peft(by_hand(tmp_path, tensors, use_dora=True)).read("q").magnitude.tolist() == [1] * 5
    tensors = {**HALVES, f"q.lora_magnitude_vector{name}": torch.ones(1, 5)}
    refused(by_hand(tmp_path, tensors, use_dora=True), f"lora_magnitude_vector{name}", "1 size")


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_before_peft_0_7(tmp_path: Path, bias: str) -> None:
    """LoRA layers were Linear layers then, so there was no base_layer in the names of their biases."""
    found = read_peft(by_hand(tmp_path, {**HALVES, "q.bias": torch.arange(5.0)}, bias=bias))
    assert found.read("q").base_bias.tolist() == [0, 1, 2, 3, 4] and not found.full
    both = {**HALVES, "q.bias": torch.ones(5), "q.base_layer.bias": torch.ones(5)}
    refused(by_hand(tmp_path, both, bias=bias), "which means the same")
    refused(by_hand(tmp_path, {**HALVES, "q.bias": torch.ones(4)}, bias=bias), "5 features")


def test_a_bias_without_a_lora_is_for_bias_all_alone(tmp_path: Path) -> None:
    tensors = {**HALVES, "norm.bias": torch.ones(7)}
    found = read_peft(by_hand(tmp_path, tensors, bias="all"))
    assert (found.modules["norm"].rank, found.modules["norm"].features) == (0, (None, 7))
    refused(by_hand(tmp_path, tensors, bias="lora_only"), "norm.bias", "a bias without a LoRA")
    refused(by_hand(tmp_path, tensors), "norm.bias")
    tensors = {**HALVES, "block.relative_attention_bias.weight": torch.ones(3, 2)}  # of T5, before PEFT 0.12
    assert read_peft(by_hand(tmp_path, tensors, bias="all")).full.keys() == {"block.relative_attention_bias.weight"}
    refused(by_hand(tmp_path, tensors, bias="lora_only"), "relative_attention_bias")


@pytest.mark.parametrize(
    ("task", "name"),
    [("SEQ_CLS", "classifier"), ("SEQ_CLS", "score"), ("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")],
)
def test_heads_that_were_saved_without_being_named_before_peft_0_12(tmp_path: Path, task: str, name: str) -> None:
    tensors = {**HALVES, f"{name}.weight": torch.ones(2, 6), f"{name}.dense.bias": torch.ones(2)}
    found = read_peft(by_hand(tmp_path, tensors, task_type=task))
    assert found.full.keys() == {f"{name}.weight", f"{name}.dense.bias"} and found.modules.keys() == {"q"}
    refused(by_hand(tmp_path, tensors, task_type="CAUSAL_LM"), name, "not in modules_to_save")


def test_copies_of_a_saved_module_count_for_nothing(tmp_path: Path) -> None:
    plain = {**HALVES, "head.weight": torch.ones(2, 2)}
    for more in ("head.original_module.weight", "head.modules_to_save.weight", "head.modules_to_save.default.weight"):
        found = read_peft(by_hand(tmp_path, {**plain, more: torch.zeros(2, 2)}, modules_to_save=["head"]))
        assert found.full.keys() == {"head.weight"} and found.read_full("head.weight").sum() == 4
        alone = {**HALVES, more: torch.zeros(2, 2)}
        refused(by_hand(tmp_path, alone, modules_to_save=["head"]), more)


def test_a_module_is_trained_in_full_or_by_a_lora(tmp_path: Path) -> None:
    refused(by_hand(tmp_path, {**HALVES, "q.weight": torch.ones(5, 6)}, modules_to_save=["q"]), "q.weight", "LoRA too")


def test_tensors_of_saved_modules_have_values(tmp_path: Path) -> None:
    refused(by_hand(tmp_path, {**HALVES, "head.weight": torch.ones(0, 6)}, modules_to_save=["head"]), "ZeRO-3")


def test_the_file_is_closed_after_an_error(copied: Path) -> None:
    def opened() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{fd}").endswith(WEIGHTS) for fd in os.listdir("/proc/self/fd"))

    before = opened()
    with pytest.raises(AdapterError, match="rank 5") as caught:
        read_peft(edit(copied, r=5))
    assert opened() == before and caught  # though the traceback still holds all that was read


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("q.lora_A.other.weight", "no part of LoRA"),
        ("q.lora_C.weight", "no part of LoRA"),
        ("experts.base_layer.lora_A.weight", "target_parameters"),
        (".lora_A.weight", "no part of LoRA"),
        ("a..b.lora_A.weight", "no part of LoRA"),
        ("q.lora_A.weight.lora_A.weight", "no part of LoRA"),
        ("wte.lora_embedding_A", "LoRA of an embedding"),
        ("wte.token_adapter.trainable_tokens_delta", "trained tokens"),
        ("_fsdp_wrapped_module.q.lora_A.weight", "FSDP"),
        ("q._checkpoint_wrapped_module.lora_A.weight", "FSDP"),
        ("q.base_layer.weight", "a weight of the base layer"),
        ("norm.weight", "not in modules_to_save"),
    ],
)
def test_foreign_names(tmp_path: Path, name: str, part: str) -> None:
    refused(by_hand(tmp_path, {**HALVES, name: torch.ones(4, 4)}), f"base_model.model.{name}", part)


def test_names_without_the_prefix(copied: Path) -> None:
    refused(rename(copied, lambda name: name.removeprefix("base_model.model.")), "starts with base_model.model.")


def test_tensors_that_do_not_fit(copied: Path) -> None:
    b = NAME % "B"
    refused(edit(copied, r=5), "lora_A.weight", "rank 5")
    edit(copied, r=4)
    refused(resave(copied, **{b: torch.ones(32, 3)}), b, "[32, 3]", "rank 4")
    refused(resave(copied, **{b: torch.ones(32, 4, dtype=torch.int32)}), b, "int32")
    refused(resave(copied, **{b: torch.ones(4, 4, 1, 1)}), b, "convolutions")
    refused(resave(copied, **{b: torch.ones(0)}), b, "ZeRO-3")
    refused(resave(copied, **{b: None}), NAME % "A", "no lora_B")
    refused(resave(copied, **{b: torch.ones(32, 4), NAME % "A": None}), b, "no lora_A")
    refused(raw(copied, {}), "tensors: found none", "ZeRO-3")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_found_when_they_are_read(copied: Path, bad: float) -> None:
    value = torch.ones(32, 4)
    value[7, 1] = bad
    found = read_peft(resave(copied, **{NAME % "B": value}))
    refused(copied, NAME % "B", "NaN or infinite", read=lambda folder: found.read(Q0))  # type: ignore[arg-type, return-value]
    assert found.read(Q0.replace("layers.0", "layers.1")).B.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floating_dtypes_are_kept(copied: Path, dtype: torch.dtype) -> None:
    expected = {key: value.to(dtype) for key, value in held(copied).items()}
    assert torch.equal(read_peft(resave(copied, **expected)).read(Q0).A, expected[NAME % "A"])


def test_what_is_not_trained_is_said(tmp_path: Path, copied: Path) -> None:
    for half, options in (("B", {}), ("A", {"init_lora_weights": "mica"})):
        found = read_peft(written(tmp_path / half, fill=False, **options))
        with pytest.warns(UserWarning, match=f"every lora_{half} is zero"):
            warn_if_untrained(found)
    only_biases = by_hand(tmp_path / "biases", {"norm.bias": torch.ones(7)}, bias="all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untrained(read_peft(copied))
        warn_if_untrained(read_peft(only_biases))


def test_the_configuration_is_recorded_and_adapters_are_never_the_same(copied: Path) -> None:
    found = read_peft(edit(copied, base_model_name_or_path="org/base", revision="abc", fan_in_fan_out=True))
    assert (found.folder, found.base_model, found.config["revision"]) == (copied, "org/base", "abc")
    assert len({found, read_peft(copied)}) == 2


def test_nothing_but_the_header_is_read_before_it_is_asked_for(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(io.TensorFile, "_values", never)
    found = read_peft(copied)
    assert len(found.modules) == 6
    with pytest.raises(AssertionError):
        found.read(Q0)
    gc.collect()


def test_pickles_are_named_and_not_opened(copied: Path) -> None:
    (copied / WEIGHTS).unlink()
    refused(copied, WEIGHTS, "save_pretrained")
    for name in io.PICKLES:
        (copied / name).write_bytes(b"not even a pickle")
        refused(copied, name, "safe_serialization=True")
        (copied / name).unlink()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "none", CONFIG, "check the path")
    (tmp_path / "file").write_text(json.dumps({}))
    refused(tmp_path / "file", CONFIG, "check the path")
    with pytest.raises(ValueError, match="check the path"):
        read_peft(Path("a" * 5000))
    with pytest.raises(ValueError, match="check the path"):
        read_peft(Path("a\0b"))
