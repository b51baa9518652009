"""The operator against a per-token loop: outputs, every gradient, and the identities that follow from the formula."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moelora.core.factors import Factors
from moelora.core.route import Route
from moelora.ops import reference, routed_lora

# Reported by torch's own checker about torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")

MIXES = ["blocks", "shared", "core"]
GRADS = ["x", "A", "B", "weight", "core"]


def oracle(case: dict[str, Any]) -> Tensor:
    """delta [T, O], token by token and unit by unit, as the docstring of ``ops/reference.py`` says."""
    x, A, B, scale, core = (case[key] for key in ("x", "A", "B", "scale", "core"))
    A = torch.eye(x.shape[1], dtype=x.dtype) if A is None else A
    G, R, rows = case["units"], A.shape[0], []
    for t in range(x.shape[0]):
        gate = [x.new_zeros(())] * G
        for slot in range(case["weight"].shape[1]):
            gate[slot if case["index"] is None else int(case["index"][t, slot])] = case["weight"][t, slot]
        h = [sum((A[j, d] * x[t, d] for d in range(x.shape[1])), x.new_zeros(())) for j in range(R)]
        if case["mix"] == "blocks":
            u = [gate[j // (R // G)] * h[j] for j in range(R)]
        elif case["mix"] == "shared":
            u = [gate[q] * h[j] for q in range(G) for j in range(R)]
        else:
            u = [sum(gate[q] * core[q, i, j] * h[j] for q in range(G) for j in range(R)) for i in range(R)]
        rows.append(sum((B[:, c] * scale[c] * u[c] for c in range(B.shape[1])), x.new_zeros(B.shape[0])))
    return torch.stack(rows) if rows else x.new_zeros(0, B.shape[0])


def in_rank_space(case: dict[str, Any]) -> dict[str, Any]:
    """The same case for an operator that is given h = A x."""
    return {**case, "x": case["x"] @ case["A"].t(), "A": None}


def make(
    mix: str, T: int = 7, D: int = 5, out: int = 3, units: int = 4, r: int = 2, k: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Random float64 arguments. k: chosen units per token, None for dense gates."""
    made = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    R = units * r if mix == "blocks" else r
    C = units * r if mix == "shared" else R
    index = None
    if k is not None:
        index = torch.rand(T, units, generator=made).argsort(1)[:, :k]
    return {
        "mix": mix,
        "units": units,
        "x": random(T, D),
        "A": random(R, D),
        "B": random(out, C),
        "scale": random(C).abs() + 0.5,
        "weight": random(T, units if k is None else k),
        "index": index,
        "core": random(units, r, r) if mix == "core" else None,
    }


def arguments(case: dict[str, Any]) -> tuple[Any, ...]:
    """Positional arguments of the operator."""
    names = ("x", "A", "B", "scale", "weight", "index", "core")
    return (*(case[name] for name in names), case["B"].shape[1] // case["units"])


def run(case: dict[str, Any]) -> Tensor:
    """The operator as experts call it."""
    route = Route(case["weight"], case["units"], case["index"])
    return routed_lora.apply(case["x"], Factors(case["A"], case["B"], case["scale"], case["core"]), route)


def tracked(case: dict[str, Any]) -> dict[str, Any]:
    """A copy whose differentiable tensors require gradients."""
    fresh = {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in case.items()}
    for key in GRADS:
        if fresh[key] is not None:
            fresh[key].requires_grad_()
    return fresh


def differentiate(function: Any, case: dict[str, Any]) -> dict[str, Tensor]:
    """Output, and gradients of a fixed weighting of it."""
    leaves = tracked(case)
    y = function(leaves)
    upstream = torch.linspace(-1, 2, max(1, y.numel()), dtype=y.dtype)[: y.numel()].view_as(y)
    wanted = [key for key in GRADS if leaves[key] is not None]
    # Without tokens the oracle's output does not depend on anything: its gradients are zero.
    if y.requires_grad:
        y.backward(upstream)
    zero = {key: torch.zeros_like(leaves[key]) for key in wanted}
    return {"y": y.detach(), **{key: zero[key] if leaves[key].grad is None else leaves[key].grad for key in wanted}}


def assert_agree(case: dict[str, Any]) -> None:
    expected, actual = differentiate(oracle, case), differentiate(run, case)
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-12, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 1, 2, 4])
@pytest.mark.parametrize("T", [0, 1, 7])
def test_equals_the_loop(mix: str, k: int | None, T: int) -> None:
    assert_agree(make(mix, T=T, k=k))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 1, 2, 4])
@pytest.mark.parametrize("T", [0, 1, 7])
def test_in_rank_space_it_equals_the_loop(mix: str, k: int | None, T: int) -> None:
    assert_agree(in_rank_space(make(mix, T=T, k=k)))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
def test_two_steps_equal_one(mix: str, k: int | None) -> None:
    def two_steps(leaves: dict[str, Any]) -> Tensor:
        return run({**leaves, "x": routed_lora.down(leaves["x"], leaves["A"]), "A": None})

    case = make(mix, k=k)
    expected, actual = differentiate(run, case), differentiate(two_steps, case)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 5, 1), (13, 11, 3, 3), (2, 17, 1, 4)])
def test_equals_the_loop_at_odd_sizes(mix: str, shape: tuple[int, int, int, int]) -> None:
    D, out, units, r = shape
    assert_agree(make(mix, T=3, D=D, out=out, units=units, r=r))
    assert_agree(make(mix, T=3, D=D, out=out, units=units, r=r, k=1))


@pytest.mark.parametrize("mix", MIXES)
def test_units_nobody_chose_get_exactly_zero_gradient(mix: str) -> None:
    case = make(mix, units=4, r=2, k=2)
    case["index"] = torch.tensor([[3, 1], [1, 3]] * 4)[:7]  # units 0 and 2 are empty
    grads = differentiate(run, case)
    if mix == "core":
        assert (grads["core"][[0, 2]] == 0).all() and (grads["core"][[1, 3]] != 0).all()
        return
    columns = grads["B"].view(3, 4, 2)
    assert (columns[:, [0, 2]] == 0).all() and (columns[:, [1, 3]] != 0).all()
    if mix == "blocks":
        rows = grads["A"].view(4, 2, 5)
        assert (rows[[0, 2]] == 0).all() and (rows[[1, 3]] != 0).all()


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("asked", [("x",), ("weight",), ("A",), ("B",), ("x", "weight"), ("core",), ("A", "B")])
def test_only_asked_gradients_are_computed(
    mix: str, k: int | None, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(mix, k=k)
    asked = tuple(key for key in asked if case[key] is not None)
    if not asked:
        asked = ("x",)
    full = differentiate(run, case)
    leaves = tracked(case)
    for key in GRADS:
        if leaves[key] is not None:
            leaves[key].requires_grad_(key in asked)
    returned: list[tuple[Tensor, ...]] = []
    original = reference.backward

    def spy(*args: Any) -> tuple[Tensor, ...]:
        returned.append(original(*args))
        return returned[-1]

    monkeypatch.setattr(reference, "backward", spy)
    y = run(leaves)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y))
    for key in GRADS:
        if leaves[key] is not None:
            assert (leaves[key].grad is not None) == (key in asked)
    for key in asked:
        assert torch.equal(leaves[key].grad, full[key])
    (grads,) = returned
    assert [key for key, grad in zip(GRADS, grads, strict=True) if grad.numel()] == [k for k in GRADS if k in asked]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("asked", [("x",), ("weight",), ("B",), ("core",), ("x", "weight", "B")])
def test_in_rank_space_only_asked_gradients_are_computed(
    mix: str, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = in_rank_space(make(mix, k=2))
    asked = tuple(key for key in asked if case[key] is not None) or ("x",)
    full, leaves, returned, original = differentiate(run, case), tracked(case), [], reference.backward
    for key in GRADS:
        if leaves[key] is not None:
            leaves[key].requires_grad_(key in asked)
    monkeypatch.setattr(reference, "backward", lambda *args: returned.append(original(*args)) or returned[-1])
    y = run(leaves)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y))
    for key in asked:
        assert torch.equal(leaves[key].grad, full[key])
    (grads,) = returned
    assert [key for key, grad in zip(GRADS, grads, strict=True) if grad.numel()] == [k for k in GRADS if k in asked]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("given_h", [False, True])
def test_gradcheck(mix: str, k: int | None, given_h: bool) -> None:
    case = make(mix, T=3, k=k)
    case = tracked(in_rank_space(case) if given_h else case)
    wanted = [key for key in GRADS if case[key] is not None]

    def function(*values: Tensor) -> Tensor:
        return run({**case, **dict(zip(wanted, values, strict=True))})

    assert torch.autograd.gradcheck(function, [case[key] for key in wanted])


# opcheck differentiates a scale that asks for gradients, and ours never does: it is a constant.
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("given_h", [False, True])
def test_opcheck_forward(mix: str, k: int | None, dtype: torch.dtype, given_h: bool) -> None:
    case = make(mix, k=k)
    case = in_rank_space(case) if given_h else case
    case["x"] = case["x"].to(dtype)
    if dtype is torch.bfloat16:
        for key in ("A", "B", "scale", "weight", "core"):
            case[key] = None if case[key] is None else case[key].float()
    torch.library.opcheck(routed_lora.routed_lora, arguments(tracked(case)))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("need", [[True] * 5, [True, False, False, True, False], [False, True, True, False, True]])
@pytest.mark.parametrize("given_h", [False, True])
def test_opcheck_backward(mix: str, k: int | None, need: list[bool], given_h: bool) -> None:
    case = make(mix, k=k)
    case = in_rank_space(case) if given_h else case
    need = [need[0], need[1] and not given_h, *need[2:4], need[4] and mix == "core"]
    y, h = routed_lora.routed_lora(*arguments(case))
    assert h.shape == ((0,) if given_h else (7, case["A"].shape[0]))  # x is h, and kept as it is
    *tensors, width = arguments(case)
    torch.library.opcheck(routed_lora.routed_lora_backward, (torch.randn_like(y), *tensors, h, width, need))


@pytest.mark.parametrize("mix", MIXES)
def test_opcheck_with_transposed_arguments(mix: str) -> None:
    # What a compiler is told about strides has to hold for views too: x may be a slice of a fused projection, and a
    # frozen expert a transposed read of a checkpoint.
    case = make(mix)
    for key in ("x", "A", "B", "weight"):
        case[key] = case[key].t().contiguous().t()
    if case["core"] is not None:
        case["core"] = case["core"].transpose(1, 2).contiguous().transpose(1, 2)
    y, h = routed_lora.routed_lora(*arguments(case))
    torch.library.opcheck(routed_lora.routed_lora, arguments(tracked(case)))
    *tensors, width = arguments(case)
    need = [True, True, True, True, mix == "core"]
    torch.library.opcheck(routed_lora.routed_lora_backward, (torch.randn_like(y), *tensors, h, width, need))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("k", "given_h"), [(None, False), (2, False), (2, True)])
def test_compiled_whole_equals_eager(mix: str, k: int | None, given_h: bool) -> None:
    torch._dynamo.reset()
    case = make(mix, k=k)
    case = in_rank_space(case) if given_h else case
    # "aot_eager" traces forward and backward through the shapes we declare, without a C++ compile per case.
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, actual = differentiate(run, case), differentiate(compiled, case)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def test_compiled_with_the_default_backend() -> None:
    torch._dynamo.reset()
    case = make("blocks", k=2)

    def around(leaves: dict[str, Any]) -> Tensor:
        return run({**leaves, "x": leaves["x"] * 2, "weight": leaves["weight"].softmax(-1)}) + leaves["x"].sum(1, True)

    expected = differentiate(around, case)
    actual = differentiate(torch.compile(around, fullgraph=True), case)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_on_cpu_is_computed_in_float32(mix: str, half: torch.dtype) -> None:
    case = make(mix, T=7, D=33, out=9, k=2)
    narrow = {**case, "x": case["x"].to(half)}
    for key in ("A", "B", "scale", "weight", "core"):
        narrow[key] = None if case[key] is None else case[key].float()
    wide = {**narrow, "x": narrow["x"].double()}
    for key in ("A", "B", "scale", "weight", "core"):
        wide[key] = None if wide[key] is None else wide[key].double()
    actual, expected = differentiate(run, narrow), differentiate(oracle, wide)
    assert actual["y"].dtype == actual["x"].dtype == half
    # One rounding at the end, not one per product: within half a unit in the last place and a little.
    last = torch.finfo(half).eps
    torch.testing.assert_close(actual["y"].double(), expected["y"], rtol=0.51 * last, atol=1e-5)
    # The upstream gradient arrives rounded to half precision, so only its exact products can be asked for here.
    assert actual["A"].dtype == torch.float32
    leaves = tracked(wide)
    oracle(leaves).backward(torch.linspace(-1, 2, expected["y"].numel(), dtype=half).view_as(expected["y"]).double())
    for key in ("A", "B", "weight", "core"):
        if wide[key] is not None:
            torch.testing.assert_close(actual[key].double(), leaves[key].grad, rtol=1e-4, atol=1e-4)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty and its relatives give NaN: memory that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("given_h", [False, True])
def test_no_unwritten_memory_is_read(mix: str, k: int | None, given_h: bool) -> None:
    case = make(mix, k=k)
    case = in_rank_space(case) if given_h else case
    expected = differentiate(run, case)
    with poisoned():
        assert torch.empty(3).isnan().all()
        actual = differentiate(run, case)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-12, atol=1e-12)


sizes = st.fixed_dictionaries(
    {
        "mix": st.sampled_from(MIXES),
        "T": st.integers(1, 5),
        "D": st.integers(1, 7),
        "out": st.integers(1, 7),
        "units": st.integers(1, 5),
        "r": st.integers(1, 3),
        "seed": st.integers(0, 1000),
    }
)


@given(sizes, st.integers(1, 5))
def test_random_sizes_equal_the_loop(size: dict[str, Any], k: int) -> None:
    case = make(**size, k=min(k, size["units"]))
    torch.testing.assert_close(run(case), oracle(case), rtol=1e-12, atol=1e-12)


@given(sizes, st.randoms(use_true_random=False))
def test_permuting_the_experts_changes_nothing(size: dict[str, Any], random: Any) -> None:
    case = make(**size)
    order = list(range(size["units"]))
    random.shuffle(order)
    moved = {**case, "weight": case["weight"][:, order]}
    if size["mix"] == "core":
        moved["core"] = case["core"][order]
    else:
        moved["B"] = case["B"].view(size["out"], size["units"], -1)[:, order].reshape(size["out"], -1)
        moved["scale"] = case["scale"].view(size["units"], -1)[order].reshape(-1)
    if size["mix"] == "blocks":
        moved["A"] = case["A"].view(size["units"], -1, size["D"])[order].reshape(-1, size["D"])
    torch.testing.assert_close(run(moved), run(case), rtol=1e-12, atol=1e-12)


@given(sizes, st.integers(0, 4))
def test_one_hot_equals_the_single_expert(size: dict[str, Any], expert: int) -> None:
    case = make(**size)
    e = expert % size["units"]
    case["weight"] = torch.zeros_like(case["weight"])
    case["weight"][:, e] = 1
    columns = slice(None) if size["mix"] == "core" else slice(e * size["r"], (e + 1) * size["r"])
    rows = columns if size["mix"] == "blocks" else slice(None)
    h = case["x"] @ case["A"][rows].t()
    if size["mix"] == "core":
        h = h @ case["core"][e].t()
    expected = (h * case["scale"][columns]) @ case["B"][:, columns].t()
    torch.testing.assert_close(run(case), expected, rtol=1e-12, atol=1e-12)


@given(sizes)
def test_zero_up_factor_gives_exactly_zero(size: dict[str, Any]) -> None:
    case = make(**size)
    case["B"] = torch.zeros_like(case["B"])
    assert (run(case) == 0).all()


@given(sizes)
def test_all_units_indexed_equals_dense(size: dict[str, Any]) -> None:
    dense = make(**size)
    shuffled = torch.rand(size["T"], size["units"]).argsort(1)
    indexed = {**dense, "index": shuffled, "weight": dense["weight"].gather(1, shuffled)}
    assert torch.equal(run(indexed), run(dense))
    one, two = differentiate(run, dense), differentiate(run, indexed)
    for key in ("x", "A", "B"):
        assert torch.equal(one[key], two[key])
    assert torch.equal(one["weight"].gather(1, shuffled), two["weight"])


@given(sizes, st.integers(1, 5))
def test_a_token_does_not_see_its_neighbours(size: dict[str, Any], k: int) -> None:
    case = make(**size, k=min(k, size["units"]))
    whole = run(case)
    for t in range(size["T"]):
        alone = {**case, "x": case["x"][t : t + 1], "weight": case["weight"][t : t + 1]}
        alone["index"] = case["index"][t : t + 1]
        torch.testing.assert_close(run(alone), whole[t : t + 1], rtol=1e-12, atol=1e-12)


@given(sizes)
def test_block_partition_identity(size: dict[str, Any]) -> None:
    """U5: a mixture of E LoRAs is one LoRA of rank E*r with gates constant on blocks, gradients included."""
    blocks = make(**{**size, "mix": "blocks"})
    r = size["r"]

    def by_rank(case: dict[str, Any]) -> Tensor:
        return run({**case, "units": case["units"] * r, "weight": case["weight"].repeat_interleave(r, dim=1)})

    def by_expert(case: dict[str, Any]) -> Tensor:
        total = torch.zeros(size["T"], size["out"], dtype=torch.float64)
        for e in range(size["units"]):
            own = slice(e * r, (e + 1) * r)
            update = (case["x"] @ case["A"][own].t() * case["scale"][own]) @ case["B"][:, own].t()
            total = total + case["weight"][:, e : e + 1] * update
        return total

    expected = differentiate(run, blocks)
    for other in (by_rank, by_expert):
        actual = differentiate(other, blocks)
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-10, atol=1e-11)


def test_float32_gates_of_a_float64_model_keep_their_gradient_dtype() -> None:
    case = make("blocks", k=2)
    case["weight"] = case["weight"].float()
    grads = differentiate(run, case)
    assert grads["weight"].dtype == torch.float32 and grads["x"].dtype == torch.float64


def test_indices_of_the_same_units_in_another_order_give_the_same_output() -> None:
    case = make("blocks", k=3)
    flipped = {**case, "index": case["index"].flip(1), "weight": case["weight"].flip(1)}
    assert torch.equal(run(case), run(flipped))


# Experts apart, and rows of their own: what a routed feed-forward block needs


def each_by_hand(case: dict[str, Any]) -> Tensor:
    """[T, k, O], unit by unit."""
    r, rows = case["A"].shape[0] // case["units"], []
    for t in range(case["x"].shape[0]):
        for unit in case["index"][t].tolist():
            own = slice(unit * r, (unit + 1) * r)
            rows.append(case["B"][:, own] @ (case["scale"][own] * (case["A"][own] @ case["x"][t])))
    shape = (*case["index"].shape, case["B"].shape[0])
    return torch.stack(rows).view(shape) if rows else case["x"].new_zeros(shape)


def sum_by_hand(case: dict[str, Any]) -> Tensor:
    """[T, O]: row j of a token through its j-th unit, times its gate."""
    r, rows = case["A"].shape[0] // case["units"], []
    for t in range(case["x"].shape[0]):
        total = case["x"].new_zeros(case["B"].shape[0])
        for slot, unit in enumerate(case["index"][t].tolist()):
            own = slice(unit * r, (unit + 1) * r)
            alone = case["B"][:, own] @ (case["scale"][own] * (case["A"][own] @ case["x"][t, slot]))
            total = total + case["weight"][t, slot] * alone
        rows.append(total)
    return torch.stack(rows) if rows else case["x"].new_zeros(0, case["B"].shape[0])


def apart(apply: Any, case: dict[str, Any]) -> Tensor:
    """``apply_each`` or ``apply_sum``."""
    route = Route(case["weight"], case["units"], case["index"])
    return apply(case["x"], Factors(case["A"], case["B"], case["scale"]), route)


def rows_of(case: dict[str, Any]) -> dict[str, Any]:
    """The case with a row of x per chosen unit: [T, k, D]."""
    made = torch.Generator().manual_seed(2)
    shape = (*case["index"].shape, case["x"].shape[1])
    return {**case, "x": torch.randn(shape, generator=made, dtype=torch.float64)}


@pytest.mark.parametrize("T", [0, 1, 7])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_experts_apart_equal_the_loop(T: int, k: int) -> None:
    case = make("blocks", T=T, k=k)
    expected = differentiate(each_by_hand, case)
    actual = differentiate(lambda leaves: apart(routed_lora.apply_each, leaves), case)
    for key in ("y", "x", "A", "B"):
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-12, atol=1e-12)
    assert (actual["weight"] == 0).all()  # gates have no part in it


@pytest.mark.parametrize("T", [0, 1, 7])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_rows_of_their_own_equal_the_loop(T: int, k: int) -> None:
    case = rows_of(make("blocks", T=T, k=k))
    expected = differentiate(sum_by_hand, case)
    actual = differentiate(lambda leaves: apart(routed_lora.apply_sum, leaves), case)
    for key in ("y", "x", "A", "B", "weight"):
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-12, atol=1e-12)


def test_the_gated_sum_of_experts_apart_is_the_mixture() -> None:
    case = make("blocks", k=3)
    each = apart(routed_lora.apply_each, case)
    torch.testing.assert_close((each * case["weight"].unsqueeze(-1)).sum(1), run(case), rtol=1e-12, atol=1e-12)
    copies = {**case, "x": case["x"].unsqueeze(1).expand(-1, 3, -1)}
    torch.testing.assert_close(apart(routed_lora.apply_sum, copies), run(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("apply", [routed_lora.apply_each, routed_lora.apply_sum])
def test_experts_apart_pass_gradcheck(apply: Any) -> None:
    case = make("blocks", T=3, k=2)
    case = tracked(rows_of(case) if apply is routed_lora.apply_sum else case)
    wanted = ("x", "A", "B", "weight") if apply is routed_lora.apply_sum else ("x", "A", "B")

    def function(*values: Tensor) -> Tensor:
        return apart(apply, {**case, **dict(zip(wanted, values, strict=True))})

    assert torch.autograd.gradcheck(function, [case[key] for key in wanted])


@pytest.mark.parametrize("apply", [routed_lora.apply_each, routed_lora.apply_sum])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_experts_apart_in_half_precision_are_computed_in_float32(apply: Any, half: torch.dtype) -> None:
    case = make("blocks", T=7, D=33, out=9, k=2)
    case = rows_of(case) if apply is routed_lora.apply_sum else case
    narrow = {
        key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in case.items()
    }
    narrow["x"] = case["x"].to(half)
    wide = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in narrow.items()
    }
    torch.testing.assert_close(apart(apply, narrow).double(), apart(apply, wide), rtol=1e-5, atol=1e-5)
