"""Every Triton kernel against the reference in float64: in Triton's interpreter, or on a GPU where there is one.

TRITON_INTERPRET=1 python -m pytest tests/triton_kernels        # make test does this, too
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moelora.ops import cuda, reference
from moelora.tools import tune
from tests.ops.test_routed_lora import GRADS, MIXES, arguments, in_rank_space, make, poisoned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
HALVES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]  # the interpreter multiplies bfloat16 wrongly

pytestmark = pytest.mark.skipif(
    bool(cuda.PROBLEM) or not (INTERPRETED or GPU), reason="kernels run on a GPU, or with TRITON_INTERPRET=1"
)


def cast(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The case on the device: tokens and factors in ``dtype``, gates and scale in float32."""
    narrow = ("x", "A", "B", "core", "onto")
    return {
        key: value.to(dtype if key in narrow else torch.float32).to(DEVICE)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value.to(DEVICE)
        if isinstance(value, Tensor)
        else value
        for key, value in case.items()
    }


def upstream(case: dict[str, Any]) -> Tensor:
    made = torch.Generator().manual_seed(1)
    dy = torch.randn(case["x"].shape[0], case["B"].shape[0], generator=made)
    return dy.to(case["x"].dtype if case.get("onto") is None else case["onto"].dtype).to(DEVICE)


def needed(case: dict[str, Any]) -> list[bool]:
    return [True, case["A"] is not None, True, True, case["core"] is not None]


def kernels(case: dict[str, Any], path: str, need: list[bool] | None = None) -> dict[str, Tensor]:
    *tensors, width = arguments(case)
    y, h = cuda.forward(*tensors, width, case.get("onto"), path)
    grads = cuda.backward(upstream(case), *tensors, h, width, need or needed(case), path)
    return {"y": y, "h": h, **dict(zip(GRADS, grads, strict=True))}


def expected(case: dict[str, Any]) -> dict[str, Tensor]:
    *tensors, width = arguments(case)
    tensors = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    onto = case.get("onto")
    y, h = reference.forward(*tensors, width, None if onto is None else onto.double())
    grads = reference.backward(upstream(case).double(), *tensors, h, width, needed(case))
    return {"y": y, "h": h, **dict(zip(GRADS, grads, strict=True))}


def assert_agree(case: dict[str, Any], path: str, dtype: torch.dtype = torch.float32) -> None:
    actual, right = kernels(case, path), expected(case)
    for key in ("y", *GRADS):
        value, wanted = actual[key], right[key]
        assert value.shape == wanted.shape, key
        # Half precision rounds u, dh and the result; sums are float32.
        bound = 2e-6 if dtype is torch.float32 else 6 * torch.finfo(dtype).eps
        if not wanted.numel():
            continue
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(
            value.double(), wanted, rtol=0, atol=8 * bound * scale, msg=lambda m, key=key: f"{key}: {m}"
        )


PATHS = ["dense", "sorted", "gather"]
WAYS = [*(("dense", mix) for mix in MIXES), ("sorted", "blocks"), ("gather", "blocks")]
"""Only blocks have units of their own, so they alone can be sorted and gathered."""


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize("given_h", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_dense_equals_the_reference(mix: str, k: int | None, given_h: bool, dtype: torch.dtype) -> None:
    case = make(mix, T=37, D=70, out=41, units=5, r=3, k=k)
    assert_agree(cast(in_rank_space(case) if given_h else case, dtype), "dense", dtype)


@pytest.mark.parametrize("path", ["sorted", "gather"])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_chosen_units_alone_equal_the_reference(path: str, k: int, dtype: torch.dtype) -> None:
    assert_agree(cast(make("blocks", T=23, D=70, out=41, units=5, r=3, k=k), dtype), path, dtype)


@pytest.mark.parametrize("path", PATHS)
def test_several_tiles_in_every_direction(path: str) -> None:
    assert_agree(cast(make("blocks", T=9 if path == "gather" else 150, D=90, out=140, units=4, r=20, k=2)), path)


@pytest.mark.parametrize(("units", "r", "k"), [(40, 1, 7), (3, 70, 2), (1, 130, None), (64, 1, None)])
def test_many_units_and_wide_ones(units: int, r: int, k: int | None) -> None:
    assert_agree(cast(make("blocks", T=19, D=40, out=33, units=units, r=r, k=k)), "dense")


@pytest.mark.parametrize(("path", "mix"), WAYS)
def test_the_update_is_added_to_what_is_there(path: str, mix: str) -> None:
    case = make(mix, T=11, D=20, out=18, k=2)
    case["onto"] = torch.randn(11, 18, dtype=torch.float64)
    case = cast(case)
    before = case["onto"].clone()
    assert_agree(case, path)
    assert torch.equal(case["onto"], before)


@pytest.mark.parametrize("mix", MIXES)
def test_rank_space_in_float32_goes_onto_half_precision(mix: str) -> None:
    case = in_rank_space(make(mix, T=11, D=20, out=18, k=2))
    case["onto"] = torch.randn(11, 18, dtype=torch.float64)
    case = cast(case)
    half = {**case, "onto": case["onto"].to(HALVES[0])}
    found = kernels(half, "dense")
    assert found["y"].dtype == HALVES[0] and found["x"].dtype == torch.float32
    assert_agree(half, "dense", HALVES[0])


@pytest.mark.parametrize("path", PATHS)
def test_y_has_the_dtype_of_what_the_update_is_added_to(path: str) -> None:
    case = make("blocks", T=11, D=20, out=18, k=2)
    case["onto"] = torch.randn(11, 18, dtype=torch.float64)
    case = cast(case)
    half = {**case, "onto": case["onto"].to(HALVES[0])}
    found = kernels(half, path)
    assert found["y"].dtype == HALVES[0] and found["x"].dtype == torch.float32
    assert_agree(half, path, HALVES[0])


@pytest.mark.parametrize("path", PATHS)
def test_skewed_choices_and_units_of_nobody(path: str) -> None:
    case = make("blocks", T=40, D=20, out=18, units=6, r=4, k=2)
    case["index"] = torch.stack([torch.full((40,), 3), torch.arange(40) % 2], 1)
    case = cast(case)
    assert_agree(case, path)
    found = kernels(case, path)
    for unit in (2, 4, 5):
        assert (found["A"][4 * unit : 4 * unit + 4] == 0).all() and (found["B"][:, 4 * unit : 4 * unit + 4] == 0).all()


@pytest.mark.parametrize(("path", "mix", "k"), [*((*way, 2) for way in WAYS), *(("dense", mix, None) for mix in MIXES)])
def test_no_unwritten_memory_is_read_or_returned(path: str, mix: str, k: int | None) -> None:
    case = cast(make(mix, T=21, D=19, out=23, units=7, r=3, k=k))
    plain = kernels(case, path)
    with poisoned():
        poison = kernels(case, path)
    for key, value in plain.items():
        assert not poison[key].isnan().any() and torch.equal(poison[key], value), key


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens_are_no_work(path: str) -> None:
    found = kernels(cast(make("blocks", T=0, D=6, out=5, k=2)), path)
    assert found["y"].shape == (0, 5) and found["x"].shape == (0, 6)
    assert (found["A"] == 0).all() and (found["B"] == 0).all() and found["A"].numel()


@pytest.mark.parametrize("path", PATHS)
def test_strides_do_not_matter(path: str) -> None:
    case = cast(make("blocks", T=20, D=19, out=23, k=2))
    plain = kernels(case, path)
    turned = {key: value.t().contiguous().t() if key in ("x", "A", "B") else value for key, value in case.items()}
    spread = dict(case)
    for key in ("x", "A", "B", "weight", "index"):
        spread[key] = torch.stack([case[key], torch.zeros_like(case[key])], -1)[..., 0]
    for other in (turned, spread):
        for key, value in kernels(other, path).items():
            torch.testing.assert_close(value, plain[key], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("asked", ["x", "weight", "A", "B", ""])
def test_only_asked_gradients_are_computed(path: str, asked: str) -> None:
    case = cast(make("blocks", T=12, D=9, out=11, k=2))
    need = [key == asked for key in GRADS]
    full, some = kernels(case, path), kernels(case, path, need)
    for key, wanted in zip(GRADS, need, strict=True):
        assert torch.equal(some[key], full[key]) if wanted else some[key].shape == (0,), key


@pytest.mark.parametrize(("path", "mix"), WAYS)
def test_twenty_runs_are_bitwise_equal(path: str, mix: str) -> None:
    case = cast(make(mix, T=9 if not GPU else 2000, D=18, out=17, k=2))
    first = kernels(case, path)
    for _ in range(19):
        for key, value in kernels(case, path).items():
            assert torch.equal(value, first[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("sizes", [(5,), (5, 3), (5, 3, 17)])
def test_projections_share_one_read(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(33, 50, generator=made).to(dtype).to(DEVICE)
    weights = [torch.randn(n, 50, generator=made).to(dtype).to(DEVICE) for n in sizes]
    found = cuda.project(x, weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double() @ torch.cat(weights).double().t(), rtol=1e-5, atol=1e-4)


def test_tokens_are_sorted_by_unit_and_every_tile_holds_one() -> None:
    from moelora.triton_kernels.sort import sort_tokens

    made = torch.Generator().manual_seed(0)
    index = torch.rand(300, 9, generator=made).argsort(1)[:, :3]
    index[:, 0] = index[:, 0].clamp(max=2)  # skewed, with units of nobody
    found = sort_tokens(index.to(DEVICE), 9, 16)
    for slot in range(3):
        order = index[:, slot].argsort(stable=True)
        assert torch.equal(found.order[slot].cpu().long(), order)
        counts = torch.bincount(index[:, slot], minlength=9)
        assert found.starts[slot].tolist() == [0, *counts.cumsum(0).tolist()]
        tiles = [
            (unit, first) for unit, first in zip(found.unit[slot].tolist(), found.first[slot].tolist(), strict=True)
        ]
        right = [
            (unit, first)
            for unit in range(9)
            for first in range(found.starts[slot, unit], found.starts[slot, unit + 1], 16)
        ]
        assert tiles[: len(right)] == right and all(unit == 9 for unit, _ in tiles[len(right) :])


def test_units_of_lower_rank_are_cut_at_it() -> None:
    from moelora.triton_kernels import expand, outer, shrink, sort
    from moelora.triton_kernels.launch import Config

    case = cast(make("blocks", T=40, D=30, out=28, units=4, r=24, k=2))
    ranks = [24, 3, 0, 17]
    x, A, B, index = case["x"], case["A"], case["B"], case["index"]
    dead = torch.ones(4, 24, dtype=torch.bool, device=DEVICE)
    for unit, rank in enumerate(ranks):
        dead[unit, :rank] = False
    config, short = Config(16, 16, 16), torch.tensor(ranks, dtype=torch.int32, device=DEVICE)
    segments = sort.sort_tokens(index, 4, 16)
    A[dead.flatten()] = float("nan")  # rows beyond a rank are never read
    B[:, dead.flatten()] = float("nan")
    h = shrink.shrink_sorted(x, A, 24, segments, config, short)
    whole = (x @ A.nan_to_num().t()).view(40, 4, 24)
    right = whole.gather(1, index.unsqueeze(-1).expand(-1, -1, 24)).reshape(80, 24)
    torch.testing.assert_close(h, right, rtol=1e-5, atol=1e-5)
    y = expand.expand_sorted(h, B.t(), segments, config, None, short)
    chosen = torch.zeros(40, 4, 1, device=DEVICE).scatter(1, index.unsqueeze(-1), 1.0)
    torch.testing.assert_close(y, (whole * chosen).flatten(1) @ B.nan_to_num().t(), rtol=1e-4, atol=1e-3)
    dA = outer.outer_sorted(h, x, torch.empty_like(A), 24, segments, config, short)
    torch.testing.assert_close(dA, (whole * chosen).flatten(1).t() @ x, rtol=1e-4, atol=1e-3)
    assert (dA[dead.flatten()] == 0).all()


def test_the_operator_leaves_out_ranks_that_are_not_in_use() -> None:
    case = make("blocks", T=30, D=20, out=18, units=3, r=20, k=2)
    ranks = torch.tensor([20, 5, 1], dtype=torch.int32, device=DEVICE)
    dead = torch.cat([torch.arange(20) >= rank for rank in ranks.tolist()])
    case["A"][dead], case["B"][:, dead] = 0, 0
    case = cast(case)
    *tensors, width = arguments(case)
    y, h = cuda.forward(*tensors, width, None, "sorted", ranks)
    grads = cuda.backward(upstream(case), *tensors, h, width, needed(case), "sorted", ranks)
    whole = kernels(case, "sorted")
    for key, value in {"y": y, "h": h, **dict(zip(GRADS, grads, strict=True))}.items():
        torch.testing.assert_close(value, whole[key], rtol=1e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("kernel", ["shrink", "expand", "outer"])
def test_every_call_that_is_tuned_runs(kernel: str) -> None:
    config = next(tune.candidates(kernel, 16, True))
    tune.call(kernel, 16, True, config, torch.device(DEVICE), 40, 40)()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    mix=st.sampled_from(MIXES),
    T=st.sampled_from([1, 2, 31, 33]),
    D=st.integers(1, 40),
    out=st.integers(1, 40),
    units=st.integers(1, 9),
    r=st.integers(1, 18),
    k=st.one_of(st.none(), st.integers(1, 9)),
    path=st.sampled_from(PATHS),
)
def test_any_size(mix: str, T: int, D: int, out: int, units: int, r: int, k: int | None, path: str) -> None:
    if mix != "blocks" or k is None:
        path = "dense"
    assert_agree(cast(make(mix, T, D, out, units, r, None if k is None else min(k, units))), path)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
def test_the_operator_takes_the_kernels_on_a_gpu(mix: str, k: int | None) -> None:
    from moelora.ops import routed_lora

    case = cast(make(mix, T=33, D=64, out=48, k=k), torch.bfloat16)
    torch.library.opcheck(routed_lora.routed_lora, (*arguments(case),))
    *tensors, width = arguments(case)
    assert cuda.machine(tensors[0], *tensors[1:5], tensors[6]) == "cuda"
    y, _ = routed_lora.routed_lora(*tensors, width)
    assert torch.equal(y, cuda.forward(*tensors, width, None, "dense")[0])
