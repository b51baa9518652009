"""Merging into the base model's files: transformers loads what the adapted model computes, all else is untouched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    conversion_mapping,
)
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming
from transformers.quantizers import auto as quantizers
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import moelora
from moelora.core.errors import AdapterError, ConfigError, MoeloraError, OutputError
from moelora.model.layer import RoutedLinear
from moelora.model.record import routed_layers
from moelora.tools.export import export_dense, export_lora, export_merged
from moelora.tools.export.hollow import hollow_base
from moelora.tools.export.merge import merge
from moelora.tools.export.plain import by_task, constant_gates
from moelora.tools.export.shards import base_folder
from tests import tiny
from tests.adapters import base as biased
from tests.adapters import choose, mixture, peft_folder
from tests.tools.test_export import CLOSE, CONSTANT, logits

AUTO = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification}
NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def saved(folder: Path, kind: str, dtype: torch.dtype = torch.float32, size: str = "20KB", **more: Any) -> Path:
    """The tiny base model on disk, in several files, with a tokenizer and what else lies in such folders."""
    tiny.MODELS[kind](0, dtype, **more).save_pretrained(folder, max_shard_size=size)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("the base model")
    (folder / "pytorch_model.bin").write_text("not looked at")
    (folder / "adapter_config.json").write_text("{}")
    return folder


def again(folder: Path, kind: str) -> Any:
    return AUTO[kind].from_pretrained(folder, dtype="auto")


def weights(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def with_gates(model: Any, seed: int = 0) -> Any:
    """The model with trained-looking gates."""
    made = torch.Generator().manual_seed(seed)
    for layer in routed_layers(model):
        for parameter in layer.router.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=made, dtype=torch.float64))
    return model


@pytest.mark.parametrize("kind", AUTO)
@pytest.mark.parametrize("method", [*CONSTANT, "task", "hydra_uniform"])
def test_the_result_loads_in_transformers_and_is_the_model(kind: str, method: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", kind)
    hydra = {"experts": {"name": "hydra", "num_experts": 4, "r": 4, "lora_alpha": 8}}
    model = with_gates(
        tiny.adapted(kind, "uniform", **hydra) if method == "hydra_uniform" else tiny.adapted(kind, method)
    )
    for task in (0, 2) if by_task(model) else (None,):
        export = export_merged(model, tmp_path / f"out{task}", base, task)
        assert export.worst[1] < 1e-6 and len(export.errors) == len(routed_layers(model))
        torch.testing.assert_close(logits(again(export.folder, kind), kind), logits(model, kind, task), **CLOSE)


def test_nothing_else_changes(tmp_path: Path) -> None:
    base, out = saved(tmp_path / "base", "gpt2"), tmp_path / "out"
    model = tiny.adapted("gpt2", "static")
    export_merged(model, out, base)
    assert len(list(base.glob("*.safetensors"))) > 3
    taken = {"README.md", "pytorch_model.bin", "adapter_config.json"}
    assert {f.name for f in out.iterdir()} == {f.name for f in base.iterdir()} - taken | {"export.json"}
    for file in out.iterdir():
        if file.suffix != ".safetensors" and file.name != "export.json":
            assert file.read_bytes() == (base / file.name).read_bytes()
    sites = {f"{layer.site.name}.weight" for layer in routed_layers(model)}
    for file in base.glob("*.safetensors"):
        old, new = load_file(file), load_file(out / file.name)
        start = int.from_bytes(file.read_bytes()[:8], "little") + 8
        assert file.read_bytes()[:start] == (out / file.name).read_bytes()[:start]
        assert {key for key in old if not torch.equal(old[key], new[key])} == sites & old.keys()


@pytest.mark.parametrize("dtype", NAMES.values())
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_weight_is_rounded_once_to_the_dtype_of_its_file(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", kind, dtype)
    model = tiny.adapted(kind, "static", dtype=dtype)
    export = export_merged(model, tmp_path / "out", base)
    old, new = weights(base), weights(tmp_path / "out")
    prefix = "transformer." if kind == "gpt2" and not any(k.startswith("transformer.") for k in old) else ""
    for layer in routed_layers(model):
        key = f"{layer.site.name}.weight".removeprefix(prefix)
        A, B = layer.experts.lora_A.double(), layer.experts.lora_B.double()
        delta = (2.0 / 4 * B @ A).detach()
        exact = old[key].double() + (delta.t() if kind == "gpt2" else delta)
        assert new[key].dtype == dtype
        ulp = torch.finfo(dtype).eps * exact.abs().clamp(min=1e-3)
        assert ((new[key].double() - exact).abs() <= 0.51 * ulp + 3e-7 * (dtype != torch.float64)).all()
    rounded = any("rounding to the dtype" in note for note in export.notes)
    assert rounded == (dtype in (torch.bfloat16, torch.float16))


def test_dora_and_biases_and_spread_gates_merge_too(tmp_path: Path) -> None:
    base = tmp_path / "base"
    biased("gpt2").save_pretrained(base, max_shard_size="20KB")
    options: list[dict[str, Any]] = [
        {"use_dora": True},
        {"lora_bias": True, "r": 2},
        {"bias": "lora_only"},
        {"target_modules": ["c_fc"]},
    ]
    folders = [peft_folder(tmp_path / str(i), "gpt2", seed=i, **o) for i, o in enumerate(options)]
    model = choose(mixture(folders, "gpt2", experts={"absent": "redistribute"}), 0.4, -0.3, 0.9, 0.2)
    export_merged(model, tmp_path / "out", base)
    torch.testing.assert_close(logits(again(tmp_path / "out", "gpt2"), "gpt2"), logits(model, "gpt2"), **CLOSE)
    changed = {k for k, v in weights(base).items() if not torch.equal(v, weights(tmp_path / "out")[k])}
    assert {name.rsplit(".", 2)[1] for name in changed if name.endswith("bias")} == {"c_attn", "c_fc"}


def test_a_bias_without_a_place_is_refused(tmp_path: Path) -> None:
    model = mixture([peft_folder(tmp_path / "a", "llama", lora_bias=True)])
    for layer in routed_layers(model):
        layer.experts.shift = torch.ones(1, layer.out_features)
    with pytest.raises(
        ConfigError, match=r"a bias at 'model.layers.0.self_attn.q_proj', and the base model's layer has"
    ):
        export_merged(model, tmp_path / "out", saved(tmp_path / "base", "llama"))


def test_trained_modules_take_the_place_of_their_originals(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "bert")
    model = tiny.adapted("bert", "static", modules_to_save=["classifier"])
    model.classifier.trained.weight.data.add_(1)
    export_merged(model, tmp_path / "out", base)
    torch.testing.assert_close(logits(again(tmp_path / "out", "bert"), "bert"), logits(model, "bert"), **CLOSE)


def test_a_base_without_its_head_has_other_names(tmp_path: Path) -> None:
    whole = tiny.llama()
    whole.model.save_pretrained(tmp_path / "base")  # no lm_head, no "model." before the names
    assert "layers.0.self_attn.q_proj.weight" in weights(tmp_path / "base")
    model = tiny.adapted("llama", "static")
    export_merged(model, tmp_path / "out", tmp_path / "base")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model(**tiny.unlabelled(tiny.batch()))
    expected = model.eval().model(**tiny.unlabelled(tiny.batch()))
    mask = tiny.batch()["attention_mask"].bool()
    torch.testing.assert_close(found[0][mask], expected[0][mask], **CLOSE)


def test_files_whose_names_transformers_changes_while_loading(tmp_path: Path) -> None:
    shape = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}
    config = ViTConfig(hidden_size=32, intermediate_size=40, initializer_range=0.2, **shape)
    torch.manual_seed(0)
    base = ViTForImageClassification(config).eval()
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    last = {name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, nn.Linear)} - {"classifier"}
    model = tiny.shake(
        tiny.adapt(base, {"router": "uniform", "experts": {"num_experts": 2}, "target_modules": [*last]})
    )
    export_merged(model, tmp_path / "out", tmp_path / "base")
    pixels = torch.randn(2, 3, 8, 8)
    found = AutoModelForImageClassification.from_pretrained(tmp_path / "out")(pixels).logits
    torch.testing.assert_close(found, model.eval()(pixels).logits, **CLOSE)
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "base").keys()


def test_two_streams(tmp_path: Path) -> None:
    tiny.t5().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = tiny.adapted("t5", "static")
    export_merged(model, tmp_path / "out", tmp_path / "base")
    batch = tiny.batch("t5")
    found = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")(**batch).logits
    torch.testing.assert_close(found, model.eval()(**batch).logits, **CLOSE)


@pytest.mark.parametrize("method", [m for m in tiny.METHODS if m not in (*CONSTANT, "task") and tiny.fits("llama", m)])
def test_a_router_that_looks_at_the_token_is_never_merged(method: str, tmp_path: Path) -> None:
    model = tiny.adapted("llama", method)
    message = r"decides token by token.*--to lora writes one.*measures.*--to peft and --to vllm.*moelora.load keeps"
    with pytest.raises(ConfigError, match=message):
        export_merged(model, tmp_path / "out", saved(tmp_path / "base", "llama"))
    with pytest.raises(ConfigError, match=message):
        merge(model)
    assert not (tmp_path / "out").exists()


def test_a_router_by_task_needs_the_task(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "task_shared")
    with pytest.raises(ConfigError, match=r"router 'task' gives every task other gates: .*--task"):
        export_merged(model, tmp_path / "out", tmp_path)
    with pytest.raises(MoeloraError, match="task id of -1 to 2, found 3"):
        export_merged(model, tmp_path / "out", tmp_path, 3)


def drop(base: Path, _: Any) -> None:
    file = next(f for f in base.glob("*.safetensors") if "model.layers.0.self_attn.q_proj.weight" in load_file(f))
    left = {k: v for k, v in load_file(file).items() if k != "model.layers.0.self_attn.q_proj.weight"}
    save_file(left, file, metadata={"format": "pt"})


def double(base: Path, _: Any) -> None:
    file = next(f for f in base.glob("*.safetensors") if "model.layers.0.self_attn.q_proj.weight" not in load_file(f))
    twice = {"layers.0.self_attn.q_proj.weight": torch.zeros(32, 32)}
    save_file({**load_file(file), **twice}, file, metadata={"format": "pt"})


def reshape(base: Path, _: Any) -> None:
    for file in base.glob("*.safetensors"):
        new = {
            k: v[:16].contiguous() if k.endswith("1.self_attn.v_proj.weight") else v for k, v in load_file(file).items()
        }
        new = {k: v[:8].contiguous() if k.endswith("1.self_attn.v_proj.weight") else v for k, v in new.items()}
        save_file(new, file, metadata={"format": "pt"})


def no_safetensors(base: Path, _: Any) -> None:
    for file in base.glob("model*"):
        file.unlink()


def leave(base: Path, _: Any) -> None:
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["x"] = "../x.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def tie(_: Path, model: Any) -> None:
    one, two = (model.model.layers[i].self_attn.q_proj.base_layer for i in (0, 1))
    two.weight = one.weight


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"no tensor for 'model.layers.0.self_attn.q_proj.weight': the files have none"),
        (double, r"'model.layers.0.self_attn.q_proj.weight' is there twice: .* and .*; keep one"),
        (reshape, r"v_proj.weight is \(8, 32\), the model's .* \(16, 32\); give the base model that"),
        (no_safetensors, r"neither model.safetensors nor model.safetensors.index.json; .*save_pretrained"),
        (leave, r"weight_map: found \['../x.safetensors'\]"),
        (tie, r"q_proj.weight' is tied to 'model.layers.\d.self_attn.q_proj.weight', which would change with it"),
    ],
)
def test_files_that_are_not_the_models_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    base, model = saved(tmp_path / "base", "llama"), tiny.adapted("llama", "static")
    damage(base, model)
    with pytest.raises(AdapterError, match=message):
        export_merged(model, tmp_path / "out", base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_files_in_a_layout_of_their_own_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    base, model = saved(tmp_path / "base", "llama"), tiny.adapted("llama", "static")
    swapped = WeightConverter("self_attn.v_proj.weight", ["self_attn.v_proj.weight"], operations=[Chunk(dim=0)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [swapped])
    with pytest.raises(AdapterError, match=r"v_proj.weight' by more than a new name.*moelora.tools.export.merge.merge"):
        export_merged(model, tmp_path / "out", base)


def test_a_rename_that_leads_nowhere_is_not_made(tmp_path: Path, monkeypatch: Any) -> None:
    base, model = saved(tmp_path / "base", "llama"), tiny.adapted("llama", "static")
    astray = WeightRenaming("self_attn.v_proj", "self_attn.values")  # transformers then keeps the name of the file
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [astray])
    export_merged(model, tmp_path / "out", base)
    torch.testing.assert_close(logits(again(tmp_path / "out", "llama"), "llama"), logits(model, "llama"), **CLOSE)


def test_files_of_another_model_are_noticed_before_anything_is_merged(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama")
    moelora.save(tiny.adapted("llama", "static"), tmp_path / "run")
    tiny.llama(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="this model has others"):
        moelora.load(hollow_base(tmp_path / "run", tmp_path / "other", "other"), tmp_path / "run")
    moelora.load(hollow_base(tmp_path / "run", tmp_path / "other", "other"), tmp_path / "run", force=True)
    assert moelora.load(hollow_base(tmp_path / "run", base, "base"), tmp_path / "run").config._name_or_path == "base"


@pytest.mark.parametrize("kind", AUTO)
def test_merging_needs_no_base_model_in_memory(kind: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", kind)
    more = {"modules_to_save": ["classifier"]} if kind == "bert" else {}
    model = tiny.adapted(kind, "static", **more)
    moelora.save(model, tmp_path / "run")
    hollow = moelora.load(hollow_base(tmp_path / "run", base, "name"), tmp_path / "run")
    standing = {id(p) for m in hollow.modules() if isinstance(m, RoutedLinear) for p in m.parameters()}
    rest = [p for n, p in hollow.named_parameters() if id(p) not in standing and "classifier" not in n]
    assert len(rest) > 5 and all(p.device.type == "meta" for p in rest)
    export_merged(hollow, tmp_path / "out", base)
    torch.testing.assert_close(logits(again(tmp_path / "out", kind), kind), logits(model, kind), **CLOSE)


def test_a_head_that_the_base_never_had(tmp_path: Path) -> None:
    tiny.bert().bert.save_pretrained(tmp_path / "base")
    model = tiny.adapted("bert", "static", modules_to_save=["classifier"])
    moelora.save(model, tmp_path / "run")
    hollow = moelora.load(hollow_base(tmp_path / "run", tmp_path / "base", "name"), tmp_path / "run")
    export_lora(hollow, tmp_path / "out")
    found = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), tmp_path / "out"
    )
    torch.testing.assert_close(logits(found, "bert"), logits(model, "bert"), **CLOSE)
    with pytest.raises(AdapterError, match=r"no tensor for 'classifier.weight': the files have none"):
        export_merged(hollow, tmp_path / "merged", tmp_path / "base")


def test_dora_needs_the_base_weights_and_finds_them(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama")
    model = mixture([peft_folder(tmp_path / "a", use_dora=True), peft_folder(tmp_path / "b", seed=2)])
    moelora.save(model, tmp_path / "run")
    hollow = moelora.load(hollow_base(tmp_path / "run", base, "name"), tmp_path / "run")
    export_merged(hollow, tmp_path / "out", base)
    torch.testing.assert_close(logits(again(tmp_path / "out", "llama"), "llama"), logits(model, "llama"), **CLOSE)


def test_nothing_is_overwritten_and_a_failed_check_leaves_nothing(tmp_path: Path) -> None:
    base, model = saved(tmp_path / "base", "llama"), tiny.adapted("llama", "static")
    with pytest.raises(OutputError, match="not empty"):
        export_merged(model, base, base)
    routed_layers(model)[3].router.constant_gates = lambda task: torch.tensor([0.25, 0.25, 0.25, 0.26])
    with pytest.raises(AdapterError, match=r"layers.1.self_attn.q_proj': the merged layer is .* off, its update is"):
        export_merged(model, tmp_path / "out", base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("kind", AUTO)
def test_merging_in_memory_gives_the_base_class_back(kind: str, tmp_path: Path) -> None:
    more = {"modules_to_save": ["classifier"]} if kind == "bert" else {}
    experts = {"num_experts": 4, "r": 4, "lora_dropout": 0.5}
    model = with_gates(tiny.adapted(kind, "static", experts=experts, **more))
    if more:
        model.classifier.trained.weight.data.add_(1)
    expected = logits(model, kind)
    merged = merge(model.train())
    assert type(merged) is type(tiny.MODELS[kind]())
    assert merged.state_dict().keys() == tiny.MODELS[kind]().state_dict().keys()
    torch.testing.assert_close(logits(merged, kind), expected, **CLOSE)
    merged.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again(tmp_path / "out", kind), kind), expected, **CLOSE)


def test_a_base_from_the_hub_is_links_into_its_cache(tmp_path: Path, monkeypatch: Any) -> None:
    base = saved(tmp_path / "base", "llama")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(base.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    asked: list[Any] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        if name != "org/there":
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = tiny.adapted("llama", "static")
    export_merged(model, tmp_path / "out", base_folder("org/there", "v1"))
    assert asked[0][:2] == ("org/there", "v1") and "*.safetensors" in asked[0][2] and "*.bin" not in asked[0][2]
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    torch.testing.assert_close(logits(again(tmp_path / "out", "llama"), "llama"), logits(model, "llama"), **CLOSE)
    with pytest.raises(
        AdapterError, match=r"base model 'org/not': no such folder, and not readable from the hub: .*--base"
    ):
        base_folder("org/not", None)


class Eighths(QuantizationConfigMixin):
    """A toy quantisation: weights in eight bits, one scale for each layer."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = "eighths"


class EighthsLinear(nn.Linear):
    """x W^T, W = scale * (weight - 128)."""

    def __init__(self, wide: int, out: int) -> None:
        super().__init__(wide, out, bias=False)
        self.weight = nn.Parameter(torch.zeros(out, wide, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.whole().to(x).t()

    def whole(self) -> Tensor:
        return (self.weight.float() - 128) * self.scale


class EighthsQuantizer(HfQuantizer):
    """Replaces the projections of attention, and puts plain layers back."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        for block in model.model.layers:
            block.self_attn.q_proj = EighthsLinear(32, 32)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, EighthsLinear):
                    plain = nn.Linear(child.in_features, child.out_features, bias=False, dtype=dtype)
                    plain.weight.data = child.whole().to(dtype)
                    setattr(parent, name, plain)
        return model

    def is_serializable(self, *_: Any) -> bool:
        return True

    is_trainable = True


def quantised(folder: Path, monkeypatch: Any) -> PreTrainedModel:
    """A base model on disk whose q_proj are eight bits wide, loaded."""
    monkeypatch.setitem(quantizers.AUTO_QUANTIZER_MAPPING, "eighths", EighthsQuantizer)
    monkeypatch.setitem(quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING, "eighths", Eighths)
    saved(folder, "llama", size="1GB")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "q_proj" in name]:
        scale = tensors[name].abs().max() / 127
        tensors[name.replace("weight", "scale")] = scale
        tensors[name] = (tensors[name] / scale).round().add(128).to(torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "eighths"}}))
    (folder / "adapter_config.json").unlink()
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return found


def test_a_quantised_base_is_dequantised_first_and_that_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    base = quantised(tmp_path / "base", monkeypatch)
    assert base.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    model = tiny.shake(tiny.adapt(base, {**tiny.METHODS["static"], "target_modules": ["q_proj", "v_proj"]}))
    expected = logits(model, "llama")
    with pytest.raises(AdapterError, match=r"q_proj.weight' is quantised \(torch.uint8\); see --dequantize"):
        export_merged(model, tmp_path / "files", tmp_path / "base")
    with pytest.raises(ConfigError, match=r"q_proj' is a quantised EighthsLinear; call model.dequantize\(\) first"):
        merge(model)
    export = export_dense(model, tmp_path / "out", tiny.tokenizer())
    assert any("dequantised" in note for note in export.notes)
    assert getattr(AutoConfig.from_pretrained(tmp_path / "out"), "quantization_config", None) is None
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    torch.testing.assert_close(logits(again(tmp_path / "out", "llama"), "llama"), expected, **CLOSE)


def test_what_transformers_cannot_dequantise_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    base = quantised(tmp_path / "base", monkeypatch)
    model = tiny.adapt(base, {**tiny.METHODS["static"], "target_modules": ["q_proj"]})
    monkeypatch.delattr(EighthsQuantizer, "_dequantize")
    with pytest.raises(AdapterError, match=r"cannot dequantise this base model: .*give an unquantised one"):
        export_dense(model, tmp_path / "out")
    assert not (tmp_path / "out").exists() and constant_gates(model, None) is not None
