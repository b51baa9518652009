"""Unmodified trainers on an adapted model: losses, gradient accumulation, checkpoints, errors instead of silence."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import moelora
from moelora.core.errors import MoeloraError
from moelora.model.record import routed_layers
from moelora.model.routed import weighted_sum
from tests import tiny

pytestmark = [
    # transformers and TRL on their own arguments, accelerate on a machine without an accelerator.
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
RATE = 0.1
Row = dict[str, Tensor]


class Watch(TrainerCallback):
    """Losses as logged, and the gradients before each optimiser step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients.append(tiny.gradients(model))


def rows(kind: str, count: int, lengths: list[int] | None = None) -> list[Row]:
    """Examples with a task; padding on the right up to the common length where lengths differ."""
    made = []
    for number in range(count):
        row = {key: value[0] for key, value in tiny.batch(kind, 1, 8, seed=number, padded=False).items()}
        length = 8 if lengths is None else lengths[number % len(lengths)]
        for key, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            if row[key].dim() and (key != "labels" or kind != "t5"):
                row[key][length:] = filler
        made.append({**row, "task_ids": torch.tensor(number % 3)})
    return made


def stacked(some: list[Row]) -> Row:
    return {key: torch.stack([row[key] for row in some]) for key in some[0]}


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "num_train_epochs": 1,
            "train_sampling_strategy": "sequential",
            "remove_unused_columns": False,  # task_ids is not an argument of the base model's forward
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **more,
        }
    )


def trained(model: Any, data: list[Row], folder: Path, cls: type[Trainer] = Trainer, **more: Any) -> Watch:
    """``Trainer`` over the data with plain SGD at a constant rate."""
    watch = Watch()
    sgd = torch.optim.SGD(list(tiny.trainable(model).values()), lr=RATE)
    constant = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.0)
    trainer = cls(
        model=model,
        args=arguments(folder, **more),
        train_dataset=data,
        optimizers=(sgd, constant),
        callbacks=[watch],
    )
    trainer.train()
    return watch


LOSSES = {"smora": {"balance": 0.5, "z": 0.1}, "meteora": {"z": 0.1, "supervised_gate": 0.5}}


@pytest.mark.parametrize("method", LOSSES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_trainer_logs_and_follows_the_whole_loss(kind: str, method: str, tmp_path: Path) -> None:
    data = rows(kind, 10)
    model, twin = (tiny.adapted(kind, method, losses=LOSSES[method]) for _ in range(2))
    watch = trained(model, data, tmp_path)

    expected, sgd = [], torch.optim.SGD(list(tiny.trainable(twin).values()), lr=RATE)
    for step in range(5):
        batch = stacked(data[2 * step : 2 * step + 2])
        if kind == "gpt2":  # transformers divides its loss by all labels, though the first of a row is never predicted
            batch["num_items_in_batch"] = torch.tensor(batch["labels"].numel())
        with moelora.collect(twin) as collected:
            own = twin(**batch).loss
        loss = own + weighted_sum(twin, collected.terms[0])
        assert loss > own
        loss.backward()
        sgd.step()
        sgd.zero_grad()
        expected.append(loss.item())
    assert watch.losses == pytest.approx(expected, abs=2e-4)  # the log is rounded
    for name, p in tiny.trainable(twin).items():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def first_gradient(kind: str, method: str, losses: dict[str, float], data: list[Row], **how: Any) -> dict[str, Tensor]:
    model = tiny.adapted(kind, method, losses=losses, dtype=torch.float64)
    (gradient,) = trained(model, data, **how).gradients
    return gradient


@pytest.mark.parametrize(
    ("kind", "method", "losses", "lengths"),
    [
        # Terms that are means over tokens add up to the mean over the whole batch:
        ("llama", "smora", {"z": 0.5}, None),
        ("gpt2", "smora", {"z": 0.5}, None),
        ("llama", "meteora", {"supervised_gate": 0.5}, None),
        # also when the parts have different numbers of tokens to predict, which is what the gate loss counts too.
        ("llama", "meteora", {"supervised_gate": 0.5}, [8, 3, 4, 6]),
    ],
)
def test_accumulation_equals_one_large_batch(
    kind: str, method: str, losses: dict[str, float], lengths: list[int] | None, tmp_path: Path
) -> None:
    data = rows(kind, 4, lengths)
    whole = first_gradient(kind, method, losses, data, folder=tmp_path, per_device_train_batch_size=4)
    parts = first_gradient(kind, method, losses, data, folder=tmp_path, gradient_accumulation_steps=2)
    assert any((grad != 0).any() for name, grad in whole.items() if "router" in name)
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_accumulated_terms_are_their_mean_whatever_the_models_own_loss_does(kind: str, tmp_path: Path) -> None:
    # These models ignore the trainer's token count, and their own loss comes out as often as there are parts.
    data = [{key: value for key, value in row.items() if key != "task_ids"} for row in rows(kind, 4)]
    for row in data if kind == "t5" else ():
        row["labels"] = row["labels"].masked_fill(row["labels"] == -100, 5)
    of_terms = []
    for how in ({"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 2}):
        with_terms = first_gradient(kind, "smora", {"z": 0.5}, data, folder=tmp_path, **how)
        without = first_gradient(kind, "smora", {}, data, folder=tmp_path, **how)
        of_terms.append({name: grad - without[name] for name, grad in with_terms.items()})
    whole, parts = of_terms
    assert any(grad.abs().max() > 1e-3 for grad in whole.values())
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: n + m)


def test_accumulated_loss_is_logged_whole(tmp_path: Path) -> None:
    logged = []
    for how in ({"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 2}):
        model = tiny.adapted("llama", "smora", losses={"z": 0.5})
        logged += trained(model, rows("llama", 4), tmp_path, **how).losses
    assert logged[0] == pytest.approx(logged[1], abs=2e-4)


@pytest.mark.parametrize("method", LOSSES)
def test_trainer_with_gradient_checkpointing(method: str, tmp_path: Path) -> None:
    watched = []
    for checkpointing in (False, True):
        model = tiny.adapted("llama", method, losses=LOSSES[method])
        watched.append(trained(model, rows("llama", 4), tmp_path, gradient_checkpointing=checkpointing))
    plain, saving = watched
    assert plain.losses == saving.losses
    for one, two in zip(plain.gradients, saving.gradients, strict=True):
        tiny.assert_same(one, two)


def test_trainer_asking_for_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoeloraError, match="use_reentrant=True gives a routed model wrong gradients"):
        trained(
            tiny.adapted("llama"),
            rows("llama", 2),
            tmp_path,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )


def test_trainer_in_bfloat16(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "smora", losses=LOSSES["smora"])
    watch = trained(model, rows("llama", 4), tmp_path, bf16=True)
    assert len(watch.losses) == 2 and all(loss == loss for loss in watch.losses)
    assert {p.dtype for p in tiny.trainable(model).values()} == {torch.float32}


def test_evaluation_reports_the_models_own_loss(tmp_path: Path) -> None:
    model, data = tiny.adapted("llama", "smora", losses=LOSSES["smora"]), rows("llama", 2)
    trainer = Trainer(model=model, args=arguments(tmp_path), eval_dataset=data)
    with torch.no_grad():
        expected = model.eval()(**stacked(data)).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_trainer_writes_the_adapter_only(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "smora")
    trained(model, rows("llama", 4), tmp_path, save_strategy="steps", save_steps=1)
    folder = tmp_path / "checkpoint-2"
    assert (folder / "moelora.json").is_file() and not (folder / "model.safetensors").exists()
    loaded, batch = moelora.load(tiny.llama(), folder), tiny.batch()
    assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


def zero(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    return outputs.logits.sum() * 0


@pytest.mark.parametrize("how", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": zero}])
def test_a_trainer_that_drops_the_models_loss_gets_an_error(how: dict[str, Any], tmp_path: Path) -> None:
    own = {"compute_loss_func": how.pop("compute_loss_func")} if "compute_loss_func" in how else {}
    model = tiny.adapted("llama", "smora", losses=LOSSES["smora"])
    data = [{key: value for key, value in row.items() if key != "task_ids"} for row in rows("llama", 2)]
    trainer = Trainer(model=model, args=arguments(tmp_path, **how), train_dataset=data, **own)
    with pytest.raises(MoeloraError, match=r"auxiliary losses \(balance, z\) would be dropped"):
        trainer.train()


def test_without_losses_any_trainer_will_do(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "smora")
    data = [{key: value for key, value in row.items() if key != "task_ids"} for row in rows("llama", 4)]
    watch = trained(model, data, tmp_path, label_smoothing_factor=0.1)
    assert len(watch.losses) == 2
    assert all((bias != 0).any() for bias in tiny.biases(model).values())


def sft(model: Any, folder: Path, **more: Any) -> SFTTrainer:
    texts = [" ".join(f"w{3 + (5 * row + i) % 60}" for i in range(4 + row)) for row in range(4)]
    keep = {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    args = SFTConfig(**{**keep, **quiet, "logging_steps": 1, "dataloader_pin_memory": False, **more})
    data = Dataset.from_dict({"text": texts})
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tiny.tokenizer())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer_trains_a_model_without_losses(checkpointing: bool, tmp_path: Path) -> None:
    model = tiny.adapted("llama", "smora", noise=0)
    before = {name: p.clone() for name, p in tiny.trainable(model).items()}
    trainer = sft(model, tmp_path, gradient_checkpointing=checkpointing)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    moved = [name for name, p in tiny.trainable(model).items() if not torch.equal(p, before[name])]
    assert any("lora_B" in name for name in moved)
    counted = tiny.biases(model)
    assert len(counted) == len(routed_layers(model)) and all((bias != 0).any() for bias in counted.values())


@pytest.mark.parametrize("losses", [{"z": 0.1}, {"balance": 0.5, "z": 0.1}])
def test_sft_trainer_on_a_model_with_losses_names_the_trainer_to_use(losses: dict[str, float], tmp_path: Path) -> None:
    trainer = sft(tiny.adapted("llama", "smora", losses=losses), tmp_path)
    with pytest.raises(MoeloraError, match="would be dropped") as caught:
        trainer.train()
    named = re.search(r"With TRL, use (moelora\S*)\.(\w+) in place of SFTTrainer", str(caught.value))
    assert named is not None
    assert issubclass(getattr(importlib.import_module(named[1]), named[2]), SFTTrainer)


def test_sft_trainer_with_losses_of_weight_zero(tmp_path: Path) -> None:
    sft(tiny.adapted("llama", "smora", losses={"z": 0.0}), tmp_path).train()
