"""The model of docs/scaling.md against what was counted, and the page against the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora.model.base import base_source
from moelora.recipe import deepspeed_options
from moelora.train.memory import engine_of, held, standing
from tests.bench.scaling_model import Exchange, Load, exchanged, limits, line, memories, offloading, sizes, traffic
from tests.bench.traffic import RECIPE, expected

DOCS = Path(__file__).parents[2] / "docs"
ROWS = json.loads((DOCS / "bench" / "traffic.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['engine']}-{row['processes']}-{row['accumulation']}")
def test_bytes_exchanged_are_those_counted(row: dict[str, Any]) -> None:
    assert row["bytes"] == pytest.approx(expected(row, row["engine"], row["accumulation"]), rel=0.02)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['engine']}-{row['processes']}-{row['accumulation']}")
def test_memory_held_is_what_the_plan_says(row: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(base_source("moelora/tiny")))
    moelora.adapt(model.float(), RECIPE["adapter"], verbose=False)
    options = None if row["engine"] == "DDP" else deepspeed_options(f"zero{row['engine'][5]}")
    engine = engine_of(options, row["processes"], False, 160, "adamw")
    assert engine is not None
    tensors = held(model)
    parts = {part.part: part.gpu for part in standing(tensors, engine)}
    assert row["held"]["optimiser states"] == pytest.approx(parts["optimiser states"], rel=1e-3)
    assert row["held"].get("float32 copies", 0) == pytest.approx(parts.get("float32 copies", 0), rel=1e-3)
    buffers = sum(one.numel * one.itemsize for one in tensors if one.buffer)
    small = sum(4 * one.numel for one in tensors if not one.buffer and one.numel <= engine.threshold)
    whole = (
        parts["base"] + parts["experts"] + parts["router"] - buffers - small
    )  # small ones: the whole beside the part
    assert row["held"]["parameters"] == pytest.approx(whole, rel=1e-3)


def test_every_engine_and_both_numbers_of_processes_were_counted() -> None:
    assert {row["processes"] for row in ROWS} == {2, 4}
    assert {row["engine"][:6] for row in ROWS} == {"DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"}


def test_what_a_process_sends() -> None:
    assert Exchange({"all_reduce": 800.0}).sent(1) == 0
    assert Exchange({"all_reduce": 800.0}).sent(4) == 1200
    assert Exchange({"all_gather": 400.0, "reduce_scatter": 400.0}).sent(4) == 600


def test_what_is_kept_is_gathered_once() -> None:
    large = Load(parameters=2 * 10**9, trained=0)
    assert exchanged(large, 3).whole["all_gather"] == 2 * (4e9 - 0.5e9)
    assert exchanged(Load(10**8, 0), 3).whole["all_gather"] == 2e8
    assert exchanged(Load(10**9, 10**6), 2, 3).whole == {"all_reduce": 6e6, "all_gather": 2e6}


def test_the_page_is_what_the_script_prints() -> None:
    page = (DOCS / "scaling.md").read_text(encoding="utf-8")
    for experts in (8, 64, 512):
        for cells in (sizes("8B", experts), traffic("8B", experts, 1024), memories("8B", experts)):
            assert line(cells) in page, "run: PYTHONPATH=. python tests/bench/scaling_model.py"
    assert line(limits("8B", 64)) in page
    assert line(offloading("8B", 64)) in page
