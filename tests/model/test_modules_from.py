"""Modules that adapters trained in full: there once for all experts, so the adapters agree or one is chosen."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import moelora
from moelora.core.errors import AdapterError
from moelora.io.peft import WEIGHTS
from moelora.model.layer import RoutedLinear
from moelora.model.saved import saved_modules
from tests import tiny
from tests.adapters import base, logits, mixture, only, peft_folder, peft_logits, shaken

HEAD = "base_model.model.classifier."
Change = Callable[[dict[str, Tensor]], Any]


def trained(folder: Path, seed: int = 0, **options: Any) -> Path:
    """An adapter of BERT whose classifier was trained with it."""
    return peft_folder(folder, "bert", seed=seed, modules_to_save=["classifier"], **options)


def rewrite(folder: Path, change: Change) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def heads(folder: Path) -> dict[str, Tensor]:
    return {name.removeprefix(HEAD): t for name, t in load_file(folder / WEIGHTS).items() if name.startswith(HEAD)}


def with_head(folder: Path, values: dict[str, Tensor]) -> Path:
    return rewrite(folder, lambda tensors: tensors.update({f"{HEAD}{key}": value for key, value in values.items()}))


def mixed(*folders: Path, modules_from: str = "agree", saved: tuple[str, ...] = ("classifier",), **more: Any) -> Any:
    experts = {"modules_from": modules_from, **more.pop("experts", {})}
    return mixture(folders, "bert", modules_to_save=list(saved), experts=experts, **more)


def held(model: Any) -> dict[str, Tensor]:
    return saved_modules(model)["classifier"].state_dict()


def refused(*folders: Path, **how: Any) -> str:
    """The message; the base model is as it was."""
    model, before = base("bert"), base("bert")
    with pytest.raises(AdapterError) as caught:
        mixed(*folders, model=model, **how)
    assert all(p.requires_grad and torch.equal(p, before.get_parameter(name)) for name, p in model.named_parameters())
    assert type(model) is type(before) and not any(isinstance(module, RoutedLinear) for module in model.modules())
    return str(caught.value)


def test_adapters_that_agree(tmp_path: Path) -> None:
    one = trained(tmp_path / "a")
    other = with_head(trained(tmp_path / "b", seed=1, r=2), heads(one))
    model = mixed(one, other)
    tiny.assert_same(held(model), heads(one))
    for expert, folder in enumerate((one, other)):
        found = logits(only(model, expert), "bert")
        torch.testing.assert_close(found, peft_logits(folder, "bert"), rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("key", ["weight", "bias"])
def test_adapters_that_disagree(key: str, tmp_path: Path) -> None:
    one = trained(tmp_path / "a")
    values = heads(one)
    values[key].view(-1)[-1] += 1e-6
    other = with_head(trained(tmp_path / "b", seed=1), values)
    said = f"{one} and {other} disagree on 'classifier.{key}'.*choose one of them .experts.modules_from: '{one}'., or"
    assert re.search(said, refused(one, other))


def test_an_adapter_without_the_module_disagrees_with_one_that_has_it(tmp_path: Path) -> None:
    one, other = trained(tmp_path / "a"), peft_folder(tmp_path / "b", "bert", seed=1)
    for folders in ((one, other), (other, one)):
        assert f"{one} and {other} disagree on 'classifier." in refused(*folders)


def test_so_does_one_that_left_it_as_it_was(tmp_path: Path) -> None:
    own = {key: value.clone() for key, value in base("bert").classifier.state_dict().items()}
    one, other = trained(tmp_path / "a"), with_head(trained(tmp_path / "b", seed=1), own)
    for folders in ((one, other), (other, one)):
        assert f"{one} and {other} disagree on 'classifier." in refused(*folders)
    tiny.assert_same(held(mixed(other)), own)
    mixture([other], "bert")  # nothing of it is lost


@pytest.mark.parametrize("chosen", [0, 1])
def test_one_of_the_entries(chosen: int, tmp_path: Path) -> None:
    folders = [trained(tmp_path / "a"), trained(tmp_path / "b", seed=1)]
    model = mixed(*folders, modules_from=str(folders[chosen]))
    tiny.assert_same(held(model), heads(folders[chosen]))
    found = logits(only(model, chosen), "bert")
    torch.testing.assert_close(found, peft_logits(folders[chosen], "bert"), rtol=5e-6, atol=5e-6)
    moelora.save(model, tmp_path / "out")
    again = moelora.load(base("bert"), tmp_path / "out").eval()
    tiny.assert_same(held(again), heads(folders[chosen]))
    assert again.moelora.config.experts.modules_from == str(folders[chosen])


def test_none_of_them(tmp_path: Path) -> None:
    folders = [trained(tmp_path / "a"), trained(tmp_path / "b", seed=1)]
    own = base("bert").classifier.state_dict()
    tiny.assert_same(held(mixed(*folders, modules_from="ignore")), own)
    assert saved_modules(mixed(*folders, modules_from="ignore", saved=())) == {}


def test_an_entry_that_is_none(tmp_path: Path) -> None:
    folder = trained(tmp_path / "a")
    message = refused(folder, modules_from="elsewhere")
    assert f"experts.modules_from: 'elsewhere' is none of {folder}, agree, ignore" in message


def test_a_module_that_is_not_to_be_saved_here(tmp_path: Path) -> None:
    message = refused(trained(tmp_path / "a"), saved=())
    assert "it has trained 'classifier." in message and "list the module in modules_to_save" in message
    assert "experts.modules_from: ignore" in message


def test_a_module_that_the_model_has_not(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors[f"{HEAD}dense.weight"] = tensors.pop(f"{HEAD}weight")

    message = refused(rewrite(trained(tmp_path / "a"), rename))
    assert "it holds 'classifier.dense.weight' (3, 32), which the model has not" in message


def test_a_classifier_of_other_labels(tmp_path: Path) -> None:
    """PEFT copies what fits and leaves the rest."""
    folder = with_head(trained(tmp_path / "a"), {"weight": torch.ones(5, 32), "bias": torch.ones(5)})
    assert "(5, 32), which the model has as (3, 32)" in refused(folder) or "(5,), which" in refused(folder)


def test_nan_in_it(tmp_path: Path) -> None:
    folder = with_head(trained(tmp_path / "a"), {"weight": torch.full((3, 32), torch.nan)})
    assert "classifier.weight" in refused(folder)


def test_a_module_trains_on_from_it(tmp_path: Path) -> None:
    folder = trained(tmp_path / "a")
    model = mixed(folder).train()
    model(**tiny.batch("bert")).loss.backward()
    names = {name for name in tiny.gradients(model) if "classifier" in name}
    assert names == {"classifier.trained.weight", "classifier.trained.bias"}


def test_half_precision_and_the_base_model_rounded_to_it(tmp_path: Path) -> None:
    """Rounded values of the base model are the base model's; others are taken, in the module's own dtype."""
    own = {key: value.bfloat16() for key, value in base("bert").classifier.state_dict().items()}
    mixture([with_head(trained(tmp_path / "a"), own)], "bert")
    values = {key: value + 1 for key, value in own.items()}
    model = mixed(with_head(trained(tmp_path / "b"), values))
    assert {key: value.dtype for key, value in held(model).items()} == dict.fromkeys(values, torch.float32)
    tiny.assert_same(held(model), {key: value.float() for key, value in values.items()})


# Embeddings


def embedded(folder: Path, tokens: int, change: bool = True) -> Path:
    """A LoRA beside which PEFT saved the embeddings, as it does where tokens were added."""
    model = base()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if tokens != tiny.VOCAB:
            model.resize_token_embeddings(tokens)
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
        shaken(model, folder)
        with torch.no_grad():
            model.get_input_embeddings().weight[30] += float(change)
        model.save_pretrained(folder, save_embedding_layers=True)
    return folder


def resized(tokens: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = base()
        model.resize_token_embeddings(tokens)
    return model


def test_resized_embeddings(tmp_path: Path) -> None:
    folder, both = embedded(tmp_path / "a", 70), ["embed_tokens", "lm_head"]
    with pytest.raises(AdapterError, match=r"\(70, 32\), which the model has as \(64, 32\); .*resize the embeddings"):
        mixture([folder], target_modules=["q_proj"], modules_to_save=both)
    with pytest.raises(AdapterError, match="in full, which no gate can choose; list the module in modules_to_save"):
        mixture([folder], target_modules=["q_proj"], model=resized(70))
    model = mixture([folder], target_modules=["q_proj"], model=resized(70), modules_to_save=both)
    expected = peft_logits(folder, model=resized(70))
    torch.testing.assert_close(logits(only(model, 0), "llama"), expected, rtol=5e-6, atol=5e-6)
    ignored = mixture([folder], target_modules=["q_proj"], experts={"modules_from": "ignore"})
    assert (logits(only(ignored, 0), "llama") - expected[..., :64]).abs().max() > 1e-3


def test_embeddings_that_were_not_trained(tmp_path: Path) -> None:
    folder = embedded(tmp_path / "a", tiny.VOCAB, change=False)
    model = mixture([folder], target_modules=["q_proj"])
    torch.testing.assert_close(logits(only(model, 0), "llama"), peft_logits(folder), rtol=5e-6, atol=5e-6)
    with pytest.raises(AdapterError, match=r"it has trained 'model.embed_tokens.weight' in full"):
        mixture([embedded(tmp_path / "b", tiny.VOCAB)], target_modules=["q_proj"])
