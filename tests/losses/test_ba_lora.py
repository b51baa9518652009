"""BA-LoRA: three terms of the logits, against their formulas; which tokens, which base, which passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import DataError, MoeloraError
from moelora.losses.ba_lora import BALoRA, leading
from tests import tiny

PARTS = {"consistency": 0.4, "diversity": 0.3, "svd": 0.2}


def formula(Z: Tensor, base: Tensor, k: int = 10, T: float = 1.0, top: int | None = None) -> Tensor:
    """The loss of logits [M, V] in float64, every part written out."""
    total = torch.zeros((), dtype=torch.float64)
    for z, z0 in zip(Z, base, strict=True):
        p, p0 = torch.exp(z / T) / torch.exp(z / T).sum(), torch.exp(z0 / T) / torch.exp(z0 / T).sum()
        total = total + PARTS["consistency"] * T * T * (p0 * (p0 / p).log()).sum() / len(Z)
        likely = z.sort(descending=True).values[:top]
        p = torch.exp(likely) / torch.exp(likely).sum()
        total = total + PARTS["diversity"] * (p * p.log()).sum() / len(Z)
    sigma = torch.linalg.svdvals(Z)
    return total - PARTS["svd"] * sigma[:k].sum() / sigma.square().sum().sqrt()


def logits(M: int = 9, V: int = 13, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return 3 * torch.randn(M, V, dtype=torch.float64), 3 * torch.randn(M, V, dtype=torch.float64)


@pytest.mark.parametrize("how", [{}, {"k": 3}, {"temperature": 2.5}, {"top": 4}, {"top": 99, "k": 1}])
def test_value_and_gradient_are_those_of_the_formula(how: Any) -> None:
    Z, base = logits()
    Z.requires_grad_()
    loss = BALoRA(1.0, **PARTS, **how).of_logits(Z, lambda: base)
    expected = formula(Z, base, how.get("k", 10), how.get("temperature", 1.0), how.get("top"))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    ours, theirs = (torch.autograd.grad(value, Z)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_singular_values_of_large_logits_are_near_enough() -> None:
    torch.manual_seed(0)
    Z = torch.randn(60, 12) @ torch.randn(12, 400) + 0.3 * torch.randn(60, 400)
    for k in (1, 5, 10):
        torch.testing.assert_close(leading(Z, k), torch.linalg.svdvals(Z)[:k].sum(), rtol=1e-4, atol=0)


def test_what_must_hold_of_each_part() -> None:
    Z, base = logits()

    def of(part: str, Z: Tensor, **how: Any) -> float:
        parts = {name: float(name == part) for name in PARTS}
        return float(BALoRA(1.0, **parts, **how).of_logits(Z, lambda: base))

    assert of("consistency", base) == pytest.approx(0, abs=1e-12) and of("consistency", Z) > 0
    assert of("consistency", base + 7, temperature=2.0) == pytest.approx(0, abs=1e-12)
    assert of("diversity", torch.zeros_like(Z)) == pytest.approx(-torch.log(torch.tensor(13.0)).item())
    assert -torch.log(torch.tensor(13.0)).item() < of("diversity", Z) < 0
    line = torch.outer(Z[:, 0], Z[0])
    assert of("svd", line, k=1) == pytest.approx(-1) and -1 < of("svd", Z, k=1) < 0
    assert of("svd", 5 * Z, k=3) == pytest.approx(of("svd", Z, k=3))


def test_no_token_is_zero_with_a_graph() -> None:
    Z = torch.randn(3, 5, requires_grad=True)
    value = BALoRA(1.0).of_logits(Z[:0], lambda: Z[:0].detach())
    assert float(value.detach()) == 0 and not torch.autograd.grad(value, Z)[0].any()


def model_with(losses: Any, kind: str = "llama", **more: Any) -> Any:
    return tiny.adapted(kind, "meteora", losses={"ba_lora": losses}, **more).train()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("tokens", ["all", "answers"])
def test_a_model_has_the_term_of_its_tokens_that_count(kind: str, tokens: str) -> None:
    model, given = model_with({"weight": 0.5, "tokens": tokens, **PARTS}, kind), tiny.given(kind)
    out = model(**given)
    out.loss.backward()
    found = tiny.gradients(model)
    model.zero_grad()
    plain = model.eval()(**given)
    with moelora.disabled(model), torch.no_grad():
        base = model(**given).logits
    labels = given["labels"]
    mask = given.get("attention_mask", torch.ones_like(labels)).bool()
    if kind == "t5":
        kept = labels.ne(-100)
    elif tokens == "answers":
        kept = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1).ne(-100) & mask
    else:
        kept = mask
    expected = plain.loss + 0.5 * formula(plain.logits[kept].double(), base[kept].double())
    torch.testing.assert_close(out.loss, expected.float(), rtol=1e-5, atol=1e-6)
    expected.backward()
    for name, gradient in tiny.gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-6)


def test_the_base_runs_only_where_it_is_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[bool] = []
    for losses, expected in (({"weight": 1.0}, [True, False]), ({"weight": 1.0, "consistency": 0.0}, [True])):
        model = model_with(losses)
        monkeypatch.setattr(
            type(model.model), "forward", _counting(type(model.model).forward, passes, lambda m=model: m.moelora.port)
        )
        passes.clear()
        model(**tiny.batch())
        assert passes == expected
        passes.clear()
        model.eval()(**tiny.batch())
        assert passes == [True]
        monkeypatch.undo()


def _counting(forward: Any, passes: list[bool], port: Any) -> Any:
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(port().enabled)
        return forward(self, *args, **kwargs)

    return counted


def test_the_base_is_the_whole_one_after_pissa_too() -> None:
    model = model_with({"weight": 1.0, **PARTS}, init="pissa", noise=0.0)
    with moelora.collect(model) as collected:
        logits = model(**tiny.batch()).logits.detach()
    kept = tiny.batch()["attention_mask"].bool()
    expected = formula(logits[kept].double(), tiny.llama()(**tiny.unlabelled(tiny.batch())).logits[kept].double())
    assert float(collected.terms[0]["ba_lora"]) == pytest.approx(float(expected), rel=1e-4)


def test_checkpointing_changes_no_gradient() -> None:
    losses = {"weight": 1.0, **PARTS}
    plain, again = model_with(losses), tiny.checkpointing(model_with(losses))
    for model in (plain, again):
        model(**tiny.batch()).loss.backward()
    tiny.assert_same(tiny.gradients(plain), tiny.gradients(again))


def test_layers_have_no_part_in_it() -> None:
    model = tiny.adapted("llama", "mixlora", losses={"ba_lora": 1.0, "balance": 0.1}).train()
    with moelora.collect(model) as collected:
        model(**tiny.batch())
    assert set(collected.terms[0]) == {"ba_lora", "balance"}


def test_what_it_cannot_do_is_said() -> None:
    model = model_with({"weight": 1.0, "tokens": "answers"})
    with pytest.raises(DataError, match=r"tokens: answers needs labels"):
        model(**tiny.unlabelled(tiny.batch()))
    with pytest.raises(MoeloraError, match=r"losses\.ba_lora reads the model's logits.*use moelora\.MoeLoraTrainer"):
        model(**tiny.batch(), return_dict=False)
    with pytest.raises(MoeloraError, match=r"gave those of \(3, 1\) for \(3, 7\) tokens; leave out logits_to_keep"):
        model_with(1.0)(**tiny.unlabelled(tiny.batch()), logits_to_keep=1)
