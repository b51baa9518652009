"""LoRA-Mixer: the formula in its three modes, and its invariants (L1 to L7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError, DataError
from moelora.model.record import routed_layers
from tests import tiny

ALPHA = 8.0
TASK = torch.tensor([0, 2, 1, 3, -1, 2])
TOKENS = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def config(num_experts: int = 4, r: int = 2, **options: Any) -> dict[str, Any]:
    return {
        "router": {"name": "lora_mixer", **options},
        "experts": {"num_experts": num_experts, "r": r, "lora_alpha": ALPHA},
    }


def oracle(layer: Any) -> tiny.Oracle:
    """Equation 4 with the gates of each mode; straight through is written with an explicit stop of the gradient."""
    router, r, E = layer.router, layer.experts.r, layer.experts.num_experts

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(x.shape[0]):
            p = (w["Wg"] @ x[t]).exp() / (w["Wg"] @ x[t]).exp().sum()
            if router.routing == "hard":
                g = torch.stack([0 * p[e] + float(TASK[t] == e) for e in range(E)])
            elif router.routing == "soft" and router.training:
                g = p
            else:
                kept = sorted(range(E), key=lambda e, p=p: (-p[e].item(), e))[: router.top_k]
                total = sum(p[e] for e in kept) if router.renorm else 1
                g = torch.stack([p[e] / total if e in kept else 0 * p[e] for e in range(E)])
                if router.training:
                    g = g.detach() + p - p.detach()
            y = w["W"] @ x[t] + w["b"]
            for e in range(E):
                own = slice(e * r, (e + 1) * r)
                y = y + g[e] * (ALPHA / r) * (w["B"][:, own] @ (w["A"][own] @ x[t]))
            rows.append(y)
            gates.append(g)
        return torch.stack(rows), torch.stack(gates)

    return formula


@pytest.mark.parametrize("routing", ["soft", "hard", "straight_through"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("top_k", "renorm"), [(2, True), (2, False), (1, True), (None, True)])
def test_equals_the_formula(routing: str, training: bool, top_k: int | None, renorm: bool) -> None:
    model, layer = tiny.toy(config(routing=routing, top_k=top_k, renorm=renorm))
    model.train(training)
    tiny.assert_layer_equals(model, layer, oracle(layer), task=TASK)


def test_a_labelled_token_trains_its_own_expert_alone() -> None:
    """L1."""
    model, layer = tiny.toy(config(routing="hard"))
    model(TOKENS[:2], task_ids=torch.tensor([2, 2])).square().sum().backward()
    own = torch.zeros(8, dtype=torch.bool)
    own[4:6] = True
    assert (layer.experts.lora_A.grad[~own] == 0).all() and (layer.experts.lora_A.grad[own] != 0).all()
    assert (layer.experts.lora_B.grad[:, ~own] == 0).all() and (layer.experts.lora_B.grad[:, own] != 0).all()
    assert (layer.router.weight.grad == 0).all()

    alone, single = tiny.toy({"router": "single", "experts": {"r": 2, "lora_alpha": ALPHA}})
    with torch.no_grad():
        single.experts.lora_A.copy_(layer.experts.lora_A[own])
        single.experts.lora_B.copy_(layer.experts.lora_B[:, own])
    alone(TOKENS[:2]).square().sum().backward()
    torch.testing.assert_close(single.experts.lora_A.grad, layer.experts.lora_A.grad[own], rtol=1e-12, atol=1e-12)


def test_a_token_of_no_task_is_left_to_the_base() -> None:
    model, layer = tiny.toy(config(routing="hard"))
    assert torch.equal(model(TOKENS, task_ids=torch.full((6,), -1)), layer.base_layer(TOKENS))


def test_all_experts_at_inference_are_the_soft_mixture() -> None:
    """L5."""
    model, _ = tiny.toy(config(top_k=4))
    dense = model(TOKENS)
    assert torch.equal(model.eval()(TOKENS), dense)
    other, _ = tiny.toy(config(top_k=3))
    assert not torch.allclose(other.eval()(TOKENS), dense)


def test_straight_through_sees_the_same_gates_in_training_and_inference() -> None:
    model, layer = tiny.toy(config(routing="straight_through", top_k=2))
    training = tiny.routes(model, x=TOKENS)[0]
    assert ((training.dense() != 0).sum(1) == 2).all()
    assert torch.equal(training.dense(), tiny.routes(model.eval(), x=TOKENS)[0].dense())
    model.train()(TOKENS).square().sum().backward()
    assert (layer.router.weight.grad != 0).all()  # the experts that were not chosen learn too


def test_frozen_experts_leave_only_the_router_to_train() -> None:
    """L7."""
    model = tiny.adapted("llama", "meteora", **{**config(), "experts": {**config()["experts"], "train": "none"}})
    assert all(".router." in name for name in tiny.trainable(model))
    model(**tiny.batch()).loss.backward()
    assert all((grad != 0).any() for grad in tiny.gradients(model).values())


def test_q_k_and_v_share_a_router_and_o_has_its_own() -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = tiny.adapt(tiny.llama(), {**config(), "target_modules": names})
    for block in (0, 1):
        q, k, v, o = (layer.router for layer in routed_layers(model)[4 * block : 4 * block + 4])
        assert q is k is v and o is not q
    assert len({id(layer.router) for layer in routed_layers(model)}) == 4
    apart = tiny.adapt(tiny.llama(), {**config(share=[]), "target_modules": names})
    assert len({id(layer.router) for layer in routed_layers(apart)}) == 8


def test_cross_attention_does_not_share_with_the_decoders_own_tokens() -> None:
    model = tiny.adapt(tiny.t5(), {**config(), "target_modules": ["q", "k", "v"]})
    streams: dict[int, set[str]] = {}
    for layer in routed_layers(model):
        streams.setdefault(id(layer.router), set()).add(layer.site.stream)
    assert all(len(found) == 1 for found in streams.values())


def test_a_shared_router_is_saved_once_and_comes_back(tmp_path: Path) -> None:
    names = ["q_proj", "k_proj", "v_proj"]
    model = tiny.shake(tiny.adapt(tiny.llama(), {**config(), "target_modules": names})).eval()
    moelora.save(model, tmp_path)
    again = moelora.load(tiny.llama(), tmp_path).eval()
    given = tiny.unlabelled(tiny.batch())
    assert torch.equal(again(**given).logits, model(**given).logits)
    assert len({id(layer.router) for layer in routed_layers(again)}) == 2


def test_state_space_projections() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    base = MambaForCausalLM(
        MambaConfig(vocab_size=tiny.VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0)
    )
    model = tiny.shake(tiny.adapt(base, {**config(), "target_modules": ["in_proj", "out_proj"]}))
    model(**tiny.batch(padded=False)).loss.backward()
    assert all((grad != 0).any() for grad in tiny.gradients(model).values())


def test_hard_routing_without_labels() -> None:
    with pytest.raises(DataError, match="lora_mixer routes by task"):
        tiny.toy(config(routing="hard"))[0](TOKENS)
    with pytest.raises(DataError, match="task id 4 at 'lin', but there are 4 experts"):
        tiny.toy(config(routing="hard"))[0](TOKENS, task_ids=torch.full((6,), 4))


def test_more_choices_than_experts() -> None:
    with pytest.raises(ConfigError, match="top_k 3 is more than the 2 experts"):
        tiny.toy(config(num_experts=2))
