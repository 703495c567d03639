"""The package stays a house to live in: short files and functions, packages that say what they are, one direction."""

import ast
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_resmem

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_resmem"
FILES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(text) for name, text in FILES.items()}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{name}:{node.lineno} {node.name}", node


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield f"{name}:{node.lineno} {node.name}", node


def lines_of_code(function: Function) -> int:
    """From `def` to the end, without the docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        assert docstring.end_lineno is not None
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def test_files_are_short() -> None:
    lengths = {name: len(text.splitlines()) for name, text in FILES.items()}
    assert {name: length for name, length in lengths.items() if length >= 350} == {}
    assert statistics.median(lengths.values()) < 150


def test_functions_fit_a_screen() -> None:
    lengths = {name: lines_of_code(function) for name, function in functions()}
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_only_what_users_call_has_many_parameters() -> None:
    owners = {function: node.name for _, node in classes() for function in node.body}
    counts = {}
    for name, function in functions():
        given = function.args
        count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) - (function in owners)
        compiled = any("triton.jit" in ast.unparse(each) for each in function.decorator_list)  # pointers, one by one
        if owners.get(function, function.name) not in lightning_resmem.__all__ and not compiled:
            counts[name] = count
    assert {name: count for name, count in counts.items() if count > 8} == {}


def test_every_package_says_what_it_is_and_nothing_else() -> None:
    packages = [name for name in TREES if name.endswith("/__init__.py")]
    assert len(packages) >= 10
    for name in packages:
        docstring = ast.get_docstring(TREES[name])
        assert docstring is not None, name
        assert len(docstring.splitlines()) >= 2, name
        assert len(TREES[name].body) == 1, f"{name} holds more than its docstring"


def test_large_classes_say_what_their_methods_are_for() -> None:
    """More than 25 methods: the docstring has a paragraph "Methods ..." that says what each group of them is for."""
    silent = []
    for name, node in classes():
        paragraphs = (ast.get_docstring(node) or "").split("\n\n")
        large = sum(isinstance(each, Function) for each in node.body) > 25
        if large and not any(paragraph.lstrip().startswith("Methods") for paragraph in paragraphs):
            silent.append(name)
    assert silent == []


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    """Run what `make test` runs on the package in another directory."""
    command = [shutil.which("lint-imports", path=str(Path(sys.executable).parent)), "--no-cache"]
    # A wide terminal: lines that name modules are not broken.
    env = {**os.environ, "PYTHONPATH": str(directory), "COLUMNS": "500"}
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package and its contracts, to be changed."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_go_in_one_direction(copied: Path) -> None:
    done = lint_imports(copied)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "imported", "told"),
    [
        ("tuning/grid.py", "lightning_resmem.tuning.tuner", ".tuner -> .grid"),
        ("memory/rows.py", "lightning_resmem.tuning", "lightning_resmem.memory.rows -> lightning_resmem.tuning"),
    ],
    ids=["circle", "upwards"],
)
def test_an_import_in_the_other_direction_is_noticed(copied: Path, file: str, imported: str, told: str) -> None:
    path = copied / PACKAGE.name / file
    path.write_text(path.read_text(encoding="utf-8") + f"\nimport {imported}\n", encoding="utf-8")
    done = lint_imports(copied)
    assert done.returncode == 1, done.stdout + done.stderr
    assert told in done.stdout
