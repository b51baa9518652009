"""A recipe: one YAML file that says everything about a run. Checked whole before any weight is read."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator

from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.core.validate import Strict, check, nearest
from moelora.data.config import DataConfig
from moelora.model.base import TINY
from moelora.model.config import AdapterConfig, build_init, named_method, resolve, sketch
from moelora.model.quantised import Quantization
from moelora.optim.base import Optim


class Recipe(Strict):
    """The sections of a recipe.

    base_model: a hub id, a local folder, or ``moelora/tiny``. quantization_config, dtype, attn_implementation: what
    transformers' ``from_pretrained`` takes; the first is a BitsAndBytesConfig, see Quantization.
    adapter: see AdapterConfig. data: see DataConfig.
    training: TRL's SFTConfig, that is transformers' TrainingArguments and more, by the same names.
    optim: a method beside the optimiser (``training.optim``), which sees the whole gradients of A and B.
    deepspeed: ``zero1``, ``zero2``, ``zero3``, ``zero3_offload``, or the path of another DeepSpeed configuration.
    max_skipped_steps: no step is taken from numbers that are not finite; so many in a row end the run.
    """

    base_model: str = TINY
    revision: str | None = None
    quantization_config: Quantization | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    training: dict[str, Any] = {}
    optim: dict[str, Any] = {"name": "plain"}
    deepspeed: str | None = None
    max_skipped_steps: Annotated[int, Field(ge=1)] = 10

    _named = field_validator("optim", mode="before")(named_method)

    @property
    def output_dir(self) -> Path:
        """Where the run writes everything."""
        return Path(self.training["output_dir"])


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number and ``no`` as a word, as YAML 1.2 and every user do."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false|True|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_recipe(path: str | Path, overrides: Iterable[str] = (), plugins: Iterable[str | Path] = ()) -> Recipe:
    """The recipe in a YAML file, with ``key.inner=value`` overrides. Raises ConfigError.

    A recipe's output_dir defaults to ``out/<file name>``. A name without a path is looked up among the recipes that
    come with the package.
    """
    file = find_recipe(path)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)  # a SafeLoader: data only
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a mapping of keys to values, found {type(content).__name__}")
    if "recipes" in content:
        raise ConfigError(f"{file}: a comparison of several recipes; run `moelora ablate {path}`")
    for override in overrides:
        _set(content, override)
    content.setdefault("training", {})
    if isinstance(content["training"], dict):
        content["training"].setdefault("output_dir", f"out/{file.stem}")
    return check_recipe(content, str(file), plugins)


def check_recipe(content: Mapping[str, Any], where: str = "recipe", plugins: Iterable[str | Path] = ()) -> Recipe:
    """A recipe from a mapping, every method's options and every training argument checked. Raises ConfigError."""
    recipe = check(Recipe, content, where if where == "recipe" else "")
    _check_training(recipe.training)
    options = {} if recipe.deepspeed is None else deepspeed_options(recipe.deepspeed)
    stage = options.get("zero_optimization", {}).get("stage")
    if recipe.deepspeed is not None:
        if recipe.quantization_config is not None and stage == 3:
            raise ConfigError(
                "quantization_config: not with ZeRO-3; bitsandbytes keeps every weight that was gathered for the "
                "forward pass until the backward pass, so no memory is saved; use deepspeed: zero2"
            )
        if recipe.training.get("load_best_model_at_end"):  # its optimiser's copies would stay those of the last step
            raise ConfigError(
                "training.load_best_model_at_end: not with deepspeed; the best checkpoint is kept, and moelora.load "
                "takes its folder"
            )
    methods = Methods(plugins)
    optim, adapter = methods.check("optim", recipe.optim), resolve(recipe.adapter, methods)
    method: Optim = methods.build("optim", optim)
    method.check(sketch(adapter, methods)[0][1])
    _check_optim(method, recipe)
    if stage == 3 and build_init(adapter, methods).probes is not None:
        raise ConfigError(
            f"init {adapter.init['name']} runs the base model before training begins, and ZeRO-3 has taken its weights "
            "apart by then; use deepspeed: zero2"
        )
    return recipe.model_copy(update={"adapter": adapter, "optim": optim})


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    import moelora.recipes

    folder = Path(next(iter(moelora.recipes.__path__)))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe: the path itself, or a shipped recipe of that name. Raises ConfigError."""
    file = Path(path)
    if file.is_file():
        return file
    shipped = shipped_recipes()
    if len(file.parts) == 1 and file.stem in shipped:
        return shipped[file.stem]
    raise ConfigError(f"no recipe {path} (seen from {Path.cwd()}){nearest(file.stem, shipped)}")


def deepspeed_options(name: str) -> dict[str, Any]:
    """A DeepSpeed configuration: a shipped one by its name, or a JSON file. Raises ConfigError."""
    import moelora.recipes

    folder = Path(next(iter(moelora.recipes.__path__))) / "deepspeed"
    shipped = {path.stem: path for path in sorted(folder.glob("*.json"))}
    file = shipped.get(name, Path(name))
    if not file.is_file():
        raise ConfigError(f"deepspeed: no configuration {name} (seen from {Path.cwd()}){nearest(name, shipped)}")
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"deepspeed: {file} is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise ConfigError(f"deepspeed: {file}: expected a JSON object, found {type(options).__name__}")
    return options


def _set(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override '{override}': expected key=value, for instance training.max_steps=100")
    *parents, last = key.split(".")
    section: Any = content
    for name in parents:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"override '{override}': '{name}' is {section!r}, not a section")
    try:
        section[last] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': the value is not YAML: {error}") from None


def _check_optim(method: Optim, recipe: Recipe) -> None:
    """Raise ConfigError where an engine would not do as the method says."""
    options = {} if recipe.deepspeed is None else deepspeed_options(recipe.deepspeed)
    own = {"optimizer", "scheduler"} & options.keys()
    if own and type(method).rate is not Optim.rate:
        raise ConfigError(
            f"optim {method.name} gives parameters learning rates of their own, which deepspeed's {min(own)} does not "
            f"keep; leave {min(own)} out of {recipe.deepspeed}, and say it under training"
        )
    if (
        recipe.training.get("fp16")
        and not recipe.training.get("max_grad_norm", 1.0)
        and method.overrides("before_step")
    ):
        raise ConfigError(
            f"optim {method.name} reads gradients, which training.fp16 scales until they are clipped; leave "
            "training.max_grad_norm at 1, or take bf16"
        )


def _check_training(training: Mapping[str, Any]) -> None:
    from trl import SFTConfig

    fields = {field.name: field for field in dataclasses.fields(SFTConfig) if field.init}
    types = typing.get_type_hints(SFTConfig)
    for key, value in training.items():
        if key == "deepspeed":
            raise ConfigError("training.deepspeed: write it beside training, not in it; for instance deepspeed: zero2")
        if key in ("fsdp", "fsdp_config") and value:
            raise ConfigError(f"training.{key}: FSDP is not supported; deepspeed: zero3 parts the model, too")
        if key not in fields:
            raise ConfigError(f"training: unknown key '{key}'{nearest(key, fields)}")
        try:
            TypeAdapter(types[key], config={"arbitrary_types_allowed": True}).validate_python(value)
        except ValidationError as error:
            fault = error.errors()[0]
            raise ConfigError(f"training.{key}: {fault['msg'].lower()}, found {value!r}") from None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and value < 0 and key not in ("max_steps", "local_rank"):
            raise ConfigError(f"training.{key}: expected no negative number, found {value}")
