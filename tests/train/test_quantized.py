"""A base model in 4 or 8 bits: trained under plain PyTorch, DDP and ZeRO-2, saved, loaded, planned, exported."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import moelora
from moelora.core.errors import AdapterError, ConfigError, TargetError
from moelora.model.adapt import adapt, fingerprint, parameter_counts
from moelora.model.base import base_source
from moelora.model.quantised import Quantization, form, shape_of
from moelora.model.record import adaptation, routed_layers
from moelora.model.sources import dense_weight
from moelora.recipe import Recipe, read_recipe
from moelora.train.activations import kept, loss_buffer
from moelora.train.dry_run import plan
from moelora.train.export import export_folder
from moelora.train.memory import held
from moelora.train.run import Result, load_base, train
from moelora.train.use import Chat, evaluate_folder
from tests.train.test_dry_run import SMALL, folder_of, memory_of, parts, trainer_of
from tests.train.test_dry_run import recipe as planned
from tests.train.test_world import adapter, losses, same
from tests.train.world import run

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.timeout(600)

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FORMS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4, scales in float32": {**NF4, "bnb_4bit_use_double_quant": False},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}
FAST = [
    "data.builtin=false",
    "data.tasks={reverse: {path: builtin/reverse, metric: exact_match}, count: {path: builtin/count}}",
    "data.max_rows=200", "data.max_eval_rows=4", "training.per_device_train_batch_size=16", "training.use_cpu=true",
    "training.disable_tqdm=true", "adapter.target_modules=[q_proj, v_proj, down_proj]", "training.logging_steps=1",
    "training.report_to=none", "training.gradient_checkpointing=false",
]  # fmt: skip


def given(out: Path, how: dict[str, Any] | None, *more: str, name: str = "smora") -> Recipe:
    return read_recipe(name, [*FAST, f"quantization_config={json.dumps(how)}", f"training.output_dir={out}", *more])


def base(how: dict[str, Any] | None = NF4, source: str = "moelora/tiny", dtype: str = "float32") -> Any:
    more = {} if how is None else {"quantization_config": BitsAndBytesConfig(**how)}
    return AutoModelForCausalLM.from_pretrained(base_source(source), dtype=dtype, **more)


def bytes_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The quantised weights, by name in the base model."""
    found = ((name.replace("base_layer.", ""), p) for name, p in model.named_parameters())
    return {name: p.detach().clone() for name, p in found if form(p) is not None}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run with evaluations, which must leave the base as it was, between its steps."""
    out = tmp_path_factory.mktemp("run") / "nf4"
    return train(given(out, NF4, "training.max_steps=24", "training.eval_strategy=steps", "training.eval_steps=8"))


def test_its_keys_are_those_of_transformers_with_the_same_defaults() -> None:
    theirs = inspect.signature(BitsAndBytesConfig.__init__).parameters
    assert set(Quantization.model_fields) == set(theirs) - {"self", "kwargs"}
    one = Quantization(load_in_4bit=True).for_transformers()
    assert one.to_dict() == BitsAndBytesConfig(load_in_4bit=True).to_dict()


def test_without_bitsandbytes_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    for what in (load_base, plan):
        with pytest.raises(ConfigError, match=r"^quantization_config: bitsandbytes is not .*'moelora\[quant\]'"):
            what(given(tmp_path / "out", NF4))
    load_base(given(tmp_path / "out", None))


def test_a_run_trains_experts_in_float32_beside_a_base_that_stays(result: Result) -> None:
    history = losses(result.out)
    assert sum(history[-4:]) < 0.3 * sum(history[:4])
    assert result.summary["tasks"]["reverse"]["loss"] < 2 and result.summary["tasks"]["reverse"]["accuracy"] is not None
    trained = [p for p in result.model.parameters() if p.requires_grad]
    assert trained and {p.dtype for p in trained} == {torch.float32}
    fresh, now = bytes_of(base()), bytes_of(result.model)
    assert len(now) == 28 and [name for name, value in fresh.items() if not torch.equal(now[name], value)] == []
    assert parameter_counts(result.model)[1] == result.summary["total_parameters"]
    assert (
        result.summary["total_parameters"] - result.summary["trainable_parameters"] == parameter_counts(base(None))[1]
    )
    for layer in routed_layers(result.model):
        assert layer.base_layer.weight.shape[1] == 1, "packed"
        assert (layer.in_features, layer.out_features) == shape_of(layer.base_layer.weight)[::-1]


def test_the_folder_loads_onto_a_quantised_base_and_generates_the_same(result: Result, tmp_path: Path) -> None:
    batch = result.tokenizer("<|user|>reverse: 1 2 3<|end|><|assistant|>", return_tensors="pt")
    result.model.eval()
    model = moelora.load(base(), result.out).eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, result.model(**batch).logits)
    found, expected = (one.generate(**batch, max_new_tokens=8, do_sample=False) for one in (model, result.model))
    assert torch.equal(found, expected)
    chat = Chat(result.out, max_new_tokens=8)
    assert form(chat.model.get_submodule("model.layers.0.mlp.up_proj").weight) == "nf4"
    assert chat.answer("reverse: 1 2 3")
    again = evaluate_folder(result.out)["tasks"]["reverse"]["loss"]
    assert again == pytest.approx(result.summary["tasks"]["reverse"]["loss"], rel=1e-5)


def test_8_bit_trains_too(tmp_path: Path) -> None:
    done = train(given(tmp_path / "out", FORMS["int8"], "training.max_steps=8", "data.max_eval_rows=1"))
    history = losses(done.out)
    assert history[-1] < 0.8 * history[0]
    assert {p.dtype for p in done.model.parameters() if p.requires_grad} == {torch.float32}
    model = moelora.load(base(FORMS["int8"]), done.out).eval()
    batch = {"input_ids": torch.arange(2, 14).view(2, 6)}
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, done.model.eval()(**batch).logits)


def test_evaluating_leaves_4_bit_layers_as_they_are() -> None:
    """Some CPUs have another layout for evaluation only, which rounds, and lets no gradient pass afterwards."""
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 1}))
    for name in ("q_proj", "v_proj", "o_proj"):
        made = bitsandbytes.nn.Linear4bit(
            256, 256 if name != "v_proj" else 128, bias=False, compute_dtype=torch.float32
        )
        setattr(model.model.layers[0].self_attn, name, made.to("cpu"))
    before = bytes_of(model)
    model = adapt(
        model, {"router": "single", "experts": {"r": 2}, "target_modules": ["q_proj", "v_proj"]}, verbose=False
    )
    ids = torch.arange(2, 34).view(2, 16)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(model.train()(inputs_embeds=embedded, labels=ids).loss, embedded)[0]

    first = gradient()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    assert torch.equal(gradient(), first)
    assert all(torch.equal(value, before[name]) for name, value in bytes_of(model).items())


def test_an_unmodified_trainer_trains_it(tmp_path: Path) -> None:
    config = {"router": "smora", "experts": {"r": 8}, "target_modules": ["q_proj", "v_proj"]}
    model = adapt(base(), config, verbose=False)
    rows = [{"input_ids": list(range(2, 18)), "labels": list(range(2, 18))}] * 16
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1,
        learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    history = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert history[-1] < history[0] - 0.5


# Which base it was


SITES = [f"model.layers.{i}.self_attn.{name}" for i in range(4) for name in ("q_proj", "v_proj")]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with other embeddings."""
    model = base(None)
    model.get_input_embeddings().weight.data.mul_(1.5)
    folder = tmp_path_factory.mktemp("other")
    model.save_pretrained(folder)
    return str(folder)


def test_the_fingerprint_of_a_quantised_base_says_how_it_is_kept_and_of_which_model_it_is(other: str) -> None:
    marks = {name: fingerprint(base(how), SITES) for name, how in FORMS.items()}
    assert {name: str(mark).partition(":")[0] for name, mark in marks.items()} == {
        "nf4": "nf4", "nf4, scales in float32": "nf4", "fp4": "fp4", "int8": "int8"
    }  # fmt: skip
    assert marks["nf4"] == marks["nf4, scales in float32"] == fingerprint(base(NF4, dtype="bfloat16"), SITES)
    assert marks["nf4"] != fingerprint(base(NF4, other), SITES)
    plain = fingerprint(base(None), SITES)
    assert plain is not None and ":" not in plain


def test_another_quantised_base_is_refused_and_an_unquantised_one_warned_of(result: Result, other: str) -> None:
    with pytest.raises(AdapterError, match=r"made for the weights of 'moelora/tiny' \(fingerprint nf4:.*force=True"):
        moelora.load(base(NF4, other), result.out)
    with pytest.warns(
        UserWarning, match=r"beside 'moelora/tiny' with nf4 weights, .* are unquantised: the experts add"
    ):
        model = moelora.load(base(None), result.out)
    for name, layer in {layer.site.name: layer for layer in routed_layers(result.model)}.items():
        assert torch.equal(model.get_submodule(name).experts.lora_B, layer.experts.lora_B)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moelora.load(base(None), result.out, force=True)


def test_experts_from_an_unquantised_base_go_beside_a_quantised_one(tmp_path: Path) -> None:
    config = {"router": "uniform", "experts": {"num_experts": 2, "r": 4}, "target_modules": ["q_proj", "v_proj"]}
    moelora.save(adapt(base(None), config, verbose=False), tmp_path / "made")
    started = {**config, "experts": {**config["experts"], "adapters": [str(tmp_path / "made")]}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapt(base(), started, verbose=False)
    assert str(adaptation(model).fingerprint).startswith("nf4:")


def test_the_weights_of_a_quantised_layer_can_be_read() -> None:
    model = adapt(base(), {"router": "single", "target_modules": ["down_proj"]}, verbose=False)
    layer: Any = model.get_submodule("model.layers.0.mlp.down_proj").base_layer
    exact = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(dense_weight(layer), exact, rtol=1e-6, atol=1e-7)


def test_a_quantised_module_cannot_be_trained_in_full(tmp_path: Path) -> None:
    config = {"router": "single", "modules_to_save": ["o_proj"], "target_modules": ["q_proj"]}
    with pytest.raises(
        TargetError, match=r"modules_to_save: 'model.layers.0.*o_proj' is quantised \(nf4\).*skip_modules"
    ):
        adapt(base(), config)
    model = adapt(base({**NF4, "llm_int8_skip_modules": ["o_proj", "lm_head"]}), config, verbose=False)
    assert model.get_submodule("model.layers.0.self_attn.o_proj").trained.weight.requires_grad


# Planned


@pytest.mark.parametrize("how", list(FORMS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dry_run_knows_the_bytes_of_a_quantised_base(how: str, dtype: str, tmp_path: Path) -> None:
    asked = planned(tmp_path, dtype=dtype).model_copy(update={"quantization_config": Quantization(**FORMS[how])})
    found = plan(asked)
    model, _ = load_base(asked)
    adapt(model, asked.adapter, verbose=False)
    for part in ("base", "experts", "router"):
        assert parts(found)[part]["gpu"] == sum(one.numel * one.itemsize for one in held(model) if one.part == part)
    everything = [*model.parameters(), *model.buffers()]
    beside = 0  # what bitsandbytes says it keeps for every layer
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            state = layer.weight.quant_state
            own = [state.absmax, state.code]
            own += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            beside += sum(value.numel() * value.itemsize for value in own)
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            beside += 4 * layer.out_features
    assert sum(parts(found)[part]["gpu"] for part in ("base", "experts", "router")) == beside + sum(
        value.numel() * value.itemsize for value in everything
    )
    assert (found["parameters"]["trainable"], found["parameters"]["total"]) == parameter_counts(model)
    assert parts(found)["base"]["dtype"].startswith("8 bit" if how == "int8" else "4 bit")
    assert [why.partition(":")[0] for why in found["memory"]["missing"]] == ["activations"] * (how == "int8")


def test_engines_cast_what_is_not_quantised(tmp_path: Path) -> None:
    asked = planned(tmp_path, dtype="float32", deepspeed="zero2", bf16=True)
    asked = asked.model_copy(update={"quantization_config": Quantization(**NF4)})
    model, _ = load_base(asked)
    packed = sum(value.numel() for value in bytes_of(model).values())
    plain = sum(p.numel() for p in model.parameters() if form(p) is None)
    fixed = sum(one.numel * one.itemsize for one in held(model) if one.buffer)
    assert parts(plan(asked, (), 2))["base"]["gpu"] == packed + 2 * plain + fixed


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all", "checkpointed"])
def test_activations_beside_a_quantised_base(checkpointing: bool, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "base", LlamaConfig(**SMALL))
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(source)
    asked = planned(tmp_path, "smora", base_model=source).model_copy(
        update={"quantization_config": Quantization(**NF4)}
    )
    trainer = trainer_of(asked)
    model: Any = trainer.model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = next(iter(trainer.get_train_dataloader()))

    def forward() -> torch.Tensor:
        return trainer.compute_loss(model, dict(batch))

    forward().backward()
    model.zero_grad()
    gc.collect()
    there, peak, loss = memory_of(forward)
    _, more, _ = memory_of(loss.backward)
    rows, length = batch["input_ids"].shape
    predicted = kept(model, rows * length, length)
    assert not isinstance(predicted, str)
    assert predicted.forward(checkpointing) == pytest.approx(there, rel=0.2)
    gradients = sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad)
    dense = parts(plan(asked))["dequantised weight"]["gpu"]
    total = predicted.most(checkpointing) + loss_buffer(model, rows * length) + gradients + dense
    assert total == pytest.approx(max(peak, there + more), rel=0.2)


# Exported


def test_merging_asks_for_dequantising_and_then_is_what_was_trained(tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ("training.max_steps=3", "data.max_eval_rows=1", "training.learning_rate=1e-2")
    trained = train(given(out, NF4, *more, name="uniform")).model.eval()
    with pytest.raises(ConfigError, match=r"is quantised \(bitsandbytes\).*--dequantize merges"):
        export_folder(out, tmp_path / "merged", "merged")
    export_folder(out, tmp_path / "merged", "merged", dequantize=True)
    merged = base(None, str(tmp_path / "merged"))
    assert getattr(merged.config, "quantization_config", None) is None and type(merged) is LlamaForCausalLM
    ids = torch.arange(2, 34).view(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained(ids).logits, rtol=1e-3, atol=2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_folder(out, tmp_path / "lora", "lora")


# Many processes


ENGINES = ("one", "ddp", "zero2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On every engine: a whole run, half of it, and the rest."""
    folder = tmp_path_factory.mktemp("quantised")
    always = [f"quantization_config={json.dumps(NF4)}", "training.lr_scheduler_type=constant"]
    saved = ["training.save_strategy=steps", "training.save_steps=3"]
    for engine in ENGINES:
        whole, part = (str(folder / engine / name) for name in ("whole", "part"))
        cases = [
            {"out": whole, "overrides": [*always, "training.max_steps=6", *saved]},
            {"out": part, "overrides": [*always, "training.max_steps=3", *saved]},
            {"out": part, "overrides": [*always, "training.max_steps=6"], "resume": True},
        ]
        run(engine, [{"recipe": "lora_mixer", **case} for case in cases], folder)
    return folder


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_every_engine_trains_the_same_experts_beside_a_4_bit_base(world: Path, engine: str) -> None:
    same(world / engine / "whole", world / "one" / "whole")
    manifests = [json.loads((world / name / "whole" / "moelora.json").read_text()) for name in ("one", engine)]
    assert manifests[0]["base"] == manifests[1]["base"] and manifests[0]["base"]["fingerprint"].startswith("nf4:")
    ranks = [json.loads((world / engine / "whole" / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["hash"] == ranks[1]["hash"]


@pytest.mark.parametrize("engine", ENGINES)
def test_half_a_run_and_the_rest_are_the_whole_run_bit_for_bit(world: Path, engine: str) -> None:
    whole, part = world / engine / "whole", world / engine / "part"
    assert losses(part) == losses(whole)
    expected, found = adapter(whole), adapter(part)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
