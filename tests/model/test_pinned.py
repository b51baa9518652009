"""Experts of the hub: saved as a pin (id, commit, hashes) in place of a copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moelora
from moelora.core.errors import AdapterError, OutputError
from moelora.io.folder import MANIFEST
from moelora.io.hub import Located
from moelora.io.peft import CONFIG, WEIGHTS
from moelora.model import save as saving
from moelora.model import sources
from tests import tiny
from tests.adapters import base, choose, logits, mixture, only, peft_folder, peft_logits

COMMIT = "c" * 40


class Hub:
    """Stands in for ``locate``: repositories are folders on this machine, all of one commit."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()

    def __call__(self, entry: str | Path) -> Located:
        self.asked.append(str(entry))
        if Path(entry).exists():
            return Located(Path(entry), None, None)
        name, _, revision = str(entry).partition("@")
        found = self.folder / name
        if revision not in ("", "main", COMMIT) or not found.is_dir():
            raise AdapterError(f"{entry}: no such repository")
        return Located(found, None, f"{name}@{COMMIT}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    for module in (sources, saving):
        monkeypatch.setattr(module, "locate", made)
    peft_folder(made.folder / "org" / "dora", "qwen", use_dora=True, bias="lora_only")
    peft_folder(made.folder / "org" / "plain", "qwen", r=2, seed=3, modules_to_save=["lm_head"])
    return made


NAMES = ["org/dora", "org/plain@main"]


def mixed(names: Any = NAMES, **experts: Any) -> Any:
    chosen = {"modules_from": "org/plain@main"} if "org/plain@main" in names else {}
    more = {"modules_to_save": ["lm_head"], "experts": {**chosen, **experts}}
    return mixture(names, "qwen", **more)


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return found


def test_a_pinned_mixture_holds_no_expert_and_loads_bit_for_bit(hub: Hub, tmp_path: Path) -> None:
    model, out = mixed(), tmp_path / "out"
    moelora.save(model, out, experts="pinned")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", MANIFEST, "router.safetensors"]
    pins = manifest(out)["pins"]
    assert [pin["adapter"] for pin in pins.values()] == [f"org/dora@{COMMIT}", f"org/plain@{COMMIT}"]
    assert list(pins) == ["expert_0", "expert_1"] and all(
        pin["files"].keys() == {CONFIG, WEIGHTS} for pin in pins.values()
    )
    hub.asked.clear()
    again = moelora.load(base("qwen"), out).eval()
    assert hub.asked == [str(out), f"org/dora@{COMMIT}", f"org/plain@{COMMIT}"]
    for expert, name in enumerate(["org/dora", "org/plain"]):
        found = logits(only(again, expert), "qwen")
        assert torch.equal(found, logits(only(model, expert), "qwen"))
        if name == "org/plain":  # whose head was chosen
            torch.testing.assert_close(found, peft_logits(hub.folder / name, "qwen"), rtol=5e-6, atol=5e-6)


def test_the_configuration_names_the_commit_that_was_read(hub: Hub, tmp_path: Path) -> None:
    model = mixed()
    moelora.save(model, tmp_path / "out")
    for config in (model.moelora.config.model_dump(), manifest(tmp_path / "out")["adapter"]):
        assert config["experts"]["adapters"] == [f"org/dora@{COMMIT}", f"org/plain@{COMMIT}"]
        assert config["experts"]["modules_from"] == f"org/plain@{COMMIT}"


def test_a_copy_needs_no_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = choose(mixed(), 0.3, 0.7)
    moelora.save(model, tmp_path / "out")
    assert manifest(tmp_path / "out")["pins"] == {}
    hub.folder.rename(tmp_path / "gone")
    assert torch.equal(logits(moelora.load(base("qwen"), tmp_path / "out").eval(), "qwen"), logits(model, "qwen"))


def test_a_loaded_mixture_is_pinned_again(hub: Hub, tmp_path: Path) -> None:
    moelora.save(mixed(), tmp_path / "one", experts="pinned")
    moelora.save(moelora.load(base("qwen"), tmp_path / "one"), tmp_path / "two", experts="pinned")
    assert manifest(tmp_path / "one") == manifest(tmp_path / "two")


def test_pins_replace_copies_and_copies_replace_pins(hub: Hub, tmp_path: Path) -> None:
    model, out = choose(mixed(), 0.3, 0.7), tmp_path / "out"
    for how in ("copied", "pinned", "copied"):
        moelora.save(model, out, experts=how)
        listed = [name for name in manifest(out)["files"] if name.startswith("experts/")]
        assert (len(listed), len(manifest(out)["pins"])) == ((4, 0) if how == "copied" else (0, 2))
        assert torch.equal(logits(moelora.load(base("qwen"), out).eval(), "qwen"), logits(model, "qwen"))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_an_expert_that_changed_on_the_hub(hub: Hub, tmp_path: Path, name: str) -> None:
    moelora.save(mixed(), tmp_path / "out", experts="pinned")
    changed = hub.folder / "org" / "plain" / name
    changed.write_bytes(changed.read_bytes() + b" ")
    model, before = base("qwen"), base("qwen")
    with pytest.raises(AdapterError, match=rf"org/plain/{name}: sha256 .*expected .*the file was changed"):
        moelora.load(model, tmp_path / "out")
    tiny.assert_same(model.state_dict(), before.state_dict())


def test_an_expert_that_is_gone_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    moelora.save(mixed(), tmp_path / "out", experts="pinned")
    (hub.folder / "org" / "dora").rename(tmp_path / "gone")
    with pytest.raises(AdapterError, match=f"org/dora@{COMMIT}: no such repository"):
        moelora.load(base("qwen"), tmp_path / "out")


@pytest.mark.parametrize("case", ["local", "trained", "new"])
def test_what_cannot_be_pinned(case: str, hub: Hub, tmp_path: Path) -> None:
    if case == "local":
        own = peft_folder(tmp_path / "own", "qwen", seed=9)
        model, said = mixture(["org/dora", own], "qwen", modules_to_save=[]), "expert_1 can be saved as a copy only"
    elif case == "trained":
        model, said = (
            mixture(["org/plain"], "qwen", experts={"train": "all", "modules_from": "ignore"}),
            "found experts.train: all",
        )
    else:
        model, said = (
            tiny.adapted("llama", "meteora", experts={"num_experts": 3, "r": 4, "train": "none"}),
            "expert_0 can",
        )
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=said):
        moelora.save(model, out, experts="pinned")
    assert not out.exists()
    moelora.save(model, out)


def test_a_mixture_of_the_hub_is_pinned_expert_by_expert(hub: Hub, tmp_path: Path) -> None:
    moelora.save(mixed(), hub.folder / "org" / "mix")
    third = peft_folder(hub.folder / "org" / "third", "qwen", seed=8)
    names = ["org/third", "org/mix"]
    model = mixture(names, "qwen", experts={"num_experts": 3})
    moelora.save(model, tmp_path / "out", experts="pinned")
    found = [pin["adapter"] for pin in manifest(tmp_path / "out")["pins"].values()]
    assert found == [f"org/{name}@{COMMIT}" for name in ("third", "mix/experts/expert_0", "mix/experts/expert_1")]
    again = moelora.load(base("qwen"), tmp_path / "out").eval()
    for expert in range(3):
        assert torch.equal(logits(only(again, expert), "qwen"), logits(only(model, expert), "qwen"))
    torch.testing.assert_close(logits(only(again, 0), "qwen"), peft_logits(third, "qwen"), rtol=5e-6, atol=5e-6)


def test_a_pinned_mixture_gives_its_experts_to_another(hub: Hub, tmp_path: Path) -> None:
    moelora.save(mixed(), tmp_path / "out", experts="pinned")
    model = mixture([tmp_path / "out"], "qwen", experts={"num_experts": 2, "modules_from": "ignore"})
    torch.testing.assert_close(
        logits(only(model, 0), "qwen"), peft_logits(hub.folder / "org" / "dora", "qwen"), rtol=5e-6, atol=5e-6
    )
    moelora.save(model, tmp_path / "again", experts="pinned")
    assert manifest(tmp_path / "again")["pins"] == manifest(tmp_path / "out")["pins"]


def test_a_revision_of_a_mixture(hub: Hub, tmp_path: Path) -> None:
    moelora.save(mixed(), hub.folder / "org" / "mix", experts="pinned")
    moelora.load(base("qwen"), "org/mix", revision="main")
    with pytest.raises(AdapterError, match="org/mix@other: no such repository"):
        moelora.load(base("qwen"), "org/mix", revision="other")


@pytest.mark.parametrize("change", ["names", "files", "both", "none"])
def test_a_manifest_that_was_edited(change: str, hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    moelora.save(mixed(), out, experts="pinned")
    content = manifest(out)
    if change == "names":
        content["pins"]["expert_7"] = content["pins"].pop("expert_1")
    elif change == "files":
        del content["pins"]["expert_1"]["files"][WEIGHTS]
    elif change == "both":
        content["experts"].append("expert_2")
    else:
        content["pins"] = {}
    (out / MANIFEST).write_text(json.dumps(content))
    said = {
        "names": "expert",
        "files": "no hash of|files",
        "both": "3 experts in",
        "none": "no files of experts/expert_0",
    }
    with pytest.raises(AdapterError, match=said[change]):
        moelora.load(base("qwen"), out)
