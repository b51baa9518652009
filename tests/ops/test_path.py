"""The choice of a path as a table: shapes and machines in, paths out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moelora.ops.path import Shape, choose
from moelora.ops.routed_lora import path_of
from tests.ops.test_cpp import built, cast
from tests.ops.test_routed_lora import MIXES, arguments, in_rank_space, make

LAYER = Shape(tokens=1024, inputs=1024, outputs=1024, units=8, width=8, k=2)
LARGE = Shape(tokens=16384, inputs=4096, outputs=4096, units=8, width=16, k=2, half=True)


@pytest.mark.parametrize(
    ("units", "width", "k", "core", "half", "compiled"),
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
def test_on_a_cpu(units: int, width: int, k: int | None, core: bool, half: bool, compiled: bool) -> None:
    shape = replace(LAYER, units=units, width=width, k=k, form="core" if core else "blocks", half=half)
    assert choose(shape, "vector") == ("compiled" if compiled else "dense")
    assert choose(shape, "torch") == "dense"


@pytest.mark.parametrize(
    ("tokens", "units", "path"), [(1, 8, "compiled"), (64, 8, "compiled"), (65, 8, "dense"), (1, 64, "dense")]
)
def test_a_few_tokens_are_one_call(tokens: int, units: int, path: str) -> None:
    assert choose(replace(LAYER, tokens=tokens, units=units, k=None), "vector") == path


@pytest.mark.parametrize(("units", "k", "path"), [(8, 2, "compiled"), (4, 2, "dense"), (1, None, "dense")])
def test_without_vector_instructions_few_of_many_are_worth_it(units: int, k: int | None, path: str) -> None:
    assert choose(replace(LAYER, units=units, k=k), "portable") == path


@pytest.mark.parametrize("machine", ["torch", "portable", "vector", "cuda"])
def test_without_tokens_nothing_is_worth_it(machine: Any) -> None:
    assert choose(replace(LAYER, tokens=0), machine) == "dense"


@pytest.mark.parametrize(("k", "ranks"), [(1, 320), (2, 560), (4, 1040), (8, 2000)])
@pytest.mark.parametrize("width", [16, 32, 64])
def test_on_a_gpu_sorting_pays_from_so_many_ranks(k: int, ranks: int, width: int) -> None:
    # Ranks from the bytes and products of either way alone, at 480 TFLOP/s. Launches and the factors' own bytes, which
    # that leaves out, move the place by less than a quarter.
    def path(units: int) -> str:
        return choose(replace(LARGE, units=units, width=width, k=k), "cuda")

    chosen = [path(units) for units in range(k, 2 * ranks // width)]
    first = chosen.index("sorted")
    assert set(chosen[:first]) == {"dense"} and set(chosen[first:]) == {"sorted"}  # one place, no to and fro
    assert ranks / 1.25 < (first + k) * width < 1.25 * ranks


@pytest.mark.parametrize("inputs", [2048, 8192])
@pytest.mark.parametrize("tokens", [16384, 65536])
def test_on_a_gpu_the_place_hardly_depends_on_tokens_and_features(inputs: int, tokens: int) -> None:
    shape = replace(LARGE, tokens=tokens, inputs=inputs, outputs=inputs)
    assert choose(replace(shape, units=24), "cuda") == "dense"
    assert choose(replace(shape, units=48), "cuda") == "sorted"


@pytest.mark.parametrize(
    ("tokens", "units", "width", "k", "path"),
    [
        (1, 8, 16, 2, "gather"),
        (1, 64, 64, 4, "gather"),
        (8, 64, 16, 4, "gather"),
        (64, 8, 16, 2, "dense"),
        (256, 8, 16, 2, "dense"),
        (256, 64, 64, 4, "dense"),  # the factors are read either way, and fewer kernels are launched
        (1024, 64, 64, 4, "sorted"),
        (16384, 64, 64, 4, "sorted"),
        (16384, 64, 64, None, "dense"),
    ],
)
def test_on_a_gpu_few_tokens_gather_their_factors(
    tokens: int, units: int, width: int, k: int | None, path: str
) -> None:
    assert choose(replace(LARGE, tokens=tokens, units=units, width=width, k=k), "cuda") == path


@pytest.mark.parametrize("change", [{"form": "shared"}, {"form": "core"}, {"mapped": True}, {"k": None}])
@pytest.mark.parametrize("tokens", [1, 16384])
def test_on_a_gpu_only_chosen_blocks_are_worth_other_ways(change: dict[str, Any], tokens: int) -> None:
    shape = replace(LARGE, tokens=tokens, units=64, width=64)
    assert choose(shape, "cuda") != "dense"
    assert choose(replace(shape, **change), "cuda") == "dense"


@built
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("given_h", [False, True])
def test_a_call_is_described_by_its_tensors(
    mix: Any, k: int | None, given_h: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cast(make(mix, T=7, D=5, out=3, units=4, r=2, k=k), torch.bfloat16)
    shapes: list[Shape] = []
    monkeypatch.setattr("moelora.ops.routed_lora.choose", lambda shape, machine: shapes.append(shape) or "dense")
    path_of(*arguments(in_rank_space(case) if given_h else case))
    ranks = 8 if mix == "blocks" else 2
    assert shapes == [Shape(7, ranks if given_h else 5, 3, 4, 2, k, mix, True, given_h)]
