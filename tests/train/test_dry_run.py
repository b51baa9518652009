"""The plan of a run against the run: the same numbers, found without weights."""

from __future__ import annotations

import gc
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from moelora.cli.show import plan_table
from moelora.core.errors import AdapterError, ConfigError
from moelora.data.load import load_tasks
from moelora.data.mixture import mix
from moelora.data.prompts import as_trl, uses_chat
from moelora.io.peft import PeftAdapter
from moelora.model.adapt import adapt, parameter_counts
from moelora.model.base import base_source
from moelora.model.record import routed_layers
from moelora.recipe import Recipe, check_recipe
from moelora.train.activations import kept, loss_buffer
from moelora.train.dry_run import plan
from moelora.train.memory import held
from moelora.train.run import build_trainer, load_base, sft_config
from moelora.train.trainer import MoeLoraTrainer
from tests.adapters import peft_folder

ROUTERS: dict[str, dict[str, Any]] = {
    "smora": {"experts": {"num_experts": 1, "r": 16}, "router": {"name": "smora", "top_k": 8}},
    "meteora": {
        "experts": {"num_experts": 8, "r": 4},
        "router": {"name": "meteora", "top_k": 2},
        "losses": {"supervised_gate": 0.1},
    },
    "xlora": {
        "experts": {"num_experts": 8, "r": 4},
        "router": {"name": "xlora", "xlora_depth": 2, "xlora_size": 64, "layerwise_scalings": True},
    },
}
LLAMA_8B = {
    **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "dtype": "bfloat16"},
}
SMALL = {
    **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3, "pad_token_id": 0},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512, "eos_token_id": 1},
}


def recipe(tmp_path: Path, router: str = "meteora", adapter: dict[str, Any] | None = None, **more: Any) -> Recipe:
    """A fast one on two built-in tasks; ``more``: training arguments, and base_model, dtype, deepspeed."""
    top = {key: more.pop(key) for key in ("base_model", "dtype", "deepspeed") if key in more}
    training = {
        "output_dir": str(tmp_path / "out"), "report_to": "none", "use_cpu": True, "max_length": 128,
        "per_device_train_batch_size": 8, "gradient_checkpointing": False, "disable_tqdm": True, **more,
    }  # fmt: skip
    tasks = {"reverse": {"path": "builtin/reverse"}, "count": {"path": "builtin/count", "weight": 2}}
    data = {"tasks": tasks, "max_rows": 60, "max_eval_rows": 4}
    return check_recipe({"adapter": adapter or ROUTERS[router], "data": data, "training": training, **top})


def folder_of(path: Path, config: Any) -> str:
    """A folder with a configuration and the tiny model's tokenizer, and no weights."""
    shutil.copytree(base_source("moelora/tiny"), path, ignore=shutil.ignore_patterns("*.safetensors"))
    config.save_pretrained(path)
    return str(path)


def trainer_of(given: Recipe) -> MoeLoraTrainer:
    arguments = sft_config(given)
    tasks = load_tasks(given.data)
    model, tokenizer = load_base(given)
    chat = uses_chat(tokenizer, given.data.chat_template)
    adapt(model, given.adapter, verbose=False)
    rows = as_trl(mix(tasks, given.data.temperature, arguments.seed), chat)
    return build_trainer(given, model, tokenizer, tasks, rows, None)


def parts(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {part["part"]: part for part in found["memory"]["parts"]}


@pytest.mark.parametrize("router", [*ROUTERS, "comol"])
def test_parameters_are_those_of_the_adapted_model(router: str, tmp_path: Path) -> None:
    comol = {"experts": {"name": "core", "num_experts": 4, "r": 8}, "router": "comol", "modules_to_save": ["norm"]}
    given = recipe(tmp_path, adapter=ROUTERS.get(router, comol))
    found = plan(given)
    model, _ = load_base(given)
    adapt(model, given.adapter, verbose=False)
    count = found["parameters"]
    assert (count["trainable"], count["total"]) == parameter_counts(model)
    assert count["experts"] == sum(p.numel() for layer in routed_layers(model) for p in layer.experts.parameters())
    routers = {id(p): p.numel() for layer in routed_layers(model) for p in layer.router.parameters()}
    assert count["router"] == sum(routers.values())
    assert sum(count.get(part, 0) for part in ("base", "experts", "router", "modules_to_save")) == count["total"]
    assert ("modules_to_save" in count) == (router == "comol")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_a_plain_run_is_that_of_its_tensors(dtype: str, tmp_path: Path) -> None:
    given = recipe(tmp_path, dtype=dtype)
    found = parts(plan(given))
    model, _ = load_base(given)
    adapt(model, given.adapter, verbose=False)
    for part in ("base", "experts", "router"):
        real = sum(one.numel * one.itemsize for one in held(model) if one.part == part)
        assert found[part]["gpu"] == real
    everything = [*model.parameters(), *model.buffers()]
    assert sum(found[part]["gpu"] for part in ("base", "experts", "router")) == sum(
        tensor.numel() * tensor.itemsize for tensor in everything
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert found["optimiser states"]["gpu"] == sum(value.numel() * value.itemsize for value in states)
    assert found["gradients"]["gpu"] == sum(p.grad.numel() * p.grad.itemsize for p in trained if p.grad is not None)


def test_zero_divides_what_it_divides(tmp_path: Path) -> None:
    plain = parts(plan(recipe(tmp_path)))
    trained, n = plan(recipe(tmp_path))["parameters"]["trainable"], 4
    found = {stage: parts(plan(recipe(tmp_path, deepspeed=f"zero{stage}", bf16=True), (), n)) for stage in (1, 2, 3)}
    near = {"rel": 2e-3}  # every tensor is rounded up
    for stage in (1, 2, 3):
        assert found[stage]["optimiser states"]["gpu"] == pytest.approx(8 * trained / n, **near)
        assert found[stage]["float32 copies"]["gpu"] == pytest.approx(4 * trained / n, **near)
        assert found[stage]["gradients"]["gpu"] == pytest.approx(2 * trained / (n if stage > 1 else 1), **near)
    for stage in (1, 2):
        for part in ("base", "experts"):
            assert found[stage][part]["gpu"] == pytest.approx(plain[part]["gpu"] / 2, rel=0.02)  # buffers stay float32
        assert "gathered parameters" not in found[stage]
    # the 9 norms of 160 are below the threshold of 10 * 160 elements: whole, beside the part
    assert found[3]["base"]["gpu"] == pytest.approx(plain["base"]["gpu"] / 2 / n + 2 * 9 * 160, rel=1e-3)
    assert found[3]["experts"]["gpu"] == pytest.approx(plain["experts"]["gpu"] / 2 / n, rel=0.1)
    assert found[3]["gathered parameters"]["gpu"] <= 2 * (plan(recipe(tmp_path))["parameters"]["total"] - 9 * 160)


def test_offloading_moves_to_the_host(tmp_path: Path) -> None:
    there = plan(recipe(tmp_path, deepspeed="zero3", bf16=True), (), 2)
    moved = plan(recipe(tmp_path, deepspeed="zero3_offload", bf16=True), (), 2)
    for part in ("gradients", "optimiser states", "float32 copies"):
        assert parts(moved)[part]["gpu"] == 0
        assert parts(moved)[part]["host"] == parts(there)[part]["gpu"] > 0
    assert there["memory"]["host"] == 0
    assert there["memory"]["gpu"] - moved["memory"]["gpu"] == moved["memory"]["host"]


def test_float32_needs_no_copies_under_zero_3_alone(tmp_path: Path) -> None:
    found = {stage: parts(plan(recipe(tmp_path, deepspeed=f"zero{stage}"), (), 2)) for stage in (2, 3)}
    assert found[2]["float32 copies"]["gpu"] > 0
    assert found[3]["float32 copies"]["gpu"] == 0


def test_ddp_holds_gradients_twice(tmp_path: Path) -> None:
    one, two = (parts(plan(recipe(tmp_path), (), n)) for n in (1, 2))
    assert two["gradients"]["gpu"] == 2 * one["gradients"]["gpu"]
    assert two["optimiser states"] == one["optimiser states"]


@pytest.mark.parametrize(
    "training",
    [
        {"num_train_epochs": 2},
        {"num_train_epochs": 1.5, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 7},
        {"max_steps": 5, "packing": True, "max_length": 64, "per_device_train_batch_size": 2},
        {"max_length": 20, "dataloader_drop_last": True},
    ],
    ids=["epochs", "accumulation", "packing", "cut"],
)
def test_batches_and_steps_are_the_trainers(training: dict[str, Any], tmp_path: Path) -> None:
    given = recipe(tmp_path, **training)
    found = plan(given)
    run = trainer_of(given)
    rows = run.train_dataset
    assert found["epoch"]["sequences"] == len(rows)
    assert found["epoch"]["tokens"] == sum(map(len, rows["input_ids"]))
    assert found["batch"]["longest_row"] == max(map(len, rows["input_ids"]))
    for index, task in enumerate(found["tasks"].values()):
        assert task["tokens"] == sum(ids.count(index) for ids in rows["task_ids"])
    real = run.set_initial_training_values(run.args, run.get_train_dataloader())
    assert (found["epoch"]["steps"], found["steps"]) == (real[1], real[-1])
    assert found["batch"]["global"] == run.get_total_train_batch_size(run.args)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes_share_batches_as_accelerate_does(processes: int, last: bool, tmp_path: Path) -> None:
    found = plan(recipe(tmp_path, dataloader_drop_last=last), (), processes)
    batches = BatchSampler(SequentialSampler(range(found["epoch"]["sequences"])), 8, last)
    assert found["epoch"]["steps"] == max(1, len(BatchSamplerShard(batches, processes, 0)))
    assert found["batch"]["global"] == 8 * processes


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tiny model, and one of other proportions with fewer heads of keys than of queries."""
    folder = tmp_path_factory.mktemp("small") / "base"
    config = LlamaConfig(**SMALL)
    path = folder_of(folder, config)
    LlamaForCausalLM(config).save_pretrained(path)
    return {"tiny": "moelora/tiny", "small": path}


def memory_of(step: Callable[[], Any]) -> tuple[int, int, Any]:
    """(bytes still there after ``step()``, most at once, what it gave), by the allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        given = step()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    return level, most, given


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all", "checkpointed"])
@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.parametrize("base", ["tiny", "small"])
def test_activations_are_those_of_a_training_step(
    base: str, router: str, checkpointing: bool, bases: dict[str, str], tmp_path: Path
) -> None:
    run = trainer_of(recipe(tmp_path, router, base_model=bases[base]))
    model: Any = run.model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = next(iter(run.get_train_dataloader()))

    def forward() -> torch.Tensor:
        return run.compute_loss(model, dict(batch))

    forward().backward()  # what is made once and kept does not count
    model.zero_grad()
    gc.collect()
    there, peak, loss = memory_of(forward)
    _, more, _ = memory_of(loss.backward)
    rows, length = batch["input_ids"].shape
    predicted = kept(model, rows * length, length)
    assert not isinstance(predicted, str)
    assert predicted.forward(checkpointing) == pytest.approx(there, rel=0.2)
    gradients = sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad)
    total = predicted.most(checkpointing) + loss_buffer(model, rows * length) + gradients
    assert total == pytest.approx(max(peak, there + more), rel=0.2)


@pytest.mark.parametrize("router", ["smora", "meteora"])
def test_a_block_is_there_again_when_it_is_recomputed(router: str, bases: dict[str, str], tmp_path: Path) -> None:
    # without the loss, whose tile is larger than everything else in a small model
    model: Any = trainer_of(recipe(tmp_path, router, base_model=bases["small"])).model.train()
    for layer in routed_layers(model):
        layer.losses = {}
    model.moelora.losses.clear()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(2, 500, (8, 64))

    def forward() -> torch.Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.sum()

    forward().backward()
    model.zero_grad()
    gc.collect()
    there, _, loss = memory_of(forward)
    _, more, _ = memory_of(loss.backward)
    predicted = kept(model, ids.numel(), 64)
    assert not isinstance(predicted, str)
    assert predicted.most(True) == pytest.approx(there + more, rel=0.2)


@pytest.mark.parametrize(("dtype", "cast"), [("float32", True), ("bfloat16", True), ("bfloat16", False)])
def test_activations_in_half_precision(dtype: str, cast: bool, bases: dict[str, str], tmp_path: Path) -> None:
    run = trainer_of(recipe(tmp_path, base_model=bases["small"], dtype=dtype))
    model: Any = run.model.train()
    batch = next(iter(run.get_train_dataloader()))

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return run.compute_loss(model, dict(batch))

    forward().backward()
    model.zero_grad()
    gc.collect()
    there, _, _loss = memory_of(forward)
    rows, length = batch["input_ids"].shape
    predicted = kept(model, rows * length, length, half=True, cast=cast)
    assert not isinstance(predicted, str)
    assert predicted.forward(False) == pytest.approx(there, rel=0.2)


def test_activations_of_models_that_do_not_state_their_shape_are_not_predicted(tmp_path: Path) -> None:
    shape = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    given = recipe(tmp_path, base_model=folder_of(tmp_path / "gpt2", GPT2Config(**shape)))
    found = plan(given)
    assert found["memory"]["missing"] == ["activations: the model's config states no intermediate_size"]
    assert "activations" not in parts(found)
    eager = plan(recipe(tmp_path).model_copy(update={"attn_implementation": "eager"}))
    assert eager["memory"]["missing"] == ["activations: eager attention keeps all its scores"]


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"init": {"name": "eva"}}, ["probing: what looks at batches before training"]),
        ({"targets": {"name": "flexora"}}, ["probing: what looks", "layers: targets flexora chooses some by data"]),
        ({"targets": {"name": "flexora", "blocks": [0]}}, []),
        ({"losses": {"ba_lora": {"weight": 1.0}}}, ["loss: an auxiliary one reads all logits"]),
    ],
)
def test_what_methods_take_besides_is_said_to_be_left_out(adapter: Any, said: list[str], tmp_path: Path) -> None:
    given = recipe(tmp_path)
    given = given.model_copy(update={"adapter": given.adapter.model_copy(update=adapter)})
    found = plan(given)["memory"]["missing"]
    assert len(found) == len(said) and all(line.startswith(start) for line, start in zip(found, said, strict=True))


def test_an_optimiser_whose_states_are_not_known_is_not_guessed(tmp_path: Path) -> None:
    found = plan(recipe(tmp_path, optim="adafactor"))
    assert any(line.startswith("optimiser states: those of adafactor") for line in found["memory"]["missing"])
    assert "optimiser states" not in parts(found)
    plain, small = (parts(plan(recipe(tmp_path, optim=name))) for name in ("adamw_torch", "adamw_bnb_8bit"))
    assert 4 * small["optimiser states"]["gpu"] == plain["optimiser states"]["gpu"]


def test_a_model_of_8b_parameters_is_planned_without_its_weights(tmp_path: Path) -> None:
    given = recipe(
        tmp_path,
        adapter={"experts": {"num_experts": 64, "r": 8}, "router": {"name": "meteora"}},
        base_model=folder_of(tmp_path / "llama", LlamaConfig(**LLAMA_8B)),
        deepspeed="zero3",
        bf16=True,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = plan(given, (), 8)
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 500e6
    assert found["parameters"]["base"] == 8_030_261_248
    assert parts(found)["base"]["gpu"] == pytest.approx(2 * 8_030_261_248 / 8, rel=1e-3)
    assert parts(found)["gathered parameters"]["gpu"] == 2_000_000_000
    json.dumps(found)


def test_of_adapters_only_the_headers_are_read(
    monkeypatch: pytest.MonkeyPatch, bases: dict[str, str], tmp_path: Path
) -> None:
    tiny = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    base = folder_of(tmp_path / "base", LlamaConfig(**tiny, **heads))
    folders = [str(peft_folder(tmp_path / str(i), seed=i, dtype=torch.bfloat16)) for i in range(2)]
    experts = {"num_experts": 2, "r": 4, "train": "none", "adapters": folders}
    adapter = {"experts": experts, "router": "meteora", "target_modules": ["q_proj", "v_proj", "down_proj"]}
    monkeypatch.setattr(PeftAdapter, "read", lambda *_: pytest.fail("a tensor was read"))
    found = plan(recipe(tmp_path, adapter=adapter, base_model=base))
    assert found["parameters"]["trainable"] == found["parameters"]["router"] > 0
    scales = 4 * 2 * 4 * 6  # one number per rank, expert and layer
    assert parts(found)["experts"]["gpu"] == 2 * found["parameters"]["experts"] + scales
    with pytest.raises(AdapterError, match="features"):
        plan(recipe(tmp_path, adapter=adapter, base_model=bases["small"]))


def test_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    plan(recipe(tmp_path, packing=True, max_length=64))
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_what_cannot_be_planned_is_said_as_in_training(tmp_path: Path) -> None:
    given = recipe(tmp_path, base_model="nobody/nothing")
    with pytest.raises(ConfigError) as trained:
        load_base(given)
    with pytest.raises(ConfigError) as planned:
        plan(given)
    assert str(planned.value) == str(trained.value)
    path = tmp_path / "zero0.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    with pytest.raises(ConfigError, match="stage is 0; expected 1, 2 or 3"):
        plan(recipe(tmp_path, deepspeed=str(path)))
    with pytest.raises(ConfigError, match="num-processes"):
        plan(recipe(tmp_path), (), 0)
    with pytest.raises(ConfigError, match="no row has an answer"):
        plan(recipe(tmp_path, max_length=4))


def test_the_table_says_it_all(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan_table(plan(recipe(tmp_path, deepspeed="zero3_offload", optim="adafactor", packing=True, max_length=64), (), 4))
    said = capsys.readouterr().out
    for words in ("trainable", "gathered parameters", "activations", "host", "reverse", "4 processes = 32 rows"):
        assert words in said
    assert "not predicted, and not in the sum: optimiser states" in said
