"""PEFT folders: every number as PEFT computes it, and every folder that is not plain LoRA refused by name."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from moelora.core.errors import AdapterError
from moelora.io import peft as io
from moelora.io.peft import CONFIG, WEIGHTS, PeftAdapter, read_peft
from tests import tiny

Q0 = "model.layers.0.self_attn.q_proj"
NAME = f"base_model.model.{Q0}.lora_%s.weight"
PATTERNS: dict[str, Any] = {
    "rank_pattern": {r".*\.gate_proj": 5, f"^{Q0}": 3, "layers.1.mlp.down_proj": 2, "q_proj": 6},
    # PEFT sorts these when it writes them, so that down_proj comes first in the file.
    "alpha_pattern": {"self_attn.q_proj": 32, "_proj": 1, r"layers\.0\.mlp\.down_proj": 7, "down_proj": 9},
}


def written(folder: Path, half: bool = False, fill: bool = True, **options: Any) -> Path:
    """A folder that PEFT writes for the tiny llama, with random weights in place of the zeros of lora_B."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "gate_proj", "down_proj"], **options}
    base = tiny.llama(dtype=torch.float16 if half else torch.float32, attention_bias="bias" in options)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(**options), autocast_adapter_dtype=not half)
        for name, weight in model.named_parameters():
            if fill and "lora_B" in name:
                weight.data.normal_()
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    path = tmp_path / "adapter"
    path.mkdir()
    for name in (CONFIG, WEIGHTS):
        (path / name).write_bytes((plain / name).read_bytes())
    return path


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def resave(folder: Path, **changes: Any) -> Path:
    """Replace tensors by name; None takes one out."""
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / WEIGHTS)
    return folder


def raw(folder: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return folder


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(AdapterError) as caught:
        read_peft(folder)
    text = str(caught.value)
    assert str(folder) in text and "found" in text and "expected" in text and ";" in text, text
    assert [part for part in parts if part not in text] == [], text
    assert len(text) < 1000


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        PATTERNS,
        {**PATTERNS, "use_rslora": True},
        {"half": True},
        {"init_lora_weights": "gaussian"},
        {"lora_dropout": 0.1, "task_type": "CAUSAL_LM", "layers_to_transform": [1], "lora_alpha": 3},
    ],
    ids=["plain", "rslora", "patterns", "patterns rslora", "fp16", "gaussian", "ignored settings"],
)
def test_delta_weights_are_those_of_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    half = options.get("half", False)
    found = read_peft(written(tmp_path, **options))
    base = tiny.llama(dtype=torch.float16 if half else torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=not half)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert found.tensors.keys() == layers.keys() and len(layers) >= 3
    for name, pair in found.tensors.items():
        expected = layers[name].get_delta_weight("default")
        assert pair.A.dtype == pair.B.dtype == expected.dtype == (torch.float16 if half else torch.float32)
        delta = pair.B.float() @ pair.A.float() * pair.scale
        assert torch.equal(delta.to(expected.dtype), expected), name
        assert pair.scale == layers[name].scaling["default"]


def test_the_first_pattern_of_the_file_wins_and_dots_are_wild(folder: Path) -> None:
    # The order is that of the file, and an unescaped dot is any character, as re.match has it in PEFT.
    edit(folder, alpha_pattern={"self.attn.q_proj": 4, "q_proj": 12, "proj": 1})
    scales = {name: pair.scale for name, pair in read_peft(folder).tensors.items()}
    assert scales[Q0] == 1.0 and scales["model.layers.0.mlp.gate_proj"] == 2.0


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["", "^", ".*", ".*.", r".*\."]), st.text(r"ab.\\", max_size=4)), max_size=3),
    st.from_regex(r"[ab]{1,3}(\.[ab]{1,3}){0,3}", fullmatch=True),
)
def test_patterns_match_as_in_peft(patterns: list[tuple[str, str]], module: str) -> None:
    table = {before + rest.replace("\\", "\\.") + end: 1.0 for before, rest in patterns for end in ("", "$") if rest}
    table = {key: float(place) for place, key in enumerate(table)}
    expected = table.get(get_pattern_key(table.keys(), module), -1.0)
    resolve = io._resolver({"alpha_pattern": table, "lora_alpha": -1.0}, "alpha_pattern", "lora_alpha", Path(), 1)
    assert resolve(module) == expected


def test_the_configuration_is_recorded(folder: Path) -> None:
    found = read_peft(edit(folder, base_model_name_or_path="org/base", revision="abc", fan_in_fan_out=True))
    assert isinstance(found, PeftAdapter) and found.folder == folder
    assert (found.base_model, found.revision, found.config["fan_in_fan_out"]) == ("org/base", "abc", True)


def test_names_with_the_adapter_in_between_are_read(folder: Path) -> None:
    tensors = {key.replace(".weight", ".default.weight"): value for key, value in load_file(folder / WEIGHTS).items()}
    expected = read_peft(folder).tensors[Q0]
    save_file(tensors, folder / WEIGHTS)
    found = read_peft(folder).tensors[Q0]
    assert torch.equal(found.A, expected.A) and torch.equal(found.B, expected.B)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floating_dtypes_are_kept(folder: Path, dtype: torch.dtype) -> None:
    tensors = {key: value.to(dtype) for key, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    assert torch.equal(read_peft(folder).tensors[Q0].A, tensors[NAME % "A"])


def test_warnings(tmp_path: Path, folder: Path) -> None:
    with pytest.warns(UserWarning, match="every lora_B is zero"):
        read_peft(written(tmp_path / "zero", fill=False))
    with pytest.warns(UserWarning, match="unknown settings, all off: .'enable_lora', 'future'."):
        read_peft(edit(folder, future=False, enable_lora=None))


def test_every_setting_of_the_installed_peft_is_known(tmp_path: Path) -> None:
    written(tmp_path)
    known = io.READ | io.RECORDED | io.IGNORED | io.REFUSED.keys()
    assert json.loads((tmp_path / CONFIG).read_text()).keys() <= known
    assert set(LoraConfig.__dataclass_fields__) <= known


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("use_dora", {"use_dora": True}),
        ("lora_bias", {"lora_bias": True}),
        ("bias", {"bias": "all"}),
        ("bias", {"bias": "lora_only"}),
        ("modules_to_save", {"modules_to_save": ["lm_head"]}),
        ("trainable_token_indices", {"trainable_token_indices": [1, 2]}),
        ("layer_replication", {"layer_replication": [(0, 2), (1, 2)]}),
        ("init_lora_weights", {"init_lora_weights": "pissa"}),
        ("init_lora_weights", {"init_lora_weights": "pissa_niter_2"}),
        ("init_lora_weights", {"init_lora_weights": "olora"}),
        ("alora_invocation_tokens", {"alora_invocation_tokens": [1]}),
        ("embedding", {"target_modules": ["embed_tokens", "q_proj"]}),
    ],
)
def test_what_peft_writes_and_is_not_plain_is_refused(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    refused(written(tmp_path, **options), name)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"use_dora": True}, "DoRA (use_dora)"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_a_configuration_that_hides_it_does_not_help(tmp_path: Path, options: dict[str, Any], kind: str) -> None:
    off = {key: "none" if key == "bias" else None for key in options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(edit(written(tmp_path, **options), **off), WEIGHTS, kind)


@pytest.mark.parametrize("key", [*io.REFUSED, "a_field_of_tomorrow"])
@pytest.mark.parametrize("value", [True, 0, ["a"], {"a": None}], ids=repr)
def test_active_settings_are_refused_by_name(folder: Path, key: str, value: object) -> None:
    refused(edit(folder, **{key: value}), CONFIG, key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("init_lora_weights", value) for value in ("corda", "loftq", "lora_ga", "eva", "mica", "new", 1, None, [])),
        *(("peft_type", value) for value in ("XLORA", "IA3", None, ["LORA"])),
        *(("r", value) for value in (0, -1, 4097, 4.0, True, None, "4")),
        *(("lora_alpha", value) for value in (0, -1, 1e7, 10**400, True, None, "8")),
        *((key, value) for key in ("use_rslora", "fan_in_fan_out") for value in (1, "true", None)),
        *((key, value) for key in ("rank_pattern", "alpha_pattern") for value in ({"q_proj": 0}, {"q_proj": "4"}, [1])),
        ("bias", None),
        ("base_model_name_or_path", 3),
        ("revision", ["main"]),
    ],
)
def test_wrong_values_are_refused_by_name(folder: Path, key: str, value: object) -> None:
    refused(edit(folder, **{key: value}), CONFIG, key)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "q_proj|v_proj", ".*a.*", "[ab]", "", "a" * 257, r"\d+"])
def test_patterns_outside_the_safe_subset_are_refused(folder: Path, pattern: str) -> None:
    refused(edit(folder, rank_pattern={pattern: 4}), "rank_pattern", "pattern")


def test_the_work_of_patterns_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "MAX_MATCHES", 11)
    refused(edit(folder, alpha_pattern={"a": 1, "b": 2}), "alpha_pattern", "2 patterns for 6 modules")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"", "JSON"),
        (b"[]", "object"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 200_000, "JSON"),
        (b'{"r": 1, "r": 2}', "'r'"),
        (b'{"lora_alpha": NaN}', "NaN"),
        (b'{"r": ' + b"9" * 5000 + b"}", "JSON"),
        (b" " * ((1 << 20) + 1), "1048577 bytes"),
    ],
    ids=["empty", "list", "not text", "deep", "twice", "nan", "long number", "long"],
)
def test_damaged_configurations(folder: Path, text: bytes, part: str) -> None:
    (folder / CONFIG).write_bytes(text)
    refused(folder, CONFIG, part)


def test_tensors_that_do_not_fit_the_configuration(folder: Path) -> None:
    refused(edit(folder, r=5), "lora_A.weight", "rank 5")
    edit(folder, r=4)
    refused(resave(folder, **{NAME % "B": torch.ones(32, 3)}), NAME % "B", "[32, 3]", "rank 4")
    refused(resave(folder, **{NAME % "B": torch.ones(32, 4, dtype=torch.int32)}), NAME % "B", "I32")
    refused(resave(folder, **{NAME % "B": torch.ones(4, 4, 1, 1)}), NAME % "B", "convolutions")
    refused(resave(folder, **{NAME % "B": torch.ones(0)}), NAME % "B", "ZeRO-3")
    refused(resave(folder, **{NAME % "B": None}), NAME % "A", "no lora_B")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(folder: Path, bad: float) -> None:
    value = torch.ones(32, 4)
    value[7, 1] = bad
    refused(resave(folder, **{NAME % "B": value}), NAME % "B", "NaN or infinite")


@pytest.mark.parametrize(
    "name",
    [
        f"{Q0}.lora_A.weight",
        f"base_model.model.{Q0}.lora_A.other.weight",
        f"base_model.model.{Q0}.lora_C.weight",
        "base_model.model.mlp.experts.base_layer.lora_A.weight",
        "base_model.model..lora_A.weight",
        "base_model.model.a/b.lora_A.weight",
        f"base_model.model.{'a' * 600}.lora_A.weight",
        NAME % "A" + "\n",
    ],
)
def test_foreign_names(folder: Path, name: str) -> None:
    refused(resave(folder, **{name: torch.ones(4, 4)}), WEIGHTS, "plain LoRA only")


def test_embeddings(folder: Path) -> None:
    refused(resave(folder, **{"base_model.model.wte.lora_embedding_A": torch.ones(4, 4)}), "LoRA of an embedding")


def test_overlapping_rank_patterns_that_peft_cannot_read_back_either(tmp_path: Path) -> None:
    written(tmp_path, rank_pattern={"q_proj": 6, f"^{Q0}": 3})  # sorted when written, so the other one wins
    refused(tmp_path, NAME % "A", "[6, 32]", "rank 3")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_headers_that_lie(folder: Path) -> None:
    a, b = NAME % "A", NAME % "B"
    good = {"dtype": "F32", "shape": [4, 1]}
    one, two = {**good, "data_offsets": [0, 16]}, {**good, "shape": [1, 4], "data_offsets": [16, 32]}
    read_peft(raw(folder, {a: one, b: two}, b"\0\0\0\x3f" * 8))
    twice = json.dumps({a: one})[:-1] + f', "{a}": ' + json.dumps(two) + "}"
    refused(raw(folder, twice.encode(), bytes(32)), a, "twice")
    both = {a: one, a.replace(".weight", ".default.weight"): {**one, "data_offsets": [16, 32]}}
    refused(raw(folder, both, bytes(32)), "twice")
    refused(raw(folder, {a: one, b: {**two, "data_offsets": [0, 16]}}, bytes(16)), "byte 0")  # overlap
    refused(raw(folder, {a: one, b: {**two, "data_offsets": [20, 36]}}, bytes(36)), "byte 20")  # gap
    refused(raw(folder, {a: one, b: two}, bytes(31)), "size")  # truncated
    refused(raw(folder, {a: one, b: two}, bytes(33)), "size")
    refused(raw(folder, {a: {**one, "shape": [4, 1 << 60]}, b: two}, bytes(32)), a, "shape")
    refused(raw(folder, {a: {**one, "shape": [True, 4]}, b: two}, bytes(32)), a, "shape")
    refused(raw(folder, {a: {**one, "data_offsets": [-16, 0]}, b: two}, bytes(32)), a, "data_offsets")
    refused(raw(folder, {a: {**one, "extra": 1}, b: two}, bytes(32)), a)
    refused(raw(folder, {}), "tensors")
    refused(raw(folder, b"{}", length=1 << 63), "header: found", "at most 16777216")
    refused(raw(folder, b"{}" + bytes(17 << 20), length=(16 << 20) + 1), "header: found", "at most 16777216")
    (folder / WEIGHTS).write_bytes(b"\1\0")
    refused(folder, "size")


def test_truncated_everywhere(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    for count in range(0, len(whole), 97):
        (folder / WEIGHTS).write_bytes(whole[:count])
        refused(folder, WEIGHTS)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_headers_raise_nothing_else(folder: Path, plain: Path, data: st.DataObject) -> None:
    whole = bytearray((plain / WEIGHTS).read_bytes())
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, end - 1))
        whole[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (folder / WEIGHTS).write_bytes(whole)
    with contextlib.suppress(AdapterError):
        read_peft(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    ),
    st.sampled_from(["dtype", "shape", "data_offsets", "whole", "config"]),
    st.sampled_from([*sorted(io.READ | io.RECORDED), "x"]),
)
def test_any_json_raises_nothing_else(folder: Path, plain: Path, value: object, where: str, key: str) -> None:
    entry = {"dtype": "F32", "shape": [4, 1], "data_offsets": [0, 16], where: value}
    raw(folder, {NAME % "A": value if where == "whole" else entry}, bytes(16))
    config = json.loads((plain / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, key: value} if where == "config" else config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(folder)


def test_pickles_are_named_and_not_opened(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refused(folder, WEIGHTS, "save_pretrained")
    for name in io.PICKLES:
        (folder / name).write_bytes(b"not even a pickle")
        refused(folder, name, "safe_serialization=True")
        (folder / name).unlink()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_and_special_files(folder: Path, tmp_path: Path, name: str) -> None:
    path, content = folder / name, (folder / name).read_bytes()
    (tmp_path / "outside").write_bytes(content)
    for target in ("../outside", str(tmp_path / "outside"), "/dev/zero", "../adapter2/../outside"):
        path.unlink()
        path.symlink_to(target)
        refused(folder, name, "leaves the folder")
    for target in ("nowhere", name):  # dangling, and a loop
        path.unlink()
        path.symlink_to(target)
        refused(folder, name)
    path.unlink()
    os.mkfifo(path)
    refused(folder, name, "regular file")
    path.unlink()
    path.mkdir()
    refused(folder, name, "regular file")
    path.rmdir()
    (folder / "inside").write_bytes(content)
    path.symlink_to("inside")
    assert read_peft(folder).tensors
    (tmp_path / "alias").symlink_to(folder)
    assert read_peft(tmp_path / "alias").tensors


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "none", CONFIG, "check the path")
