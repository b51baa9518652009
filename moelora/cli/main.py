"""The command line. Heavy imports happen inside the commands, so that help is instant."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
recipes_app = typer.Typer(no_args_is_help=True, help="Recipes that come with the package.")
app.add_typer(recipes_app, name="recipes")

Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="Python file with a method of your own; repeatable.")
]
Force = Annotated[bool, typer.Option("--force", help="Do not compare the base model's weights.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, for instance training.max_steps=100")]


@app.callback()
def main() -> None:
    """Train, evaluate and use mixtures of LoRA experts."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at its import it names kernels that few can have


@contextmanager
def _readable_errors() -> Iterator[None]:
    """A user's mistake is a message and exit code 2; Ctrl-C is 130. Anything else is a bug and keeps its traceback."""
    from moelora.core.errors import MoeloraError

    try:
        yield
    except MoeloraError as error:
        if not error.told:
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print(
            "\ninterrupted; `moelora train` with the same recipe and --resume goes on from the last checkpoint",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Overrides = None,
    plugin: Plugins = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last complete checkpoint of the output folder.")] = False,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="Start so many on this machine, one for each GPU.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take: parameters, memory per GPU, batches, steps.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON instead of tables.")] = False,
) -> None:
    """Train as a recipe says; writes the adapter, summary.json and report.html to training.output_dir."""
    with _readable_errors():
        from moelora.cli.show import task_table
        from moelora.model.record import main_process
        from moelora.recipe import read_recipe
        from moelora.train.processes import end, launch, leave, started
        from moelora.train.run import train as run

        read = read_recipe(recipe, overrides or [], plugin or [])
        if dry_run:
            import json as encoder

            from moelora.cli.show import plan_table
            from moelora.train.dry_run import plan

            found = plan(read, plugin or [], num_processes or 1)
            print(encoder.dumps(found, indent=1)) if json else plan_table(found)
            return
        if (num_processes or read.deepspeed) and not started():
            again = ["train", recipe, *(overrides or []), *(f"--plugin={path}" for path in plugin or [])]
            raise typer.Exit(launch([*again, *(["--resume"] if resume else [])], num_processes or 1))
        try:
            result = run(read, plugin or [], resume)
            if main_process():
                task_table({result.name: result.summary["tasks"]})
                print(f"adapter, summary.json and report.html are in {result.out}")
            end()
        finally:
            leave()


@app.command()
def ablate(
    comparison: Annotated[str, typer.Argument(help="A file that lists recipes, or the name of a shipped one.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for all runs; out/<file name> if not given.")] = None,
    plugin: Plugins = None,
) -> None:
    """Train several recipes and compare them in one table, summary.json and report.html."""
    with _readable_errors():
        from moelora.cli.show import comparison_table
        from moelora.train.compare import compare, read_comparison

        folder = out or Path("out") / Path(comparison).stem
        variants = compare(read_comparison(comparison), folder, overrides or [], plugin or [])
        comparison_table(variants)
        print(f"{folder}/report.html shows the same with pictures; {folder}/summary.json holds the numbers")


@app.command()
def eval(
    folder: Annotated[Path, typer.Argument(help="A folder written by `moelora train`.")],
    overrides: Overrides = None,
    base: Annotated[str | None, typer.Option(help="Another place of the base model.")] = None,
    plugin: Plugins = None,
    force: Force = False,
    routing: Annotated[bool, typer.Option("--routing", help="Show what the router of each layer did, too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables, routing included.")] = False,
) -> None:
    """Evaluate a trained adapter on its recipe's tasks (or others: data.root=FOLDER)."""
    with _readable_errors():
        import json as encoder

        from moelora.cli.show import routing_table, task_table
        from moelora.train.use import evaluate_folder

        found = evaluate_folder(folder, overrides or [], base, plugin or [], force)
        if json:
            print(encoder.dumps(found, indent=1))
            return
        task_table({folder.name: found["tasks"]})
        if routing:
            routing_table(found["routing"])


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="A folder written by `moelora train` or `moelora.save`.")],
    prompt: Annotated[str | None, typer.Argument(help="What to answer; without it, a chat begins.")] = None,
    base: Annotated[str | None, typer.Option(help="Another place of the base model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    task: Annotated[str | None, typer.Option(help="The recipe's task it belongs to, for routers by task.")] = None,
    plugin: Plugins = None,
    force: Force = False,
) -> None:
    """Answer one prompt, or chat (an empty line ends it)."""
    with _readable_errors():
        from moelora.train.use import Chat

        chat = Chat(folder, base, plugin or [], max_new_tokens, temperature, seed, task, force)
        if prompt is not None:
            print(chat.answer(prompt))
            return
        print("chat with the adapted model; an empty line ends it")
        while (line := _ask()) != "":
            print(chat.answer(line))


@app.command()
def inspect(
    adapters: Annotated[list[str], typer.Argument(help="Folders or hub ids: PEFT LoRAs, or what moelora wrote.")],
    base: Annotated[
        str | None, typer.Option(help="Base model to prove them on: each alone in it, logits compared.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what adapters hold and which can be experts together; exit code 1 when one cannot."""
    with _readable_errors():
        import json as encoder

        from moelora.cli.show import adapter_table
        from moelora.model.base import load_model
        from moelora.tools.inspect import inspect_adapters

        found = inspect_adapters(adapters, None if base is None else load_model(base))
        if json:
            print(encoder.dumps(found, indent=1))
        else:
            adapter_table(found)
        if any(entry["error"] for entry in found["adapters"]):
            raise typer.Exit(1)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A folder written by `moelora train` or `moelora.save`.")],
    dest: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Annotated[str, typer.Option(help="peft, merged, lora or vllm: see above.")],
    base: Annotated[str | None, typer.Option(help="Another place of the base model.")] = None,
    task: Annotated[str | None, typer.Option(help="Name or number of a task, for routers by task.")] = None,
    rank: Annotated[int | None, typer.Option(help="lora, vllm: cut every layer down to this rank.")] = None,
    truncate: Annotated[
        int | None, typer.Option(help="ranks: dylora: the first so many ranks of every expert.")
    ] = None,
    probe: Annotated[Path | None, typer.Option(help="lora: rows to fit and measure on; the recipe's if none.")] = None,
    fit: Annotated[str, typer.Option(help="lora: least_squares or average; both are measured.")] = "least_squares",
    dequantize: Annotated[bool, typer.Option("--dequantize", help="merged: a quantised base, unquantised.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Do not compare the base model's weights.")] = False,
    plugin: Plugins = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Write an adapter for tools that know no routers; what was written is compared with the model.

    peft: every expert a LoRA. merged: the base model with the experts in its weights, for a router that does not look
    at the token. lora: one LoRA; where the router looks at the token it comes near, and the distance is measured.
    vllm: LoRAs that vLLM serves.
    """
    with _readable_errors():
        import json as encoder

        from moelora.cli.show import export_table
        from moelora.train.export import export_folder

        options: dict[str, Any] = {"base": base, "task": task, "rank": rank, "truncated": truncate, "probe": probe}
        options["choice"] = fit
        done = export_folder(folder, dest, to, **options, dequantize=dequantize, force=force, plugins=plugin or [])
        if json:
            print(encoder.dumps(done.to_json(), indent=1))
        else:
            export_table(done)


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="What PEFT's X-LoRA, xlora, MixLoRA, MoE-PEFT or MeteoRA saved.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    base: Annotated[str, typer.Option(help="The base model it was trained beside.")],
    expert: Annotated[
        list[str] | None, typer.Option(help="Folder or hub id of an expert, in the router's order; repeatable.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="MeteoRA, which does not record it: 2 if not given.")] = None,
    temperature: Annotated[float | None, typer.Option(help="MeteoRA, the same: 1 if not given.")] = None,
) -> None:
    """Turn a mixture of another project into an adapter of moelora, its router copied exactly."""
    with _readable_errors():
        from moelora.model.base import load_model
        from moelora.model.save import save
        from moelora.tools.mixtures import import_mixture

        given = {"top_k": top_k, "temperature": temperature}
        router = {key: value for key, value in given.items() if value is not None}
        model = import_mixture(load_model(base), folder, expert or [], router=router)
        save(model, out)
        print(f"the adapter is in {out}; moelora.load and `moelora generate` take it")


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List shipped recipes."""
    with _readable_errors():
        from moelora.cli.catalogue import first_line
        from moelora.recipe import shipped_recipes

        for name, path in shipped_recipes().items():
            print(f"{name:24} {first_line(path)}")


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(help="A name from `moelora recipes ls`.")],
    target: Annotated[Path | None, typer.Argument(help="File or folder; here if not given.")] = None,
) -> None:
    """Copy a shipped recipe to edit it."""
    with _readable_errors():
        from moelora.core.errors import OutputError
        from moelora.recipe import find_recipe

        source = find_recipe(name)
        to = target or Path.cwd()
        to = to / source.name if to.is_dir() else to
        if to.exists():
            raise OutputError(f"{to}: exists already; give another name")
        to.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        print(to)


@app.command()
def methods(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/methods.md.")] = False,
    plugin: Plugins = None,
) -> None:
    """List every method on every axis: what it is, its paper, its file and its recipe line."""
    with _readable_errors():
        from moelora.cli.catalogue import methods_page
        from moelora.cli.show import methods_table

        if markdown:
            print(methods_page(), end="")
        else:
            methods_table(plugin or [], json)


@app.command()
def tune(
    out: Annotated[
        Path | None, typer.Option(help="File to write; that of this GPU in ~/.cache/moelora if not given.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Rows of the products that are measured.")] = 8192,
    features: Annotated[int, typer.Option(min=1, help="Their columns.")] = 4096,
) -> None:
    """Measure the Triton kernels' block sizes on this GPU; the operator uses the best from then on."""
    with _readable_errors():
        from rich.progress import track

        from moelora.tools.tune import tune as run

        print(run(out, tokens, features, track))


@app.command()
def env(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Show versions, which kernels of the operator are active, GPUs and threads."""
    with _readable_errors():
        import json as encoder

        from moelora.cli.env import environment
        from moelora.cli.show import environment_table

        found = environment()
        if json:
            print(encoder.dumps(found, indent=1))
        else:
            environment_table(found)


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
