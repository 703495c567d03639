"""What a save may replace, who may save at a time, and what it leaves behind."""

import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_resmem import InputError, LocalMemory, StorageError
from lightning_resmem.memory.storage import directory as directories
from lightning_resmem.memory.storage import disk
from tests.saved_files import file_of

Make = Callable[..., LocalMemory]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("manifest", ['{"name": "web project"}', "", "not json", '{"format": "other"}', "[1]"])
def test_a_project_with_a_manifest_of_its_own_is_left_alone(tmp_path: Path, make: Make, manifest: str) -> None:
    (tmp_path / "web" / "src").mkdir(parents=True)
    (tmp_path / "web" / "src" / "index.js").write_text("precious")
    (tmp_path / "web" / "manifest.json").write_text(manifest)
    before = contents(tmp_path)
    for use in (disk.check_target, make().save):
        with pytest.raises(StorageError, match=r"it is left as it is \(its manifest.json is not ours\)"):
            use(tmp_path / "web")
    assert contents(tmp_path) == before


def test_what_is_in_the_way_is_named(tmp_path: Path, make: Make) -> None:
    for name in ("a.tex", "b.tex", "c.tex", "d.tex", "e.tex"):
        (tmp_path / name).write_text("precious")
    for use in (disk.check_target, make().save):
        with pytest.raises(StorageError, match=r"it holds a.tex, b.tex, c.tex and 2 more"):
            use(tmp_path)


def test_other_files_beside_a_memory_stay(saved: Path, make: Make) -> None:
    (saved / "notes").mkdir()
    (saved / "notes" / "today.txt").write_text("precious")
    (saved / "index.faiss").write_bytes(b"of somebody else")
    (saved / "model-00001-of-00002.safetensors").write_bytes(b"of somebody else")
    make(7).save(saved)
    make(8).save(saved)
    assert len(LocalMemory.load(saved)) == 8
    assert (saved / "notes" / "today.txt").read_text() == "precious"
    assert (saved / "index.faiss").read_bytes() == b"of somebody else"
    assert (saved / "model-00001-of-00002.safetensors").read_bytes() == b"of somebody else"
    assert len(list(saved.iterdir())) == 5 + 3  # nothing of the memories before


def test_a_memory_of_any_version_may_be_replaced(saved: Path, make: Make) -> None:
    (saved / "manifest.json").write_text('{"format": "lightning_resmem", "version": 99}')
    make(7).save(saved)
    assert len(LocalMemory.load(saved)) == 7


def test_two_savers_end_with_one_memory_and_one_error(saved: Path, make: Make) -> None:
    descriptor = os.open(saved, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match=r"Another process or thread is saving a memory to .*memory right now"):
            make(7).save(saved)
        assert len(LocalMemory.load(saved)) == 200
    finally:
        os.close(descriptor)
    make(7).save(saved)
    assert len(LocalMemory.load(saved)) == 7


def test_one_that_is_refused_leaves_the_new_directory_to_the_other(tmp_path: Path) -> None:
    missing = directories.missing(tmp_path / "a" / "memory")
    directories.make(missing)
    with directories.locked(missing[0]):
        directories.unmake(missing)
        assert missing[0].is_dir()
    directories.unmake(missing)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_another_one_removes_is_made_again(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, flock, removed = tmp_path / "a" / "memory", fcntl.flock, []

    def removing(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(target)
            target.rmdir()
            target.parent.rmdir()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removing)
    make(7).save(target)
    assert removed
    assert len(LocalMemory.load(target)) == 7


@pytest.mark.parametrize("exists", [True, False])
def test_what_the_dead_have_left_is_removed(tmp_path: Path, make: Make, exists: bool) -> None:
    target = tmp_path / "memory"
    target.mkdir()
    if exists:
        make().save(target)
    (target / ".keys-0123456789abcdef.partial").write_bytes(b"half")
    (target / "ids-0123456789abcdef.safetensors").write_bytes(b"whole, but of no memory")
    (target / ".manifest-0123456789abcdef.partial").write_bytes(b"{")
    make(7).save(target)
    assert len(LocalMemory.load(target)) == 7
    assert len(list(target.iterdir())) == 5


def test_a_failed_first_save_leaves_nothing(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(StorageError, match="Input/output error"):
        make().save(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("mask", "directory", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0, 0o777, 0o666)]
)
def test_modes_follow_the_umask(tmp_path: Path, make: Make, mask: int, directory: int, file: int) -> None:
    before = os.umask(mask)
    try:
        target = make(index="HNSW8").save(tmp_path / "memory")
    finally:
        os.umask(before)
    assert isinstance(target, Path)
    assert stat.S_IMODE(target.stat().st_mode) == directory
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()}
    assert len(files) == 6
    assert set(files.values()) == {file}


def test_a_link_to_a_directory_is_followed_and_stays(saved: Path, tmp_path: Path, make: Make) -> None:
    link = tmp_path / "link"
    link.symlink_to(saved)
    assert make(7).save(link) == link
    assert link.is_symlink()
    assert len(LocalMemory.load(saved)) == 7


def test_links_that_cannot_be_followed_are_refused(saved: Path, tmp_path: Path, make: Make) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for use in (disk.check_target, make().save):
        with pytest.raises(StorageError, match=r"link is a symbolic link to .*nowhere, which does not exist"):
            use(link)
    assert link.is_symlink()
    (saved / "manifest.json").rename(tmp_path / "elsewhere.json")
    (saved / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    assert len(LocalMemory.load(saved)) == 200
    with pytest.raises(StorageError, match=r"its manifest.json is a symbolic link"):
        make(7).save(saved)


def test_paths_that_there_cannot_be(tmp_path: Path, make: Make) -> None:
    long = tmp_path / ("x" * 300)
    for use in (disk.check_target, make().save, LocalMemory.load):
        with pytest.raises(StorageError, match="File name too long"):
            use(long)
        with pytest.raises(InputError, match="holds a NUL character"):
            use("a\0b")
        with pytest.raises(InputError, match="is not a path of this machine"):
            use("half a character \ud800")
        with pytest.raises(InputError, match="is not a path of this machine"):
            use("~nobody-of-this-name/memory")


@pytest.mark.parametrize("name", ["keys", "manifest.json"])
@pytest.mark.parametrize("mmap", [False, True])
def test_pipes_and_devices_are_not_read(saved: Path, name: str, mmap: bool) -> None:
    file = saved / name if name == "manifest.json" else file_of(saved, name)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(StorageError, match=rf"{file.name} cannot be read: it is not a regular file"):
        LocalMemory.load(saved, mmap=mmap)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(StorageError, match=rf"{file.name} cannot be read: it is not a regular file"):
        LocalMemory.load(saved, mmap=mmap)


def test_a_reader_keeps_what_it_has_opened(saved: Path, make: Make) -> None:
    with disk.opened(saved, mmap=True) as files:
        make(7).save(saved)
        make(8).save(saved)
        assert {len(tensor) for tensor in files.tensors.values()} == {200}
        files.verify()
        assert torch.equal(files.tensors["ids"], torch.arange(200))
