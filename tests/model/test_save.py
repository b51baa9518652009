"""save and load: bit for bit, readable by PEFT, and strict about everything that does not fit."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import moelora
from moelora.core.errors import AdapterError, ConfigError, MoeloraError, OutputError
from moelora.io.folder import MANIFEST
from moelora.model.record import routed_layers
from moelora.model.routed import RoutedModel
from moelora.model.save import restore
from tests import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),  # PEFT, on transformers' names
]
METHODS = [method for method in tiny.METHODS if tiny.fits("llama", method)]
EXPERT = "adapter_model.safetensors"


def used(kind: str = "llama", method: str = "smora", **more: Any) -> Any:
    """A model after two steps of training, so that all that is saved differs from its start."""
    model = tiny.adapted(kind, method, **more)
    sgd = torch.optim.SGD(list(tiny.trainable(model).values()), lr=0.5)
    for seed in range(2):
        model(**tiny.given(kind, seed=seed)).loss.backward()
        sgd.step()
        sgd.zero_grad()
    return model.eval()


def logits(model: Any, kind: str = "llama") -> Tensor:
    given = tiny.given(kind) if isinstance(model, RoutedModel) else tiny.batch(kind)
    with torch.no_grad():
        return model.eval()(**given).logits


def own_state(model: Any) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if ".experts." in key or ".router." in key}


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest."""
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a file, and the hash in the manifest with them."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    edit(folder, lambda manifest: manifest["files"].update({name: digest}))


def refused(base: Any, folder: Path, **how: Any) -> str:
    """The message of a failed load, which leaves the base model as it was."""
    keys, cls, before = list(base.state_dict()), type(base), {n: p.clone() for n, p in base.named_parameters()}
    with pytest.raises(MoeloraError) as caught:
        moelora.load(base, folder, **how)
    assert type(base) is cls and not isinstance(base, RoutedModel) and list(base.state_dict()) == keys
    assert all(p.requires_grad and torch.equal(p, before[name]) for name, p in base.named_parameters())
    return str(caught.value)


# Round trips


@pytest.mark.parametrize(("method", "kind"), tiny.PAIRS)
def test_round_trip_is_bit_for_bit(method: str, kind: str, tmp_path: Path) -> None:
    model = used(kind, method)
    moelora.save(model, tmp_path)
    base = tiny.MODELS[kind]()
    loaded = moelora.load(base, tmp_path)
    assert loaded is base
    tiny.assert_same(own_state(loaded), own_state(model))
    assert torch.equal(logits(loaded, kind), logits(model, kind))
    assert loaded.moelora.config == model.moelora.config
    assert tiny.trainable(loaded).keys() == tiny.trainable(model).keys()


def test_round_trip_in_another_process(tmp_path: Path) -> None:
    expected = {}
    for method in METHODS:
        model = used("llama", method)
        moelora.save(model, tmp_path / method)
        expected[method] = hashlib.sha256(logits(model).numpy().tobytes()).hexdigest()
    code = (
        "import hashlib, json, sys, torch, moelora\n"
        "from tests import tiny\n"
        "torch.set_num_threads(1)\n"
        "found = {}\n"
        "for method in sys.argv[2:]:\n"
        "    model = moelora.load(tiny.llama(), f'{sys.argv[1]}/{method}').eval()\n"
        "    with torch.no_grad():\n"
        "        raw = model(**tiny.given()).logits.numpy().tobytes()\n"
        "    found[method] = hashlib.sha256(raw).hexdigest()\n"
        "print(json.dumps(found))\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(tmp_path), *METHODS]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == expected


def test_a_trained_balance_bias_comes_back(tmp_path: Path) -> None:
    model = used()
    assert all((bias != 0).any() for bias in tiny.biases(model).values())
    moelora.save(model, tmp_path)
    tiny.assert_same(tiny.biases(moelora.load(tiny.llama(), tmp_path)), tiny.biases(model))


def test_losses_come_back(tmp_path: Path) -> None:
    model = used(losses={"z": 0.1, "balance": {"weight": 0.2}})
    moelora.save(model, tmp_path)
    loaded = moelora.load(tiny.llama(), tmp_path)
    assert {name: loss.weight for name, loss in loaded.moelora.losses.items()} == {"z": 0.1, "balance": 0.2}
    assert torch.equal(loaded.train()(**tiny.batch()).loss, model.train()(**tiny.batch()).loss)


def test_a_loaded_model_trains_and_saves_again(tmp_path: Path) -> None:
    moelora.save(used(), tmp_path / "one")
    loaded = moelora.load(tiny.llama(), tmp_path / "one").train()
    before = {key: value.clone() for key, value in own_state(loaded).items()}
    loaded(**tiny.batch()).loss.backward()
    torch.optim.SGD(list(tiny.trainable(loaded).values()), lr=0.1).step()
    moelora.save(loaded, tmp_path / "two")
    again = moelora.load(tiny.llama(), tmp_path / "two")
    tiny.assert_same(own_state(again), own_state(loaded))
    assert all(not torch.equal(own_state(again)[key], value) for key, value in before.items())


def test_saving_over_an_adapter_replaces_it(tmp_path: Path) -> None:
    moelora.save(used("llama", "meteora"), tmp_path)
    model = used("llama", "smora")
    moelora.save(model, tmp_path)
    assert torch.equal(logits(moelora.load(tiny.llama(), tmp_path)), logits(model))


def test_precision_of_the_base_model_may_differ(tmp_path: Path) -> None:
    model = used(dtype=torch.bfloat16)
    moelora.save(model, tmp_path)
    loaded = moelora.load(tiny.llama(dtype=torch.float32), tmp_path)
    tiny.assert_same(own_state(loaded), own_state(model))


def test_save_pretrained_writes_the_adapter(tmp_path: Path) -> None:
    model = used()
    model.save_pretrained(tmp_path, safe_serialization=True)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(moelora.load(tiny.llama(), tmp_path)), logits(model))
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_save_pretrained_takes_a_gathered_state(tmp_path: Path) -> None:
    # Engines that shard parameters hand over the full tensors, some with a prefix.
    model = used()
    state = {f"module.{key}": value.clone() for key, value in model.state_dict().items()}
    expected = logits(model)
    for p in tiny.trainable(model).values():
        torch.nn.init.zeros_(p)
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(logits(moelora.load(tiny.llama(), tmp_path)), expected)


def test_a_state_without_the_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"q_proj\.router\.weight: not in the state to be saved"):
        used().save_pretrained(tmp_path, state_dict={"x": torch.zeros(1)})


def test_a_plugin_router_needs_its_file_again(tmp_path: Path) -> None:
    plugin = tmp_path / "twice.py"
    plugin.write_text("from moelora.routers.meteora import MeteoRA\n\n\nclass Twice(MeteoRA):\n    pass\n")
    config = {"router": "twice", "experts": {"num_experts": 3, "r": 2}, "target_modules": ["q_proj"]}
    model = tiny.shake(moelora.adapt(tiny.llama(), config, plugins=[plugin], verbose=False))
    moelora.save(model, tmp_path / "out")
    assert "no method named 'twice'" in refused(tiny.llama(), tmp_path / "out")
    loaded = moelora.load(tiny.llama(), tmp_path / "out", plugins=[plugin])
    assert torch.equal(logits(loaded), logits(model))


# What is on disk


def test_files_of_a_mixture(tmp_path: Path) -> None:
    moelora.save(used("llama", "meteora"), tmp_path)
    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    experts = [f"experts/expert_{e}/{n}" for e in range(3) for n in ("adapter_config.json", EXPERT)]
    assert names == sorted(["README.md", MANIFEST, "router.safetensors", *experts])
    router = load_file(tmp_path / "router.safetensors")
    assert router.keys() == {
        f"model.layers.{i}.{n}.router.weight"
        for i in range(2)
        for n in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }


def test_manifest(tmp_path: Path) -> None:
    moelora.save(used("llama", "meteora", options={"name_or_path": "somebody/some-model"}), tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["base"]["cls"] == "LlamaForCausalLM" and manifest["base"]["model"] == "somebody/some-model"
    assert manifest["adapter"]["router"] == {"name": "meteora", "top_k": 2, "temperature": 2.0}
    assert manifest["adapter"]["experts"]["lora_alpha"] == 8 and len(manifest["sites"]) == 6
    assert manifest["sites"][0] == {"name": "model.layers.0.self_attn.q_proj", "in_features": 32, "out_features": 32}
    assert manifest["moelora"] == moelora.__version__
    card = (tmp_path / "README.md").read_text()
    assert "somebody/some-model" in card and "library_name: moelora" in card and "moelora.load(" in card


@pytest.mark.filterwarnings("error:fan_in_fan_out is set to")  # PEFT's guess of what the folder should have said
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_a_single_expert_is_the_same_model_in_peft(kind: str, tmp_path: Path) -> None:
    model = used(kind, "single")
    moelora.save(model, tmp_path)
    other = PeftModel.from_pretrained(tiny.MODELS[kind](), tmp_path / "experts" / "expert_0")
    torch.testing.assert_close(logits(other, kind), logits(model, kind), rtol=0, atol=5e-6)
    assert not torch.equal(logits(other, kind), logits(tiny.MODELS[kind](), kind))


@pytest.mark.parametrize("experts", [{"r": 4, "lora_alpha": 6, "use_rslora": True}, {"r": 4, "lora_alpha": 3}])
def test_the_scale_of_a_single_expert_in_peft(experts: dict[str, Any], tmp_path: Path) -> None:
    model = used("llama", "single", experts=experts)
    moelora.save(model, tmp_path)
    other = PeftModel.from_pretrained(tiny.llama(), tmp_path / "experts" / "expert_0")
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=5e-6)


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["smora_blocks", "meteora"])
def test_each_expert_of_a_mixture_loads_in_peft(kind: str, method: str, tmp_path: Path) -> None:
    model = used(kind, method)
    moelora.save(model, tmp_path)
    for e, folder in enumerate(sorted((tmp_path / "experts").iterdir())):
        other = PeftModel.from_pretrained(tiny.MODELS[kind](), folder)
        for layer in routed_layers(model):
            twin, r = other.base_model.model.get_submodule(layer.site.name), layer.experts.r
            own = slice(e * r, (e + 1) * r)
            assert torch.equal(twin.lora_A["default"].weight, layer.experts.lora_A[own])
            assert torch.equal(twin.lora_B["default"].weight, layer.experts.lora_B[:, own])
            assert twin.scaling["default"] == pytest.approx(layer.experts.scale[0].item())
            x = torch.randn(3, layer.in_features)
            update = layer.experts.scale[0] * x @ layer.experts.lora_A[own].t() @ layer.experts.lora_B[:, own].t()
            torch.testing.assert_close(twin.eval()(x), layer.base_layer(x) + update, rtol=0, atol=1e-5)


def test_expert_folders_sort_in_their_order(tmp_path: Path) -> None:
    router, experts = {"name": "meteora", "top_k": 2}, {"num_experts": 11, "r": 2}
    model = tiny.adapted("llama", "meteora", router=router, experts=experts)
    moelora.save(model, tmp_path)
    names = json.loads((tmp_path / MANIFEST).read_text())["experts"]
    assert names == sorted(names) and names[0] == "expert_00" and names[-1] == "expert_10"
    assert torch.equal(logits(moelora.load(tiny.llama(), tmp_path)), logits(model))


# Refusals


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    moelora.save(tiny.adapted("llama", "meteora"), path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(saved, tmp_path / "adapter")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ROUTER = "model.layers.0.self_attn.q_proj.router.weight"


def test_a_good_copy_loads(folder: Path) -> None:
    moelora.load(tiny.llama(), folder)


@pytest.mark.parametrize("name", ["router.safetensors", f"experts/expert_1/{EXPERT}"])
def test_a_changed_file(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert "the file was changed" in refused(tiny.llama(), folder)


@pytest.mark.parametrize("name", ["router.safetensors", f"experts/expert_1/{EXPERT}"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert "missing" in refused(tiny.llama(), folder)
    edit(folder, lambda manifest: manifest["files"].pop(name))  # and the manifest keeps quiet about it
    assert "expert_1" in refused(tiny.llama(), folder) or "router" in refused(tiny.llama(), folder)


def test_a_missing_first_expert(folder: Path) -> None:
    name = f"experts/expert_0/{EXPERT}"
    (folder / name).unlink()
    edit(folder, lambda manifest: manifest["files"].pop(name))
    assert "experts/expert_0" in refused(tiny.llama(), folder)


def test_nan(folder: Path) -> None:
    rewrite(folder, "router.safetensors", lambda t: t[ROUTER].fill_(float("nan")))
    assert "found NaN or infinite values" in refused(tiny.llama(), folder)


def test_a_missing_tensor(folder: Path) -> None:
    rewrite(folder, "router.safetensors", lambda t: t.pop(ROUTER))
    assert f"tensor {ROUTER} is missing" in refused(tiny.llama(), folder)


def test_an_extra_tensor(folder: Path) -> None:
    rewrite(folder, "router.safetensors", lambda t: t.update(more=torch.zeros(1)))
    assert "tensor more is not part of this adapter" in refused(tiny.llama(), folder)


@pytest.mark.parametrize("expert", [0, 2])
def test_a_tensor_missing_in_one_expert(folder: Path, expert: int) -> None:
    rewrite(folder, f"experts/expert_{expert}/{EXPERT}", lambda t: t.pop(KEY))
    assert "q_proj" in refused(tiny.llama(), folder)


def test_an_extra_tensor_in_one_expert(folder: Path) -> None:
    rewrite(folder, f"experts/expert_2/{EXPERT}", lambda t: t.update(more=torch.zeros(1)))
    assert "more" in refused(tiny.llama(), folder)


def test_a_router_of_another_shape(folder: Path) -> None:
    rewrite(folder, "router.safetensors", lambda t: t.update({ROUTER: torch.zeros(4, 32)}))
    assert f"tensor {ROUTER} is (4, 32), expected (3, 32)" in refused(tiny.llama(), folder)


def test_an_expert_of_another_rank(folder: Path) -> None:
    rewrite(folder, f"experts/expert_1/{EXPERT}", lambda t: t.update({KEY: torch.zeros(5, 32)}))
    message = refused(tiny.llama(), folder)
    assert "expert_1" in message and "q_proj" in message and "[5, 32]" in message


def test_experts_that_do_not_stack(folder: Path) -> None:
    rewrite(folder, f"experts/expert_1/{EXPERT}", lambda t: t.update({KEY: torch.zeros(4, 31)}))
    assert "q_proj" in refused(tiny.llama(), folder)


def test_experts_of_compensating_ranks(folder: Path) -> None:
    # 5 + 3 + 4 ranks stack to the right shape, with every expert but the last out of place.
    for e, rank in ((0, 5), (1, 3)):
        rewrite(folder, f"experts/expert_{e}/{EXPERT}", lambda t, r=rank: t.update({KEY: torch.zeros(r, 32)}))
    assert "q_proj" in refused(tiny.llama(), folder)


def test_other_weights_are_refused_unless_forced(folder: Path) -> None:
    message = refused(tiny.llama(seed=7), folder)
    assert "fingerprint" in message and "force=True" in message
    forced = moelora.load(tiny.llama(seed=7), folder, force=True)
    tiny.assert_same(own_state(forced), own_state(moelora.load(tiny.llama(), folder)))


def test_another_architecture(folder: Path) -> None:
    assert "matches no layer" in refused(tiny.gpt2(), folder)


@pytest.mark.parametrize("options", [{"num_hidden_layers": 3}, {"intermediate_size": 48}])
def test_another_size(folder: Path, options: dict[str, int]) -> None:
    message = refused(tiny.llama(**options), folder)
    assert "with 6 adapted layers; in this LlamaForCausalLM they differ" in message
    assert message == refused(tiny.llama(**options), folder, force=True)


def test_a_peft_folder_is_diagnosed(folder: Path) -> None:
    message = refused(tiny.llama(), folder / "experts" / "expert_0")
    assert "a PEFT adapter, not a moelora one" in message


def test_a_path_that_leaves_the_folder(folder: Path) -> None:
    shutil.move(folder / "router.safetensors", folder.parent / "router.safetensors")

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"]["../router.safetensors"] = manifest["files"].pop("router.safetensors")

    edit(folder, change)
    assert "leaves the folder" in refused(tiny.llama(), folder)


def test_an_expert_name_that_leaves_the_folder(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["experts"].__setitem__(0, "../../elsewhere"))
    refused(tiny.llama(), folder)


@pytest.mark.parametrize("change", [lambda e: e.pop(), lambda e: e.append("expert_3"), lambda e: e.clear()])
def test_another_number_of_experts(folder: Path, change: Callable[[list[str]], Any]) -> None:
    edit(folder, lambda manifest: change(manifest["experts"]))
    refused(tiny.llama(), folder)


def test_a_configuration_that_is_not_valid(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["adapter"]["router"].update(top_k=99))
    assert "top_k 99 is more than the 3 experts" in refused(tiny.llama(), folder)
    edit(folder, lambda manifest: manifest["adapter"].update(router={"name": "nobody"}))
    assert "no method named 'nobody'" in refused(tiny.llama(), folder)


def test_no_such_folder(tmp_path: Path) -> None:
    assert "no such file" in refused(tiny.llama(), tmp_path / "absent")


def test_a_model_with_experts_takes_no_others(folder: Path) -> None:
    model = tiny.adapted("llama", "meteora")
    before = logits(model)
    with pytest.raises(MoeloraError):
        moelora.load(model, folder)
    with pytest.raises(ConfigError, match="has experts already; start from a fresh base model"):
        moelora.adapt(model, tiny.METHODS["smora"])
    assert torch.equal(logits(model), before)


# Where save refuses to write


def test_a_folder_of_somebody_else_is_refused_and_nothing_written(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"not empty and not written by moelora \(thesis\.tex\)"):
        moelora.save(tiny.adapted("llama"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"] and (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="a file; expected a folder"):
        moelora.save(tiny.adapted("llama"), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_empty_and_new_folders_are_fine(tmp_path: Path) -> None:
    moelora.save(tiny.adapted("llama"), tmp_path)
    moelora.save(tiny.adapted("llama"), tmp_path / "deep" / "er")
    assert (tmp_path / "deep" / "er" / MANIFEST).is_file()


def test_a_model_without_experts_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(MoeloraError, match="has no experts; call moelora"):
        moelora.save(tiny.llama(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# restore: into a model that is adapted already


def test_restore(tmp_path: Path) -> None:
    model, fresh = used(), tiny.adapted("llama", "smora", seed=0)
    moelora.save(model, tmp_path)
    restore(fresh, tmp_path)
    tiny.assert_same(own_state(fresh), own_state(model))


def test_restore_of_another_configuration(tmp_path: Path) -> None:
    moelora.save(used(), tmp_path)
    other = tiny.adapted("llama", "smora", experts={"r": 16, "lora_alpha": 8})
    before = {key: value.clone() for key, value in own_state(other).items()}
    with pytest.raises(AdapterError, match=r"another adapter configuration \(differs in experts\)"):
        restore(other, tmp_path)
    tiny.assert_same(own_state(other), before)


def test_restore_of_a_damaged_folder(folder: Path) -> None:
    model = tiny.adapted("llama", "meteora", seed=3)
    before = {key: value.clone() for key, value in own_state(model).items()}
    rewrite(folder, "router.safetensors", lambda t: t.update({ROUTER: torch.zeros(4, 32)}))
    with pytest.raises(AdapterError, match="expected"):
        restore(model, folder)
    tiny.assert_same(own_state(model), before)


def test_uploading_while_saving_is_refused_not_ignored(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "smora")
    with pytest.raises(MoeloraError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()


def test_push_to_hub_uploads_all_that_loading_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create_repo(self: HfApi, repo_id: str, **options: Any) -> Any:
        assert options == {"private": True, "exist_ok": True} and self.token == "secret"
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: str, **options: Any) -> Any:
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
        assert options["commit_message"] == "Upload the adapter" and options["revision"] is None
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model = used()
    assert model.push_to_hub("mine", private=True, token="secret") == "https://hub/me/mine/commit/1"
    tiny.assert_same(own_state(moelora.load(tiny.llama(), tmp_path / "hub" / "me" / "mine")), own_state(model))
    assert "Each folder in `experts/`" in (tmp_path / "hub" / "me" / "mine" / "README.md").read_text()


def test_a_name_that_the_hub_refuses() -> None:
    with pytest.raises(OutputError, match="cannot upload the adapter"):
        used().push_to_hub("no/such/name")


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model = used()
    layer = model.get_submodule(model.moelora.sites[3].name)
    with torch.no_grad():
        layer.experts.lora_B[0, 0] = float("inf")
    with pytest.raises(OutputError, match=rf"{layer.site.name}.experts.lora_B holds a number that is not finite"):
        moelora.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
