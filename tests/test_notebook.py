"""The notebook in examples/ runs, in this process, and still prints what its kept outputs show."""

import ast
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def shown(cell: dict[str, Any]) -> str:
    """The text that a cell shows in the file, with # for each number."""
    texts = [output.get("text") or output["data"]["text/plain"] for output in cell["outputs"]]
    return re.sub(r"\d+(\.\d+)?", "#", "".join("".join(text) for text in texts)).strip()


def run(source: str, namespace: dict[str, Any]) -> str:
    """Run a cell as a notebook does; what it prints, and the value of a last expression."""
    # Magics are for the notebook's own display.
    tree = ast.parse(re.sub(r"^%.*$", "pass", source, flags=re.MULTILINE))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, str(NOTEBOOK), "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), namespace)
            if value is not None:
                print(repr(value))
    return re.sub(r"\d+(\.\d+)?", "#", printed.getvalue()).strip()


def test_every_cell_shows_what_it_still_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(CODE):
        assert run("".join(cell["source"]), namespace) == shown(cell), f"code cell {number}: run the notebook again"
    scores = namespace["scores"]
    assert scores["test/acc_resmem"] > scores["test/acc_base"]
    assert list(tmp_path.iterdir()) == []


def test_a_picture_and_scores_are_kept() -> None:
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("resmem: 0." in "".join(output.get("text", "")) for output in outputs)
    assert all(output["output_type"] != "error" for output in outputs)


def test_it_needs_no_clone() -> None:
    """It installs the package by its name, and imports nothing of this repository."""
    source = "\n".join("".join(cell["source"]) for cell in CODE)
    assert '"lightning-resmem[plots]"' in source
    assert not re.search(r"\b(examples|tests)\b", source)
