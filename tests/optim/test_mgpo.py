"""MGPO: the gradient is taken at w + eps, and w is stepped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moelora.core.errors import ConfigError, MoeloraError
from moelora.model.record import routed_layers
from moelora.model.save import restore
from moelora.optim.mgpo import MGPO
from moelora.recipe import check_recipe
from tests import tiny
from tests.optim.bench import Bench, full, unused
from tests.train.test_trainer import METEORA, trainer

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def bench(spec: dict[str, Any] | None = None, **more: Any) -> Bench:
    return Bench({"name": "mgpo", "beta": 0.8, "mu": 0.7, **(spec or {})}, **more)


def norm(A: Tensor, B: Tensor, group: str) -> Tensor:
    """Of both factors, of all pairs or of each."""
    squares = (A**2).sum((1, 2)) + (B**2).sum((1, 2))
    return (squares.sum() if group == "all" else squares).sqrt().view(-1, 1, 1)


@pytest.mark.parametrize("group", ["all", "expert"])
def test_forwards_see_the_weights_moved_and_the_step_is_from_where_they_were(group: str) -> None:
    made, lr = bench({"group": group, "rho": 0.3}), 0.1
    vA = vB = n = None
    for turn in range(4):
        A, B = made.down, made.up
        made.stepping.begin(made.now)
        if vA is None:
            assert torch.equal(made.down, A) and torch.equal(made.up, B)
        else:
            far = norm(vA, vB, group) * n
            torch.testing.assert_close(made.down, A + 0.3 * vA / far, **CLOSE)
            torch.testing.assert_close(made.up, B + 0.3 * vB / far, **CLOSE)
            torch.testing.assert_close(norm(made.down - A, made.up - B, group), (0.3 / n).expand_as(far), **CLOSE)
        dA, dB = made.gradients(full(turn))
        made.give(dA, dB)
        made.stepping.before(made.now)
        assert torch.equal(made.down, A) and torch.equal(made.up, B)
        made.optimizer.step()
        made.stepping.after(made.now)
        torch.testing.assert_close(made.down, A - lr * dA, **CLOSE)
        long = norm(dA, dB, "all")
        n = long if n is None else 0.8 * n + 0.2 * long
        vA, vB = (0.3 * dA, 0.3 * dB) if vA is None else (0.7 * vA + 0.3 * dA, 0.7 * vB + 0.3 * dB)
        made.steps += 1


def test_along_a_momentum_that_is_the_gradient_the_loss_rises() -> None:
    model = tiny.adapted("llama", "meteora", dtype=torch.float64).train()
    made = bench({"rho": 1e-3, "mu": 0.0})
    optimizer = torch.optim.SGD(tiny.trainable(model).values(), lr=0.0)
    stepping = type(made.stepping)(model, type(made.engine)(model, model, optimizer), made.method)
    losses = []
    for _ in range(2):
        stepping.begin(made.now)
        model.zero_grad()
        loss = model(**tiny.batch()).loss
        losses.append(loss.item())
        loss.backward()
        stepping.before(made.now)
    assert losses[1] > losses[0]


def test_without_rho_it_is_lora_bit_for_bit() -> None:
    made, plain = bench({"rho": 0.0}, optimizer=torch.optim.AdamW), Bench("plain", torch.optim.AdamW)
    for turn in range(4):
        made.step(full(turn))
        plain.step(full(turn))
    assert torch.equal(made.down, plain.down) and torch.equal(made.up, plain.up)


@pytest.mark.parametrize("group", ["all", "expert"])
def test_an_unused_expert_keeps_momentum_norm_and_weights(group: str) -> None:
    made = bench({"group": group}, optimizer=torch.optim.AdamW, decay=0.3)
    made.step(unused(full(0)))  # never used yet: it has no momentum and is not moved
    A, B = made.down, made.up
    made.stepping.begin(made.now)
    assert torch.equal(made.down[1], A[1]) and not torch.equal(made.down[0], A[0])
    made.stepping.skip(made.now)
    made.step(full(1))
    A, B, kept = made.down, made.up, {name: value.clone() for name, value in made.state.items()}
    made.step(unused(full(2)))
    assert torch.equal(made.down[1], A[1]) and torch.equal(made.up[1], B[1])
    rows = slice(2, 4)
    assert torch.equal(made.state["v_lora_A"][rows], kept["v_lora_A"][rows])
    assert torch.equal(made.state["v_lora_B"][:, rows], kept["v_lora_B"][:, rows])
    assert not torch.equal(made.state["v_lora_A"], kept["v_lora_A"])


def test_a_skipped_step_puts_weights_back_and_keeps_what_is_kept() -> None:
    made = bench()
    made.step(full(0))
    A, B, kept = made.down, made.up, {name: value.clone() for name, value in made.state.items()}
    made.stepping.begin(made.now)
    assert not torch.equal(made.up, B)
    made.stepping.skip(made.now)
    assert torch.equal(made.down, A) and torch.equal(made.up, B)
    tiny.assert_same(made.state, kept)


def run(out: Path, spoiled: tuple[int, ...] = (), limit: int = 10, **training: Any) -> Any:
    made = trainer(out, METEORA, **training)
    made.optim, made.max_skipped_steps = MGPO(rho=0.3), limit

    def spoil(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output * float("nan") if made.is_in_train and made.state.global_step + 1 in spoiled else output

    routed_layers(made.model)[0].register_forward_hook(spoil)
    return made


def factors(made: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in tiny.trainable(made.model).items() if ".experts." in name}


def test_a_checkpoint_holds_the_weights_themselves_and_a_run_goes_on_from_it(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", max_steps=3, save_strategy="steps", save_steps=2)
    whole.train()
    kept = load_file(tmp_path / "whole" / "checkpoint-2" / "pairs.safetensors")
    assert {name.rpartition("/")[2] for name in kept} == {"n", "v_lora_A", "v_lora_B"}
    rest = run(tmp_path / "whole", max_steps=3)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    tiny.assert_same(factors(rest), factors(whole))


def test_steps_that_are_skipped_and_a_run_that_ends_by_them_leave_the_weights_of_the_last_one(tmp_path: Path) -> None:
    made = run(tmp_path, spoiled=(2, 3), limit=2, max_steps=4, save_strategy="steps", save_steps=1)
    with pytest.raises(MoeloraError, match="training ended: step 3 skipped"):
        made.train()
    found = factors(made)
    for step in (1, 2):
        tiny.assert_same(found, loaded(made, tmp_path / f"checkpoint-{step}"))


def loaded(made: Any, folder: Path) -> dict[str, Tensor]:
    """The experts' tensors of a checkpoint, in place of the model's."""
    restore(made.model, folder)
    return factors(made)


def test_experts_that_share_a_are_one_group_or_refused() -> None:
    adapter = {"router": "softmax", "experts": {"num_experts": 2, "name": "hydra"}}
    recipe = {"adapter": adapter, "training": {"output_dir": "out"}}
    check_recipe({**recipe, "optim": "mgpo"})
    with pytest.raises(ConfigError, match=r"group: expert, and experts 'hydra' share A; take group: all"):
        check_recipe({**recipe, "optim": {"name": "mgpo", "group": "expert"}})
