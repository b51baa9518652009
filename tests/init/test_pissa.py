"""PiSSA: the leading part of the base weight, in slices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import moelora
from moelora.core.errors import ConfigError
from moelora.core.tape import Site
from moelora.experts.core import Core
from moelora.init.pissa import PiSSA
from moelora.tools.export import export_lora
from tests import tiny
from tests.init.steps import LORA, assert_one_step_alike, layer_of, ours, parts, peft, weight_of


@pytest.mark.parametrize(("out", "wide"), [(12, 9), (9, 12)])
def test_every_expert_is_its_slice_of_the_spectrum(out: int, wide: int) -> None:
    W = weight_of(out, wide)
    experts, start = layer_of(W, num_experts=3, r=3, scale=0.5)
    PiSSA()(experts, start)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    for e, part in enumerate(parts(experts)):
        k = slice(3 * e, 3 * e + 3)
        torch.testing.assert_close(part, U[:, k] @ S[k].diag() @ V[k], rtol=1e-12, atol=1e-12)
        A, B = experts.lora_A[k], experts.lora_B[:, k]
        torch.testing.assert_close(A @ A.t(), (S[k] / 0.5).diag(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(B.t() @ B, (S[k] / 0.5).diag(), rtol=1e-12, atol=1e-12)


def test_what_stays_frozen_is_as_large_as_the_next_singular_value() -> None:
    W = weight_of(12, 9)
    experts, start = layer_of(W, r=4)
    PiSSA()(experts, start)
    left = torch.linalg.matrix_norm(W - parts(experts)[0], 2)
    torch.testing.assert_close(left, torch.linalg.svdvals(W)[4], rtol=1e-12, atol=1e-12)


def test_all_experts_may_start_from_the_same_directions() -> None:
    W = weight_of(6, 5)
    experts, start = layer_of(W, num_experts=4, r=3)
    alone, _ = layer_of(W, r=3)
    PiSSA(experts="same")(experts, start)
    PiSSA()(alone, start)
    for part in parts(experts):
        assert torch.equal(part, parts(alone)[0])


def test_the_fast_decomposition_is_close_and_leaves_the_random_state_alone() -> None:
    decaying = torch.logspace(1, -3, 20, dtype=torch.float64).diag()
    W = torch.linalg.qr(weight_of(30, 20))[0] @ decaying @ torch.linalg.qr(weight_of(24, 20, 4))[0].t()
    exact, start = layer_of(W, r=5)
    PiSSA()(exact, start)
    state = torch.get_rng_state()
    for _ in range(2):
        fast, _ = layer_of(W, r=5)
        PiSSA(niter=16)(fast, start)
        torch.testing.assert_close(parts(fast), parts(exact), rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_starts_and_trains_as_pefts() -> None:
    assert_one_step_alike(ours("pissa"), peft("pissa"))


def test_a_trained_one_is_saved_and_exported_exactly(tmp_path: Path) -> None:
    model = ours("pissa")
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**tiny.batch()).loss.backward()
    sgd.step()
    moelora.save(model.eval(), tmp_path / "own")
    export_lora(model, tmp_path / "plain")
    own = moelora.load(tiny.llama(), tmp_path / "own").eval()
    plain = PeftModel.from_pretrained(tiny.llama(), tmp_path / "plain").eval()
    assert plain.peft_config["default"].r == 2 * LORA["r"]
    with torch.no_grad():
        expected = model(**tiny.batch()).logits
        assert torch.equal(own(**tiny.batch()).logits, expected)
        torch.testing.assert_close(plain(**tiny.batch()).logits, expected, rtol=1e-5, atol=1e-5)
        with moelora.disabled(model):
            assert not torch.allclose(model(**tiny.batch()).logits, expected, atol=1e-2)


def test_what_it_cannot_start_is_refused() -> None:
    experts, start = layer_of(weight_of(7, 30), num_experts=4, r=2)
    said = r"init pissa takes 8 directions \(slices: 4 experts, r 2\) and 'layer' has 7; choose init.experts: same"
    with pytest.raises(ConfigError, match=said):
        PiSSA()(experts, start)
    experts, start = layer_of(weight_of(7, 30), num_experts=4, r=8)
    with pytest.raises(ConfigError, match=r"takes 8 directions \(same: 4 experts, r 8\).*choose a lower experts.r$"):
        PiSSA(experts="same")(experts, start)
    with pytest.raises(ConfigError, match=r"init pissa sets lora_A and lora_B; experts 'core' train core, lora_A, "):
        PiSSA()(Core(Site("layer", 0, 8, 8), 2, 2), start)
