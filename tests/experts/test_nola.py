"""NOLA experts: sums of random matrices that are drawn again whenever they are needed."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.experts import nola
from moelora.experts.nola import NOLA, drawn, mixed
from moelora.model.adapt import parameter_counts
from moelora.model.record import routed_layers
from moelora.model.write import adapter_tensors
from tests import tiny
from tests.experts import usual

ALPHA, R, K = 6.0, 3, 10
CPU = torch.device("cpu")


def experts(num_experts: int = 3, **more: Any) -> dict[str, Any]:
    return {"name": "nola", "num_experts": num_experts, "r": R, "lora_alpha": ALPHA, "bases": K, **more}


def stored(own: NOLA) -> tuple[Tensor, Tensor, Tensor]:
    """(A0 [E, r, D], A_i [k, r, D], B_i [k, O, r]) float64, all of them at once, from the documented draws."""
    E, wide, out = own.num_experts, own.site.in_features, own.site.out_features
    shapes = [(E, R, wide), (own.alpha.shape[1], R, wide), (own.alpha.shape[1], out, R)]
    bounds = [1 / math.sqrt(wide), 1 / math.sqrt(own.alpha.shape[1]), 1 / math.sqrt(own.alpha.shape[1])]
    found = []
    for seed, shape, bound in zip(own.seeds, shapes, bounds, strict=True):
        numbers = hashed(math.prod(shape), seed) >> np.uint32(8)
        uniform = torch.from_numpy(numbers.astype(np.float32)).view(shape) / 2**24
        found.append(((uniform - 0.5) * (2 * bound)).double())
    return found[0], found[1], found[2]


def hashed(count: int, seed: int) -> np.ndarray:
    """The documented hash of 0 to count - 1, in arithmetic that wraps at 32 bits."""

    def mix(x: np.ndarray, first: Any = 0, second: Any = 0) -> np.ndarray:
        x = x ^ np.uint32(first)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
        x = (x ^ (x >> np.uint32(15)) ^ np.uint32(second)) * np.uint32(0x735A2D97)
        return x ^ (x >> np.uint32(15))

    key = mix(np.array([seed], dtype=np.uint32), 0x1E3779B9)
    return mix(np.arange(count, dtype=np.uint32), key[0], mix(key)[0])


@pytest.mark.parametrize(("router", "E"), [("softmax", 3), ({"name": "meteora", "top_k": 2}, 4), ("single", 1)])
def test_equals_the_formula_with_stored_bases(router: Any, E: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(nola, "CHUNK", 40)  # two bases of A at a time, and one of B
    model, layer = usual.toy(experts(E), router)
    A0, A_i, B_i = stored(layer.experts)

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(len(x)):
            scores = w["Wg"] @ x[t] if E > 1 else x.new_zeros(1)
            gate = usual.best(scores, 2 if E == 4 else E)
            y = w["W"] @ x[t] + w["b"]
            for e in range(E):
                A = A0[e] + sum(w["alpha"][e, i] * A_i[i] for i in range(K))
                B = sum(w["beta"][e, i] * B_i[i] for i in range(K))
                y = y + gate[e] * (ALPHA / R) * (B @ (A @ x[t]))
            rows.append(y)
            gates.append(torch.stack(gate))
        return torch.stack(rows), torch.stack(gates)

    tiny.assert_layer_equals(model, layer, formula)


def test_the_gradient_of_a_weight_is_the_product_with_its_basis() -> None:
    layer = routed_layers(usual.disturbed(usual.llama(experts(), dtype=torch.float64)))[0]
    own, factors = layer.experts, layer.experts.factors()
    dA, dB = torch.randn_like(factors.A), torch.randn_like(factors.B)
    torch.autograd.backward([factors.A, factors.B], [dA, dB])
    _, A_i, B_i = stored(own)
    torch.testing.assert_close(own.alpha.grad, torch.einsum("erd,krd->ek", dA.unflatten(0, (3, R)), A_i))
    torch.testing.assert_close(own.beta.grad, torch.einsum("oer,kor->ek", dB.unflatten(1, (3, R)), B_i))


@pytest.mark.parametrize("chunk", [1, 7, 100, 1 << 22])
def test_the_numbers_do_not_depend_on_how_many_are_drawn_at_once(chunk: int, monkeypatch: Any) -> None:
    whole = torch.cat([rows for _, rows in drawn(5, 11, 13, CPU)])
    monkeypatch.setattr(nola, "CHUNK", chunk)
    monkeypatch.setattr(nola, "PIECE", chunk // 3 + 1)
    parts = list(drawn(5, 11, 13, CPU))
    assert torch.equal(torch.cat([rows for _, rows in parts]), whole)
    assert all(rows.numel() <= max(chunk, 13) for _, rows in parts)
    assert whole.abs().max() <= 1 / math.sqrt(11)


def test_the_numbers_are_the_same_everywhere() -> None:
    """Others would make saved adapters mean something else."""
    ((_, rows),) = drawn(0, 1, 4, CPU)
    assert (rows * 2**23).tolist() == [[3413567.0, 3300135.0, 2667569.0, -3255082.0]]
    ((_, rows),) = drawn(1, 4, 1, CPU)
    assert (rows * 2**24).flatten().tolist() == [7414362.0, 7377463.0, -4372579.0, -7029808.0]


def test_the_numbers_are_spread_evenly_and_streams_have_nothing_in_common() -> None:
    count = 1 << 18
    streams = [
        torch.cat([rows for _, rows in drawn(seed, 1, count, CPU, 0.5)]).flatten() for seed in (0, 1, 2, 1 << 16)
    ]
    for stream in streams:
        assert abs(float(stream.mean())) < 5 / math.sqrt(12 * count)
        buckets = torch.histc(stream, 256, -0.5, 0.5)
        chi = float(((buckets - count / 256).square() / (count / 256)).sum())
        assert 160 < chi < 360  # 255 degrees of freedom
        for lag in (1, 2, 64, 4096):
            assert abs(float((stream[lag:] * stream[:-lag]).mean())) * 12 < 5 / math.sqrt(count - lag)
    for one, two in itertools.combinations(streams, 2):
        assert abs(float((one * two).mean())) * 12 < 5 / math.sqrt(count)
        assert len(set(one[:1000].tolist()) & set(two.tolist())) < 1000 * count / 2**24 * 3 + 10


def test_a_mix_is_a_permutation() -> None:
    """Of 32-bit numbers: every step has an inverse, which is written out here."""

    def back(x: int, first: int, second: int) -> int:
        x = x ^ (x >> 15) ^ (x >> 30)
        x = x * pow(0x735A2D97, -1, 2**32) % 2**32 ^ second
        x = x ^ (x >> 15) ^ (x >> 30)
        x = x * pow(0x21F0AAAD, -1, 2**32) % 2**32
        return x ^ (x >> 16) ^ first

    for x in (0, 1, 77, 2**31 - 1, 0x12345678, -1, -77, -(2**31)):
        for keys in ((0, 0), (5, 2**30 + 9)):
            found = int(mixed(torch.tensor([x], dtype=torch.int32), *keys))
            assert back(found % 2**32, *keys) == x % 2**32


def test_forward_leaves_the_random_state_alone_and_is_the_same_again() -> None:
    model = usual.disturbed(usual.llama(experts()))
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model.zero_grad()
        model(**tiny.batch()).loss.backward()
        assert torch.equal(torch.get_rng_state(), before)
        found.append(tiny.gradients(model))
    tiny.assert_same(*found)


def test_bases_are_never_kept() -> None:
    """Neither saved for backward, nor in the module, nor in the adapter."""
    model = usual.disturbed(usual.llama(experts(bases=200)))
    layer, sizes = routed_layers(model)[0], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        factors = layer.experts.factors()
    assert max(sizes, default=0) < 4 * 200 * R * layer.out_features / 10
    assert factors.A.shape == (3 * R, layer.in_features)
    own = {name for name, _ in (*layer.experts.named_parameters(), *layer.experts.named_buffers())}
    assert own == {"alpha", "beta", "scale"}
    names = {name.rpartition(".")[2]: value for name, value in adapter_tensors(model).items() if ".experts." in name}
    assert names.keys() == {"alpha", "beta"}


def test_size_does_not_depend_on_width_or_rank() -> None:
    for r in (2, 5):
        model = usual.llama(experts(r=r))
        assert parameter_counts(model)[0] == sum(3 * 2 * K + 3 * site.in_features for site in model.moelora.sites)


def test_starts_as_the_base_model_from_lora_s_own_a() -> None:
    model = usual.llama(experts())
    usual.assert_starts_as_the_base_model(model)
    starts = []
    for layer in routed_layers(model):
        A = layer.experts.factors().A.detach()
        assert 0.8 / math.sqrt(layer.in_features) < A.abs().max() <= 1 / math.sqrt(layer.in_features)
        starts += list(A[:, :8].unflatten(0, (3, R)))
    alike = torch.corrcoef(torch.stack([start.flatten() for start in starts]))
    assert alike.fill_diagonal_(0).abs().max() < 0.9  # of every expert and layer
    other = routed_layers(usual.llama(experts(seed=1)))[0].experts.factors()
    assert not torch.equal(other.A, routed_layers(model)[0].experts.factors().A)


def test_half_precision_weights_sum_up_in_float32() -> None:
    own = routed_layers(usual.disturbed(usual.llama(experts())))[0].experts.to(torch.bfloat16)
    factors = own.factors()
    assert factors.A.dtype == factors.B.dtype == torch.float32
    A0, A_i, _ = stored(own)
    expected = A0 + torch.einsum("ek,krd->erd", own.alpha.detach().double(), A_i)
    torch.testing.assert_close(factors.A.double(), expected.flatten(0, 1), rtol=1e-5, atol=1e-6)
    factors.A.sum().backward()
    assert own.alpha.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("router", ["smora", "mole", "arrow"])
def test_any_router_sees_loras_of_its_own(router: str) -> None:
    model = usual.disturbed(usual.llama(experts(), router))
    plain = usual.llama({"name": "lora", "num_experts": 3, "r": R, "lora_alpha": ALPHA}, router)
    for layer, twin in zip(routed_layers(model), routed_layers(plain), strict=True):
        factors = layer.experts.factors()
        twin.experts.load_state_dict({"lora_A": factors.A, "lora_B": factors.B})
        twin.router.load_state_dict(layer.router.state_dict())
        for each in (layer, twin):
            each.router.prepare(each.experts.factors())
    torch.testing.assert_close(usual.logits(model), usual.logits(plain), rtol=1e-5, atol=1e-5)


def test_trains_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    usual.assert_comes_back(usual.trained(usual.llama(experts())), tmp_path)


def test_checkpointing_changes_no_gradient() -> None:
    usual.assert_checkpointing_changes_nothing(usual.disturbed(usual.llama(experts())))


def test_every_expert_is_a_plain_lora(tmp_path: Path) -> None:
    usual.assert_exports_exactly(usual.disturbed(usual.llama(experts()), 0.2), tmp_path / "out")


def test_constant_gates_are_one_plain_lora(tmp_path: Path) -> None:
    usual.assert_mixture_exports_exactly(usual.disturbed(usual.llama(experts(), "uniform")), tmp_path / "out")


def test_seeds_that_a_generator_would_fold_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"experts\.nola\.seed: .*less than 32768, found 32768"):
        usual.llama(experts(seed=2**15))
    with pytest.raises(ConfigError, match=r"router 'comol' is for experts with one A for all; experts 'nola'"):
        usual.llama(experts(), "comol")
