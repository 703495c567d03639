"""What releases that wrote beside a memory have left there: removed if it is theirs, and they are dead."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_resmem import LocalMemory

Make = Callable[..., LocalMemory]
DAY = 24 * 3600.0


def left(directory: Path, *names: str, age: float = DAY) -> Path:
    """A directory with files, all of them last changed so many seconds ago."""
    directory.mkdir(parents=True)
    then = time.time() - age
    for name in names:
        (directory / name).write_bytes(b"half")
        os.utime(directory / name, (then, then))
    os.utime(directory, (then, then))
    if directory.parent.name.endswith(".replaced"):
        os.utime(directory.parent, (then, then))
    return directory


@pytest.mark.parametrize("exists", [True, False])
def test_what_the_dead_have_left_beside_a_memory_is_removed(tmp_path: Path, make: Make, exists: bool) -> None:
    if exists:
        make().save(tmp_path / "memory")
    left(tmp_path / ".memory.ab_d3f9h.partial", "keys.safetensors", "ids.safetensors")
    left(tmp_path / ".memory.abcdefgh.partial")
    left(tmp_path / ".memory.01234567.partial", "keys.safetensors", "index.faiss", "manifest.json")
    left(tmp_path / ".memory.0123456h.replaced" / "memory", "keys.safetensors", "manifest.json")
    make(7).save(tmp_path / "memory")
    assert len(LocalMemory.load(tmp_path / "memory")) == 7
    assert os.listdir(tmp_path) == ["memory"]


def test_what_is_of_the_living_or_of_others_stays(tmp_path: Path, make: Make) -> None:
    left(tmp_path / ".memory.abcdefg0.partial", "keys.safetensors", age=60)
    left(tmp_path / ".memory.abcdefg1.partial", age=60)
    left(tmp_path / ".memory.abcdefg2.replaced" / "memory", "keys.safetensors", age=60)
    left(tmp_path / ".memory2.abcdefgh.partial", "keys.safetensors")
    left(tmp_path / ".memory.partial", "keys.safetensors")
    left(tmp_path / "memory.abcdefgh.partial", "keys.safetensors")
    left(tmp_path / "elsewhere", "keys.safetensors")
    (tmp_path / ".memory.abcdefg3.partial").symlink_to("elsewhere")
    (tmp_path / ".memory.abcdefg4.partial").write_bytes(b"a file")
    before = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    make(7).save(tmp_path / "memory")
    after = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert {name for name in after if name.split("/")[0] != "memory"} == before


def test_other_files_in_what_was_left_stay(tmp_path: Path, make: Make) -> None:
    left(tmp_path / ".memory.abcdefgh.replaced" / "memory", "keys.safetensors", "manifest.json", "notes.txt")
    make(7).save(tmp_path / "memory")
    assert os.listdir(tmp_path / ".memory.abcdefgh.replaced" / "memory") == ["notes.txt"]
