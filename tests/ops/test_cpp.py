"""The compiled CPU kernels against the reference in float64, in every form and dtype; and what else they promise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moelora.ops import cpu, reference
from moelora.ops.cpu import Level
from tests.ops.test_routed_lora import GRADS, MIXES, arguments, in_rank_space, make, poisoned

built = pytest.mark.skipif(bool(cpu.PROBLEM), reason=f"no compiled kernels: {cpu.PROBLEM}")
LEVELS = [] if cpu.PROBLEM else [level for level in Level if Level.ABSENT < level <= cpu.level()]


@pytest.fixture(params=LEVELS, ids=lambda level: level.name)
def level(request: pytest.FixtureRequest) -> Iterator[Level]:
    """Every set of instructions that this machine has, one after the other."""
    before = cpu.level()
    assert cpu.level(request.param) is request.param
    yield request.param
    cpu.level(before)


def cast(
    case: dict[str, Any], tokens: torch.dtype = torch.float32, factors: torch.dtype | None = None
) -> dict[str, Any]:
    """The case in float32, with tokens and factors in the dtypes given."""
    given = {"x": tokens, **dict.fromkeys(("A", "B", "core"), factors or tokens)}
    return {
        key: value.to(given.get(key, torch.float32)) if isinstance(value, Tensor) and key != "index" else value
        for key, value in case.items()
    }


def all_needed(case: dict[str, Any]) -> list[bool]:
    return [True, case["A"] is not None, True, True, case["core"] is not None]


def result_dtype(case: dict[str, Any]) -> torch.dtype:
    """The dtype of y: that of what it is added to, else that of the tokens."""
    return case.get("onto", case["x"]).dtype


def upstream(case: dict[str, Any]) -> Tensor:
    made = torch.Generator().manual_seed(1)
    return torch.randn(case["x"].shape[0], case["B"].shape[0], generator=made).to(result_dtype(case))


def beneath(case: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The case with something that the update is added to."""
    made = torch.Generator().manual_seed(2)
    wide = torch.randn(case["x"].shape[0], case["B"].shape[0] + 3, generator=made) * 3
    return {**case, "onto": wide.to(dtype or case["x"].dtype)[:, 1:-2]}  # rows of a wider matrix


def compiled(case: dict[str, Any], need: list[bool] | None = None) -> dict[str, Tensor]:
    """Output, h and gradients by the kernels, whether they pay or not."""
    *tensors, width = arguments(case)
    y, h = cpu.forward(*tensors, width, case.get("onto"))
    grads = cpu.backward(upstream(case), *tensors, h, width, need or all_needed(case))
    return {"y": y, "h": h, **dict(zip(GRADS, grads, strict=True))}


def expected(case: dict[str, Any]) -> dict[str, Tensor]:
    """The same by the reference, in float64."""
    *tensors, width = arguments(case)
    *tensors, onto = [
        t.double() if t is not None and t.is_floating_point() else t for t in (*tensors, case.get("onto"))
    ]
    y, h = reference.forward(*tensors, width, onto)
    grads = reference.backward(upstream(case).double(), *tensors, h, width, all_needed(case))
    if case["mix"] == "blocks" and case["index"] is not None and h.numel():
        # The kernels keep the chosen blocks alone: place s of token t is its s-th choice.
        h = torch.stack([h[t].view(-1, width)[case["index"][t]].flatten() for t in range(len(h))])
    return {"y": y, "h": h, **dict(zip(GRADS, grads, strict=True))}


def assert_agree(case: dict[str, Any]) -> None:
    actual, right = compiled(case), expected(case)
    dtypes = {
        "y": result_dtype(case),
        "h": torch.float32,
        **{key: case[key].dtype for key in GRADS if case[key] is not None},
    }
    for key, dtype in dtypes.items():
        value, wanted = actual[key], right[key]
        assert value.dtype == dtype and value.shape == wanted.shape and value.is_contiguous(), key
        # One rounding to bfloat16 at the end; else float32 sums, whose error goes with the largest summands.
        narrow = 0.51 * torch.finfo(dtype).eps if dtype is torch.bfloat16 else 1e-5
        bound = 1e-5 * max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
        torch.testing.assert_close(
            value.double(), wanted, rtol=narrow, atol=bound, msg=lambda m, key=key: f"{key}: {m}"
        )


# Right numbers


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 1, 2, 4])
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given_h", [False, True])
def test_equals_the_reference(
    level: Level, mix: str, k: int | None, tokens: torch.dtype, factors: torch.dtype, given_h: bool
) -> None:
    # 150 tokens are several blocks, 530 features several passes, and neither is a multiple of anything.
    case = make(mix, T=150, D=530, out=67, units=4, r=6, k=k)
    assert_agree(cast(in_rank_space(case) if given_h else case, tokens, factors))


sizes = st.fixed_dictionaries(
    {
        "mix": st.sampled_from(MIXES),
        "T": st.one_of(st.integers(0, 9), st.sampled_from([63, 64, 65, 129, 257])),
        "D": st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 511, 513])),
        "out": st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 257])),
        "units": st.one_of(st.integers(1, 9), st.sampled_from([16, 33, 64])),
        "r": st.one_of(st.integers(1, 9), st.just(17)),
        "seed": st.integers(0, 1000),
    }
)
halves = st.sampled_from([torch.float32, torch.bfloat16])


@built
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    size=sizes,
    k=st.one_of(st.none(), st.integers(1, 9)),
    tokens=halves,
    factors=halves,
    given_h=st.booleans(),
    added=st.one_of(st.none(), halves),
)
def test_equals_the_reference_at_any_size(
    level: Level,
    size: dict[str, Any],
    k: int | None,
    tokens: torch.dtype,
    factors: torch.dtype,
    given_h: bool,
    added: torch.dtype | None,
) -> None:
    case = make(**size, k=None if k is None else min(k, size["units"]))
    case = cast(in_rank_space(case) if given_h else case, tokens, factors)
    assert_agree(beneath(case, added) if added else case)


@built
@pytest.mark.parametrize(
    ("units", "r", "k"), [(64, 1, 8), (300, 1, 5), (32, 2, 8), (64, 8, 2), (128, 4, 1), (3, 70, 2), (1, 200, None)]
)
def test_equals_the_reference_for_many_units_and_for_wide_ones(level: Level, units: int, r: int, k: int | None) -> None:
    # For 128 units, 300 columns are several stretches of a product.
    assert_agree(beneath(cast(make("blocks", T=700, D=96, out=300, units=units, r=r, k=k))))


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("given_h", [False, True])
def test_without_tokens_gradients_of_factors_are_zero(mix: str, k: int | None, given_h: bool) -> None:
    case = make(mix, T=0, k=k)
    case = beneath(cast(in_rank_space(case) if given_h else case))
    with poisoned():
        assert_agree(case)
        assert (compiled(case)["B"] == 0).all()


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("r", [2, 5])  # of two ranks, sums run token by token
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("below", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given_h", [False, True])
def test_the_update_is_added_to_what_is_given_and_rounded_once(
    level: Level, mix: str, k: int | None, r: int, tokens: torch.dtype, below: torch.dtype, given_h: bool
) -> None:
    # 300 columns are several stretches of a product, and the last of them is not whole.
    case = make(mix, T=150, D=19, out=300, units=6, r=r, k=k)
    case = beneath(cast(in_rank_space(case) if given_h else case, tokens), below)
    before = case["onto"].clone()
    assert_agree(case)
    assert torch.equal(case["onto"], before)
    scattered = torch.stack([before, before], -1)[..., 0]  # columns are not adjacent
    one_row = before[:1].expand_as(before)  # rows are the same memory
    for onto, same in ((scattered, before), (one_row, one_row.contiguous())):
        assert torch.equal(compiled({**case, "onto": onto})["y"], compiled({**case, "onto": same})["y"])


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("unit", [1, 5, 8])
def test_all_tokens_in_one_unit(level: Level, mix: str, unit: int) -> None:
    case = make(mix, T=130, D=33, out=21, units=9, r=4, k=1)
    case["index"] = torch.full_like(case["index"], unit)
    assert_agree(cast(case))
    grads = compiled(cast(case))
    others = [u for u in range(9) if u != unit]
    if mix == "core":
        assert (grads["core"][others] == 0).all()
    else:
        assert (grads["B"].view(21, 9, 4)[:, others] == 0).all()
        assert mix == "shared" or (grads["A"].view(9, 4, 33)[others] == 0).all()


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
def test_large_values_are_not_lost_and_infinities_stay(level: Level, mix: str, k: int | None) -> None:
    case = cast(make(mix, T=9, D=40, k=k), torch.bfloat16)
    case["x"][4] = float("inf")
    case["x"][7, 3] = float("nan")
    y = compiled(case)["y"]
    assert not y[4].isfinite().any() and y[7].isnan().all() and y[[0, 1, 2, 3, 5, 6, 8]].isfinite().all()


@built
def test_bfloat16_is_rounded_as_torch_does(level: Level) -> None:
    # y is the gate itself: every number, ties, what is too large, and what is none.
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ties = (bits & -65536) | 0x8000
    gate = torch.cat([bits, ties]).view(torch.float32)
    gate = torch.cat([gate, torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4e38, 0.0, -0.0])])[:, None]
    ones = torch.ones(19, 1)
    y, _ = cpu.forward(torch.ones_like(gate).bfloat16(), None, ones, ones[0], gate, None, None, 1)
    normal = (gate.abs() >= torch.finfo(torch.float32).tiny) | (gate == 0) | gate.isnan()
    wanted = gate.bfloat16().where(normal, 0).expand(-1, 19)
    torch.testing.assert_close(y.where(normal, 0), wanted, rtol=0, atol=0, equal_nan=True)


# Promises


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])
def test_runs_are_bitwise_equal_on_any_number_of_threads(mix: str, k: int | None, tokens: torch.dtype) -> None:
    case = beneath(cast(make(mix, T=700, D=530, out=300, units=8, r=5, k=k), tokens))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7, 1, 2):
            torch.set_num_threads(threads)
            results.append(compiled(case))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[key], results[0][key]) for key in other)


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given_h", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_no_unwritten_memory_is_read_or_returned(
    level: Level, mix: str, k: int | None, tokens: torch.dtype, given_h: bool, added: bool
) -> None:
    case = make(mix, T=150, D=37, out=29, units=7, r=3, k=k)
    if k is not None:
        case["index"] = case["index"] % 3 + torch.tensor([0, 4])  # unit 3 is nobody's
    case = cast(in_rank_space(case) if given_h else case, tokens)
    case = beneath(case) if added else case
    plain = compiled(case)
    with poisoned():
        # Scratch memory comes from torch too, so it is poisoned as well.
        poison = compiled(case)
    for key, value in plain.items():
        assert not poison[key].isnan().any() and torch.equal(poison[key], value), key


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("given_h", [False, True])
@pytest.mark.parametrize("asked", [("x",), ("weight",), ("A",), ("B",), ("core",), ("x", "weight"), ("A", "B"), ()])
def test_only_asked_gradients_are_computed(mix: str, k: int | None, given_h: bool, asked: tuple[str, ...]) -> None:
    case = make(mix, T=20, D=9, out=11, k=k)
    case = cast(in_rank_space(case) if given_h else case)
    need = [key in asked and case[key] is not None for key in GRADS]
    full, some = compiled(case), compiled(case, need)
    for key, wanted in zip(GRADS, need, strict=True):
        assert torch.equal(some[key], full[key]) if wanted else some[key].shape == (0,), key


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
def test_strides_do_not_matter(mix: str, k: int | None) -> None:
    case = cast(make(mix, T=70, D=19, out=23, k=k))
    strided = dict(case)
    for key in ("x", "A", "B", "weight", "core", "scale", "index"):
        if case[key] is not None:
            wide = torch.stack([case[key], torch.zeros_like(case[key])], -1)
            strided[key] = wide[..., 0]  # columns are not adjacent
    rows = dict(case)
    for key in ("x", "A", "B"):
        rows[key] = torch.cat([case[key], case[key]], -1)[:, : case[key].shape[1]]  # a slice of a fused projection
    turned = {key: value.t().contiguous().t() if key in ("x", "A", "B") else value for key, value in case.items()}
    plain = compiled(case)
    for other in (strided, rows, turned):
        assert all(torch.equal(value, plain[key]) for key, value in compiled(other).items())


@built
@pytest.mark.parametrize("mix", MIXES)
def test_a_token_does_not_see_its_neighbours(level: Level, mix: str) -> None:
    case = cast(make(mix, T=140, D=50, out=40, units=6, r=3, k=2))
    whole = compiled(case)
    for t in (0, 63, 64, 139):
        alone = {**case, **{key: case[key][t : t + 1] for key in ("x", "weight", "index")}}
        assert torch.equal(cpu.forward(*arguments(alone))[0], whole["y"][t : t + 1])


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.tensor([[0, 4]] * 7)}, "index names a unit outside 0 to 3; there are 4 units"),
        ({"index": torch.tensor([[-1, 0]] * 7)}, "index names a unit outside 0 to 3; there are 4 units"),
        ({"index": torch.tensor([[2, 2]] * 7)}, "index names a unit twice for one token"),
        ({"index": torch.tensor([[2, 1]] * 6 + [[3, 3]])}, "index names a unit twice for one token"),
        ({"index": torch.zeros(7, 3, dtype=torch.int64)}, "dimension 1 of index is 3, not 2"),
        ({"index": torch.zeros(7, 2, dtype=torch.int32)}, "index has the wrong dtype"),
        ({"scale": torch.ones(5)}, "dimension 0 of scale is 5, not 8"),
        ({"A": torch.ones(8, 6)}, "dimension 1 of A is 6, not 5"),
        ({"A": torch.ones(8, 5, dtype=torch.float16)}, "A is neither float32 nor bfloat16"),
        ({"A": torch.ones(5)}, "A is a matrix"),
        ({"B": torch.ones(3, 7)}, "B has 7 columns"),
        ({"weight": torch.ones(7, 2, dtype=torch.float64)}, "weight has the wrong dtype"),
        ({"weight": torch.ones(6, 2)}, "dimension 0 of weight is 6, not 7"),
        ({"x": torch.ones(7, 5, 1)}, "matrices"),
        ({"core": torch.ones(4, 16, 4)}, r"core is not \[units, 8, 8\]"),
        ({"core": torch.ones(4, 64)}, "core has 2 dimensions, not 3"),
        ({"onto": torch.ones(7, 4)}, "dimension 1 of onto is 4, not 3"),
        ({"onto": torch.ones(7, 3, dtype=torch.float16)}, "onto is neither float32 nor bfloat16"),
    ],
)
def test_wrong_arguments_are_refused_before_any_memory_is_read(change: dict[str, Tensor], message: str) -> None:
    case = {**cast(make("blocks", k=2)), "onto": None, **change}
    names = ("x", "A", "B", "scale", "weight", "index", "core")
    with pytest.raises(RuntimeError, match=f"moelora: .*{message}"):
        torch.ops.moelora.cpu_forward(*(case[name] for name in names), 2, case["onto"])


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": lambda old: old + 100}, "there are 4 units"),
        ({"index": torch.zeros_like}, "twice"),
        ({"h": lambda old: torch.zeros(7, 8)}, "dimension 1 of h is 8, not 4"),  # all units, not the chosen two
    ],
)
def test_wrong_arguments_are_refused_in_the_backward_pass_too(change: dict[str, Any], message: str) -> None:
    case = cast(make("blocks", k=2))
    *tensors, width = arguments(case)
    _, h = cpu.forward(*tensors, width)
    named = {"index": tensors.pop(5), "h": h}
    named.update({key: of(named[key]) for key, of in change.items()})
    tensors.insert(5, named["index"])
    with pytest.raises(RuntimeError, match=f"moelora: .*{message}"):
        cpu.backward(upstream(case), *tensors, named["h"], width, all_needed(case))
