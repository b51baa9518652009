"""Recipes: strict, with near misses, before anything heavy; overrides; the frozen list of keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_origin

import pytest
from pydantic import BaseModel

from moelora.core.errors import ConfigError
from moelora.core.validate import _section
from moelora.recipe import Recipe, check_recipe, read_recipe, shipped_recipes

RUNS = sorted(name for name, path in shipped_recipes().items() if "recipes:" not in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RUNS)
def test_every_shipped_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.output_dir == Path("out") / name
    assert shipped_recipes()[name].read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.router.topk=3", "routers.smora: unknown key 'topk'; did you mean 'top_k'"),
        ("adapter.router.top_k=99", "top_k 99 is more than the 19 ranks"),
        ("adapter.router.top_k=0", "greater than or equal to 1, found 0"),
        ("adapter.router.top_k=two", "valid integer, found 'two'"),
        ("adapter.router.name=smorra", "no method named 'smorra'; did you mean 'smora'"),
        ("adapter.experts.rank=4", "experts.lora: unknown key 'rank'"),
        ("adapter.target_module=x", "adapter: unknown key 'target_module'; did you mean 'target_modules'"),
        ("adapter.losses={balance: -1}", "losses.balance.weight: expected a number of at least 0"),
        ("adapter.losses={blance: 1}", "no method named 'blance'; did you mean 'balance'"),
        ("data.temprature=2", "data: unknown key 'temprature'; did you mean 'temperature'"),
        ("data.temperature=0", "greater than 0, found 0"),
        ("data.tasks={a: {pth: x}}", "data.tasks.a: unknown key 'pth'; did you mean 'path'"),
        ("training.learning_rte=1", "training: unknown key 'learning_rte'; did you mean 'learning_rate'"),
        ("training.learning_rate=fast", "training.learning_rate: .*found 'fast'"),
        ("training.learning_rate=-1", "no negative number, found -1"),
        ("trainin.max_steps=1", "unknown key 'trainin'; did you mean 'training'"),
        ("dtype=float8", "dtype: .*found 'float8'"),
        ("nonsense", "expected key=value"),
        ("quantization={load_in_4bit: true}", "unknown key 'quantization'; did you mean 'quantization_config'"),
        ("quantization_config.load_in_4bits=true", "unknown key 'load_in_4bits'; did you mean 'load_in_4bit'"),
        ("quantization_config.load_in_4bit=yes", "load_in_4bit: .*valid boolean, found 'yes'"),
        (
            "quantization_config={}",
            "quantization_config: expected load_in_4bit: true or load_in_8bit: true, and not both",
        ),
        ("quantization_config={load_in_4bit: true, load_in_8bit: true}", "and not both"),
        ("quantization_config={load_in_4bit: true, bnb_4bit_quant_type: nf5}", "'fp4' or 'nf4', found 'nf5'"),
        ("quantization_config={load_in_4bit: true, bnb_4bit_quant_storage: bfloat16}", "storage: .*'uint8', found"),
        ("base_model.x=1", "'base_model' is 'moelora/tiny', not a section"),
    ],
)
def test_mistakes_are_named_with_the_nearest_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe("smora", [override])


@pytest.mark.parametrize("name", ["zero3", "zero3_offload", "own"])
def test_a_quantised_base_is_refused_under_zero_3(name: str, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 3}}')
    engine = str(tmp_path / "own.json") if name == "own" else name
    with pytest.raises(ConfigError, match=r"^quantization_config: not with ZeRO-3; .* no memory is saved.* zero2"):
        read_recipe("smora", ["quantization_config={load_in_4bit: true}", f"deepspeed={engine}"])
    assert read_recipe("smora", ["quantization_config={load_in_4bit: true}", "deepspeed=zero2"]).quantization_config


def test_overrides_reach_inside_and_read_numbers_as_numbers() -> None:
    changes = ["training.learning_rate=1e-4", "training.save_strategy=no", "data.max_rows=5", "adapter.router.top_k=4"]
    recipe = read_recipe("smora", changes)
    assert recipe.training["learning_rate"] == 1e-4
    assert recipe.training["save_strategy"] == "no"
    assert recipe.data.max_rows == 5
    assert recipe.adapter.router == {
        "name": "smora", "top_k": 4, "block_size": 1, "score_fn": "sigmoid", "bias_in_gate": True,
        "bias_update_rate": 1e-5,
    }  # fmt: skip


def test_a_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    import yaml

    recipe = read_recipe("meteora")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe.model_dump()), encoding="utf-8")
    assert read_recipe(tmp_path / "again.yaml") == recipe


def test_a_recipe_cannot_name_code() -> None:
    for key in ("plugins", "plugin"):
        with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
            check_recipe({key: ["evil.py"]})
    with pytest.raises(ConfigError, match="no method named"):
        check_recipe({"adapter": {"router": {"name": "os.system"}}})


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe nowhere.*known: adamole"):
        read_recipe("nowhere")
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not YAML"):
        read_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a", encoding="utf-8")
    with pytest.raises(ConfigError, match="expected a mapping"):
        read_recipe(tmp_path / "list.yaml")


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        section: Any = _section(field.annotation)
        inner = f"{prefix}{name}{'.*' if get_origin(field.annotation) is dict else ''}."
        found += keys(section, inner) if section is not None else [f"{prefix}{name}"]
    return found


def test_the_surface_of_recipes_changes_only_on_purpose() -> None:
    """Every key of the framework that a user may write; a method's own keys are its arguments, in its own file.

    Adding one is fine; it is a visible change of recipe_keys.txt.
    """
    snapshot = (Path(__file__).parent / "recipe_keys.txt").read_text(encoding="utf-8")
    assert "\n".join(keys(Recipe)) + "\n" == snapshot
