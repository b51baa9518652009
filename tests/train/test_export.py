"""moelora export: from the folder of a run to what other tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import moelora
import moelora.train.export as exporting
from moelora.cli.main import app
from moelora.core.errors import AdapterError, ConfigError, DataError, OutputError
from moelora.data import builtin
from moelora.recipe import check_recipe
from moelora.tools.export.hollow import hollow_base
from moelora.train.export import export_folder, probe_batches
from moelora.train.run import RECIPE, load_base
from tests import tiny
from tests.tools.test_export import CLOSE, logits
from tests.tools.test_export_merged import quantised

DATA = {"builtin": True, "max_rows": 24, "max_eval_rows": 4}
TASKS = {name: number for number, name in enumerate(builtin.TASKS)}


def base_at(folder: Path) -> Path:
    tiny.llama(vocab_size=512, max_position_embeddings=256).save_pretrained(folder, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(Path(moelora.__file__).parent / "assets" / "tiny").save_pretrained(folder)
    return folder


def run_at(folder: Path, router: Any, base: str | Path = "moelora/tiny", **more: Any) -> Any:
    """A folder as a run leaves it, and its model."""
    experts = {"num_experts": 8, "r": 2, "lora_alpha": 4, **more.pop("experts", {})}
    adapter = {"router": router, "experts": experts, "target_modules": ["q_proj", "down_proj"]}
    adapter["ranks"] = more.pop("ranks", "full")
    training = {"output_dir": str(folder), "max_length": 48}
    recipe = check_recipe({"base_model": str(base), "adapter": adapter, "data": DATA, "training": training, **more})
    model = tiny.shake(tiny.adapt(load_base(recipe)[0], recipe.adapter.model_dump()), 0.1)
    moelora.save(model, folder)
    (folder / RECIPE).write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False))
    return model


def command(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)], env={"COLUMNS": "160"}, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_merged_for_a_task_from_the_command_line(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base")
    model = run_at(tmp_path / "run", {"name": "task", "num_tasks": 8}, base)
    assert "say which task is meant (--task)" in command(tmp_path / "run", tmp_path / "x", "--to", "merged", code=2)
    shown = command(tmp_path / "run", tmp_path / "out", "--to", "merged", "--task", "sum")
    assert "4 modules read again and compared with the model; largest relative error of an update: " in shown
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(found, "llama"), logits(model, "llama", TASKS["sum"]), **CLOSE)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == AutoTokenizer.from_pretrained(base).vocab_size
    export_folder(tmp_path / "run", tmp_path / "other", "merged", task=str(TASKS["reverse"]))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    torch.testing.assert_close(logits(other, "llama"), logits(model, "llama", TASKS["reverse"]), **CLOSE)
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (report["task"], report["source"]["base"]) == (TASKS["sum"], str(base))


def test_one_lora_by_the_rows_of_the_run_from_the_command_line(tmp_path: Path) -> None:
    run_at(tmp_path / "run", {"name": "softmax", "top_k": 2})
    shown = command(tmp_path / "run", tmp_path / "out", "--to", "lora")
    assert "least_squares (written)" in shown and "no_adapter" in shown and "an approximation" in shown
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    other = json.loads(command(tmp_path / "run", tmp_path / "b", "--to", "lora", "--fit", "average", "--json"))
    assert other["written"] == "average" and other["measured"] == report["measured"]
    assert report["measured"]["least_squares"]["kl"] < report["measured"]["no_adapter"]["kl"]
    recipe = check_recipe({"base_model": "moelora/tiny", "training": {"output_dir": "x"}})
    assert PeftModel.from_pretrained(load_base(recipe)[0], tmp_path / "out")
    assert "decides token by token" in command(tmp_path / "run", tmp_path / "x", "--to", "merged", code=2)


def test_the_command_has_help() -> None:
    shown = command("--help")
    assert all(word in shown for word in ("peft:", "merged:", "lora:", "vllm:", "--probe", "--dequantize"))


def test_peft_and_vllm_from_the_command_line(tmp_path: Path) -> None:
    run_at(tmp_path / "run", {"name": "softmax", "top_k": 2})
    assert "the router is in none of them" in command(tmp_path / "run", tmp_path / "a", "--to", "peft")
    assert "token by token is NOT served" in command(tmp_path / "run", tmp_path / "b", "--to", "vllm")
    for name in ("a", "b"):
        assert len(list((tmp_path / name).glob("expert_*/adapter_model.safetensors"))) == 8
    assert "rank 1: expert_0 loses up to" in command(tmp_path / "run", tmp_path / "c", "--to", "vllm", "--rank", 1)


def rows_of(batches: Any) -> list[list[int]]:
    return [row[row >= 0].unique().tolist() for batch in batches for row in batch["task_ids"]]


def test_probe_rows_are_training_rows_to_fit_and_evaluation_rows_to_measure(tmp_path: Path, monkeypatch: Any) -> None:
    model = run_at(tmp_path / "run", "softmax")
    recipe = check_recipe(yaml.safe_load((tmp_path / "run" / RECIPE).read_text()))
    tokenizer = load_base(recipe)[1]
    fit, measured = map(rows_of, probe_batches(recipe, model, tokenizer, None, None))
    assert (len(fit), len(measured)) == (8 * 24, 8 * 4)
    for rows in (fit, measured):
        assert sorted({row[0] for row in rows}) == list(range(8)) and all(len(row) == 1 for row in rows)
    monkeypatch.setattr(exporting, "FIT_ROWS", 40)
    fit, measured = map(rows_of, probe_batches(recipe, model, tokenizer, None, TASKS["sum"]))
    assert {*map(tuple, fit), *map(tuple, measured)} == {(TASKS["sum"],)} and (len(fit), len(measured)) == (24, 4)
    fit, _ = map(rows_of, probe_batches(recipe, model, tokenizer, None, None))
    assert len(fit) == 40
    with pytest.raises(DataError, match="the recipe has 8 tasks, so no rows of task 9"):
        probe_batches(recipe, model, tokenizer, None, 9)


def test_probe_rows_of_a_file(tmp_path: Path) -> None:
    model = run_at(tmp_path / "run", "softmax")
    recipe = check_recipe(yaml.safe_load((tmp_path / "run" / RECIPE).read_text()))
    tokenizer = load_base(recipe)[1]
    (tmp_path / "lines.txt").write_text("".join(f"sort: {i} {i + 1}\n\n" for i in range(9)))
    made = [{"prompt": f"sort: {i} 1", "completion": "1"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    for name, count in (("lines.txt", 9), ("rows.jsonl", 8)):
        fit, measured = probe_batches(recipe, model, tokenizer, tmp_path / name, None)
        assert (len(rows_of(fit)), len(rows_of(measured))) == (count - 2, 2)
        fit, measured = probe_batches(recipe, model, tokenizer, tmp_path / name, 3)
        assert {*map(tuple, rows_of([*fit, *measured]))} == {(3,)}
    said = tokenizer.decode(measured[0]["input_ids"][0])
    assert "sort: 3 1" in said or "sort: 7 1" in said
    (tmp_path / "few.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(DataError, match="3 probe rows: expected at least 4"):
        probe_batches(recipe, model, tokenizer, tmp_path / "few.txt", None)
    for name in ("none.txt", "none.jsonl"):
        with pytest.raises(DataError, match=f"no .*{name}"):
            probe_batches(recipe, model, tokenizer, tmp_path / name, None)


def test_a_task_without_evaluation_rows_keeps_some_training_rows_apart(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"sort: {i}", "completion": str(i)}) for i in range(20)]
    (tmp_path / "one.jsonl").write_text("\n".join(lines))
    model = run_at(tmp_path / "run", "softmax", data={"tasks": {"one": {"path": str(tmp_path / "one.jsonl")}}})
    recipe = check_recipe(yaml.safe_load((tmp_path / "run" / RECIPE).read_text()))
    tokenizer = load_base(recipe)[1]
    batches = probe_batches(recipe, model, tokenizer, None, None)
    said = [{tuple(row.tolist()) for batch in part for row in batch["input_ids"]} for part in batches]
    assert [len(rows) for rows in said] == [15, 5] and not said[0] & said[1]


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("onnx", {}, "--to: expected one of peft, merged, lora, vllm, found 'onnx'"),
        ("lora", {"choice": "best"}, "--fit: expected one of least_squares, average, found 'best'"),
        ("merged", {"rank": 4}, "--rank is for --to lora or vllm, and this is --to merged"),
        ("peft", {"probe": Path("x")}, "--probe is for --to lora"),
        ("lora", {"dequantize": True}, "--dequantize is for --to merged"),
        ("lora", {"rank": 0}, "--rank: expected a number of at least 1, found 0"),
        ("merged", {"task": "sorting"}, "no task 'sorting', and no number; did you mean 'sort'"),
        ("merged", {"dequantize": True}, "--dequantize: base_model 'moelora/tiny' is not quantised"),
        ("merged", {"base": "/nowhere/base"}, "base_model '/nowhere/base': "),
    ],
)
def test_options_that_make_no_sense_are_refused(to: str, options: Any, message: str, tmp_path: Path) -> None:
    run_at(tmp_path / "run", "uniform")
    with pytest.raises(ConfigError) as error:
        export_folder(tmp_path / "run", tmp_path / "out", to, **options)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_taken_place_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(OutputError, match=r"not empty \(mine\)"):
        export_folder(tmp_path / "nowhere", tmp_path / "out", "peft")
    with pytest.raises(AdapterError, match="nowhere"):
        export_folder(tmp_path / "nowhere", tmp_path / "new", "peft")


def test_another_base_model_is_refused_unless_forced(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base")
    run_at(tmp_path / "run", "uniform", base)
    tiny.llama(seed=9, vocab_size=512, max_position_embeddings=256).save_pretrained(base_at(tmp_path / "other"))
    for to in ("peft", "merged", "lora", "vllm"):
        with pytest.raises(AdapterError, match=r"this model has others .*--force"):
            export_folder(tmp_path / "run", tmp_path / to, to, base=str(tmp_path / "other"))
        export_folder(tmp_path / "run", tmp_path / to, to, base=str(tmp_path / "other"), force=True)


def test_a_base_without_safetensors_is_loaded_whole_and_not_merged(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base")
    model = run_at(tmp_path / "run", "uniform", base)
    for file in base.glob("*.safetensors*"):
        file.unlink()
    torch.save(tiny.llama(vocab_size=512, max_position_embeddings=256).state_dict(), base / "pytorch_model.bin")
    export_folder(tmp_path / "run", tmp_path / "lora", "lora")
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    torch.testing.assert_close(logits(found, "llama"), logits(model, "llama"), **CLOSE)
    with pytest.raises(AdapterError, match=r"merging reads safetensors only: .*save_pretrained"):
        export_folder(tmp_path / "run", tmp_path / "out", "merged")


def test_a_folder_without_a_recipe(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base")
    for name, router in (("a", "uniform"), ("b", "softmax")):
        run_at(tmp_path / name, router, base)
        (tmp_path / name / RECIPE).unlink()
    export_folder(tmp_path / "a", tmp_path / "merged", "merged")
    with pytest.raises(ConfigError, match=r"no recipe.yaml with data to measure on; give rows with --probe FILE"):
        export_folder(tmp_path / "b", tmp_path / "lora", "lora")
    (tmp_path / "rows.txt").write_text("\n".join(f"sort: {i}" for i in range(8)))
    done = export_folder(tmp_path / "b", tmp_path / "lora", "lora", probe=tmp_path / "rows.txt")
    assert done.figures["measured"]["least_squares"]["update_error"] < 1


def test_a_quantised_base_is_merged_only_when_dequantising_is_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    base = quantised(tmp_path / "base", monkeypatch)
    run_at(tmp_path / "run", "uniform", tmp_path / "base")
    with pytest.raises(
        ConfigError, match=r"is quantised \(eighths\), .*--dequantize merges .*--to lora leaves the base"
    ):
        export_folder(tmp_path / "run", tmp_path / "out", "merged")
    done = export_folder(tmp_path / "run", tmp_path / "out", "merged", dequantize=True)
    assert any("dequantised" in note for note in done.notes)
    model = moelora.load(base, tmp_path / "run")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(found, "llama"), logits(model, "llama"), **CLOSE)
    export_folder(tmp_path / "run", tmp_path / "lora", "lora")
    with pytest.raises(AdapterError, match=r"q_proj.weight' is quantised \(torch.uint8\)"):  # so it is loaded whole
        hollow_base(tmp_path / "run", tmp_path / "base", "name")


def test_the_whole_model_is_loaded_for_a_token_wise_router_only(tmp_path: Path, monkeypatch: Any) -> None:
    run_at(tmp_path / "run", "uniform")

    def refuse(_: Any) -> None:
        raise AssertionError("the whole base model was loaded")

    monkeypatch.setattr(exporting, "load_base", refuse)
    for to in ("peft", "merged", "lora", "vllm"):
        export_folder(tmp_path / "run", tmp_path / to, to)


def test_experts_at_their_first_ranks_from_the_command_line(tmp_path: Path) -> None:
    run_at(tmp_path / "run", "meteora", experts={"num_experts": 2, "r": 4}, ranks="dylora")
    command(tmp_path / "run", tmp_path / "out", "--to", "peft", "--truncate", 3)
    config = json.loads((tmp_path / "out" / "expert_0" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 4)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["source"]["ranks"]["eval_rank"] == 3
    run_at(tmp_path / "full", "meteora", experts={"num_experts": 2, "r": 4})
    said = " ".join(command(tmp_path / "full", tmp_path / "x", "--to", "peft", "--truncate", 3, code=2).split())
    assert "only ranks: dylora trains for that" in said
