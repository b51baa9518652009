"""Exporting to PEFT, as one exact LoRA, and for vLLM: what PEFT loads computes what the model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import moelora.tools.export.folder as writing
from moelora.core.errors import AdapterError, ConfigError, DataError, OutputError
from moelora.core.route import Route
from moelora.model.record import routed_layers
from moelora.tools.export import VLLM_RANKS, Export, export_lora, export_peft, export_vllm
from moelora.tools.export.plain import by_task, constant_gates
from tests import tiny
from tests.adapters import base as biased
from tests.adapters import mixture, peft_folder

CONSTANT = ["static", "uniform", "single", "task_shared", "lora_mixer_hard"]
KINDS = ["llama", "gpt2", "bert"]
CLOSE = {"rtol": 0, "atol": 1e-5}


@torch.no_grad()
def logits(model: Any, kind: str, task: int | None = None) -> Tensor:
    """Of all real tokens, in evaluation mode."""
    batch = tiny.unlabelled(tiny.batch(kind))
    more = {} if task is None else {"task_ids": torch.full((3,), task)}
    found = model.eval()(**batch, **more).logits
    return found if kind == "bert" else found[batch["attention_mask"].bool()]


def in_peft(folder: Path, kind: str, base: Any = None) -> Tensor:
    """The logits of the base model with a LoRA that PEFT has loaded."""
    return logits(PeftModel.from_pretrained(tiny.MODELS[kind]() if base is None else base, folder), kind)


def only(model: Any, expert: int) -> Any:
    """The model with gates one-hot on an expert."""
    for layer in routed_layers(model):
        count, sparse = layer.experts.num_experts, layer.router.around == "ffn"
        own = min(expert, count - 1)  # attention beside a block has one for all

        def forward(x: Tensor, _: Any, count: int = count, sparse: bool = sparse, own: int = own) -> Route:
            if sparse:
                return Route(torch.ones(len(x), 1), count, torch.full((len(x), 1), own))
            return Route(torch.eye(count)[[own]].expand(len(x), -1), count)

        layer.router.forward = forward
    return model


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def checked(export: Export, modules: int) -> None:
    """An exact export that compared so many modules, and said so in its report."""
    report = json.loads((export.folder / "export.json").read_text())
    assert len(export.errors) == modules == report["check"]["modules"]
    assert export.worst[1] < 1e-6
    assert report["to"] == export.kind


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((kind, method) for kind in KINDS for method in ("static", "hydra", "comol")),
        *(("llama", method) for method in ("smear_merged", "smora_blocks", "flylora", "meteora", "xlora")),
        *(("llama", method) for method in ("mixlora", "mixlora_attention")),
    ],
)
def test_every_expert_in_peft_is_the_model_with_its_gates_on_it(kind: str, method: str, tmp_path: Path) -> None:
    model = tiny.adapted(kind, method)
    export = export_peft(model, tmp_path / "out")
    folders = sorted((tmp_path / "out").glob("expert_*"))
    assert [f.name for f in folders] == [f"expert_{i}" for i in range(model.moelora.config.experts.most)]
    checked(export, len(folders) * len(routed_layers(model)))
    base = logits(tiny.MODELS[kind](), kind)
    for index, folder in enumerate(folders):
        expected = logits(only(model, index), kind)
        assert (expected - base).abs().max() > 0.1
        torch.testing.assert_close(in_peft(folder, kind), expected, **CLOSE)
        assert config_of(folder)["fan_in_fan_out"] == (kind == "gpt2")


def test_experts_go_as_they_came_with_their_own_rank_scale_and_kind(tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [
        {"r": 4, "rank_pattern": {"c_fc": 2}, "alpha_pattern": {"c_attn": 3}},
        {"r": 2, "use_rslora": True, "target_modules": ["c_fc"]},
        {"r": 3, "use_dora": True},
        {"r": 1, "lora_bias": True},
        {"r": 4, "bias": "lora_only"},
    ]
    folders = [peft_folder(tmp_path / str(i), "gpt2", seed=i, **o) for i, o in enumerate(options)]
    export_peft(mixture(folders, "gpt2"), tmp_path / "out")
    for index, folder in enumerate(folders):
        written = tmp_path / "out" / f"expert_{index}"
        assert torch.equal(in_peft(written, "gpt2", biased("gpt2")), in_peft(folder, "gpt2", biased("gpt2")))
        theirs, ours = (load_file(f / "adapter_model.safetensors") for f in (folder, written))
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_layers_with_fewer_experts_have_no_part_in_the_others(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "softmax", experts={"num_experts": [1, 2], "r": 4})
    export_peft(model, tmp_path / "out")
    halves = load_file(tmp_path / "out" / "expert_1" / "adapter_model.safetensors")
    assert halves and all(".layers.1." in name for name in halves)


def test_modules_trained_in_full_go_with_every_expert(tmp_path: Path) -> None:
    model = tiny.adapted("bert", "static", modules_to_save=["classifier"])
    with torch.no_grad():
        model.classifier.trained.weight.add_(1)
    export_peft(model, tmp_path / "out")
    for index in (0, 3):
        expected = logits(only(model, index), "bert")
        torch.testing.assert_close(in_peft(tmp_path / "out" / f"expert_{index}", "bert"), expected, **CLOSE)


@pytest.mark.parametrize(
    ("method", "said"), [("smora", True), ("flylora", True), ("smora_blocks", True), ("static", False)]
)
def test_single_ranks_are_said_to_be_all_on(method: str, said: bool, tmp_path: Path) -> None:
    notes = export_peft(tiny.adapted("llama", method), tmp_path / "out").notes
    assert any("all its ranks on" in note for note in notes) == said


@pytest.mark.parametrize(
    ("method", "task"), [*((method, task) for method in tiny.METHODS for task in (None, 2)), ("task", -1), ("task", 0)]
)
def test_constant_gates_are_those_of_every_token(method: str, task: int | None) -> None:
    model = tiny.adapted("llama", method).eval()
    batch = tiny.batch(padded=False)
    if task is None and by_task(model):
        with pytest.raises(ConfigError, match=r"other gates: say which task is meant \(--task\)"):
            constant_gates(model, None)
        return
    gates = constant_gates(model, task)
    assert (gates is not None) == (method in [*CONSTANT, "task"])
    if gates is not None:
        found = tiny.routes(model, **batch, task_ids=torch.full((3,), -1 if task is None else task))
        for layer, route in zip(routed_layers(model), found, strict=True):
            own = gates[layer.site.name]
            torch.testing.assert_close(route.dense(), own.expand(len(route.weight), -1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("router", "constant"),
    [
        ({"name": "flylora", "top_k": 16}, True),
        ({"name": "flylora", "top_k": 15}, False),
        ({"name": "random", "top_k": 4}, True),
        ({"name": "random", "top_k": 3}, False),
        ({"name": "lora_mixer"}, False),
        ({"name": "task"}, False),
    ],
)
def test_choosing_everything_is_no_choice(router: dict[str, Any], constant: bool) -> None:
    model = tiny.adapted("llama", "uniform", router=router).eval()
    if by_task(model):
        return
    gates = constant_gates(model, 0)
    assert (gates is not None) == constant
    if gates is not None:
        for layer, route in zip(routed_layers(model), tiny.routes(model, **tiny.batch()), strict=True):
            assert torch.equal(route.dense(), gates[layer.site.name].expand(len(route.weight), -1))


def test_a_block_with_constant_gates_is_still_no_one_lora() -> None:
    model = tiny.adapted("llama", "mixlora")  # a mean of what experts make of a nonlinear block is not linear in them
    for layer in routed_layers(model):
        layer.router.constant_gates = lambda task: torch.full((4,), 0.25)
    assert constant_gates(model, None) is None


def test_experts_that_have_not_learned_yet_are_exported_too(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "static", noise=0.0)
    export_peft(model, tmp_path / "a")
    export_lora(model, tmp_path / "b")
    assert torch.equal(in_peft(tmp_path / "a" / "expert_2", "llama"), in_peft(tmp_path / "b", "llama"))


def test_a_task_that_is_not_there_is_refused() -> None:
    for method, last in (("lora_mixer_hard", 3), ("task_shared", 2)):
        with pytest.raises(DataError, match=f"task id of -1 to {last}, found 9"):
            constant_gates(tiny.adapted("llama", method), 9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", CONSTANT)
def test_constant_gates_are_one_exact_lora(kind: str, method: str, tmp_path: Path) -> None:
    model = tiny.adapted(kind, method)
    task = 1 if by_task(model) else None
    export = export_lora(model, tmp_path / "out", task)
    checked(export, len(routed_layers(model)))
    torch.testing.assert_close(in_peft(tmp_path / "out", kind), logits(model, kind, task), **CLOSE)
    used = 1 if method in ("single", "lora_mixer_hard") else 4
    assert config_of(tmp_path / "out")["r"] == 4 * used


def test_unlike_experts_are_one_exact_lora_and_missing_ones_add_nothing(tmp_path: Path) -> None:
    folders = [
        peft_folder(tmp_path / "a", r=4, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 7}),
        peft_folder(tmp_path / "b", r=2, target_modules=["q_proj"], seed=1),
    ]
    for absent in ("keep", "redistribute"):
        model = mixture(folders, experts={"absent": absent})
        for layer in routed_layers(model):
            layer.router.theta.data = torch.tensor([0.3, -1.2])
        export_lora(model, tmp_path / absent)
        torch.testing.assert_close(in_peft(tmp_path / absent, "llama"), logits(model, "llama"), **CLOSE)
        ranks = {
            k: v.shape[0] for k, v in load_file(tmp_path / absent / "adapter_model.safetensors").items() if "_A" in k
        }
        assert {name.split(".")[-3]: rank for name, rank in ranks.items()} == {"q_proj": 5, "v_proj": 4, "down_proj": 4}


@pytest.mark.parametrize("experts", ["hydra", "core", "merged"])
def test_shared_factors_need_no_more_than_their_rank(experts: str, tmp_path: Path) -> None:
    router = "uniform" if experts != "core" else {"name": "static", "weights_fn": "free"}
    model = tiny.adapted("llama", "uniform", router=router, experts={"name": experts, "num_experts": 4, "r": 3})
    export_lora(model, tmp_path / "out")
    torch.testing.assert_close(in_peft(tmp_path / "out", "llama"), logits(model, "llama"), **CLOSE)
    assert config_of(tmp_path / "out")["r"] == 3


def test_a_lower_rank_is_the_closest_one_and_its_loss_is_said(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "static")
    export = export_lora(model, tmp_path / "out", rank=5)
    halves = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for layer in routed_layers(model):
        A, B = layer.experts.lora_A.detach().double(), layer.experts.lora_B.detach().double()
        whole = 2.0 / 4 * B @ A
        S = torch.linalg.svdvals(whole)
        lost = float(S[5:].norm() / S.norm())
        path = layer.site.name
        written = (halves[f"base_model.model.{path}.lora_{half}.weight"].double() for half in "BA")
        off = float((next(written) @ next(written) - whole).norm() / whole.norm())
        assert off == pytest.approx(lost, rel=1e-4)
        assert export.figures["truncation"]["relative_error"]["lora"][path] == pytest.approx(lost, rel=1e-6)
        assert export.errors[path] == pytest.approx(lost, rel=0.5)  # on random tokens
    assert config_of(tmp_path / "out")["r"] == 5


@pytest.mark.parametrize("kind", KINDS)
def test_vllm_gets_one_scale_and_one_rank_it_knows(kind: str, tmp_path: Path) -> None:
    model = tiny.adapted(kind, "static")
    export = export_vllm(model, tmp_path / "out")
    checked(export, 5 * len(routed_layers(model)))
    for name, rank in (*((f"expert_{i}", 8) for i in range(4)), ("mixture", 16)):
        found = config_of(tmp_path / "out" / name)
        assert (found["r"], found["lora_alpha"], type(found["lora_alpha"])) == (rank, rank, int)
        assert found["rank_pattern"] == found["alpha_pattern"] == {}
        assert (found["bias"], found["modules_to_save"]) == ("none", None)
        assert not found["use_dora"] and not found["lora_bias"] and not found.get("use_rslora", False)
        halves = load_file(tmp_path / "out" / name / "adapter_model.safetensors")
        assert all(value.shape[0 if "lora_A" in key else 1] == rank for key, value in halves.items())
    assert export.figures["max_lora_rank"] == 16
    torch.testing.assert_close(in_peft(tmp_path / "out" / "mixture", kind), logits(model, kind), **CLOSE)
    for index in range(2):
        expected = logits(only(model, index), kind)
        torch.testing.assert_close(in_peft(tmp_path / "out" / f"expert_{index}", kind), expected, **CLOSE)


def test_half_precision_experts_lose_nothing_by_their_scale(tmp_path: Path) -> None:
    model = mixture([peft_folder(tmp_path / "a", r=3, lora_alpha=2, dtype=torch.bfloat16)])
    assert routed_layers(model)[0].experts.lora_B.dtype == torch.bfloat16
    export = export_vllm(model, tmp_path / "out")
    assert export.worst[1] < 1e-6
    torch.testing.assert_close(in_peft(tmp_path / "out" / "mixture", "llama"), logits(model, "llama"), **CLOSE)
    export_peft(model, tmp_path / "peft")
    halves = load_file(tmp_path / "peft" / "expert_0" / "adapter_model.safetensors")
    assert {value.dtype for value in halves.values()} == {torch.bfloat16}
    export_lora(model, tmp_path / "lora", rank=2)
    assert load_file(tmp_path / "lora" / "adapter_model.safetensors").popitem()[1].dtype == torch.float32


def test_vllm_serves_no_routing_and_that_is_said(tmp_path: Path) -> None:
    export = export_vllm(tiny.adapted("llama", "meteora"), tmp_path / "a")
    assert not (tmp_path / "a" / "mixture").exists()
    assert any("token by token is NOT served" in note for note in export.notes)
    model = tiny.adapted("llama", "task_shared")
    without, one = export_vllm(model, tmp_path / "b"), export_vllm(model, tmp_path / "c", task=1)
    assert any("--task NAME adds one" in note for note in without.notes) and not (tmp_path / "b" / "mixture").exists()
    assert len(one.errors) > len(without.errors)
    torch.testing.assert_close(in_peft(tmp_path / "c" / "mixture", "llama"), logits(model, "llama", 1), **CLOSE)


def test_what_vllm_cannot_load_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"modules_to_save \(classifier\).*--to merged"):
        export_vllm(tiny.adapted("bert", "static", modules_to_save=["classifier"]), tmp_path / "out")
    dora = mixture([peft_folder(tmp_path / "dora", use_dora=True)])
    for export in (export_vllm, export_lora):
        with pytest.raises(ConfigError, match=r"'model.layers.0.self_attn.q_proj' have DoRA.*--to peft.*--to merged"):
            export(dora, tmp_path / "out")
    with pytest.raises(ConfigError, match="have a bias"):
        export_vllm(mixture([peft_folder(tmp_path / "bias", "gpt2", lora_bias=True)], "gpt2"), tmp_path / "out")
    wide = tiny.adapted("llama", "uniform", experts={"num_experts": 17, "r": 32})
    with pytest.raises(ConfigError, match=r"mixture has rank 544, and vLLM takes 512 at most; --rank 512"):
        export_vllm(wide, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_vllm(wide, tmp_path / "out", rank=VLLM_RANKS[-1])
    assert config_of(tmp_path / "out" / "mixture")["r"] == 32  # no layer is wider
    torch.testing.assert_close(in_peft(tmp_path / "out" / "mixture", "llama"), logits(wide, "llama"), **CLOSE)


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path: Path, monkeypatch: Any) -> None:
    model = tiny.adapted("llama", "static")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "taken")
    for name, message in (("taken", r"not empty \(a\)"), ("file", "not a folder"), ("link", "not a folder")):
        for export in (export_peft, export_lora, export_vllm):
            with pytest.raises(OutputError, match=message):
                export(model, tmp_path / name)
    with pytest.raises(OutputError, match="not empty"):  # at once, not after a long fit
        export_lora(tiny.adapted("llama", "softmax"), tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["a"]
    (tmp_path / "empty").mkdir()
    export_lora(model, tmp_path / "empty")
    saved, calls = writing.save_file, []

    def full(*given: Any, **more: Any) -> None:
        calls.append(given)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        saved(*given, **more)

    monkeypatch.setattr(writing, "save_file", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match="No space left"):
        export_peft(model, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "static", experts={"num_experts": 4, "r": 4, "lora_dropout": 0.5})
    model.eval()
    model.model.layers[0].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    export_peft(model, tmp_path / "a")
    export_lora(model, tmp_path / "b")
    export_vllm(model, tmp_path / "c")
    tiny.assert_same(dict(model.state_dict()), before)
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("export", [export_peft, export_lora, export_vllm])
def test_experts_that_do_more_than_their_factors_say_are_noticed(export: Any, tmp_path: Path) -> None:
    model = tiny.adapted("llama", "static")
    for layer in routed_layers(model):

        def more(x: Any, decide: Any, own: Any = layer.experts.forward, onto: Any = None, **known: Any) -> Any:
            return (0 if onto is None else onto) + 1.001 * own(x, decide, **known)

        layer.experts.forward = more
    with pytest.raises(AdapterError, match=r"_proj: what was written is 0\.000999 off the model"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_gates_that_are_not_what_the_router_does_are_noticed(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "static")
    routed_layers(model)[1].router.constant_gates = lambda task: torch.full((4,), 0.3)
    with pytest.raises(AdapterError, match=r"v_proj: what was written is 0\.2 off"):
        export_lora(model, tmp_path / "out")


def test_an_expert_that_adds_nothing_anywhere_is_refused(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "static")
    for layer in routed_layers(model):
        layer.experts.lora_A.data[:4], layer.experts.lora_B.data[:, :4] = 0, 0
    with pytest.raises(AdapterError, match="expert_0: nothing is added to any layer"):
        export_peft(model, tmp_path / "out")


def test_a_needless_task_is_said(tmp_path: Path) -> None:
    assert any(
        "--task made no difference" in n for n in export_lora(tiny.adapted("llama", "static"), tmp_path / "a", 1).notes
    )
