"""The compiled CPU kernels as a part of the operator: when they are used, how they are loaded and built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moelora.ops import cpu, reference, routed_lora
from moelora.ops.cpu import Level
from tests.ops.test_cpp import all_needed, built, cast
from tests.ops.test_routed_lora import GRADS, MIXES, arguments, differentiate, in_rank_space, make, run


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two computed, call by call."""
    calls: list[str] = []
    for module, name in ((cpu, "cpu"), (reference, "reference")):
        for function in ("forward", "backward"):
            original = getattr(module, function)
            monkeypatch.setattr(module, function, lambda *a, f=original, n=name: (calls.append(n), f(*a))[1])
    return calls


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])
def test_the_operator_uses_the_kernels(mix: str, tokens: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    case = cast(make(mix, T=20, k=2), tokens, torch.float32)
    ours = differentiate(run, case)
    assert calls == ["cpu", "cpu"]
    with (
        routed_lora.routed_lora.set_kernel_enabled("cpu", False),
        routed_lora.routed_lora_backward.set_kernel_enabled("cpu", False),
    ):
        plain = differentiate(run, case)
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
    assert cpu.takes(*arguments(case))
    assert not cpu.takes(*arguments({**case, key: case[key].double()}))


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("given_h", [False, True])
def test_opcheck(mix: str, given_h: bool) -> None:
    case = cast(make(mix, k=2))
    case = in_rank_space(case) if given_h else case
    assert cpu.takes(*arguments(case))
    leaves = {
        key: value.requires_grad_() if key in GRADS and value is not None else value for key, value in case.items()
    }
    torch.library.opcheck(routed_lora.routed_lora, arguments(leaves))
    frozen = {key: value.detach() if isinstance(value, Tensor) else value for key, value in case.items()}
    *tensors, width = arguments(frozen)
    y, h = routed_lora.routed_lora(*tensors, width)
    torch.library.opcheck(
        routed_lora.routed_lora_backward, (torch.randn_like(y), *tensors, h, width, all_needed(frozen))
    )


@built
@pytest.mark.parametrize("mix", MIXES)
def test_compiled_whole_and_checkpointed_it_is_the_same(mix: str) -> None:
    torch._dynamo.reset()
    case = cast(make(mix, T=20, k=2))
    plain = differentiate(run, case)
    graph = differentiate(torch.compile(run, fullgraph=True, backend="aot_eager"), case)
    again = differentiate(lambda leaves: checkpoint(run, leaves, use_reentrant=False), case)
    for key, value in plain.items():
        assert torch.equal(graph[key], value) and torch.equal(again[key], value)


# Path choice, loading, building


@pytest.mark.parametrize(
    ("units", "width", "k", "core", "half", "wanted"),
    [
        # chosen units: where at least half of the work falls away
        (8, 8, 2, False, False, True),
        (64, 8, 2, False, False, True),
        (4, 64, 2, False, False, True),
        (3, 8, 2, False, False, True),
        (4, 8, 3, False, False, False),
        (8, 8, 8, False, False, False),
        (64, 1, 8, False, False, True),
        (64, 1, 32, False, False, True),
        (64, 1, 40, False, False, False),
        (2, 8, 2, False, False, True),  # so little work that the copies saved decide
        # dense gates: only few ranks
        (1, 8, None, False, False, True),
        (4, 4, None, False, False, True),
        (8, 8, None, False, False, False),
        (4, 8, None, False, True, True),
        (8, 8, None, False, True, False),
        # cores
        (8, 8, None, True, False, True),
        (8, 32, None, True, False, False),
        (8, 32, None, True, True, True),
        (8, 128, 2, True, False, True),
        (8, 128, None, True, True, False),
    ],
)
def test_when_the_kernels_pay(units: int, width: int, k: int | None, core: bool, half: bool, wanted: bool) -> None:
    assert cpu.pays(units, width, k, core, half, Level.AVX2) is wanted
    assert cpu.pays(units, width, k, core, half, Level.AVX512) is wanted
    assert cpu.pays(units, width, k, core, half, Level.ABSENT) is False


def test_without_vector_instructions_they_pay_for_few_of_many() -> None:
    assert cpu.pays(8, 8, 2, False, False, Level.PORTABLE)
    assert not cpu.pays(4, 8, 2, False, False, Level.PORTABLE)
    assert not cpu.pays(1, 8, None, False, False, Level.PORTABLE)


@pytest.mark.parametrize("T", [0, 1])
def test_empty_tensors_go_to_the_reference(T: int) -> None:
    case = cast(make("blocks", T=T, D=0 if T else 5, k=2))
    assert not cpu.takes(*arguments(case))
    assert run(case).shape == (T, 3) and (run(case) == 0).all()


def test_a_missing_library_is_no_error_and_a_broken_one_is_named(tmp_path: Path) -> None:
    assert cpu.load(tmp_path / "absent.so") == "not built"
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    assert str(broken) in cpu.load(broken) and "cannot be loaded" in cpu.load(broken)


@built
def test_a_level_that_the_machine_lacks_is_not_taken() -> None:
    assert torch.ops.moelora.cpu_level(99) == torch.ops.moelora.cpu_level(0) == cpu.level()
    assert cpu.status() in ("portable", "AVX2", "AVX-512")


@pytest.mark.parametrize(("wish", "said"), [("maybe", "it can be auto, 0 or 1"), ("0", "moelora")])
def test_the_build_switch(wish: str, said: str) -> None:
    top = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "--name"],
        cwd=top,
        env={**os.environ, "MOELORA_BUILD": wish},
        capture_output=True,
        text=True,
    )
    assert said in ran.stdout + ran.stderr and (ran.returncode == 0) == (wish == "0")
