"""adapter_config.json of every PEFT version: what is read, what is refused, and by what name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from moelora.core.errors import AdapterError
from moelora.io import peft_config as io
from moelora.io.peft import CONFIG, read_peft
from moelora.io.peft_config import check_config
from tests.io.written import by_hand, edit, refused, written

NONE: dict[str, Any] = {}
VERSIONS: dict[str, dict[str, Any]] = {
    "0.3": {
        **{"base_model_name_or_path": "org/base", "bias": "none", "fan_in_fan_out": False, "inference_mode": True},
        **{"init_lora_weights": True, "lora_alpha": 8, "lora_dropout": None, "modules_to_save": None},
        **{"peft_type": "LORA", "r": 4, "target_modules": ["q"], "task_type": "CAUSAL_LM"},
    },
    "0.4": {"layers_to_transform": None, "layers_pattern": None, "auto_mapping": None, "revision": None},
    "0.6": {"rank_pattern": {}, "alpha_pattern": {}},
    "0.8": {"use_rslora": False, "megatron_config": None, "megatron_core": "megatron.core", "loftq_config": {}},
    "0.10": {"use_dora": False, "layer_replication": None},
    "0.14": {"exclude_modules": None, "eva_config": None, "lora_bias": False},
    "0.17": {
        **{"trainable_token_indices": None, "corda_config": None, "use_qalora": False, "qalora_group_size": 16},
        **{"target_parameters": None},
    },
    "0.18": {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "ensure_weight_tying": False,
        "peft_version": "0.18.0",
    },
    "0.19": {"lora_ga_config": None, "use_bdlora": None},
    "0.20": {"velora_config": None, "monteclora_config": None},
}
"""The fields that each version was the first to write, with the values they have when nothing is asked for."""


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_read_without_a_word(tmp_path: Path, version: str) -> None:
    names = list(VERSIONS)
    config = {key: value for name in names[: names.index(version) + 1] for key, value in VERSIONS[name].items()}
    tensors = {"q.lora_A.weight": torch.ones(4, 6), "q.lora_B.weight": torch.ones(5, 4)}
    by_hand(tmp_path, tensors)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_peft(tmp_path)
    assert (found.read("q").scale, found.base_model, found.moved) == (2.0, "org/base", None)


def test_every_setting_of_the_installed_peft_is_known(tmp_path: Path) -> None:
    written(tmp_path)
    known = io.READ | io.RECORDED | io.IGNORED | set(io.REFUSED)
    assert json.loads((tmp_path / CONFIG).read_text()).keys() <= known
    assert set(LoraConfig.__dataclass_fields__) <= known
    assert len(known) == sum(map(len, (io.READ, io.RECORDED, io.IGNORED, io.REFUSED)))


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica", "pissa", "olora", ...])
def test_starts_that_are_read(copied: Path, start: Any) -> None:
    eva = {"rho": 2.0, "tau": 0.99} if start == "eva" else None
    found = read_peft(edit(copied, init_lora_weights=start, eva_config=eva))
    assert found.moved == (start if start in ("pissa", "olora") else None)


@pytest.mark.parametrize(
    "start", ["corda", "loftq", "lora_ga", "pissa_niter_4", "pissa_niter_16", "new", "", 1, 0, None, [], {"pissa": 1}]
)
def test_starts_that_are_refused(copied: Path, start: object) -> None:
    refused(
        edit(copied, init_lora_weights=start), CONFIG, "init_lora_weights", "path_initial_model_for_weight_conversion"
    )


@pytest.mark.parametrize("key", [*io.REFUSED, "a_field_of_tomorrow"])
@pytest.mark.parametrize("value", [True, 0, 0.0, ["a"], {"a": None}, "x"], ids=repr)
def test_active_settings_are_refused_by_name(copied: Path, key: str, value: object) -> None:
    refused(edit(copied, **{key: value}), CONFIG, key)


@pytest.mark.parametrize("key", io.REFUSED)
@pytest.mark.parametrize("value", [None, False, "", [], {}], ids=repr)
def test_settings_that_are_off_are_not_spoken_of(copied: Path, key: str, value: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_peft(edit(copied, **{key: value}))


def test_unknown_settings_that_are_off_are_named_in_one_warning(copied: Path) -> None:
    with pytest.warns(UserWarning, match=r"unknown settings, all off: \['enable_lora', 'future'\]$") as caught:
        read_peft(edit(copied, future=False, enable_lora=None))
    assert len(caught) == 1


NAMES = "x" * 1025


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("peft_type", value) for value in ("XLORA", "IA3", None, ["LORA"], ...)),
        *(("r", value) for value in (0, -1, 4097, 4.0, True, None, "4", [4], ...)),
        *(("lora_alpha", value) for value in (0, -1, 1e7, 10**400, True, None, "8", {}, ...)),
        *(
            (key, value)
            for key in ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias")
            for value in (1, 0, "true", None, [])
        ),
        *(
            (key, value)
            for key in ("rank_pattern", "alpha_pattern")
            for value in ({"q_proj": 0}, {"q_proj": "4"}, {"q_proj": True}, {"q_proj": None}, [1], "q_proj", 1, False)
        ),
        ("rank_pattern", {"q_proj": 4.5}),
        *(("bias", value) for value in (None, "some", True, [], {})),
        *(
            (key, value)
            for key in ("base_model_name_or_path", "revision", "task_type")
            for value in (3, ["main"], {}, False, "a\nb", "\x1b[2J", "\ud800", "\u202e", NAMES)
        ),
        *(
            (key, value)
            for key in ("target_modules", "exclude_modules", "layers_pattern")
            for value in (3, {}, True, ["q", 1], [["q"]], ["q"] * 4097, ["\x1b[2J"], [NAMES])
        ),
        *(("modules_to_save", value) for value in ("q_proj", 3, [None], {"q": 1}, [""], ["q"] * 4097, ["\n"])),
        *(("layers_to_transform", value) for value in ("1", [True], [1.0], {}, 1.5, True, [0] * 4097)),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_wrong_values_are_refused_by_name(copied: Path, key: str, value: object) -> None:
    refused(edit(copied, **{key: value}), f"{CONFIG}: {key}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 4),
        ("lora_alpha", 0.5),
        ("lora_alpha", 1_000_000),
        ("target_modules", None),
        ("target_modules", "all-linear"),
        ("target_modules", ["q"] * 4096),
        ("layers_to_transform", 3),
        ("layers_to_transform", [0, 1]),
        ("base_model_name_or_path", "/home/user/Modelle für später/base"),
        ("rank_pattern", None),
        ("bias", ...),
        ("use_rslora", ...),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_right_values_are_taken(copied: Path, key: str, value: object) -> None:
    assert read_peft(edit(copied, **{key: value})).modules


def test_dora_and_lora_bias_exclude_each_other_as_in_peft(copied: Path) -> None:
    refused(edit(copied, use_dora=True, lora_bias=True), "lora_bias", "use_dora")
    with pytest.raises(ValueError, match="not supported for DoRA"):
        written(copied, use_dora=True, lora_bias=True)


@pytest.mark.parametrize("key", ["\x1b[31m", "\n" * 50, "k" * 100_000, "\ud800", "\u202egnirts"])
def test_names_of_settings_do_not_reach_the_terminal_as_they_are(key: str) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, key: 1}
    with pytest.raises(AdapterError) as caught:
        check_config(config, Path("x"))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300
    with pytest.warns(UserWarning, match="unknown settings") as warned:
        check_config({**config, key: None}, Path("x"))
    text = str(warned[0].message)
    assert text.isprintable() and len(text) < 300
