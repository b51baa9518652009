"""The compiled CPU kernels as a part of the operator: when they are used, how they are loaded and built."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moelora.core.errors import MoeloraError
from moelora.core.factors import Factors
from moelora.core.route import Route
from moelora.ops import cpu, reference, routed_lora
from moelora.ops.path import Path
from tests.ops.test_cpp import all_needed, built, cast
from tests.ops.test_routed_lora import GRADS, MIXES, arguments, differentiate, in_rank_space, make, run, tracked

# Reported by torch's own checker about torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two computed, call by call."""
    calls: list[str] = []
    for module, name in ((cpu, "cpu"), (reference, "reference")):
        for function in ("forward", "backward"):
            original = getattr(module, function)
            monkeypatch.setattr(module, function, lambda *a, f=original, n=name: (calls.append(n), f(*a))[1])
    return calls


def onto_of(case: dict[str, Any]) -> Tensor:
    """Something to add the update to."""
    made = torch.Generator().manual_seed(3)
    return torch.randn(case["x"].shape[0], case["B"].shape[0], generator=made).to(case["x"].dtype)


def by(path: Path | None) -> Any:
    """The operator on a given path, as ``run`` is on the one that it takes itself; with ``onto`` if a case has it."""

    def call(leaves: dict[str, Any]) -> Tensor:
        route = Route(leaves["weight"], leaves["units"], leaves["index"])
        factors = Factors(leaves["A"], leaves["B"], leaves["scale"], leaves["core"])
        return routed_lora.apply(leaves["x"], factors, route, leaves.get("onto"), path)

    return call


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])
def test_the_operator_uses_the_kernels(mix: str, tokens: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    case = cast(make(mix, T=20, k=2), tokens, torch.float32)
    ours = differentiate(run, case)
    assert calls == ["cpu", "cpu"]
    plain = differentiate(by("dense"), case)
    assert calls == ["cpu", "cpu", "reference", "reference"]
    for key, value in plain.items():
        loose = {"rtol": 1e-2, "atol": 1e-2} if tokens is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(ours[key], value, **loose)


@built
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_go_to_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    case = make("blocks", k=2)
    differentiate(run, case if dtype is torch.float64 else cast(case, dtype))
    assert calls == ["reference", "reference"]


@built
@pytest.mark.parametrize("key", ["weight", "scale", "A", "B"])
def test_one_float64_tensor_sends_the_call_to_the_reference(key: str) -> None:
    case = cast(make("blocks", k=2))
    assert routed_lora.path_of(*arguments(case)) == "compiled"
    assert routed_lora.path_of(*arguments({**case, key: case[key].double()})) == "dense"


@pytest.mark.parametrize("T", [0, 1])
def test_empty_tensors_go_to_the_reference(T: int) -> None:
    case = cast(make("blocks", T=T, D=0 if T else 5, k=2))
    assert routed_lora.path_of(*arguments(case)) == "dense"
    assert run(case).shape == (T, 3) and (run(case) == 0).all()


@pytest.mark.parametrize("path", ["sorted", "gather", "fast"])
def test_a_path_of_other_devices_is_refused(path: Any) -> None:
    case = cast(make("blocks", k=2))
    with pytest.raises(MoeloraError, match=f"path '{path}' is none of cpu tensors"):
        by(path)(case)


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["dense", "compiled"])
def test_the_gradient_of_what_the_update_is_added_to_is_that_of_the_sum(
    mix: str, k: int | None, tokens: torch.dtype, path: Path
) -> None:
    case = cast(make(mix, T=20, k=k), tokens)
    leaves, alone = tracked(case), tracked(case)
    onto = onto_of(case).requires_grad_()
    y = by(path)({**leaves, "onto": onto})
    dy = onto_of(case).flip(0)
    y.backward(dy)
    by(path)(alone).backward(dy)
    assert torch.equal(onto.grad, dy)
    assert all(torch.equal(leaves[key].grad, alone[key].grad) for key in GRADS if case[key] is not None)


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("given_h", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_opcheck(mix: str, k: int | None, given_h: bool, added: bool) -> None:
    case = cast(make(mix, k=k))
    case = in_rank_space(case) if given_h else case
    onto = onto_of(case) if added else None
    leaves = tracked(case)
    given = (onto if onto is None else onto.requires_grad_(), "compiled")
    torch.library.opcheck(routed_lora.routed_lora, (*arguments(leaves), *given))
    *tensors, width = arguments(case)
    y, h = routed_lora.routed_lora(*tensors, width, onto, "compiled")
    places = case["A"] is not None and k is not None and mix == "blocks"
    assert h.shape == ((0,) if given_h else (7, k * width if places else case["A"].shape[0]))
    upstream = torch.randn_like(y).detach()
    need = all_needed(case)
    torch.library.opcheck(routed_lora.routed_lora_backward, (upstream, *tensors, h, width, need, "compiled"))


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("added", [False, True])
def test_compiled_whole_and_checkpointed_it_is_the_same(mix: str, added: bool) -> None:
    torch._dynamo.reset()
    case = cast(make(mix, T=20, k=2))
    case = {**case, "onto": onto_of(case)} if added else case
    whole = by(None)
    plain = differentiate(whole, case)
    graph = differentiate(torch.compile(whole, fullgraph=True, backend="aot_eager"), case)
    again = differentiate(lambda leaves: checkpoint(whole, leaves, use_reentrant=False), case)
    for key, value in plain.items():
        assert torch.equal(graph[key], value) and torch.equal(again[key], value)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_are_kept_for_the_gradient_of_factors_alone(mix: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    case = cast(make(mix, T=9, k=2), dtype)
    expected = differentiate(run, case)
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        for trained in (True, False):
            leaves, kept = tracked(case), set()
            leaves["A"].requires_grad_(trained)

            def keep(tensor: Tensor, kept: set[int] = kept) -> Tensor:
                kept.add(tensor.untyped_storage().data_ptr())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                y = function(leaves)
            assert (leaves["x"].untyped_storage().data_ptr() in kept) == trained
            y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y))
            for key in GRADS:
                if leaves[key] is not None and leaves[key].requires_grad:
                    assert torch.equal(leaves[key].grad, expected[key]), key


@built
def test_compiled_by_the_default_backend_it_is_the_same() -> None:
    torch._dynamo.reset()
    case = cast(make("blocks", T=20, k=2))

    def around(leaves: dict[str, Any]) -> Tensor:
        return by(None)({**leaves, "x": leaves["x"] * 2, "onto": leaves["x"].sum(1, True) + leaves["B"][:, 0]})

    expected, actual = differentiate(around, case), differentiate(torch.compile(around, fullgraph=True), case)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-5)


# Loading, building


@pytest.mark.skipif(
    os.environ.get("MOELORA_BUILD") == "0" or not (shutil.which("g++") or shutil.which("c++")),
    reason="no compiler, or no wish for the kernels",
)
def test_the_kernels_are_there_where_they_can_be_built() -> None:
    # Without this, all tests of the kernels could be skipped unseen.
    assert cpu.PROBLEM == "", "python setup.py build_ext --inplace"


def test_a_missing_library_is_no_error_and_a_broken_one_is_named(tmp_path: pathlib.Path) -> None:
    assert cpu.load(tmp_path / "absent.so") == "not built"
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    assert str(broken) in cpu.load(broken) and "cannot be loaded" in cpu.load(broken)


@built
def test_a_level_that_the_machine_lacks_is_not_taken() -> None:
    assert torch.ops.moelora.cpu_level(99) == torch.ops.moelora.cpu_level(0) == cpu.level()
    assert cpu.status() in ("portable", "AVX2", "AVX-512")


@pytest.mark.parametrize(
    ("wish", "fails", "said"),
    [
        ("maybe", True, "MOELORA_BUILD is 'maybe'; it can be auto, 0 or 1"),
        ("0", False, ""),
        ("auto", False, "the C++ kernels cannot be built; all works without them"),
        ("1", True, "MOELORA_BUILD=1: the C++ kernels cannot be built: "),
    ],
)
def test_the_build_switch_without_a_compiler(wish: str, fails: bool, said: str, tmp_path: pathlib.Path) -> None:
    ran = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}"],
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "MOELORA_BUILD": wish, "CC": "false", "CXX": "false"},
        capture_output=True,
        text=True,
    )
    assert said in ran.stderr and (ran.returncode != 0) is fails
    assert ("C++ kernels" in ran.stderr) is (wish in ("auto", "1")) and not list(tmp_path.rglob("*.so"))
