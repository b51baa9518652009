"""PEFT's ``adapter_config.json``, versions 0.3 to 0.21: what each setting means for reading the adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moelora.io.files import FIX, fail, short

CONFIG = "adapter_config.json"
MAX_RANK, MAX_ALPHA, MAX_NAMES, MAX_NAME = 4096, 1e6, 4096, 1024
UNMOVED = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Starts that leave the base weights as they were."""
MOVED = ("pissa", "olora")
"""Starts that took something out of the base weights which can be computed again from these."""
READ = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
    *("bias", "lora_bias", "use_dora", "modules_to_save", "task_type"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
RECORDED = {"base_model_name_or_path", "revision", "fan_in_fan_out"}
IGNORED = {
    *("auto_mapping", "peft_version", "inference_mode", "lora_dropout", "runtime_config"),
    *("megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # init_lora_weights says which was used
}
REFUSED = (
    *("use_qalora", "kasa_config", "monteclora_config", "use_bdlora", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "megatron_config", "arrow_config", "alora_invocation_tokens", "velora_config"),
    "ensure_weight_tying",
)
"""Fields of PEFT's LoraConfig that must be null, false or empty."""

PLAIN = "moelora cannot represent it as an expert: train the adapter again without it, or leave this adapter out"
BASE_MOVED = (
    "this start changed the base weights in a way that is not in the adapter: save it again with PEFT's "
    "path_initial_model_for_weight_conversion, which writes a plain LoRA"
)


def check_config(config: dict[str, Any], path: Path) -> None:
    """Refuse every setting that is on and has no meaning here. Raises AdapterError; warns of unknown ones."""

    def check(key: str, good: Callable[[Any], bool], expected: str, what: str, *default: Any) -> None:
        value = config.get(key, *default)
        if not good(value):
            fail(path, key, short(value), expected, what)

    check("peft_type", lambda v: v == "LORA", "'LORA'", "moelora reads LoRA adapters only")
    check("init_lora_weights", _is_start, f"one of {(*UNMOVED, *MOVED)}", BASE_MOVED, True)
    for key in REFUSED:
        check(key, _inactive, "null, false or empty", PLAIN)
    check("bias", lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only", FIX, "none")
    check("r", _is_rank, f"an integer from 1 to {MAX_RANK}", FIX)
    check("lora_alpha", _is_alpha, f"a number above 0, at most {MAX_ALPHA:g}", FIX)
    for key in ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias"):
        check(key, lambda v: type(v) is bool, "true or false", FIX, False)
    if config.get("use_dora") and config.get("lora_bias"):
        fail(path, "lora_bias", "true, beside use_dora", "one of the two, as in PEFT", FIX)
    for key in ("base_model_name_or_path", "revision", "task_type"):
        check(key, lambda v: v is None or _is_name(v), f"null or at most {MAX_NAME} printable characters", FIX)
    few = f"list of at most {MAX_NAMES}"
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        check(key, lambda v: v is None or isinstance(v, str) or _are(_is_name, v), f"null, a string or a {few}", FIX)
    check("modules_to_save", lambda v: v is None or (_are(_is_name, v) and "" not in v), f"null or a {few} names", FIX)
    blocks = f"null, a block or a {few}"
    check("layers_to_transform", lambda v: v is None or _is_block(v) or _are(_is_block, v), blocks, FIX)
    for key, good in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        check(key, lambda v: v is None or isinstance(v, dict), "an object or null", FIX)
        for pattern, value in (config.get(key) or {}).items():
            if not good(value):
                fail(path, f"{key}: {short(pattern)}", short(value), "a number in the range of its default", FIX)
    unknown = sorted(config.keys() - READ - RECORDED - IGNORED - set(REFUSED))
    for key in unknown:
        if not _inactive(config[key]):
            what = "moelora does not know this setting, so it cannot honour it"
            fail(path, short(key), short(config[key]), "null, false or empty", what)
    if unknown:
        warnings.warn(f"{path}: unknown settings, all off: {short(unknown)}", stacklevel=4)


def _is_start(value: object) -> bool:
    return type(value) in (bool, str) and value in (*UNMOVED, *MOVED)


def _inactive(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= MAX_ALPHA  # type: ignore[operator]


def _is_name(value: object) -> bool:
    """Whether it can be shown and be used as a path as it is."""
    return isinstance(value, str) and len(value) <= MAX_NAME and value.isprintable()


def _is_block(value: object) -> bool:
    return type(value) is int


def _are(kind: Callable[[object], bool], value: object) -> bool:
    return isinstance(value, list) and len(value) <= MAX_NAMES and all(map(kind, value))
