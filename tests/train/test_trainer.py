"""The trainer: task ids, packing, auxiliary losses under accumulation, evaluation per task, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from torch.nn import functional as F
from trl import SFTConfig

import moelora
from moelora.core.errors import DataError
from moelora.core.tape import View
from moelora.data.config import DataConfig, TaskConfig
from moelora.data.load import load_tasks
from moelora.data.prompts import as_trl
from moelora.model.record import routed_layers
from moelora.model.routed import collect
from moelora.recipe import Recipe
from moelora.train.run import load_base
from moelora.train.trainer import MoeLoraTrainer

TASKS = {"reverse": TaskConfig(path="builtin/reverse"), "count": TaskConfig(path="builtin/count")}
METEORA = {
    "experts": {"num_experts": 2, "r": 2},
    "router": {"name": "meteora", "top_k": 1},
    "losses": {"supervised_gate": 0.5, "balance": 0.1},
    "target_modules": ["q_proj", "down_proj"],
}


def rows(count: int = 8, chat: bool = True) -> tuple[Dataset, Dataset]:
    tasks = load_tasks(DataConfig(tasks=TASKS, max_rows=count, max_eval_rows=4))
    train = as_trl(concatenate_datasets([task.train for task in tasks]).shuffle(seed=0), chat)
    return train, as_trl(concatenate_datasets([task.eval for task in tasks if task.eval is not None]), chat)


def trainer(out: Path, adapter: dict[str, Any], train: Dataset | None = None, **training: Any) -> MoeLoraTrainer:
    model, tokenizer = load_base(Recipe())
    torch.manual_seed(0)
    moelora.adapt(model, adapter, verbose=False)
    for layer in routed_layers(model):
        torch.nn.init.normal_(layer.experts.lora_B, std=0.02)
    made, held_out = rows()
    settings = {
        "output_dir": str(out), "report_to": "none", "bf16": False, "max_length": 64, "use_cpu": True,
        "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 4,
        "save_strategy": "no", "activation_checkpointing": False, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    config = SFTConfig(**{**settings, **training})
    return MoeLoraTrainer(model, config, made if train is None else train, held_out, tokenizer, list(TASKS), ["count"])


def gradients(
    run: MoeLoraTrainer, batches: list[dict[str, Any]], items: Any = None
) -> tuple[float, dict[str, torch.Tensor]]:
    run.model.train()
    run.model.zero_grad()
    run.current_gradient_accumulation_steps = len(batches)
    total = 0.0
    for batch in batches:
        loss = run.compute_loss(run.model, dict(batch), num_items_in_batch=items)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


def test_task_ids_go_beside_the_tokens(tmp_path: Path) -> None:
    run = trainer(tmp_path, METEORA)
    batch = next(iter(run.get_train_dataloader()))
    assert batch["task_ids"].shape == batch["input_ids"].shape
    assert torch.equal(batch["task_ids"] == -1, batch["attention_mask"] == 0)
    assert (batch["labels"][:, 0] == -100).all()
    for ids, tokens in zip(batch["task_ids"], batch["input_ids"], strict=True):
        text = run.processing_class.decode(tokens)
        assert list(TASKS)[ids[0]] in text


def test_packing_keeps_the_borders_of_sequences_and_tasks(tmp_path: Path) -> None:
    """A packed row has the loss, auxiliary terms and gradients of its sequences apart."""
    apart = trainer(tmp_path, METEORA, per_device_train_batch_size=16)
    packed = trainer(tmp_path, METEORA, packing=True, max_length=512, per_device_train_batch_size=1)
    [one], [many] = list(packed.get_train_dataloader()), list(apart.get_train_dataloader())
    assert one["input_ids"].shape[0] == 1
    assert many["input_ids"].shape[0] == 16
    assert int((one["position_ids"] == 0).sum()) == 16
    assert sorted(one["task_ids"].flatten().tolist()) == sorted(many["task_ids"][many["attention_mask"] == 1].tolist())
    loss_packed, grads_packed = gradients(packed, [one])
    loss_apart, grads_apart = gradients(apart, [many])
    assert loss_packed == pytest.approx(loss_apart, rel=1e-5)
    for name, grad in grads_apart.items():
        torch.testing.assert_close(grads_packed[name], grad, rtol=1e-3, atol=2e-6)


def test_packed_evaluation_gives_the_same_figures(tmp_path: Path) -> None:
    apart = trainer(tmp_path, METEORA).measure()
    packed = trainer(tmp_path, METEORA, packing=True, max_length=512, per_device_eval_batch_size=1).measure()
    for key, value in apart.items():
        assert packed[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_shuffling_is_done_when_asked(tmp_path: Path) -> None:
    plain = list(trainer(tmp_path, METEORA).train_dataset["input_ids"])
    shuffled = list(trainer(tmp_path, METEORA, shuffle_dataset=True).train_dataset["input_ids"])
    assert plain != shuffled
    assert sorted(plain) == sorted(shuffled)


def test_the_loss_is_the_token_loss_plus_the_weighted_terms(tmp_path: Path) -> None:
    run = trainer(tmp_path, METEORA)
    batch = next(iter(run.get_train_dataloader()))
    loss, _ = gradients(run, [batch])
    run.model.train()
    with collect(run.model) as taken:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = run.model(**inputs).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    terms = taken.terms[0]
    assert set(terms) == {"supervised_gate", "balance"}
    assert loss == pytest.approx((expected + 0.5 * terms["supervised_gate"] + 0.1 * terms["balance"]).item(), rel=1e-5)


def test_accumulated_terms_are_the_token_weighted_mean(tmp_path: Path) -> None:
    """Token losses weigh by answers, terms by tokens that are not padding, or that another follows."""
    run = trainer(tmp_path, METEORA)
    batches, items = run.get_batch_samples(iter(run.get_train_dataloader()), 2, torch.device("cpu"))
    answers = torch.tensor([batch["labels"][:, 1:].ne(-100).sum() for batch in batches]).double()
    tokens = torch.tensor([batch["attention_mask"].sum() for batch in batches]).double()
    followed = tokens - torch.tensor([len(batch["input_ids"]) for batch in batches])
    assert items == answers.sum() and answers[0] * tokens[1] != answers[1] * tokens[0]
    loss, _ = gradients(run, batches, items)
    expected = 0.0
    for batch, of_answers, of_tokens, of_followed in zip(
        batches, answers / answers.sum(), tokens / tokens.sum(), followed / followed.sum(), strict=True
    ):
        total, _ = gradients(run, [batch])
        with collect(run.model) as taken:
            run.model(**batch)
        gate, balance = 0.5 * taken.terms[0]["supervised_gate"].item(), 0.1 * taken.terms[0]["balance"].item()
        expected += of_answers * (total - gate - balance) + of_followed * gate + of_tokens * balance
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_plain_text_and_conversations_mix(tmp_path: Path) -> None:
    chat, _ = rows(2)
    text = chat.select([0]).remove_columns(["text", "prompt", "completion"])
    text = (
        text.add_column("text", ["Ada finds the red apple."]).add_column("prompt", [[]]).add_column("completion", [[]])
    )
    mixed = concatenate_datasets([chat, text.cast(chat.features)])
    run = trainer(tmp_path, METEORA, train=mixed, shuffle_dataset=False)
    labels = run.train_dataset["labels"]
    assert all(-100 in row for row in list(labels)[:4])
    assert -100 not in list(labels)[4]


def test_a_model_without_chat_template_gets_plain_prompts() -> None:
    train, held_out = rows(2, chat=False)
    assert train[0]["prompt"].endswith("\n")
    assert train.column_names == held_out.column_names
    assert all(isinstance(answer, str) for answer in train["completion"])


def test_a_dataset_without_the_columns_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lacks \['task_id', 'text'\]"):
        trainer(tmp_path, METEORA, train=Dataset.from_list([{"prompt": "q", "completion": "a"}]))


def test_evaluation_sums_token_losses_by_task(tmp_path: Path) -> None:
    run = trainer(tmp_path, METEORA, per_device_eval_batch_size=3)
    metrics = run.evaluate()
    sums = torch.zeros(2, 2, dtype=torch.float64)
    run.model.eval()
    for row in run.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = run.model(input_ids=ids).logits
        loss = F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        sums[row["task_ids"][0]] += torch.tensor([float(loss), float((labels[0, 1:] != -100).sum())])
    for index, task in enumerate(TASKS):
        assert metrics[f"eval_{task}_loss"] == pytest.approx(float(sums[index, 0] / sums[index, 1]), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(float(sums[:, 0].sum() / sums[:, 1].sum()), rel=1e-5)
    assert 0 <= metrics["eval_count_accuracy"] <= 1
    assert "eval_reverse_accuracy" not in metrics
    assert run.routing is not None
    assert set(run.routing.layers) == {layer.site.name for layer in routed_layers(run.model)}


def test_logs_show_terms_and_routing(tmp_path: Path) -> None:
    run = trainer(tmp_path, METEORA, max_steps=2)
    run.train()
    first = run.state.log_history[0]
    figures = ("load_entropy", "dead", "top1", "token_entropy", "agreement", "collapsed")
    for key in ("loss", "aux/supervised_gate", "aux/balance", *(f"routing/{name}" for name in figures)):
        assert key in first, key


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_routing_logged_is_that_of_all_micro_batches_of_the_step(tmp_path: Path, strategy: str) -> None:
    """Logged once an epoch, it is that of all steps that were watched since."""
    small = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    run = trainer(tmp_path, METEORA, max_steps=4, logging_steps=2, logging_strategy=strategy, **small)
    batches = [batch["attention_mask"].sum() for batch in run.get_train_dataloader()]
    seen: list[float] = []
    run.alarm.update = lambda stats: seen.extend(  # type: ignore[method-assign]
        {float(layer.tokens.sum()) for layer in stats.layers.values()}
    )
    run.train()
    steps = [float(batches[2] + batches[3]), float(batches[6] + batches[7])]
    assert seen == (steps if strategy == "steps" else [sum(steps)])
    logged = [row for row in run.state.log_history if "loss" in row]
    assert all("routing/top1" in row for row in logged) and len(logged) == len(seen)
    assert run.watched is None


def test_a_collapse_is_told_once_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, {**METEORA, "losses": {}}, max_steps=4, learning_rate=0.0)
    with torch.no_grad():
        for layer in routed_layers(run.model)[1:]:
            layer.router.weight.zero_()  # all scores equal: the first expert for every token
    run.train()
    shown = capsys.readouterr().err
    assert shown.count("routing has collapsed in 7 of 8 layers; worst is model.layers.0.mlp.down_proj") == 1
    assert shown.count("routing has collapsed") == 1
    logged = [row["routing/collapsed"] for row in run.state.log_history if "routing/collapsed" in row]
    assert logged == [7, 7, 7, 7]


def test_evaluation_computes_no_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a term was computed")

    run = trainer(tmp_path, METEORA)
    for loss in run.model.moelora.losses.values():
        monkeypatch.setattr(type(loss), "__call__", fail)
    assert run.measure()["eval_routing/agreement"] >= 0


def test_smora_biases_move_once_per_optimiser_step(tmp_path: Path) -> None:
    smora = {"experts": {"r": 8}, "router": {"name": "smora", "top_k": 2, "bias_update_rate": 0.25}}
    run = trainer(tmp_path, smora, max_steps=2, gradient_accumulation_steps=2, activation_checkpointing=True)
    seen: list[int] = []
    for layer in routed_layers(run.model):
        layer.router.after_step = lambda load, at=layer.site.index: seen.append(at)  # type: ignore[method-assign]
    run.train()
    assert seen == [layer.site.index for layer in routed_layers(run.model)] * 2


@pytest.mark.parametrize("router", ["smora", "meteora"])
def test_half_a_run_resumed_is_the_whole_run_bit_for_bit(tmp_path: Path, router: str) -> None:
    smora = {"experts": {"r": 4, "lora_dropout": 0.1}, "router": {"name": "smora", "top_k": 2}}
    held = {**METEORA, "losses": {**METEORA["losses"], "l2_preservation": 0.1}}
    adapter = smora if router == "smora" else held
    whole = trainer(tmp_path / "whole", adapter, max_steps=4)
    whole.train()
    half = trainer(tmp_path / "half", adapter, max_steps=4, save_strategy="steps", save_steps=2)
    half.train()
    resumed = trainer(tmp_path / "half", adapter, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_the_best_checkpoint_comes_back(tmp_path: Path) -> None:
    """The highest loss is declared the best, so that it is not the last one."""
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer(tmp_path, METEORA, **every, **best)
    run.train()
    losses = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert losses[0] > losses[-1]
    assert Path(run.state.best_model_checkpoint or "").name == "checkpoint-1"
    assert run.measure()["eval_loss"] == pytest.approx(losses[0], rel=1e-6)


def test_a_router_sees_the_task_of_every_token(tmp_path: Path) -> None:
    run = trainer(tmp_path, METEORA)
    batch = next(iter(run.get_train_dataloader()))
    views: list[View] = []
    with collect(run.model, lambda view, route: views.append(view)):
        run.model(**{key: value for key, value in batch.items() if key != "labels"})
    for view in views:
        assert torch.equal(view.task, batch["task_ids"].flatten())
        assert torch.equal(view.mask, batch["attention_mask"].flatten().bool())
