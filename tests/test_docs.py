"""Every Python block of the documentation runs, every `make` target it names exists, and the site builds strictly.

The blocks of a page run in order and in one namespace, each page in a process and a directory of its own. Two HTML
comments, invisible to readers and each at the start of a line, steer it:

- `<!-- setup: CODE -->` is executed where it stands, for what readers need not see (a model, some data);
- `<!-- not run: REASON -->` right before a block leaves it out.
"""

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.interpreters import Finished, run_python

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").rglob("*.md"))]
ARCHITECTURE = ROOT / "docs" / "pages" / "architecture.md"
PYTHON_NAMES = {"python", "python3", "py"}
SHELL_NAMES = {"bash", "console", "sh", "shell"}
SECONDS_PER_PAGE = 150

_PIECE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)(?P=fence)[ \t]*$"
    r"|^[ \t]*<!--(?P<comment>.*?)-->",
    re.MULTILINE | re.DOTALL,
)

# Blocks are compiled under the page's own path and lines, so that a traceback points into the page.
_DRIVER = """
import json, sys
namespace = {"__name__": "__main__"}
for piece in json.load(open(sys.argv[1], encoding="utf-8")):
    source = "\\n" * (piece["line"] - 1) + piece["source"]
    exec(compile(source, piece["page"], "exec"), namespace)
"""


@dataclass(frozen=True)
class Piece:
    """A fenced block or a setup comment: its language ("setup" for the comment), first line of code, and code."""

    language: str
    line: int
    source: str
    skipped: str | None = None  # the reason given, if it is not to be run


def pieces_of(markdown: str) -> list[Piece]:
    """The fenced blocks and setup comments of a page, in order."""
    pieces: list[Piece] = []
    reason, reason_end = None, 0
    for match in _PIECE.finditer(markdown):
        if reason is not None and (match["fence"] is None or markdown[reason_end : match.start()].strip()):
            raise ValueError(f"'not run: {reason}' is not followed by a block")
        if match["fence"] is not None:
            words = match["info"].strip().lower().split()
            line = markdown.count("\n", 0, match.start("body")) + 1
            pieces.append(Piece(words[0] if words else "", line, textwrap.dedent(match["body"]), reason))
            reason = None
            continue
        kind, colon, text = match["comment"].partition(":")
        if colon and kind.strip() == "setup":
            line = markdown.count("\n", 0, match.start("comment") + len(kind)) + 1
            pieces.append(Piece("setup", line, textwrap.dedent(text) if "\n" in text else text.strip()))
        elif kind.strip() == "not run":
            reason, reason_end = text.strip(), match.end()
    if reason is not None:
        raise ValueError(f"'not run: {reason}' is not followed by a block")
    return pieces


def python_of(page: Path) -> list[Piece]:
    """The pieces of a page that are executed."""
    pieces = pieces_of(page.read_text(encoding="utf-8"))
    return [p for p in pieces if p.language in {*PYTHON_NAMES, "setup"} and p.skipped is None]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_pieces(pieces: list[Piece], page: str, directory: Path) -> Finished:
    script = directory / "pieces.json"
    script.write_text(json.dumps([{"page": page, "line": p.line, "source": p.source} for p in pieces]))
    cwd = directory / "cwd"
    cwd.mkdir()
    env = os.environ | {"WANDB_MODE": "disabled", "MPLBACKEND": "Agg"}
    return run_python("-c", _DRIVER, script, cwd=cwd, env=env, seconds=SECONDS_PER_PAGE)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if python_of(p)], ids=name_of)
def test_page_runs(page: Path, tmp_path: Path) -> None:
    done = run_pieces(python_of(page), str(page), tmp_path)
    assert done.code == 0, f"{name_of(page)} does not run:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "pages" / "index.md"], ids=name_of)
def test_entry_pages_have_python_that_runs(page: Path) -> None:
    assert [p for p in python_of(page) if p.language != "setup"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_left_out_blocks_say_why(page: Path) -> None:
    assert [p.line for p in pieces_of(page.read_text(encoding="utf-8")) if p.skipped == ""] == []


def make_targets_in(markdown: str) -> set[str]:
    """What a page tells its readers to make, in its shell blocks and in its text."""
    shell = "\n".join(piece.source for piece in pieces_of(markdown) if piece.language in SHELL_NAMES)
    inline = "\n".join(re.findall(r"`([^`\n]+)`", markdown))
    return set(re.findall(r"^\s*\$?\s*make ([a-z][\w-]*)", f"{shell}\n{inline}", re.MULTILINE))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_named_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = make_targets_in(page.read_text(encoding="utf-8"))
    assert named <= targets, f"{name_of(page)} names {sorted(named - targets)}, which the Makefile lacks"


@pytest.mark.slow
def test_site_builds_strictly(tmp_path: Path) -> None:
    # Without --quiet, which keeps mkdocs from counting warnings, so that --strict lets them pass.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    pages = {path.relative_to(ROOT / "docs" / "pages") for path in PAGES[1:]}
    built = [tmp_path / "site" / ("." if p.stem == "index" else p.with_suffix("")) / "index.html" for p in pages]
    assert [str(path) for path in built if not path.is_file()] == []
    elsewhere = re.compile(r"""<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)""")
    assert [url for html in built for url in elsewhere.findall(html.read_text(encoding="utf-8"))] == []

    # A doctest that became prose: its section is not called "Examples:", the one name that mkdocstrings knows.
    assert [str(html) for html in built if "<blockquote>\n<blockquote>" in html.read_text(encoding="utf-8")] == []


def test_diagram_is_what_the_code_gives(tmp_path: Path) -> None:
    drawn = tmp_path / "packages.svg"
    subprocess.run([sys.executable, "docs/diagram.py", str(drawn)], cwd=ROOT, check=True, timeout=60)
    kept = ROOT / "docs" / "pages" / "assets" / "packages.svg"
    assert kept.read_text(encoding="utf-8") == drawn.read_text(encoding="utf-8"), "run `make diagram`"


def test_files_that_the_architecture_names_exist() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", text))
    assert len(named) > 20
    assert sorted(name for name in named if not (ROOT / "lightning_resmem" / name).exists()) == []


# The reader of pages is itself code that could let a block slip through.


def test_the_readme_has_the_measured_scores_of_real_data() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = (ROOT / "docs" / "benchmarks" / "real_data.md").read_text(encoding="utf-8").splitlines()[2:]
    assert len(lines) >= 8
    for line in lines:
        data_to_resmem = line.split(" | ")[:5]
        assert " | ".join(data_to_resmem) + " |\n" in readme, f"written by real_data.py, and not in the README: {line}"


def test_blocks_are_found_in_order_with_their_lines() -> None:
    page = "a\n<!-- setup:\nx = 1\n-->\n\n```python title='t'\ny = x + 1\n```\n\n- item\n\n  ```py\n  z = y\n  ```\n"
    found = [(p.language, p.line, p.source) for p in pieces_of(page)]
    assert found == [("setup", 2, "\nx = 1\n"), ("python", 7, "y = x + 1\n"), ("py", 13, "z = y\n")]


def test_make_targets_are_found_in_blocks_and_in_text() -> None:
    page = "Run `make bench`.\n\n```bash\n$ make demo  # see\nmake test\n```\n\n```python\nmake = 1\n```\n"
    assert make_targets_in(page) == {"bench", "demo", "test"}


def test_block_with_reason_is_left_out_and_only_that_one() -> None:
    page = "<!-- not run: needs a GPU -->\n\n```python\na\n```\n\n```python\nb\n```\n"
    assert [p.skipped for p in pieces_of(page)] == ["needs a GPU", None]


@pytest.mark.parametrize("page", ["<!-- not run: x -->\ntext\n```python\na\n```\n", "<!-- not run: x -->\n"])
def test_reason_without_block_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="not followed by a block"):
        pieces_of(page)


def test_comments_and_fences_inside_blocks_are_text() -> None:
    page = "````markdown\n<!-- setup: raise SystemExit(3) -->\n```python\nraise SystemExit(4)\n```\n````\n"
    assert [p.language for p in pieces_of(page)] == ["markdown"]


def test_pieces_share_a_namespace_and_failures_point_into_the_page(tmp_path: Path) -> None:
    page = "<!-- setup: x = 1 -->\n\n```python\ny = x + 1\n```\n\n```python\nassert y == 2\nassert y == 3\n```\n"
    done = run_pieces(pieces_of(page), "page.md", tmp_path)
    assert done.code == 1
    assert 'File "page.md", line 9' in done.stderr


@pytest.mark.slow
def test_the_token_of_the_cluster_page_is_the_users_alone(tmp_path):
    page = (ROOT / "docs" / "pages" / "cluster.md").read_text()
    (made,) = set(re.findall(r"^\(umask .*auth-token.*?\)", page, re.MULTILINE))
    environment = {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", f"umask 022; {made}"], env=environment, check=True, capture_output=True, timeout=120)
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


TROUBLESHOOTING = ROOT / "docs" / "pages" / "troubleshooting.md"


def messages() -> list[str]:
    """Every text in the package's source, with … where something is put in."""
    found = []
    for path in (ROOT / "lightning_resmem").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts))
    return found


def test_troubleshooting_quotes_what_the_package_says() -> None:
    quoted = re.findall(r"^### `(.+)`$", TROUBLESHOOTING.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quoted) > 20
    assert TROUBLESHOOTING.read_text(encoding="utf-8").count("\n### ") == len(quoted)
    said = messages()
    missing = [
        quote
        for quote in quoted
        if not any(re.search(".*".join(map(re.escape, quote.split("…"))), text, re.DOTALL) for text in said)
    ]
    assert missing == []
