"""modules_to_save: trained in full, switched off with the experts, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import moelora
from moelora.core.errors import TargetError
from tests import tiny

CONFIG = {"experts": {"r": 2}, "target_modules": ["query"], "modules_to_save": ["classifier"]}


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes)).eval()


def test_a_classifier_trains_switches_off_and_comes_back(tmp_path: Path) -> None:
    ids = torch.randint(0, 64, (4, 7))
    with torch.no_grad():
        base = bert()(input_ids=ids).logits
    model = moelora.adapt(bert(), CONFIG, verbose=False)
    assert torch.equal(model(input_ids=ids).logits, base)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"classifier.trained.weight", "classifier.trained.bias"} < trainable
    assert not any(name.startswith("classifier.original") for name in trainable)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(input_ids=ids).logits
        assert not torch.equal(after, base)
        with moelora.disabled(model):
            assert torch.equal(model(input_ids=ids).logits, base)
    moelora.save(model, tmp_path / "out")
    again = moelora.load(bert(), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, after)
    assert model.classifier.out_features == 3


def test_a_saved_module_gets_no_experts() -> None:
    model = moelora.adapt(bert(), {**CONFIG, "target_modules": ["query", "dense", "classifier"]}, verbose=False)
    assert "classifier" not in [site.name for site in model.moelora.sites]
    whole = moelora.adapt(bert(), {**CONFIG, "modules_to_save": ["layer.1"]}, verbose=False)
    assert [site.name for site in whole.moelora.sites] == ["bert.encoder.layer.0.attention.self.query"]


def test_an_excluding_expression_and_a_saved_module_go_together() -> None:
    config = {"target_modules": "all-linear", "exclude_modules": r".*(query|key)", "modules_to_save": ["layer.1"]}
    model = moelora.adapt(bert(), {"experts": {"r": 2}, **config}, verbose=False)
    names = [site.name for site in model.moelora.sites]
    assert names
    assert not [name for name in names if "layer.1." in name or name.endswith(("query", "key"))]


def test_names_that_match_nothing_and_tied_weights_are_refused() -> None:
    with pytest.raises(TargetError, match="'clasifier' matches no module; did you mean 'classifier'"):
        moelora.adapt(bert(), {**CONFIG, "modules_to_save": ["clasifier"]}, verbose=False)
    gpt2 = tiny.MODELS["gpt2"]()
    with pytest.raises(TargetError, match=r"'lm_head' is tied to 'transformer\.wte\.weight'"):
        moelora.adapt(gpt2, {"modules_to_save": ["lm_head"]}, verbose=False)
