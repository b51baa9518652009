"""GGPO: forwards in training are those of a noisy weight, and nothing else is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.model.record import routed_layers
from moelora.ops.noise import sample
from moelora.optim.ggpo import GGPO
from moelora.recipe import check_recipe
from moelora.train.engine import Engine
from moelora.train.stepping import Stepping
from tests import tiny
from tests.optim.bench import SCALE, WIDE, Bench, full, unused
from tests.train.test_trainer import METEORA, trainer

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
X = torch.randn(6, WIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def bench(spec: dict[str, Any] | None = None, **more: Any) -> Bench:
    made = Bench({"name": "ggpo", "sigma": 0.4, "beta": 0.2, **(spec or {})}, **more)
    made.model.train()
    return made


def output(made: Bench) -> Tensor:
    with torch.no_grad():
        return made.model(X)


def noise_in(made: Bench) -> Tensor:
    """What is in the output of a training forward and not in that of an evaluation."""
    noisy = output(made)
    made.model.eval()
    clean = output(made)
    made.model.train()
    return noisy - clean


@pytest.mark.parametrize("law", ["additive", "port"])
def test_the_noise_of_a_step_is_that_of_the_weight_and_of_the_last_gradient(law: str) -> None:
    made = bench({"law": law})
    W, d = made.layer.base_layer.weight.detach(), None
    for turn in range(4):
        made.stepping.begin(made.now)
        if d is None:
            assert not noise_in(made).any()
        else:
            long = W.norm(dim=1)
            tau = (0.16 * long**2 + 0.04 * d**2).sqrt() if law == "additive" else 0.4 * long + 0.2 * d**2
            tau = tau / WIDE**0.5
            deviation, seed = made.layer.noise
            torch.testing.assert_close(deviation, tau, **CLOSE)
            torch.testing.assert_close(noise_in(made), X @ sample(tau, WIDE, seed).double().t(), rtol=1e-6, atol=1e-6)
            assert torch.equal(output(made), output(made)), "one draw for all micro-batches"
        dA, dB = made.gradients(full(turn))
        d = SCALE * (made.up @ dA + dB @ made.down).sum(0)
        d = d.norm(dim=1)
        made.step(full(turn))
        assert made.layer.noise is None


def test_every_step_and_layer_has_a_draw_of_its_own() -> None:
    made = bench()
    made.step(full(0))
    draws = []
    for index in (0, 0, 1):
        made.stepping.begin(made.now)
        draws.append(made.layer.noise[1])
        made.stepping.skip(made.now)
        made.steps += 1 if index == 0 else 0
    model = tiny.adapted("llama", "meteora").train()
    stepping = Stepping(model, Engine(model, model, torch.optim.SGD(tiny.trainable(model).values())), made.method)
    model(**tiny.batch()).loss.backward()
    stepping.before(made.now)
    stepping.begin(made.now)
    draws += [layer.noise[1] for layer in routed_layers(model)[1:]]
    assert len(set(draws)) == len(draws)


def test_the_step_itself_is_torchs_from_the_gradient_as_it_is() -> None:
    made, plain = bench(optimizer=torch.optim.AdamW), Bench("plain", torch.optim.AdamW)
    for turn in range(3):
        made.step(full(turn))
        plain.step(full(turn))
    assert torch.equal(made.down, plain.down) and torch.equal(made.up, plain.up)
    made.step(unused(full(3)))
    plain.step(unused(full(3)))
    assert torch.equal(made.up, plain.up)


def test_without_sigma_and_beta_it_is_lora() -> None:
    made = bench({"sigma": 0.0, "beta": 0.0})
    made.step(full(0))
    made.stepping.begin(made.now)
    assert not noise_in(made).any()


def test_a_skipped_step_ends_the_noise() -> None:
    made = bench()
    made.step(full(0))
    made.stepping.begin(made.now)
    assert made.layer.noise is not None
    made.stepping.skip(made.now)
    assert made.layer.noise is None


@pytest.mark.parametrize("method", ["meteora", "mixlora"])
def test_recomputation_sees_the_same_noise(method: str) -> None:
    found = []
    for recomputed in (False, True):
        model = tiny.adapted("llama", method).train()
        if recomputed:
            tiny.checkpointing(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.SGD(tiny.trainable(model).values(), lr=0.1)
        stepping = Stepping(model, Engine(model, model, optimizer), GGPO(sigma=0.3))
        losses = []
        for _ in range(2):
            stepping.begin(Bench("plain").now)
            model.zero_grad()
            loss = model(**tiny.batch()).loss
            loss.backward()
            losses.append(loss.item())
            if len(losses) == 1:
                stepping.before(Bench("plain").now)
        found.append((losses, tiny.gradients(model)))
    assert found[0][0] == found[1][0] and found[0][0][0] != found[0][0][1]
    tiny.assert_same(found[0][1], found[1][1])


def test_the_base_model_alone_has_no_noise() -> None:
    made = bench()
    made.step(full(0))
    made.stepping.begin(made.now)
    made.layer.port.enabled = False
    torch.testing.assert_close(output(made), made.layer.base_layer(X).detach())


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run(**training: Any) -> Any:
        made = trainer(tmp_path, METEORA, max_steps=3, **training)
        made.optim = GGPO(sigma=0.2)
        return made

    whole = run(save_strategy="steps", save_steps=2)
    whole.train()
    rest = run()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    one, two = (dict(tiny.trainable(made.model)) for made in (whole, rest))
    tiny.assert_same(one, two)
    assert all(layer.noise is None for layer in routed_layers(whole.model))


def test_experts_that_are_no_pairs_are_refused() -> None:
    adapter = {"router": "comol", "experts": {"num_experts": 2, "name": "core"}}
    with pytest.raises(ConfigError, match=r"optim ggpo reckons with experts that are pairs B A .*'core'"):
        check_recipe({"adapter": adapter, "optim": "ggpo", "training": {"output_dir": "out"}})
