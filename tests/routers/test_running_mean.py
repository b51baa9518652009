"""The running mean that sequence-level routers share: over a sequence, in a cache, in packed rows, with padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError, MoeloraError
from moelora.routers.base import running_mean
from tests import tiny

NEW = 8
ROUTERS = ["smear", "mole"]


def values(rows: int, length: int, width: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows * length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow(rows: Tensor, mask: Tensor, positions: Tensor, whole: bool = False) -> Tensor:
    """The definition, token by token: rows [B, S, n], mask and positions [B, S]."""
    found = torch.zeros_like(rows)
    for b in range(rows.shape[0]):
        for t in range(rows.shape[1]):
            starts = [s for s in range(rows.shape[1]) if positions[b, s] == 0 and mask[b, s]]
            first = max([s for s in starts if s <= t], default=0)
            end = min([s for s in starts if s > t], default=rows.shape[1]) if whole else t + 1
            seen = [rows[b, s] for s in range(first, end) if mask[b, s]]
            found[b, t] = sum(seen) / len(seen) if seen else 0
    return found


MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
PLAIN = torch.arange(6).expand(4, 6)


@pytest.mark.parametrize("pool", ["prefix", "sequence"])
@pytest.mark.parametrize("positions", [None, PLAIN[:1], PLAIN, POSITIONS], ids=["none", "one", "plain", "packed"])
@pytest.mark.parametrize("mask", [torch.ones(4, 6), MASK], ids=["full", "padded"])
def test_equals_the_definition(pool: Any, positions: Tensor | None, mask: Tensor) -> None:
    x = values(4, 6)
    found = running_mean(x, tiny.view((4, 6), mask, positions=positions), pool)
    order = PLAIN if positions is None else positions.expand(4, 6)
    if positions is None:
        order = order + 1  # nothing starts anew
    expected = slow(x.view(4, 6, 3), mask, order, pool == "sequence")
    torch.testing.assert_close(found.view(4, 6, 3), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("positions", [None, POSITIONS])
def test_pieces_in_a_cache_equal_the_whole(positions: Tensor | None) -> None:
    x, whole = values(4, 6), tiny.view((4, 6), MASK, positions=positions)
    expected = running_mean(x, whole).view(4, 6, 3)
    past: dict[int, Tensor] = {}
    for start, end in ((0, 3), (3, 4), (4, 6)):
        part = None if positions is None else positions[:, start:end]
        view = tiny.view((4, end - start), MASK[:, start:end], positions=part, past=past)
        found = running_mean(x.view(4, 6, 3)[:, start:end].reshape(-1, 3), view)
        torch.testing.assert_close(found.view(4, end - start, 3), expected[:, start:end], rtol=1e-13, atol=1e-13)
        past = dict(view.tape.kept)
        assert past[0].shape == (4, 4) and not past[0].requires_grad


def test_what_was_kept_is_left_behind_by_a_new_sequence() -> None:
    past = {0: torch.tensor([[100.0, 1.0], [100.0, 1.0]], dtype=torch.float64)}
    view = tiny.view((2, 1), None, positions=torch.tensor([[0], [7]]), past=past)
    assert running_mean(torch.tensor([[2.0], [2.0]], dtype=torch.float64), view).tolist() == [[2.0], [51.0]]
    assert view.tape.kept[0].tolist() == [[2.0, 1.0], [102.0, 2.0]]


def test_padding_may_hold_anything() -> None:
    x = values(2, 3)
    x[[0, 5]] = torch.nan
    x.requires_grad_()
    found = running_mean(x, tiny.view((2, 3), torch.tensor([[0, 1, 1], [1, 1, 0]])))
    assert found.isfinite().all() and (found[0] == 0).all()
    found.sum().backward()
    assert x.grad.isfinite().all() and (x.grad[[0, 5]] == 0).all()


@pytest.mark.parametrize("shape", [(4,), (2, 1, 2), ()])
def test_tokens_that_are_no_sequence_stand_alone(shape: tuple[int, ...]) -> None:
    x, view = values(1, 4 if shape else 1), tiny.view(shape)
    assert torch.equal(running_mean(x, view), x) and not view.tape.kept


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_tokens(shape: tuple[int, int]) -> None:
    assert running_mean(torch.zeros(0, 3), tiny.view(shape)).shape == (0, 3)


def test_long_packed_rows_stay_exact_in_float32() -> None:
    x = 1000 + torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    view = tiny.view((1, 4000), None, positions=(torch.arange(4000) % 1000).unsqueeze(0))
    expected = x.double().view(4, 1000, 1).cumsum(1) / torch.arange(1, 1001).view(1, -1, 1)
    found = running_mean(x, view)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.view(4000, 1).float(), rtol=1e-7, atol=0)


def test_half_precision_is_pooled_in_float32() -> None:
    assert running_mean(values(2, 3).bfloat16(), tiny.view((2, 3))).dtype == torch.float32


# Models whose router uses it


def model_for(router: str, experts: str = "lora", kind: str = "llama", **options: Any) -> Any:
    """float64, so that two orders of summation never decide a token."""
    more = {"router": {"name": router, **options}, "experts": {"name": experts, "num_experts": 4, "r": 4}}
    model = sharp(tiny.adapted(kind, router, dtype=torch.float64, noise=0.5, **more).eval())
    if kind == "t5":  # with its embedding as output head, an untrained T5 only repeats itself
        model.lm_head.weight = torch.nn.Parameter(torch.randn(tiny.VOCAB, tiny.HIDDEN, dtype=torch.float64))
    return model


@torch.no_grad()
def sharp(model: Any) -> Any:
    """Gates far from uniform, so that a wrong mean shows."""
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            parameter.mul_(10)
    return model


def prompts() -> dict[str, Tensor]:
    """Three rows, padded on the left by 0, 2 and 4 tokens."""
    given = tiny.unlabelled(tiny.batch(rows=3, length=6, padded=False))
    for row, cut in enumerate([0, 2, 4]):
        given["attention_mask"][row, :cut] = 0
        given["input_ids"][row, :cut] = 0
    return given


def generated(model: Any, given: dict[str, Tensor], **how: Any) -> Tensor:
    torch.manual_seed(4)
    return model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, **how)


STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 10},
    "beams": {"do_sample": False, "num_beams": 2},
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("experts", ["lora", "merged"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_cache_changes_nothing(router: str, experts: str, strategy: str) -> None:
    model, how = model_for(router, experts), STRATEGIES[strategy]
    cached = generated(model, prompts(), use_cache=True, **how)
    assert torch.equal(cached, generated(model, prompts(), use_cache=False, **how))


@pytest.mark.parametrize("router", ROUTERS)
def test_logits_of_one_cached_step_are_those_of_the_whole(router: str) -> None:
    model, given = model_for(router), prompts()
    with torch.no_grad():
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        whole = model(**given).logits[:, 4:]
        first = model(**{key: value[:, :4] for key, value in given.items()})
        later = {"attention_mask": given["attention_mask"], "past_key_values": first.past_key_values}
        later |= {key: given[key][:, 4:] for key in ("input_ids", "position_ids")}
        torch.testing.assert_close(model(**later).logits, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_static_cache_changes_nothing(router: str) -> None:
    model = model_for(router)
    assert torch.equal(generated(model, prompts(), cache_implementation="static"), generated(model, prompts()))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_padded_prompt_continues_as_it_does_alone(router: str, kind: str) -> None:
    model, given = model_for(router, kind=kind), prompts()
    together = generated(model, given)[2, -NEW:]
    alone = generated(model, {key: value[2:, 4:] for key, value in given.items()})[0, -NEW:]
    assert torch.equal(together, alone)


@pytest.mark.parametrize("router", ROUTERS)
def test_packed_rows_equal_separate_rows(router: str) -> None:
    model = model_for(router)
    ids = tiny.batch(rows=2, length=6, padded=False)["input_ids"]
    packed = {"input_ids": ids.view(1, 12), "position_ids": torch.arange(6).repeat(2).unsqueeze(0), "use_cache": False}
    with torch.no_grad():
        expected = model(input_ids=ids).logits.view(1, 12, -1)
        torch.testing.assert_close(model(**packed).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("router", ROUTERS)
def test_later_tokens_and_other_rows_are_not_seen(router: str) -> None:
    model, ids = model_for(router), tiny.batch(padded=False)["input_ids"]
    changed = ids.clone()
    changed[1:], changed[0, 4:] = 5, 6
    with torch.no_grad():
        before, after = model(input_ids=ids).logits[0], model(input_ids=changed).logits[0]
    torch.testing.assert_close(before[:4], after[:4], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(before[4:], after[4:])


@pytest.mark.parametrize("router", ROUTERS)
def test_earlier_tokens_are_seen(router: str) -> None:
    made = tiny.toy({"router": router, "experts": {"num_experts": 4, "r": 2}})
    model, x = sharp(made[0]), values(1, 4, 5).view(1, 4, 5)
    moved = torch.cat([-x[:, :1], x[:, 1:]], 1)
    one, two = tiny.routes(model, x=x)[0].weight, tiny.routes(model, x=moved)[0].weight
    assert ((one - two).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_the_whole_sequence_has_one_gate(router: str) -> None:
    model = sharp(tiny.adapted("bert", router, router={"name": router, "pool": "sequence"}))
    batch = tiny.batch("bert")
    mask = batch["attention_mask"].bool()
    for route in tiny.routes(model, **batch):
        if route.weight.shape[0] == mask.numel():  # the pooler sees one state per row
            for row, keep in zip(route.weight.view(*mask.shape, -1), mask, strict=True):
                assert torch.equal(row[keep], row[keep][:1].expand_as(row[keep]))


@pytest.mark.parametrize("router", ROUTERS)
def test_the_whole_sequence_is_refused_in_a_cache_and_in_decoders(router: str) -> None:
    model = model_for(router, pool="sequence")
    with pytest.raises(ConfigError, match="cannot decode with a cache; use pool: prefix"):
        generated(model, prompts(), use_cache=True)
    model = tiny.adapted("t5", router, router={"name": router, "pool": "sequence"})
    with pytest.raises(ConfigError, match=r"decoder\.block.* is for encoders"):
        model(**tiny.batch("t5"))


@pytest.mark.parametrize("router", ROUTERS)
def test_assisted_decoding_is_refused(router: str) -> None:
    model, given = model_for(router), {key: value[:1] for key, value in prompts().items()}
    with pytest.raises(MoeloraError, match="cannot forget tokens"):
        generated(model, {**given, "input_ids": given["input_ids"] * 0 + 5}, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("losses", [{}, {"balance": 0.5, "z": 0.1}])
def test_checkpointing_changes_no_gradient(router: str, losses: dict[str, float]) -> None:
    plain = tiny.adapted("llama", router, losses=losses)
    saving = tiny.checkpointing(tiny.adapted("llama", router, losses=losses))
    for model in (plain, saving):
        model(**tiny.batch()).loss.backward()
    tiny.assert_same(tiny.gradients(plain), tiny.gradients(saving))


@pytest.mark.parametrize("router", ROUTERS)
def test_an_adapter_without_the_router_is_the_base(router: str) -> None:
    model, batch = tiny.adapted("llama", router), tiny.batch()
    with moelora.disabled(model):
        assert torch.equal(model(**batch).logits, tiny.llama()(**batch).logits)
