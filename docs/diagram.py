"""Draw the packages of lightning_resmem and what they import, from the code, as one SVG: `make diagram`.

A package stands above all that it imports. An arrow is left out where a longer way of arrows says the same, and the
one line on each box is the first of its docstring.
"""

import ast
import importlib.util
import sys
import textwrap
import tomllib
from html import escape
from itertools import pairwise
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lightning_resmem"
BOX_WIDTH, BOX_HEIGHT, LANE = 264, 74, 28  # a lane is what an arrow takes that passes a row
GAP, ROW_GAP, MARGIN = 26, 36, 24
LINE_LENGTH = 45

# Of the same colours as dataflow.svg, on a card of its own, so that it reads alike on light and dark pages.
STYLE = """<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 10 5 0 10z" style="fill:#37474f;stroke:none"/></marker></defs>
<style>
text { font: 11px Helvetica, Arial, sans-serif; text-anchor: middle; fill: #263238 }
.name { font-size: 14px; font-weight: bold }
.package { fill: #e8eaf6; stroke: #3f51b5 }
.file { fill: #eceff1; stroke: #90a4ae }
path { fill: none; stroke: #37474f; stroke-width: 1.3; marker-end: url(#tip) }
</style>"""

Edges = dict[str, set[str]]
Places = dict[str, tuple[float, float]]


def order() -> list[str]:
    """What stands at the top of the package, in the order of the contract in pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    names = [name.strip() for layer in layers for name in layer.replace("|", ":").split(":")]
    return [name for name in names if name != "__main__"]  # `python -m lightning_resmem` is the command


def imports(names: list[str]) -> Edges:
    """For each name those that it imports, less those that one of these imports anyway."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    direct: Edges = {name: set() for name in names}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            start, end = (f"{part}.".split(".")[1] for part in (module, imported))
            if start != end and start in direct and end in direct:
                direct[start].add(end)
    reached: Edges = {}
    for name in reversed(names):
        reached[name] = direct[name].union(*(reached[other] for other in direct[name]))
    return {name: {end for end in direct[name] if not any(end in reached[o] for o in direct[name])} for name in names}


def rows_and_paths(edges: Edges) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of keys, the top row first, and the keys that each arrow goes through.

    A key is a name, or `start>end@row` for the lane of an arrow that passes a row on its way down.
    """
    height: dict[str, int] = {}
    for name in reversed(edges):
        height[name] = max((height[end] + 1 for end in edges[name]), default=0)
    row = {name: max(height.values()) - height[name] for name in edges}
    rows = [[name for name in edges if row[name] == number] for number in range(max(row.values()) + 1)]
    paths = []
    for start, ends in edges.items():
        for end in sorted(ends, key=list(edges).index):
            lanes = [f"{start}>{end}@{number}" for number in range(row[start] + 1, row[end])]
            for number, lane in enumerate(lanes, row[start] + 1):
                rows[number].append(lane)
            paths.append([start, *lanes, end])
    return rows, paths


def place(rows: list[list[str]], paths: list[list[str]]) -> Places:
    """The middle of each key's place. Rows are sorted by where their neighbours are, again and again: few crossings."""
    neighbors: dict[str, list[str]] = {key: [] for row in rows for key in row}
    for above, below in (pair for path in paths for pair in pairwise(path)):
        neighbors[above].append(below)
        neighbors[below].append(above)
    x: dict[str, float] = {}

    def wanted(key: str) -> float:
        known = [x[other] for other in neighbors[key] if other in x]
        return sum(known) / len(known) if known else 0.0

    for sweep in range(24):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            row.sort(key=wanted)
            widths = [LANE if ">" in key else BOX_WIDTH for key in row]
            left = -(sum(widths) + GAP * (len(row) - 1)) / 2
            for key, width in zip(row, widths, strict=True):
                x[key] = left + width / 2
                left += width + GAP
    return {key: (x[key], number * (BOX_HEIGHT + ROW_GAP)) for number, row in enumerate(rows) for key in row}


def purpose(name: str) -> str:
    """The first line of a module's docstring, without backticks and full stop."""
    spec = importlib.util.find_spec(f"{PACKAGE}.{name}")
    if spec is None or spec.origin is None:
        raise SystemExit(f"pyproject.toml names {name}, which {PACKAGE} lacks.")
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].replace("`", "").rstrip(".")


def box(name: str, x: float, y: float) -> str:
    """A package or file: its name, and what it is for."""
    source = ROOT / PACKAGE / name
    kind, label = ("package", f"{name}/") if source.is_dir() else ("file", f"{name}.py")
    lines = textwrap.wrap(purpose(name), LINE_LENGTH)
    base = round(y) + BOX_HEIGHT // 2 + 5 - 7 * len(lines)
    text = "".join(
        f'<text x="{x:.0f}" y="{base + 17 + 14 * number}">{escape(line)}</text>' for number, line in enumerate(lines)
    )
    return (
        f'<g><rect class="{kind}" x="{x - BOX_WIDTH / 2:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" '
        f'rx="6"/><text class="name" x="{x:.0f}" y="{base}">{label}</text>{text}</g>'
    )


def arrow(path: list[str], places: Places) -> str:
    """A curve from the bottom of the first box, along the lanes, to the top of the last."""
    x, y = places[path[0]][0], places[path[0]][1] + BOX_HEIGHT
    steps = [f"M{x:.0f} {y:.0f}"]
    for key in path[1:]:
        to, top = places[key]
        middle = (y + top) / 2
        steps.append(f"C{x:.0f} {middle:.0f} {to:.0f} {middle:.0f} {to:.0f} {top:.0f}")
        x, y = to, top
        if key != path[-1]:
            y += BOX_HEIGHT
            steps.append(f"V{y:.0f}")
    return f'<path d="{"".join(steps)}"/>'


def draw() -> str:
    """The whole picture."""
    edges = imports(order())
    rows, paths = rows_and_paths(edges)
    places = place(rows, paths)
    left = min(places[key][0] for key in edges) - BOX_WIDTH / 2 - MARGIN
    width = -2 * left
    height = (len(rows) - 1) * (BOX_HEIGHT + ROW_GAP) + BOX_HEIGHT + 2 * MARGIN
    places = {key: (x - left, y + MARGIN) for key, (x, y) in places.items()}
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
            f'aria-label="Packages of {PACKAGE}, each above what it imports">',
            STYLE,
            f'<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="#ffffff"/>',
            *(arrow(path, places) for path in paths),
            *(box(name, *places[name]) for name in edges),
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")
