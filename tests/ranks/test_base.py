"""What every allocator of ranks has to do, whatever it masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moelora
from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.model.config import resolve
from moelora.tools.export import export_peft
from tests import tiny
from tests.ranks.runs import Run, experts_of, model_with
from tests.tools.test_export import CLOSE, in_peft, logits, only

NAMES = [name for name in Methods().names("ranks") if name != "full"]
OPTIONS: dict[str, dict[str, Any]] = {"increlora": {"warmup": 1, "interval": 1, "target_r": 3}}
"""What makes a method act within three steps."""
QUIET: dict[str, dict[str, Any]] = {"adalora": {"tinit": 5}, "increlora": {"warmup": 5}}
"""What keeps it from sharing out ranks anew for as long: any expert may lose or win some, used or not."""


def ranks_of(name: str) -> dict[str, Any]:
    return {"name": name, **OPTIONS.get(name, {})}


@pytest.mark.parametrize("name", NAMES)
class TestEvery:
    def test_steps_then_save_and_load_give_the_same_model_bit_for_bit(self, name: str, tmp_path: Path) -> None:
        run = Run(model_with(ranks_of(name), dtype=torch.float32)).step(times=3)
        assert all(torch.isfinite(p).all() for p in run.model.parameters())
        moelora.save(run.model, tmp_path / "out")
        again = moelora.load(tiny.llama(), tmp_path / "out")
        tiny.assert_same(dict(again.state_dict()), dict(run.model.state_dict()))
        found = logits(again, "llama")
        assert torch.equal(found, logits(run.model, "llama"))
        with moelora.disabled(again):
            assert not torch.equal(logits(again, "llama"), found)

    def test_a_recomputed_forward_has_the_gradients_of_the_first(self, name: str) -> None:
        run = Run(model_with(ranks_of(name))).step(times=2)
        found = []
        for model in (run.model, tiny.checkpointing(run.model)):
            model.zero_grad()
            model(**tiny.given()).loss.backward()
            found.append(tiny.gradients(model))
        tiny.assert_same(*found)

    def test_an_expert_is_exported_as_a_plain_lora_without_what_is_masked(self, name: str, tmp_path: Path) -> None:
        run = Run(model_with(ranks_of(name), dtype=torch.float32), steps=3).step(times=3)
        export_peft(run.model, tmp_path / "out")
        lora = in_peft(tmp_path / "out" / "expert_1", "llama")
        torch.testing.assert_close(lora, logits(only(run.model, 1), "llama"), **CLOSE)

    def test_what_it_keeps_comes_back_with_a_checkpoint(self, name: str) -> None:
        """All of a run but this is the business of tests/train: parameters, moments, the place in the data."""
        one = Run(model_with(ranks_of(name))).step(times=3)
        state = {key: value.clone() for key, value in one.model.state_dict().items()}
        moments = {key: value.clone() for key, value in one.engine.states().items()}
        kept = {key: value.clone() for key, value in one.stepping.tensors().items()}
        two = Run(model_with(ranks_of(name)))
        two.model.load_state_dict(state)
        two.engine.set_states(moments)
        two.stepping.set_tensors(kept)
        two.done = 3
        tiny.assert_same(dict(one.step(times=2).model.state_dict()), dict(two.step(times=2).model.state_dict()))

    def test_experts_from_adapters_are_refused(self, name: str) -> None:
        experts = {"adapters": ["out/a", "out/b"], "num_experts": 2}
        with pytest.raises(ConfigError, match=f"ranks {name} is for experts that start anew"):
            resolve({"router": "meteora", "experts": experts, "ranks": ranks_of(name)}, Methods())

    def test_an_expert_without_tokens_keeps_everything(self, name: str) -> None:
        run = Run(model_with({**ranks_of(name), **QUIET.get(name, {})})).step(times=2)
        unused = _unused(run.model)
        before = [part.clone() for part in _parts(run.model, unused)]
        run.step(times=2)
        assert all(torch.equal(old, new) for old, new in zip(before, _parts(run.model, unused), strict=True))


def _unused(model: Any) -> int:
    """From now on the routers never choose this expert."""
    for experts in experts_of(model):
        layer = model.get_submodule(experts.site.name)
        forward = layer.router.forward

        def without(x: Any, view: Any, forward: Any = forward) -> Any:
            route = forward(x, view)
            dense = route.dense() * torch.tensor([1.0, 0.0, 1.0])
            return route._replace(weight=dense, index=None)

        layer.router.forward = without
    return 1


def _parts(model: Any, expert: int) -> list[Any]:
    """All that one expert has trained, in every layer."""
    found = []
    for experts in experts_of(model):
        for key, value in experts.named_parameters():
            each = value.unflatten(1, (3, -1))[:, expert] if key == "lora_B" else value.unflatten(0, (3, -1))[expert]
            found.append(each.detach().clone())
    return found


def test_experts_with_one_down_factor_for_all_are_refused() -> None:
    with pytest.raises(ConfigError, match="ranks dylora is for experts with an A of their own, not for experts 'core'"):
        resolve({"router": "comol", "experts": {"name": "core"}, "ranks": "dylora"}, Methods())


def test_losses_that_hold_experts_near_their_start_go_by_the_experts_alone() -> None:
    model = model_with("dylora", losses={"l2_preservation": 0.1})
    assert {name for name, _ in model.named_buffers() if "anchor" in name and "layers.0" in name and "q_" in name} == {
        f"model.layers.0.self_attn.q_proj.experts.anchor_lora_{half}" for half in "AB"
    }
    assert model(**tiny.given()).loss.isfinite()
