"""DyLoRA: truncated forwards, one rank that learns, and experts that are exported at any rank."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import moelora
from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.core.step import Now
from moelora.model.config import resolve
from moelora.model.record import routed_layers
from moelora.tools.export import export_peft
from moelora.tools.truncate import truncate
from tests import tiny
from tests.ranks.runs import Run, experts_of, model_with, plain
from tests.tools.test_export import CLOSE, in_peft, logits, only


def drawn(model: Any, b: int | list[int]) -> Any:
    """The model with lora_B everywhere, truncated to b."""
    tiny.shake(model, 0.3)
    for experts in experts_of(model):
        experts.allocator.b.copy_(torch.as_tensor(b))
    return model


def halves(experts: Any) -> tuple[Any, Any]:
    return experts.lora_A.detach().unflatten(0, (-1, experts.r)), experts.lora_B.detach().unflatten(1, (-1, experts.r))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("b", [1, 3, 4])
def test_a_truncated_layer_is_the_loras_of_its_first_ranks(b: int, frozen: bool) -> None:
    model = drawn(model_with({"name": "dylora", "frozen": frozen}), b)
    layer = routed_layers(model)[0]
    A, B = (half.clone().requires_grad_() for half in halves(layer.experts))
    x = torch.randn(7, layer.in_features, dtype=torch.float64)
    update = layer(x) - layer.base_layer(x)
    up = torch.randn_like(update)
    model.zero_grad()
    (update * up).sum().backward()
    expected = plain(layer, x, A[:, :b].flatten(0, 1), B[:, :, :b].flatten(1), 8 / b)
    (expected * up).sum().backward()
    torch.testing.assert_close(update, expected, rtol=1e-6, atol=1e-6)  # scales are float32
    learns = slice(b - 1, b) if frozen else slice(0, b)
    found_A = layer.experts.lora_A.grad.unflatten(0, (-1, 4))
    found_B = layer.experts.lora_B.grad.unflatten(1, (-1, 4))
    torch.testing.assert_close(found_A[:, learns], A.grad[:, learns], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found_B[:, :, learns], B.grad[:, :, learns], rtol=1e-6, atol=1e-6)
    rest = [rank for rank in range(4) if rank not in range(4)[learns]]
    assert found_A[:, learns].abs().min() > 0 and not found_A[:, rest].any() and not found_B[:, :, rest].any()


def test_ranks_beyond_b_make_no_difference_and_all_of_them_are_lora_bit_for_bit() -> None:
    model = drawn(model_with({"name": "dylora", "frozen": False}), 2)
    before = model(**tiny.given()).logits
    with torch.no_grad():
        for A, B in map(halves, experts_of(model)):
            A[:, 2:], B[:, :, 2:] = 5.0, 5.0
    assert torch.equal(model(**tiny.given()).logits, before)
    whole, lora = drawn(model_with({"name": "dylora", "frozen": False}), 4), tiny.shake(model_with("full"), 0.3)
    for one in (whole, lora):
        one(**tiny.given()).loss.backward()
    tiny.assert_same(tiny.gradients(whole), tiny.gradients(lora))


def test_one_row_and_one_column_change_in_a_step_of_adamw_with_decay() -> None:
    run = Run(tiny.shake(model_with("dylora"), 0.3)).step(times=3)
    for experts in experts_of(run.model):
        before = [half.clone() for half in halves(experts)]
        experts.allocator.before = before
    run.step()
    for experts in experts_of(run.model):
        b = int(experts.allocator.b[0])
        for half, old, dim in zip(halves(experts), experts.allocator.before, (1, 2), strict=True):
            moved = (half != old).movedim(dim, 0).flatten(1)
            used = moved[b - 1].any()
            assert used and not moved[[rank for rank in range(4) if rank != b - 1]].any()


def test_the_draw_is_uniform_and_depends_on_nothing_but_seed_and_step() -> None:
    def draws(ranks: dict[str, Any], count: int) -> list[list[int]]:
        run = Run(model_with({"name": "dylora", **ranks}))
        own = [experts.allocator for experts in experts_of(run.model)]
        found = []
        for step in range(count):
            torch.rand(step % 3)
            own[0].begin_step(run.stepping.layers["ranks"], Now(step, count, 0.1))
            assert all(torch.equal(other.b, own[0].b) for other in own)
            found.append(own[0].b.tolist())
        return found

    counts = Counter(b for b, *_ in draws({}, 400))
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 60
    assert all(len(set(b)) == 1 for b in draws({}, 20)) and draws({}, 20) == draws({}, 40)[:20]
    assert draws({"seed": 1}, 20) != draws({}, 20)
    assert {b for b, *_ in draws({"r_min": 3}, 40)} == {3, 4}
    assert any(len(set(b)) > 1 for b in draws({"per_expert": True}, 20))


def test_each_expert_may_have_a_rank_of_its_own() -> None:
    layer = routed_layers(drawn(model_with({"name": "dylora", "per_expert": True}), [1, 2, 4]))[0]
    A, B = halves(layer.experts)
    x = torch.randn(7, layer.in_features, dtype=torch.float64)
    keep = torch.arange(4) < torch.tensor([[1], [2], [4]])
    expected = plain(layer, x, A.flatten(0, 1), (B * keep).flatten(1), torch.tensor([8.0, 4.0, 2.0]))
    torch.testing.assert_close(layer(x) - layer.base_layer(x), expected, rtol=1e-6, atol=1e-6)


def test_a_truncated_model_is_evaluated_saved_and_exported_at_that_rank(tmp_path: Path) -> None:
    model = tiny.shake(model_with("dylora", dtype=torch.float32), 0.3)
    whole = logits(model, "llama")
    truncate(model, 3)
    cut = logits(model, "llama")
    assert (cut - whole).abs().max() > 0.01
    moelora.save(model, tmp_path / "saved")
    again = moelora.load(tiny.llama(), tmp_path / "saved")
    assert torch.equal(logits(again, "llama"), cut)
    export_peft(model.train(), tmp_path / "out")  # whatever mode it is in
    layer = routed_layers(model)[0]
    lora = in_peft(tmp_path / "out" / "expert_1", "llama")
    torch.testing.assert_close(lora, logits(only(model, 1), "llama"), **CLOSE)
    A, B = halves(layer.experts)
    x = torch.randn(5, layer.in_features)
    expected = 8 / 3 * (x @ A[1, :3].t() @ B[:, 1, :3].t())
    torch.testing.assert_close(layer(x) - layer.base_layer(x), expected, rtol=1e-5, atol=1e-5)
    truncate(model, 4)
    assert routed_layers(model)[0].experts.allocator.eval_rank == 4


def test_with_rslora_the_scale_is_by_the_root_of_the_rank() -> None:
    model = drawn(model_with("dylora", experts={"use_rslora": True}), 2)
    torch.testing.assert_close(experts_of(model)[0].composed().scale, torch.full((12,), 8 / 2**0.5))


def test_ranks_that_the_experts_do_not_have_are_refused() -> None:
    config = {"router": "meteora", "experts": {"num_experts": 2, "r": 4}}
    for key in ("r_min", "eval_rank"):
        with pytest.raises(ConfigError, match=rf"ranks.dylora: {key} 5 is more than experts.r, which is 4"):
            resolve({**config, "ranks": {"name": "dylora", key: 5}}, Methods())
    with pytest.raises(ConfigError, match="ranks dylora is for experts with an A of their own"):
        resolve({"router": "comol", "experts": {"name": "core"}, "ranks": "dylora"}, Methods())
    with pytest.raises(ConfigError, match="truncated to rank 5: expected 1 to 4"):
        truncate(model_with("dylora"), 5)
    with pytest.raises(ConfigError, match="experts trained with ranks: full do not work at their first 2 ranks"):
        truncate(model_with("full"), 2)
