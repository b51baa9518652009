"""The catalogue of methods, read from their own files; as data, and as the page docs/methods.md."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from moelora.core.methods import AXES, Methods
from moelora.recipe import shipped_recipes

_HEAD = """# Methods

Every method is one file on one axis; this page is made from those files by `moelora methods --markdown`, and a test
keeps it so. Methods of different axes combine in a recipe; combinations that were published under a name are recipes at
the end.
"""
_AXIS = {
    "experts": "What an expert is: the factors A, B and what lies between them.",
    "routers": "Which experts, or ranks, a token uses.",
    "init": "The values experts start from.",
    "ranks": "How many ranks each expert uses, found while training; the others are masked, and left out of exports.",
    "targets": "Which of the layers that `target_modules` names get experts.",
    "optim": "What sees whole gradients of A and B between backward and step, on any engine; a section of the recipe.",
    "losses": "Auxiliary terms. Every loss takes a `weight`, and `tokens: all` (no padding) or `tokens: answers`.",
}


def catalogue(plugins: Iterable[Path] = ()) -> list[dict[str, str]]:
    """One entry per method: axis, name, summary, paper, formula, notes, differences, recipe, file, test and options."""
    known = Methods(plugins)
    found = []
    for axis in AXES:
        for name in known.names(axis):
            cls = known.find(axis, name)
            source = inspect.getsourcefile(cls) or ""
            inside = Path(source).parent.name == axis
            found.append(
                {
                    "axis": axis,
                    "name": name,
                    **_parts(inspect.getdoc(inspect.getmodule(cls)) or ""),
                    "file": f"{axis}/{name}.py" if inside else source,
                    "test": f"tests/{axis}/test_{name}.py" if inside else "",
                    "options": ", ".join(
                        key if option.default is option.empty else f"{key}={option.default}"
                        for key, option in known.options(axis, name).items()
                    ),
                }
            )
    return found


def methods_page() -> str:
    """docs/methods.md."""
    lines = [_HEAD]
    entries = catalogue()
    for axis, what in _AXIS.items():
        lines += [f"## {axis}", "", what, ""]
        for entry in (entry for entry in entries if entry["axis"] == axis):
            lines += [f"### `{entry['name']}`", "", entry["summary"], ""]
            lines += [f"{entry['lead']}\n"] if entry["lead"] else []
            if entry["formula"]:
                lines += ["```", entry["formula"], "```", ""]
            lines += [f"{entry['notes']}\n"] if entry["notes"] else []
            rows = {
                "Source": entry["paper"],
                "Differences": entry["differences"],
                "Options": f"`{entry['options']}`" if entry["options"] else "",
                "Recipe": entry["recipe"],
                "File": f"[moelora/{entry['file']}](../moelora/{entry['file']}), "
                f"test [{entry['test']}](../{entry['test']})",
            }
            lines += [*(f"- **{key}**: {value}" for key, value in rows.items() if value), ""]
    lines += ["## Recipes", "", "`moelora train NAME` runs one of these, `moelora ablate` a comparison of several.", ""]
    lines += ["| recipe | what | experts | router | losses |", "|---|---|---|---|---|"]
    lines += [_recipe_row(name, path) for name, path in shipped_recipes().items()]
    return "\n".join(lines).rstrip() + "\n"


def first_line(path: Path) -> str:
    """What a recipe file says about itself."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def _recipe_row(name: str, path: Path) -> str:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    adapter: Mapping[str, Any] = content.get("adapter", {})
    cells = [_short(adapter.get(section)) for section in ("experts", "router", "losses")]
    return f"| [{name}](../recipes/{path.name}) | {first_line(path)} | {' | '.join(cells)} |"


def _short(section: Any) -> str:
    if not section:
        return ""
    text = yaml.safe_dump(section, default_flow_style=True, sort_keys=False, width=1000).strip()
    return f"`{text.removesuffix('...').strip()}`"


def _parts(doc: str) -> dict[str, str]:
    """A method file's docstring by its parts; the paragraphs that are no other part are notes."""
    parts: dict[str, list[str]] = {
        key: [] for key in ("summary", "paper", "lead", "formula", "notes", "differences", "recipe")
    }
    for number, paragraph in enumerate(doc.split("\n\n")):
        text = " ".join(paragraph.split())
        if number == 0:
            kind = "summary"
        elif paragraph.startswith("    "):
            kind, text = "formula", inspect.cleandoc(paragraph)
        elif text.startswith(("Paper:", "Source:")):
            kind, text = "paper", text.partition(": ")[2]
            text, _, line = text.partition("Recipe line: ")
            parts["recipe"] += [line] if line else []
            if text.endswith(":"):  # the sentence that leads to the formula
                said, _, lead = text.rpartition(". ")
                text = said or lead.removesuffix(":")
                parts["lead"] += [lead.replace("``", "`")] if said else []
        elif text.startswith("Differences"):
            kind, text = "differences", re.sub(r"^Differences[^:.]*[:.] ?", "", text)
        elif text.startswith("Recipe line:"):
            kind, text = "recipe", text.partition(": ")[2]
        else:
            kind = "notes"
        parts[kind].append(text.replace("``", "`").strip())
    return {key: "\n\n".join(texts) for key, texts in parts.items()}
