"""Losses that read logits, in the trainer: TRL's loss and figures are as they are without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moelora
from tests import tiny
from tests.train.test_trainer import METEORA, gradients, trainer

FIGURES = ("entropy", "mean_token_accuracy", "num_tokens")


def with_losses(tmp_path: Path, losses: Any, **args: Any) -> Any:
    return trainer(tmp_path, {**METEORA, "losses": losses}, **args)


@pytest.mark.parametrize("packing", [False, True])
def test_trls_loss_and_figures_are_as_without(packing: bool, tmp_path: Path) -> None:
    how: Any = {"packing": True, "max_length": 512, "per_device_train_batch_size": 1} if packing else {}
    plain, read = (with_losses(tmp_path, losses, **how) for losses in ({}, {"ba_lora": 0.0}))
    batch = next(iter(plain.get_train_dataloader()))
    expected, found = gradients(plain, [batch]), gradients(read, [batch])
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=2e-6)
    for figure in FIGURES:
        assert read._metrics["train"][figure] == pytest.approx(plain._metrics["train"][figure], rel=1e-4)


def test_the_term_is_added_and_logged(tmp_path: Path) -> None:
    losses = {"ba_lora": {"weight": 2.0, "tokens": "answers", "diversity": 0.1}}
    plain, read = with_losses(tmp_path, {}), with_losses(tmp_path, losses)
    batch = next(iter(plain.get_train_dataloader()))
    (expected, _), (found, _) = gradients(plain, [batch]), gradients(read, [batch])
    with moelora.collect(read.model) as collected:
        read.model(**{key: value for key, value in batch.items() if key != "task_ids"}, task_ids=batch["task_ids"])
    term = float(collected.terms[0]["ba_lora"].detach())
    assert abs(term) > 0.01 and found == pytest.approx(expected + 2 * term, rel=1e-5)
    assert read._metrics["train"]["aux/ba_lora"] == [pytest.approx(term, rel=1e-5)]


def test_accumulated_parts_are_means_over_all_answers(tmp_path: Path) -> None:
    """All but the singular values: these are of one micro-batch."""
    losses = {"ba_lora": {"weight": 1.0, "tokens": "answers", "diversity": 0.5, "consistency": 0.5, "svd": 0.0}}
    run = with_losses(tmp_path, losses)
    batches, items = run.get_batch_samples(iter(run.get_train_dataloader()), 2, torch.device("cpu"))
    found, slopes = gradients(run, batches, items)
    length = max(batch["input_ids"].shape[1] for batch in batches)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100, "task_ids": -1}
    padded = {
        key: torch.cat(
            [torch.nn.functional.pad(b[key], (0, length - b[key].shape[1]), value=value) for b in batches]
        )
        for key, value in fill.items()
    }  # fmt: skip
    one, expected = gradients(with_losses(tmp_path, losses), [padded])
    assert found == pytest.approx(one, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(slopes[name], gradient, rtol=1e-3, atol=2e-6)


def test_one_that_only_reads_layers_leaves_the_fused_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelora.train.trainer.with_logits", None)
    run = with_losses(tmp_path, {"balance": 0.1})
    gradients(run, [next(iter(run.get_train_dataloader()))])
    assert tiny.trainable(run.model)
