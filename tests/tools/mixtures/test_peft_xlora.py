"""X-LoRA folders of PEFT, with the installed PEFT as the witness.

What PEFT's releases write was read from folders that 0.14.0, 0.18.1, 0.19.1 and 0.21.2 wrote. 0.18 and 0.19 write the
router whole, as ``whole`` does here; 0.21.2 writes its own, broken ones.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import XLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import moelora
from moelora.core.errors import AdapterError, ConfigError
from moelora.model.record import routed_layers
from moelora.tools.mixtures import import_mixture
from tests import tiny
from tests.adapters import peft_folder

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{text}.*:UserWarning") for text in ("enable_softmax", "PEFT lost")]
EXPERTS: list[dict[str, Any]] = [
    {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    {"r": 2, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 7},
    {"r": 3, "target_modules": ["v_proj"], "use_rslora": True},
    {"r": 1, "target_modules": ["gate_proj", "q_proj"], "seed": 5},
]
FIELDS = {"softmax_temperature": 1.0, "enable_softmax": True, "enable_softmax_topk": False, "top_k_lora": None}
KEY = "base_model.internal_xlora_classifier."


def sources(folder: Path, count: int = 3) -> list[Path]:
    """LoRAs of unlike ranks, scales and targets."""
    return [peft_folder(folder / f"source_{i}", **{"seed": i, **EXPERTS[i]}) for i in range(count)]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sources(tmp_path_factory.mktemp("sources"))


def theirs(experts: list[Path], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """PEFT's X-LoRA model with a head that matters."""
    base = tiny.llama(dtype=dtype)
    base.config.use_cache = False
    made = {"xlora_size": 6, "xlora_dropout_p": 0.0, "task_type": "CAUSAL_LM", "hidden_size": tiny.HIDDEN, **options}
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(
            base, XLoraConfig(adapters={str(i): str(e) for i, e in enumerate(experts)}, **made)
        ).eval()


def whole(model: Any, folder: Path, experts: list[Path] | None) -> Path:
    """What PEFT 0.19 saves: the router with all its keys. experts: plain adapters to put into the subfolders."""
    model.save_pretrained(folder)
    for name in model.peft_config["default"].adapters:
        shutil.rmtree(folder / name)
        if experts is not None:
            shutil.copytree(experts[int(name)], folder / name)
    state = model.base_model.internal_xlora_classifier.state_dict()
    save_file({f"{KEY}{key}": value for key, value in state.items()}, folder / "adapter_model.safetensors")
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**tiny.unlabelled(tiny.batch()), use_cache=False).logits


def assert_equal(mine: Any, peft: Any) -> None:
    """Logits, to 5e-6 of the largest, and the scalings of every layer before the choice of the largest."""
    expected = logits(peft)
    assert (logits(mine.eval()) - expected).abs().max() <= 5e-6 * expected.abs().max()
    scalings = peft.base_model.internal_xlora_scalings.flatten(0, 1)
    for site, route in enumerate(tiny.routes(mine, **tiny.unlabelled(tiny.batch()))):
        found = route.probs if mine.moelora.config.router["enable_softmax"] else route.logits
        torch.testing.assert_close(found, scalings[:, site], rtol=1e-5, atol=1e-6)


@pytest.fixture
def saved(tmp_path: Path, once: Path) -> Path:
    """A whole folder of depth 1, to spoil."""
    return Path(shutil.copytree(once, tmp_path / "x"))


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, experts: list[Path]) -> Path:
    return whole(theirs(experts), tmp_path_factory.mktemp("saved") / "x", experts)


def refused(folder: Path, experts: list[Path] | None = None, base: Any = None) -> str:
    """The message of the refusal; the model is as it was."""
    model = tiny.llama() if base is None else base
    before, kind = {key: value.clone() for key, value in model.state_dict().items()}, type(model)
    with pytest.raises(AdapterError) as caught:
        import_mixture(model, folder, experts or [], verbose=False)
    assert type(model) is kind and all(parameter.requires_grad for parameter in model.parameters())
    tiny.assert_same(before, dict(model.state_dict()))
    return str(caught.value)


def change(folder: Path, **values: Any) -> Path:
    """Other values in the configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "temperature": {"softmax_temperature": 0.3},
    "raw": {"enable_softmax": False, "softmax_temperature": 0.3},
    "top_k": {"top_k_lora": 2},
    "softmax of top_k": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "softmax twice": {"enable_softmax_topk": True},
    "weight": {"global_scaling_weight": -0.7},
}


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("layerwise", [False, True])
def test_equals_peft(tmp_path: Path, experts: list[Path], depth: int, layerwise: bool) -> None:
    dropout = 0.2 if layerwise else 0.0  # PEFT numbers the layers differently
    peft = theirs(experts, xlora_depth=depth, layerwise_scalings=layerwise, xlora_dropout_p=dropout)
    folder, config = whole(peft, tmp_path / "x", experts), peft.base_model.xlora_config
    usual = dict(vars(config))
    for options in OPTIONS.values():
        for key, value in {**usual, **options}.items():
            setattr(config, key, value)
        peft.base_model.internal_xlora_classifier.softmax.temperature = config.softmax_temperature
        mine = import_mixture(tiny.llama(), change(folder, **{**FIELDS, **options}), verbose=False)
        assert_equal(mine, peft)
    moelora.save(mine, tmp_path / "ours")
    again = moelora.load(tiny.llama(), tmp_path / "ours").eval()
    assert torch.equal(logits(again), logits(mine))


def test_eleven_experts_keep_the_order_of_their_numbers(tmp_path: Path) -> None:
    """PEFT sorts the names in the file as words."""
    experts = [peft_folder(tmp_path / f"source_{i}", r=1, seed=i) for i in range(11)]
    peft = theirs(experts, layerwise_scalings=True)
    folder = whole(peft, tmp_path / "x", experts)
    assert list(json.loads((folder / "adapter_config.json").read_text())["adapters"])[:3] == ["0", "1", "10"]
    assert_equal(import_mixture(tiny.llama(), folder, verbose=False), peft)


def test_only_the_head_trains_unless_the_folder_says_otherwise(saved: Path) -> None:
    for trainable in (False, True):
        model = import_mixture(tiny.llama(), change(saved, use_trainable_adapters=trainable), verbose=False)
        names = {
            name.rsplit(".", 2)[-2] if "head" in name else name.rsplit(".", 1)[-1] for name in tiny.trainable(model)
        }
        assert ("lora_A" in names) is trainable and "0" in names


def test_dropout_of_the_experts_is_kept_where_they_have_one(tmp_path: Path) -> None:
    experts = [peft_folder(tmp_path / str(i), seed=i, lora_dropout=0.3) for i in range(2)]
    model = import_mixture(tiny.llama(), whole(theirs(experts), tmp_path / "x", experts), verbose=False)
    assert model.moelora.config.experts.lora_dropout == 0.3


# Experts elsewhere, and as PEFT writes them


def test_experts_that_the_caller_gives(tmp_path: Path, experts: list[Path]) -> None:
    peft = theirs(experts, xlora_depth=2)
    folder = whole(peft, tmp_path / "x", None)
    assert_equal(import_mixture(tiny.llama(), folder, experts, verbose=False), peft)


def test_paths_that_the_configuration_names_are_not_opened(saved: Path, experts: list[Path]) -> None:
    for name in "012":
        shutil.rmtree(saved / name)
    found = refused(saved)
    assert "paths that a configuration names are never opened" in found and str(experts[0]) in found
    assert "2 in what was given, expected 3, one for each" in refused(saved, experts[:2])


def as_018(model: Any, folder: Path, name: str, cut: bool = False) -> None:
    """The subfolder of an expert as PEFT 0.18 and 0.19 write it; cut: as those before do."""
    state = {}
    for key, value in model.state_dict().items():
        if ("lora_" in key and name in key) or "bias" in key:
            parts = key.split(".")
            if cut:
                parts = [part for part in parts if part != name]
            elif parts[-2] == name:
                del parts[-2]
            state[".".join(parts)] = value.clone()
    save_file(state, folder / name / "adapter_model.safetensors")


def test_subfolders_as_peft_018_and_019_write_them(tmp_path: Path) -> None:
    """With tensors of the base model, of the router and of other experts in them."""
    experts = sources(tmp_path, 4)
    peft = theirs(experts, xlora_depth=2, layerwise_scalings=True)
    folder = whole(peft, tmp_path / "x", experts)
    for name in "0123":
        as_018(peft, folder, name)
    keys = load_file(folder / "0" / "adapter_model.safetensors").keys()
    assert any("layers.0.mlp.up_proj.weight" in k for k in keys) and any("lora_A.1.weight" in k for k in keys)
    assert_equal(import_mixture(tiny.llama(), folder, verbose=False), peft)


def test_subfolders_of_earlier_releases_have_lost_the_numbers_of_blocks(tmp_path: Path, experts: list[Path]) -> None:
    peft = theirs(experts)
    folder = whole(peft, tmp_path / "x", experts)
    for name in "012":
        as_018(peft, folder, name, cut=True)
    assert "renamed before 0.18" in refused(folder)
    assert_equal(import_mixture(tiny.llama(), folder, experts, verbose=False), peft)


def test_what_0_21_2_writes_is_whole_with_the_experts_it_was_made_from(tmp_path: Path, experts: list[Path]) -> None:
    """The file of expert 0 holds the layer of the router that is missing in the folder itself."""
    for depth in (1, 2):
        peft = theirs(experts, xlora_depth=depth, xlora_dropout_p=0.2)
        folder = tmp_path / f"x{depth}"
        peft.save_pretrained(folder)
        assert not any("layers.0." in key for key in load_file(folder / "adapter_model.safetensors"))
        with pytest.warns(UserWarning, match=r"PEFT lost layers\.0\.weight, layers\.0\.bias of the router here"):
            mine = import_mixture(tiny.llama(), folder, experts, verbose=False)
        assert_equal(mine, peft)


def test_what_0_21_2_writes_has_lost_blocks_of_the_experts(tmp_path: Path, experts: list[Path]) -> None:
    theirs(experts).save_pretrained(tmp_path / "x")
    found = refused(tmp_path / "x")
    assert "'model.layers.1.self_attn.q_proj' (2 such modules): found nothing" in found
    assert "blocks are lost from 0.20 to 0.21.2" in found and f"were made from '{experts[0]}'" in found


@pytest.mark.parametrize(
    ("depth", "count", "missing"), [(1, "0 of 2", ["0"]), (2, "2 of 4", ["0"]), (4, "6 of 8", ["0"])]
)
def test_a_lost_router_is_diagnosed(
    tmp_path: Path, experts: list[Path], depth: int, count: str, missing: list[str]
) -> None:
    peft = theirs(experts, xlora_depth=depth, xlora_dropout_p=0.2)
    folder = tmp_path / "x"
    peft.save_pretrained(folder)
    for index, expert in enumerate(experts):  # as many do by hand, since PEFT reads these
        shutil.rmtree(folder / str(index))
        shutil.copytree(expert, folder / str(index))
    found = refused(folder)
    assert f"router: found {count} tensors, missing" in found
    assert all(f"{KEY}layers.{number}.weight" in found and f"{KEY}layers.{number}.bias" in found for number in missing)
    assert "PEFT 0.20 to 0.21.2 lose every layer of the router" in found and "cannot be repaired" in found
    assert f"experts: {{adapters: [{folder / '0'}, {folder / '1'}" in found
    adapter = {"router": "meteora", "target_modules": ["q_proj", "v_proj", "down_proj"]}
    own = {"num_experts": len(experts), "r": 4, "adapters": [str(folder / str(i)) for i in range(len(experts))]}
    assert routed_layers(tiny.adapt(tiny.llama(), {**adapter, "experts": own}))  # the message tells the truth


def test_experts_beside_a_base_in_half_precision_are_its_own(tmp_path: Path, experts: list[Path]) -> None:
    peft = theirs(experts, dtype=torch.bfloat16)
    peft.save_pretrained(tmp_path / "x")
    model = import_mixture(tiny.llama(), tmp_path / "x", experts, verbose=False)
    head = peft.base_model.internal_xlora_classifier.layers[0]
    assert torch.equal(routed_layers(model)[0].router.head[0].weight, head.weight.float())


def test_other_experts_than_its_own_are_refused(tmp_path: Path) -> None:
    experts = [peft_folder(tmp_path / str(i), seed=i) for i in range(2)]
    peft = theirs(experts, use_trainable_adapters=True)
    whole(peft, tmp_path / "x", experts)
    assert "give those that belong to it" in refused(tmp_path / "x", experts[::-1])
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.add_(1)
    peft.save_pretrained(tmp_path / "y")
    assert "trained on with the router (use_trainable_adapters)" in refused(tmp_path / "y", experts)


# Refusals


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scaling_pass_value": 0.1}, r"scaling_pass_value: found 0.1, expected 0; moelora's first pass is without"),
        ({"scaling_pass_value": None}, "scaling_pass_value: found None, expected 0"),
        ({"xlora_depth": 0}, "xlora_depth: found 0, expected an integer from 1"),
        ({"xlora_depth": 10**12}, "xlora_depth: found 1000000000000, expected an integer from 1"),
        ({"xlora_depth": 3}, r"layers\.4\.weight: found nothing, expected a layer of the router"),
        ({"xlora_dropout_p": 1.0}, "xlora_dropout_p: found 1.0, expected a number from 0, below 1"),
        ({"enable_softmax": "yes"}, "enable_softmax: found 'yes', expected true or false"),
        ({"layerwise_scalings": True}, r"layers\.0\.weight: found shape \[3, 32\], expected \[18, 32\]"),
        ({"softmax_temperature": 0}, "softmax_temperature: found 0, expected a number above 0"),
        ({"softmax_temperature": 1e999}, "JSON: found Infinity, expected finite numbers"),
        ({"top_k_lora": 4}, "top_k_lora: found 4, expected null, or an integer from 1 to the 3 experts"),
        ({"global_scaling_weight": None}, "global_scaling_weight: found None, expected a number"),
        ({"use_trainable_adapters": 1}, "use_trainable_adapters: found 1, expected true or false"),
        ({"hidden_size": 16}, r"layers\.0\.weight: found shape \[3, 32\], expected \[3, 16\]"),
        (
            {"adapters": {"math": "a", "code": "b", "law": "c"}},
            "paths by the names 0, 1, ...: PEFT runs X-LoRA with no",
        ),
        ({"adapters": {"0": "a", "1": "b"}}, r"layers\.0\.weight: found shape \[3, 32\], expected \[2, 32\]"),
        ({"adapters": {}}, "adapters: found {}"),
        ({"gate_noise": 0.1}, "gate_noise: found 0.1, expected null, false or empty; moelora does not know"),
    ],
)
def test_settings_are_refused_by_name(saved: Path, values: dict[str, Any], message: str) -> None:
    assert re.search(message, refused(change(saved, **values)))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.0.weight": torch.full((3, 32), torch.nan)}, r"layers\.0\.weight: found NaN or infinite values"),
        (
            {"layers.0.weight": torch.zeros(3, 32, dtype=torch.int32)},
            "found dtype int32, expected a floating-point dtype",
        ),
        ({"layers.0.weight": torch.zeros(32, 3)}, r"found shape \[32, 3\], expected \[3, 32\]"),
        ({"layers.7.weight": torch.zeros(3)}, r"layers\.7\.weight: found a tensor that this router has not"),
    ],
)
def test_tensors_of_the_router_are_refused_by_name(saved: Path, tensors: dict[str, Tensor], message: str) -> None:
    path = saved / "adapter_model.safetensors"
    save_file({**load_file(path), **{f"{KEY}{key}": value for key, value in tensors.items()}}, path)
    assert re.search(message, refused(saved))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "expert: found magnitude, expected LoRA alone; X-LoRA computes something else"),
        ({"lora_bias": True}, "expert: found bias, expected LoRA alone"),
        ({"modules_to_save": ["lm_head"]}, r"expert: found lm_head\.weight, expected LoRA alone"),
        ({"init_lora_weights": "olora"}, "expert: found olora, expected LoRA alone"),
    ],
)
def test_experts_that_x_lora_does_not_mix_are_refused(
    saved: Path, experts: list[Path], options: Any, message: str
) -> None:
    shutil.rmtree(saved / "1")
    odd = peft_folder(saved.parent / "odd", **options)
    assert re.search(message, refused(saved, [experts[0], odd, experts[2]]))


def test_another_base_model_is_refused(saved: Path) -> None:
    found = refused(saved, base=tiny.llama(intermediate_size=48))
    assert "made for a 'model.layers.0.mlp.down_proj' of 40 -> 32 features, here it has 48 -> 32" in found
    assert "it adapts 'model.layers.1." in refused(saved, base=tiny.llama(num_hidden_layers=1))


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, saved: Path, experts: list[Path]) -> None:
    weights, outside = saved / "adapter_model.safetensors", tmp_path / "outside"
    weights.rename(outside)
    weights.symlink_to(outside)
    assert "a path that leaves the folder" in refused(saved)
    weights.unlink()
    outside.rename(weights)
    shutil.rmtree(saved / "1")
    (saved / "1").symlink_to(experts[1])
    assert "a path that leaves the folder" in refused(saved)


def test_an_adapted_model_is_refused(saved: Path) -> None:
    model = import_mixture(tiny.llama(), saved, verbose=False)
    with pytest.raises(ConfigError, match="has experts already"):
        import_mixture(model, saved)
