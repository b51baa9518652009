"""The page and the pictures of a measurement, made from its rows alone.

    python -m tests.bench.page docs/bench/cpu.json [MORE.json ...] [--out docs/bench/cpu]

Several files of one kind (a measurement in parts) become one. Writes OUT.json, OUT.md and OUT_*.png.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from tests.bench.measure import Row, read, write

COLOURS = "#2f6fb0 #d9722e #3a9a68 #8a5fb3 #c0504d #7a6a53".split()
FORWARD, BOTH = "forward", "forward and backward"


@dataclass(frozen=True)
class Target:
    """What is asked, and what was found; None where it was not measured."""

    what: str
    asked: str
    found: float | None
    held: bool | None

    @classmethod
    def least(cls, what: str, asked: float, found: float | None) -> Target:
        return cls(what, f"at least {asked:g}", found, None if found is None else found >= asked)

    @classmethod
    def most(cls, what: str, asked: float, found: float | None) -> Target:
        return cls(what, f"at most {asked:g}", found, None if found is None else found <= asked)

    def line(self) -> str:
        found = "not measured" if self.found is None else f"{self.found:.2f}"
        held = {None: "", True: "yes", False: "**no**"}[self.held]
        return f"| {self.what} | {self.asked} | {found} | {held} |"


class Rows:
    """Rows to be looked up."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def of(self, **wanted: str) -> list[Row]:
        """Rows with these keys; ``what`` is the pass."""
        keys = {("pass" if key == "what" else key): value for key, value in wanted.items()}
        return [row for row in self.rows if all(row[key] == value for key, value in keys.items())]

    def value(self, key: str, **wanted: str) -> float | None:
        """One value of one row, or None where there is none."""
        return next((row[key] for row in self.of(**wanted)), None)

    def quotient(self, over: dict[str, str], under: dict[str, str], key: str = "ms") -> float | None:
        """A value of one row over that of another."""
        above, below = self.value(key, **over), self.value(key, **under)
        return None if above is None or not below else above / below

    def groups(self, *keys: str) -> dict[tuple[str, ...], Rows]:
        """Rows with equal keys together, in the order they came in."""
        found: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            found.setdefault(tuple(row[key] for key in keys), []).append(row)
        return {name: Rows(rows) for name, rows in found.items()}


def sizes(case: str) -> dict[str, float]:
    """T, d, n, E, r and k of a layer's case."""
    found = {key: float(value) for key, _, value in (part.partition("=") for part in case.split())}
    return {"n": found["d"], **found}


def _time(row: Row | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    if row["ms"] is None:
        return "refused: wrong", ""
    digits = 1 if row["ms"] >= 10 else 3
    time = f"{row['ms']:.{digits}f} ({row['p10']:.{digits}f} to {row['p90']:.{digits}f})"
    return time, "" if row["ratio"] is None else f"{row['ratio']:.2f}"


def _bytes(row: Row | None, key: str) -> str:
    return "" if row is None or row[key] is None else f"{row[key] / 1e6:.1f}"


def opening(title: str, head: dict[str, Any], out: Path) -> list[str]:
    """What was measured where."""
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    command = [f"    {line}" for line in head["command"].splitlines()]
    where = f"{head['machine']}; {versions}; compiled kernels: {head['kernels']}. Made from `{out.name}.json`."
    return [f"# {title}", "", *command, *paragraph(where)]


def layer_table(rows: Rows, more: Callable[[Row], str] | None = None, extra: str = "") -> list[str]:
    """One case and dtype: a line per variant. more: a further cell for each, under the heading ``extra``."""
    head = f"| variant | {FORWARD}, ms | of ours | {BOTH}, ms | of ours | kept, MB | peak, MB | error |"
    lines = [head + (f" {extra} |" if more else ""), "|---" * (8 + (more is not None)) + "|"]
    for (variant,), group in rows.groups("variant").items():
        one, two = (next(iter(group.of(what=what)), None) for what in (FORWARD, BOTH))
        last: Any = two or one
        cells = [variant, *_time(one), *_time(two), _bytes(two, "saved_bytes"), _bytes(last, "peak_bytes")]
        cells += [f"{last['error']:.0e}"] + ([more(last)] if more else [])
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def model_table(rows: Rows) -> list[str]:
    """One case of whole models: a line per variant."""
    lines = ["| variant | ms | of ours | kept, MB | peak, MB | error |", "|---|---|---|---|---|---|"]
    for row in rows.rows:
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        cells = [row["variant"], *_time(row), _bytes(row, "saved_bytes"), _bytes(row, "peak_bytes"), error]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def paragraph(text: str) -> list[str]:
    return ["", *textwrap.wrap(" ".join(text.split()), 120)]


def target_table(targets: Sequence[Target]) -> list[str]:
    return ["", "| what | asked | found | held |", "|---|---|---|---|", *(target.line() for target in targets)]


def figure(panels: int) -> tuple[Figure, list[Axes]]:
    made = Figure(figsize=(4.4 * panels, 3.9), dpi=150, layout="constrained")
    axes = made.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.grid(True, which="major", color="#e2e6ea", linewidth=0.8)
        one.spines[["top", "right"]].set_visible(False)
    return made, list(axes)


def logarithmic(axes: Axes) -> None:
    """Both axes, with plain numbers; 2k is 2048."""
    axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 2048 else f"{value / 1024:g}k")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())


def scaling_picture(rows: Rows, path: Path) -> bool:
    """One panel per curve, both axes logarithmic: milliseconds of every variant. False where there is no curve."""
    curves = {name: found for (name,), found in rows.groups("suite").items() if name.startswith("scaling ")}
    if not curves:
        return False
    variants = list(dict.fromkeys(row["variant"] for found in curves.values() for row in found.rows))
    made, axes = figure(len(curves))
    for one, (name, found) in zip(axes, curves.items(), strict=True):
        letter, first = name.split()[-1], sizes(found.rows[0]["case"])
        for variant, colour in zip(variants, COLOURS, strict=False):
            timed = [row for row in found.of(variant=variant) if row["ms"] is not None]
            across = [sizes(row["case"])[letter] for row in timed]
            one.plot(across, [row["ms"] for row in timed], "o-", color=colour, label=variant, markersize=4)
        one.set_xlabel(letter)
        logarithmic(one)
        one.set_title(", ".join(f"{key}={first[key]:g}" for key in "TdErk" if key != letter), fontsize=9)
    axes[0].set_ylabel(f"ms, {BOTH}")
    axes[0].legend(frameon=False, fontsize=8)
    made.savefig(path)
    return True


def merged(paths: Sequence[Path]) -> tuple[dict[str, Any], list[Row]]:
    """Head and rows of all files; where two hold the same suite, that of the last. Raises ValueError for unlike heads.

    The commands are all kept.
    """
    head: dict[str, Any] = {}
    suites: dict[str, list[Row]] = {}
    commands: list[str] = []
    for path in paths:
        found, rows = read(path)
        commands += [line for line in found.pop("command").splitlines() if line not in commands]
        if head and found != head:
            raise ValueError(f"{path} was measured elsewhere: {found}, not {head}")
        head = found
        suites.update({name: group.rows for (name,), group in Rows(rows).groups("suite").items()})
    return {"command": "\n".join(commands), **head}, [row for rows in suites.values() for row in rows]


def main() -> None:
    from tests.bench import cpu_page, gpu_page

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="path without an ending; by default the first file's")
    args = parser.parse_args()
    out: Path = args.out or args.json[0].with_suffix("")
    head, rows = merged(args.json)
    if len(args.json) > 1:
        write(out.with_suffix(".json"), head, rows)
    page = gpu_page.page if head["kind"] == "gpu" else cpu_page.page
    page(head, Rows(rows), out)


if __name__ == "__main__":
    main()
