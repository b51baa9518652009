"""Nothing between backward and step."""

from __future__ import annotations

import torch

from moelora.core.step import Now
from moelora.optim.plain import Plain
from moelora.train.engine import Engine
from moelora.train.stepping import Stepping
from tests import tiny


def test_gradients_stay_as_they_are() -> None:
    model = tiny.adapted("llama", "meteora").train()
    trained = [p for p in model.parameters() if p.requires_grad]
    stepping = Stepping(model, Engine(model, model, torch.optim.SGD(trained, lr=0.1)), Plain())
    model(**tiny.batch()).loss.backward()
    before = [p.grad.clone() for p in trained]
    stepping.before(Now(0, 1, 0.1))
    assert all(torch.equal(p.grad, old) for p, old in zip(trained, before, strict=True)) and not stepping.tensors()
