"""What is released: the source distribution, the wheel built from it, and that wheel in an empty environment."""

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from hatchling.build import build_sdist, build_wheel

import lightning_resmem

ROOT = Path(__file__).resolve().parents[1]
SAVED = ROOT / "tests" / "data" / "saved_before" / "sparse"
# What a directory of the package has that nobody wrote.
LEFT_BEHIND = {"__pycache__", ".mypy_cache", ".ruff_cache"}


def files_of_package() -> set[str]:
    package = ROOT / "lightning_resmem"
    found = (path for path in package.rglob("*") if path.is_file() and not LEFT_BEHIND & {*path.parts})
    return {path.relative_to(ROOT).as_posix() for path in found}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    directory = tmp_path_factory.mktemp("source")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        archive = directory / build_sdist(str(directory))
    with tarfile.open(archive) as file:
        file.extractall(directory, filter="data")
    return directory / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """The wheel, built from the source distribution as `pip install` of one does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(source)
        return source.parent / build_wheel(str(source.parent))


def test_the_version_is_written_once(source: Path, wheel: Path) -> None:
    version = lightning_resmem.__version__
    assert importlib.metadata.version("lightning-resmem") == version
    assert source.name == f"lightning_resmem-{version}"
    assert wheel.name == f"lightning_resmem-{version}-py3-none-any.whl"
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("version")] == []


def test_source_distribution_holds_what_its_tests_and_docs_need(source: Path) -> None:
    needed = ["LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "Makefile", "constraints.txt", "docs/mkdocs.yml"]
    assert [name for name in needed if not (source / name).is_file()] == []
    assert {"tests", "examples", "configs"} <= {path.name for path in source.iterdir()}


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    assert "lightning_resmem/py.typed" in names
    assert names == files_of_package()


def test_wheel_runs_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    # This environment lends the dependencies, and not the package: the .pth file of its editable install is not read.
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True, timeout=120)
    (site / "lent.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [tmp_path / "venv" / "bin" / "resmem", "stats", SAVED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(SAVED) in done.stdout
