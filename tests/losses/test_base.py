"""What losses share: weights, means over real tokens, and the check that the router gives what they read."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moelora
from moelora.core.errors import ConfigError, MoeloraError
from moelora.core.methods import Methods
from moelora.losses.base import Loss, token_entropy, token_mean
from moelora.losses.z import Z
from tests import tiny


def test_mean_over_all_tokens() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert token_mean(values, None).tolist() == [2, 4]
    assert token_mean(values[:, 0], None).item() == 2


def test_mean_over_real_tokens() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]])
    assert token_mean(values, torch.tensor([True, True, False])).tolist() == [2, 4]


def test_mean_over_no_tokens_is_zero_with_a_graph() -> None:
    values = torch.randn(3, 2, requires_grad=True)
    for some, mask in ((values, torch.zeros(3).bool()), (values[:0], None)):
        mean = token_mean(some, mask)
        assert mean.tolist() == [0, 0] and mean.requires_grad


def test_token_entropy_is_in_nats_and_safe_at_zero() -> None:
    probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    entropy = token_entropy(probs)
    assert entropy.tolist() == pytest.approx([math.log(2), 0])
    assert torch.autograd.grad(entropy.sum(), probs)[0].isfinite().all()


@pytest.mark.parametrize(("reads", "method"), [("layers", "__call__"), ("logits", "of_logits")])
def test_a_loss_without_its_term_cannot_be_made(reads: str, method: str) -> None:
    other = {"__call__": "of_logits", "of_logits": "__call__"}[method]
    made = type("Mine", (Loss,), {"reads": reads, other: lambda *_: None})
    with pytest.raises(TypeError, match=f"Mine reads {reads} and has no {method}"):
        made(1.0)


def test_negative_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="must not be negative, found -1"):
        Z(-1)


@pytest.mark.parametrize("weight", [-0.1, "0.1", None, True, float("nan")])
def test_a_weight_that_is_no_number_of_at_least_zero_leaves_the_model_untouched(weight: Any) -> None:
    model = tiny.llama()
    cls = type(model)
    with pytest.raises(ConfigError, match=r"losses"):
        moelora.adapt(model, {**tiny.METHODS["smora"], "losses": {"z": {"weight": weight}}})
    assert type(model) is cls


def test_a_loss_without_a_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"losses\.z\.weight: expected a number of at least 0, found None"):
        moelora.adapt(tiny.llama(), {**tiny.METHODS["smora"], "losses": {"z": {}}})


def test_unknown_loss_and_unknown_option() -> None:
    for losses, message in (({"balnce": 0.1}, "did you mean 'balance'"), ({"z": {"weight": 1, "k": 2}}, "key 'k'")):
        with pytest.raises(ConfigError, match=message):
            moelora.adapt(tiny.llama(), {**tiny.METHODS["smora"], "losses": losses})


@pytest.mark.parametrize(("name", "reads"), [("balance", "probs"), ("z", "logits"), ("supervised_gate", "logits")])
def test_a_loss_that_reads_what_the_router_does_not_give(name: str, reads: str) -> None:
    model = tiny.llama()
    keys, cls = list(model.state_dict()), type(model)
    message = rf"losses\.{name} reads {reads}, which neither router 'single' nor experts 'lora' have"
    with pytest.raises(ConfigError, match=message):
        moelora.adapt(model, {"router": "single", "losses": {name: 0.1}})
    assert type(model) is cls and list(model.state_dict()) == keys


def test_every_shipped_loss_says_what_it_needs() -> None:
    methods = Methods()
    known = {"logits", "probs", "core", "own_A", "lora_A", "lora_B", "sigma"}
    for name in methods.names("losses"):
        assert set(methods.find("losses", name).needs) <= known


def test_the_reported_term_is_the_mean_over_layers() -> None:
    model = tiny.adapted("llama", "smora", losses={"z": 1.0})
    per_layer: list[torch.Tensor] = []

    def observe(view: Any, route: Any) -> None:
        per_layer.append(route.logits.logsumexp(-1).square().mean())

    with moelora.collect(model, observe) as collected:
        model(input_ids=tiny.batch()["input_ids"])
    (terms,) = collected.terms
    assert terms.keys() == {"z"} and terms["z"].dtype == torch.float32
    torch.testing.assert_close(terms["z"], torch.stack(per_layer).mean())


CHATTY = """
from moelora.core.route import Route
from moelora.routers.base import Router


class Chatty(Router):
    def forward(self, x, view):
        view.add("diversity", x.mean())
        return Route(x.new_ones(len(x), self.num_experts), self.num_experts)
"""


def test_a_recorded_term_without_a_weight_is_an_error(tmp_path: Path) -> None:
    plugin = tmp_path / "chatty.py"
    plugin.write_text(CHATTY)
    model = moelora.adapt(tiny.llama(), {"router": "chatty"}, plugins=[plugin], verbose=False).train()
    with pytest.raises(MoeloraError, match=r"term 'diversity' is recorded, but has no weight; add losses: {diversity"):
        model(**tiny.batch())
    with pytest.raises(MoeloraError, match="'diversity' is recorded"), moelora.collect(model):
        model(**tiny.batch())
    assert model.eval()(**tiny.batch()).loss.isfinite()


class Idle(nn.Module):
    """A model that never calls one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_a_weight_without_a_term_is_an_error() -> None:
    config = {**tiny.METHODS["meteora"], "losses": {"z": 0.1}, "target_modules": ["idle"]}
    model = tiny.adapt(Idle(), config).train()
    with pytest.raises(MoeloraError, match=r"losses\.z has a weight, but no adapted layer of this model took part"):
        model(torch.randn(2, 5))
    model.eval()(torch.randn(2, 5))


def test_all_layers_share_one_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"balance": 0.1, "specialisation_balance": {"weight": 0.1, "entropy_coef": 0.3}}
    model = tiny.adapted("llama", "meteora", losses=losses).train()
    alone = model(**tiny.batch()).loss
    sizes: list[int] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: sizes.append(len(flat)))
    torch.testing.assert_close(model(**tiny.batch()).loss, alone)
    units, layers = model.moelora.config.experts.num_experts, len(model.moelora.sites)
    assert sizes == [2 * layers * (units + 1)] and layers > 1


TWO_PROCESSES = """
import os
import sys
import torch
from torch import distributed
from moelora.core.route import Route, top_k
from moelora.core.tape import Site, Tape
from moelora.core.term import settled
from moelora.losses.balance import Balance
from moelora.losses.specialisation_balance import SpecialisationBalance

child = os.fork()  # one import of torch for both
rank = 1 if child else 0
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
made = torch.Generator().manual_seed(1)
logits = torch.randn(4, 5, 3, generator=made, dtype=torch.float64)
some = (torch.rand(4, 5, generator=made) < 0.6).double()
losses = Balance(1.0), SpecialisationBalance(1.0, entropy_coef=0.3)


def term(of, mask):
    probs = of.flatten(0, 1).softmax(-1)
    view = Tape(mask={"input": mask.bool()}).view(Site("site", 0, 5, 7), mask.shape)
    terms = [loss(Route(probs[:, :1], 3, top_k(probs, 1), probs=probs), view) for loss in losses]
    return sum(settled(terms, torch.is_grad_enabled() and distributed.is_initialized()))


found = []
for mask, own in ((torch.ones(4, 5), [slice(0, 2), slice(2, 4)]), (some, [slice(0, 3), slice(3, 4)])):
    mine = logits.clone().requires_grad_()
    share = mask[own[rank]].sum().double() / mask.sum()
    (2 * share * term(mine[own[rank]], mask[own[rank]])).backward()  # as a trainer weighs a process's batch
    distributed.all_reduce(mine.grad)
    found.append((mask, mine.grad / 2))
with torch.no_grad():  # evaluation waits for nobody
    if rank == 0:
        term(logits, some)
distributed.destroy_process_group()
for mask, averaged in found:
    whole = logits.clone().requires_grad_()
    term(whole, mask).backward()
    torch.testing.assert_close(averaged, whole.grad, rtol=1e-12, atol=1e-14)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_gradients_averaged_over_processes_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """First with equally many tokens each, then three rows against one, with padding, by their share of all tokens."""
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "store")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
