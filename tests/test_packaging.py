"""What holds for the package as a whole: its imports and names, the pins, and what is in its files."""

import ast
import importlib.metadata
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import lightning_resmem

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ["faiss", "jsonargparse", "matplotlib", "ray", "sklearn", "wandb"]

# Put together here, so that this file does not contain them.
MACHINE_PATHS = ["/" + name + "/" for name in ("work", "opt", "root", "home", "Users")] + ["file:" + "//"]
REGISTRIES = ["pypi" + ".org", "python" + "hosted.org", "download.pytorch" + ".org", "registry." + "npmjs"]
PIP_OPTIONS = ["--" + "index-url", "--" + "extra-index-url", "--" + "find-links", "--" + "trusted-host"]


def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


def direct_dependencies() -> dict[str, SpecifierSet]:
    """Every dependency of the core and of every extra, by canonical name, with the range it may have."""
    table = project()
    lines = [*table["dependencies"], *(line for extra in table["optional-dependencies"].values() for line in extra)]
    found: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        if name != table["name"]:  # "all" names other extras of this project
            found[name] = found.get(name, SpecifierSet()) & requirement.specifier
    return found


def pins(file: str = "constraints.txt") -> dict[str, str]:
    """The exact versions in a file of constraints, by canonical name."""
    found: dict[str, str] = {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            name, equals, version = line.partition("#")[0].partition("==")
            assert equals, f"{file}: {line!r} is not a pin"
            found[canonicalize_name(name.strip())] = version.strip()
    return found


@pytest.mark.slow
def test_import_loads_no_optional_library() -> None:
    code = (
        f"import json, sys, lightning; before = [m for m in {OPTIONAL} if m in sys.modules]\n"
        f"from lightning_resmem import *; after = [m for m in {OPTIONAL} if m in sys.modules]\n"
        "print(json.dumps([before, after]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    print(f"import lightning itself loads {before}")
    assert sorted(set(after) - set(before)) == []


def test_every_public_name_resolves() -> None:
    assert lightning_resmem.__all__
    assert len(set(lightning_resmem.__all__)) == len(lightning_resmem.__all__)
    assert [name for name in lightning_resmem.__all__ if not hasattr(lightning_resmem, name)] == []


def test_no_module_hides_a_public_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(lightning_resmem.__path__)}
    assert modules & set(lightning_resmem.__all__) == set()


@pytest.mark.slow
def test_a_shard_starts_without_lightning() -> None:
    names = {"lightning", "torchmetrics", "ray", "torch"}
    code = f"import sys, lightning_resmem.cluster.pool; print({names} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(ast.literal_eval(done.stdout)) == {"ray", "torch"}


def test_every_direct_dependency_has_a_pin_within_its_range() -> None:
    pinned = pins()
    for name, allowed in direct_dependencies().items():
        assert name in pinned, f"{name} has no pin in constraints.txt"
        assert allowed.contains(pinned[name]), f"{name}=={pinned[name]} is not in {allowed}"


def test_the_oldest_versions_are_the_lower_ends_of_the_ranges() -> None:
    oldest, not_at_hand = pins("tests/constraints-oldest.txt"), {"torch", "triton"}
    for name, allowed in direct_dependencies().items():
        lowest = max(Version(each.version) for each in allowed if each.operator == ">=")
        if name == "faiss-gpu":  # never beside faiss-cpu
            assert name not in oldest
        elif name not in not_at_hand:
            assert Version(oldest[name]) == lowest, f"{name}=={oldest[name]} is not the lower end of {allowed}"


def test_installed_versions_are_the_pinned_ones() -> None:
    for name, version in pins().items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that this environment does not have
        assert installed.partition("+")[0] == version, f"{name} {installed} is installed, constraints.txt has {version}"


def test_all_never_brings_both_builds_of_faiss() -> None:
    extras = project()["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    assert everything.extras == {"cpu", "fast", "ray", "serve", "wandb", "cli", "plots"}


def test_files_name_no_machine_path_and_no_registry() -> None:
    # Untracked files too, so that it fails before the commit and not after it.
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: no list of the files that belong to the repository")
    # A path starts where a word does not go on: "this/or/that" has none, "=/or/that" has one.
    paths = [r"(?<![\w.*])" + re.escape(path) for path in MACHINE_PATHS]
    forbidden = re.compile("|".join([*paths, *map(re.escape, REGISTRIES + PIP_OPTIONS)]))
    for sign in (*MACHINE_PATHS, *REGISTRIES, *PIP_OPTIONS):
        assert forbidden.search(f"as {sign}any")
    names, found = listed.stdout.split("\0"), []
    assert "pyproject.toml" in names
    for name in filter(None, names):
        path = ROOT / name
        if path.is_file():
            text = path.read_bytes().decode("utf-8", errors="replace")
            found += [f"{name}: {match.group()}" for match in forbidden.finditer(text)]
    assert found == []


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_call_targets_that_there_are(workflow: Path) -> None:
    [phony] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job.get("steps", ()) if "run" in step]
    for version in jobs.get("test", {}).get("strategy", {}).get("matrix", {}).get("versions", [""]):
        script = "\n".join(runs).replace("${{ matrix.versions }}", version)
        called = re.findall(r"make ([a-z-]+)", script)
        assert called
        assert set(called) <= set(phony.split())


def test_the_classifiers_are_the_pythons_of_the_checks() -> None:
    table = project()
    prefix = "Programming Language :: Python :: 3."
    named = [entry.removeprefix(prefix) for entry in table["classifiers"] if entry.startswith(prefix)]
    checks = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())
    assert [f"3.{minor}" for minor in named] == checks["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert table["requires-python"] == f">=3.{named[0]}"


def test_the_version_is_in_the_changelog_and_the_citation() -> None:
    newest, *_ = re.findall(r"^## \[([0-9.]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest == (lightning_resmem.__version__, str(citation["date-released"]))
    assert citation["version"] == lightning_resmem.__version__
