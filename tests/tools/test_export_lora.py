"""One LoRA near a mixture that routes token by token: the fit, and what is measured of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError, DataError
from moelora.model.record import routed_layers
from moelora.tools.export import export_lora
from moelora.tools.export.condense import candidates, predictions, replaced
from moelora.tools.export.measure import measure
from moelora.tools.export.plain import PlainLoRA, constant_gates
from tests import tiny
from tests.adapters import mixture, peft_folder

DEPENDENT = [
    m for m in tiny.METHODS if m not in ("static", "uniform", "single", "task", "task_shared", "lora_mixer_hard")
]
FIT = [tiny.batch(rows=8, length=12, seed=seed) for seed in range(3)]
HELD_OUT = [tiny.batch(rows=8, length=12, seed=seed) for seed in (10, 11)]


def tokens(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Per site (x [T, D], gates [T, G], update [T, O]) of all real tokens, float64; single linear layers only."""
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for batch in batches:
        mask = batch["attention_mask"].bool().reshape(-1)
        routes = tiny.routes(model, **batch)
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [
            layer.register_forward_hook(
                lambda layer, args, out, seen=seen: seen.update(
                    {layer.site.name: (args[0], out - layer.base_layer(args[0]))}
                )
            )
            for layer in routed_layers(model)
        ]
        with torch.no_grad():
            model(**tiny.unlabelled(batch))
        for handle in handles:
            handle.remove()
        for layer, route in zip(routed_layers(model), routes, strict=True):
            x, update = (value.flatten(0, -2)[mask].double() for value in seen[layer.site.name])
            found.setdefault(layer.site.name, []).append((x, route.dense()[mask].double(), update))
    return {path: tuple(torch.cat(part) for part in zip(*parts, strict=True)) for path, parts in found.items()}  # type: ignore[misc]


def relative(lora: PlainLoRA, x: Tensor, update: Tensor) -> float:
    return float((lora(x) - update).norm() / update.norm())


@pytest.mark.parametrize("method", ["softmax_top2", "smora", "hydra"])
def test_least_squares_is_the_best_constant_gate_for_every_rank(method: str) -> None:
    model = tiny.adapted("llama", method).eval()
    fits = candidates(model, FIT)
    for layer in routed_layers(model):
        x, _, update = tokens(model, FIT)[layer.site.name]
        factors = layer.experts.factors()
        A, B = factors.A.detach().double(), (factors.B * factors.scale).detach().double()
        h = x @ (A if B.shape[1] == A.shape[0] else A.repeat(B.shape[1] // A.shape[0], 1)).t()
        each = (h.unsqueeze(1) * B).reshape(-1, B.shape[1])  # [T * O, R]: what every rank adds, a gate of 1
        gates = torch.linalg.lstsq(each, update.reshape(-1, 1)).solution
        best = float((each @ gates - update.reshape(-1, 1)).norm() / update.norm())
        assert relative(fits["least_squares"][layer.site.name], x, update) == pytest.approx(best, rel=1e-5)
        assert fits["least_squares"][layer.site.name].rank == A.shape[0]


def test_least_squares_of_cores_is_the_best_mixture_of_them() -> None:
    model = tiny.adapted("llama", "comol_x").eval()
    fits = candidates(model, FIT)
    for layer in routed_layers(model):
        x, _, update = tokens(model, FIT)[layer.site.name]
        e = layer.experts
        B, scale = e.lora_B.detach().double(), e.scale.double()
        each = torch.stack([(x @ e.lora_A.double().t() @ m.double().t()) @ (B * scale).t() for m in e.core], -1)
        gates = torch.linalg.lstsq(each.detach().reshape(-1, 4), update.reshape(-1, 1)).solution
        best = float((each.detach().reshape(-1, 4) @ gates - update.reshape(-1, 1)).norm() / update.norm())
        lora = fits["least_squares"][layer.site.name]
        assert (lora.rank, relative(lora, x, update)) == (3, pytest.approx(best, rel=1e-5))


def test_average_is_the_layer_at_the_mean_gates_of_real_tokens() -> None:
    for method in ("softmax_top2", "smora", "smear_merged", "comol_x"):
        model = tiny.adapted("llama", method).eval()
        fits = candidates(model, FIT)
        for layer in routed_layers(model):
            x, gates, _ = tokens(model, FIT)[layer.site.name]
            route = moelora.core.route.Route(gates.mean(0, keepdim=True).expand(len(x), -1), gates.shape[1])
            expected = layer.experts(x, lambda *_, route=route: route).detach()
            torch.testing.assert_close(fits["average"][layer.site.name](x), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", DEPENDENT)
def test_least_squares_is_never_worse_than_average_where_it_was_fitted(method: str) -> None:
    model = tiny.adapted("llama", method).eval()
    found = measure(model, candidates(model, FIT), FIT)
    for path, error in found["least_squares"]["sites"].items():
        assert error <= found["average"]["sites"][path] + 1e-6
        assert error < 1 or method in ("arrow",)
    assert found["no_adapter"]["kl"] > found["least_squares"]["kl"]


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_other_models(kind: str, tmp_path: Path) -> None:
    model = tiny.adapted(kind, "softmax_top2")
    fit, held_out = ([tiny.batch(kind, rows=16, seed=seed) for seed in seeds] for seeds in ((1, 2, 3, 4), (5, 6)))
    measured = export_lora(model, tmp_path / "out", probe=(fit, held_out)).figures["measured"]
    assert measured["least_squares"]["kl"] < measured["no_adapter"]["kl"]
    assert measured["least_squares"]["sites"].keys() == {layer.site.name for layer in routed_layers(model)}


def test_gates_that_hardly_vary_are_hardly_lost() -> None:
    model = tiny.adapted("llama", "softmax").eval()
    for layer in routed_layers(model):
        layer.router.weight.data.mul_(1e-4)
    found = measure(model, candidates(model, FIT), HELD_OUT)
    for fit in ("least_squares", "average"):
        assert found[fit]["update_error"] < 1e-3 and found[fit]["kl"] < 1e-5
        assert found[fit]["top1_agreement"] > 0.99


@pytest.mark.parametrize("method", ["softmax_top2", "xlora", "mixlora"])
def test_what_is_measured_is_what_peft_computes(method: str, tmp_path: Path) -> None:
    model = tiny.adapted("llama", method)
    export = export_lora(model, tmp_path / "out", probe=(FIT, HELD_OUT))
    peft, model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "out").eval(), model.eval()
    wanted, found, bare = [], [], []
    with torch.no_grad():
        for batch in HELD_OUT:
            mask, given = batch["attention_mask"].bool(), tiny.unlabelled(batch)
            for part, one in ((wanted, model), (found, peft), (bare, tiny.llama().eval())):
                part.append(one(**given).logits[mask].double().log_softmax(-1))
    p, q, r = (torch.cat(part) for part in (wanted, found, bare))
    for name, other in (("least_squares", q), ("no_adapter", r)):
        figures = export.figures["measured"][name]
        assert figures["kl"] == pytest.approx(float((p.exp() * (p - other)).sum(-1).mean()), rel=1e-4)
        assert figures["top1_agreement"] == float((p.argmax(-1) == other.argmax(-1)).double().mean())
    for path, (x, _, update) in tokens(model, HELD_OUT).items() if method != "mixlora" else ():
        site = export.figures["measured"]["least_squares"]["sites"][path]
        A, B = (peft.base_model.model.get_submodule(f"{path}.lora_{half}.default").weight.double() for half in "AB")
        assert site == pytest.approx(float((x @ A.t() @ B.t() - update).norm() / update.norm()), rel=1e-4)


def test_the_report_lies_beside_the_adapter(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "meteora")
    export = export_lora(model, tmp_path / "out", probe=(FIT, HELD_OUT), choice="average")
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["written"] == "average" and report["measured"].keys() == {"least_squares", "average", "no_adapter"}
    assert report["measured"]["no_adapter"]["update_error"] == 1
    assert report["check"]["worst_relative_error"] == max(report["measured"]["average"]["sites"].values())
    assert any("an approximation: router 'meteora' decides token by token" in note for note in report["notes"])
    assert report["source"]["router"]["name"] == "meteora" and report == export.to_json()
    average = candidates(model.eval(), FIT)["average"]
    found = PeftModel.from_pretrained(tiny.llama(), tmp_path / "out").eval()
    with torch.no_grad(), replaced(model, average):
        torch.testing.assert_close(
            found(**tiny.unlabelled(HELD_OUT[0])).logits,
            model(**tiny.unlabelled(HELD_OUT[0])).logits,
            rtol=0,
            atol=5e-6,
        )


def test_a_lower_rank_is_measured_as_it_is_written(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "softmax")
    whole, low = (export_lora(model, tmp_path / str(r), probe=(FIT, HELD_OUT), rank=r) for r in (None, 2))
    for fit in ("least_squares", "average"):
        assert low.figures["measured"][fit]["update_error"] > 1.2 * whole.figures["measured"][fit]["update_error"]
    assert low.figures["truncation"]["relative_error"].keys() == {"least_squares", "average"}
    assert json.loads((tmp_path / "2" / "adapter_config.json").read_text())["r"] == 2


def test_an_untrained_direction_stays_at_the_average(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "softmax_top2").eval()
    for layer in routed_layers(model):
        layer.experts.lora_B.data[:, :4] = 0  # expert 0 adds nothing, so nothing tells its gate
    fits = candidates(model, FIT)
    for layer in routed_layers(model):
        lora = fits["least_squares"][layer.site.name]
        assert torch.isfinite(lora.A).all() and torch.isfinite(lora.B).all() and lora.B.abs().max() < 10


def test_padding_counts_for_nothing() -> None:
    model = tiny.adapted("llama", "softmax_top2").eval()
    padded = [{**b, "input_ids": b["input_ids"].where(b["attention_mask"] == 1, 5)} for b in FIT]
    one, two = candidates(model, FIT), candidates(model, padded)
    for fit in one:
        for path, lora in one[fit].items():
            torch.testing.assert_close(lora.B, two[fit][path].B, rtol=1e-4, atol=1e-6)
    three, four = (measure(model, one, batches) for batches in (FIT, padded))
    assert three["average"]["kl"] == pytest.approx(four["average"]["kl"], rel=1e-5)
    assert three["average"]["update_error"] == pytest.approx(four["average"]["update_error"], rel=1e-5)


def test_it_needs_probe_data_and_tokens_in_it(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "softmax")
    with pytest.raises(ConfigError, match=r"decides token by token.* give probe data .*\(--probe FILE\)"):
        export_lora(model, tmp_path / "out")
    with pytest.raises(DataError, match=r"no probe token reached 'model.layers.0.self_attn.q_proj'"):
        export_lora(model, tmp_path / "out", probe=([], HELD_OUT))
    with pytest.raises(DataError, match="no held-out probe token"):
        export_lora(model, tmp_path / "out", probe=(FIT, []))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="gives every task other gates"):
        export_lora(tiny.adapted("llama", "task_shared"), tmp_path / "out")


def test_unlike_experts_and_spread_gates(tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / "a"), peft_folder(tmp_path / "b", r=2, seed=1, target_modules=["q_proj"])]
    for absent in ("keep", "redistribute"):
        experts = {"absent": absent}
        model = mixture(folders, router={"name": "softmax"}, experts=experts)
        fits = candidates(model, FIT)
        found = measure(model, fits, HELD_OUT)["least_squares"]["sites"]
        if absent == "redistribute":  # the one expert that has the layer is always on there
            assert max(error for path, error in found.items() if "q_proj" not in path) < 1e-5
        assert constant_gates(model, None) is None and max(found.values()) < 0.9


def test_predictions_are_of_real_tokens_only() -> None:
    batch = tiny.batch()
    found = predictions(tiny.adapted("llama", "softmax").eval(), batch)
    assert found.shape == (int(batch["attention_mask"].sum()), tiny.VOCAB)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(found)))
