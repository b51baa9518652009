"""A layer whose weight is used and which is never called: its experts would have no effect, so that is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moelora
from moelora.core.errors import MoeloraError
from tests import tiny

CONFIG = {"router": "softmax", "experts": {"num_experts": 2, "r": 2}}
READS = "the model reads the weight of"


class ByHand(nn.Module):
    """One layer called, one whose weight is used by hand, and one whose dtype alone is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.used, self.looked = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, by_hand: bool = True) -> Tensor:
        y = self.called(x.to(self.looked.weight.dtype))
        y = F.linear(y, self.used.weight, self.used.bias) if by_hand else self.used(y)
        return y + self.looked(x)


def adapt(model: Any, *targets: str) -> Any:
    return tiny.shake(tiny.adapt(model, {**CONFIG, "target_modules": list(targets)}))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_weight_used_by_hand_is_named_at_the_first_forward(training: bool, grad: bool) -> None:
    model = adapt(ByHand(), "called", "used", "looked").train(training)
    with torch.set_grad_enabled(grad), pytest.raises(MoeloraError, match=f"{READS} 'used' without calling") as caught:
        model(torch.ones(2, 4))
    assert "exclude_modules: [used]" in str(caught.value) and "(1 such layers)" in str(caught.value)
    assert model.moelora.port.tape is None


def test_looking_at_a_layer_that_is_called_is_fine() -> None:
    for targets in (("called", "looked"), ("looked",)):
        assert adapt(ByHand(), *targets)(torch.ones(2, 4)).isfinite().all()


def test_each_forward_is_judged_by_itself() -> None:
    model = adapt(ByHand(), "called", "used")
    assert model(torch.ones(2, 4), by_hand=False).isfinite().all()
    with pytest.raises(MoeloraError, match=READS):
        model(torch.ones(2, 4))
    assert model(torch.ones(2, 4), by_hand=False).isfinite().all()


def test_the_disabled_model_may_do_as_it_likes() -> None:
    model = adapt(ByHand(), "called", "used")
    with moelora.disabled(model):
        assert model(torch.ones(2, 4)).isfinite().all()


def test_looking_from_outside_a_forward_is_nobodys_business() -> None:
    model = adapt(ByHand(), "called", "used")
    assert model.used.weight.shape == (4, 4)
    assert model(torch.ones(2, 4), by_hand=False).isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_mamba(training: bool) -> None:
    model = adapt(tiny.mamba(), "in_proj", "x_proj", "dt_proj", "out_proj").train(training)
    with pytest.raises(MoeloraError, match=rf"{READS} 'backbone\.layers\.0\.mixer\.dt_proj'.*\(2 such layers\)"):
        model(**tiny.batch())
    everything = tiny.adapt(tiny.mamba(), {**CONFIG, "target_modules": "all-linear"})
    with pytest.raises(MoeloraError, match=r"exclude_modules: \[dt_proj\]"):
        everything(**tiny.batch())


def test_mamba_without_that_layer_learns() -> None:
    model = tiny.shake(
        tiny.adapt(tiny.mamba(), {**CONFIG, "target_modules": "all-linear", "exclude_modules": ["dt_proj"]})
    )
    model(**tiny.batch()).loss.backward()
    assert all((grad != 0).any() for grad in tiny.gradients(model).values())


@pytest.mark.parametrize("kind", list(tiny.MODELS))
@pytest.mark.parametrize("training", [True, False])
def test_models_that_look_at_a_dtype_are_no_fault(kind: str, training: bool) -> None:
    # T5 asks wo for its weight's dtype before it calls it.
    model = tiny.adapted(kind, "softmax", target_modules="all-linear").train(training)
    assert model(**tiny.given(kind)).logits.isfinite().all()
    tiny.checkpointing(model.train())(**tiny.given(kind)).loss.backward()
    assert all(grad.isfinite().all() for grad in tiny.gradients(model).values())


def test_a_block_of_experts_counts_as_called() -> None:
    for kind in tiny.FFN_TARGETS:
        model = tiny.adapted(kind, "mixlora")
        assert model(**tiny.given(kind)).loss.isfinite()
