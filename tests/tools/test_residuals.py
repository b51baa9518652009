"""Sums of what models have learned beside their base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moelora.core.errors import AdapterError, ConfigError, OutputError
from moelora.tools.residuals import REPORT, add_residuals
from tests import tiny


def model_at(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, torch.Tensor]:
    model = tiny.llama(seed, dtype, **options)
    model.save_pretrained(folder, max_shard_size="20KB")
    return {name: value.clone() for name, value in model.state_dict().items()}


def read(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


def test_the_sum_is_that_of_the_formula(tmp_path: Path) -> None:
    base, one, two = (model_at(tmp_path / name, seed) for seed, name in enumerate(("base", "lang", "chat")))
    add_residuals(tmp_path / "base", {tmp_path / "lang": 0.8, tmp_path / "chat": 0.5}, tmp_path / "out")
    found = read(tmp_path / "out")
    for name, value in base.items():
        old = value.double()
        expected = old + 0.8 * (one[name].double() - old) + 0.5 * (two[name].double() - old)
        assert torch.equal(found[name], expected.float()), name
    said = json.loads((tmp_path / "out" / REPORT).read_text())
    assert said["residuals"] == {str(tmp_path / "lang"): 0.8, str(tmp_path / "chat"): 0.5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_one_of_weight_one_is_that_model_and_of_zero_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    base, one = (model_at(tmp_path / name, seed, dtype) for seed, name in enumerate(("base", "lang")))
    add_residuals(tmp_path / "base", {tmp_path / "lang": 1.0}, tmp_path / "whole")
    add_residuals(tmp_path / "base", {tmp_path / "lang": 0.0}, tmp_path / "none")
    tiny.assert_same(read(tmp_path / "whole"), one)
    tiny.assert_same(read(tmp_path / "none"), base)


def test_what_is_excluded_stays_the_bases_and_may_have_another_shape(tmp_path: Path) -> None:
    base, _ = model_at(tmp_path / "base", 0), model_at(tmp_path / "chat", 1, vocab_size=tiny.VOCAB + 2)
    with pytest.raises(
        AdapterError, match=r"chat: '.*' is torch.float32 \(66, 32\), the base's torch.float32 \(64, 32\)"
    ):
        add_residuals(tmp_path / "base", {tmp_path / "chat": 1.0}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    add_residuals(tmp_path / "base", {tmp_path / "chat": 1.0}, tmp_path / "out", ["embed_tokens", "lm_head"])
    found, chat = read(tmp_path / "out"), read(tmp_path / "chat")
    assert torch.equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    inner = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(found[inner], chat[inner])


def test_what_cannot_be_added_is_refused(tmp_path: Path) -> None:
    model_at(tmp_path / "base", 0)
    with pytest.raises(ConfigError, match="expected at least one folder"):
        add_residuals(tmp_path / "base", {}, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"exclude \['norms'\]: no parameter"):
        add_residuals(tmp_path / "base", {tmp_path / "base": 1.0}, tmp_path / "out", ["norms"])
    with pytest.raises(AdapterError, match="neither model"):
        add_residuals(tmp_path / "base", {tmp_path: 1.0}, tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    with pytest.raises(OutputError, match="not empty"):
        add_residuals(tmp_path / "base", {tmp_path / "base": 1.0}, tmp_path / "taken")
