"""What is on disk: damage is told, nothing else is touched, a FAISS file is made again."""

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lightning_resmem import InputError, LocalMemory, RayMemory, ResMemParams, StorageError
from lightning_resmem.memory.storage import files
from lightning_resmem.memory.values.sparse import SparseConfig
from tests.saved_files import edited, file_of


def _memory(index: str = "exact", rows: int = 200) -> LocalMemory:
    memory = LocalMemory(params=ResMemParams(k=3), index=index)
    memory.add(torch.randn(rows, 4), torch.randn(rows, 5), torch.randint(5, (rows,)))
    return memory


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return _memory().save(tmp_path / "memory")


def test_flipped_byte(saved: Path) -> None:
    file = file_of(saved, "keys")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(StorageError, match=rf"{file.name} is damaged: its sha256 is \w+, the manifest says"):
        LocalMemory.load(saved)
    with pytest.raises(StorageError) as caught:
        LocalMemory.load(saved)
    assert str(caught.value).count("Restore it from a backup") == 1
    assert "cannot be read" not in str(caught.value)


def test_file_of_another_tensor(saved: Path) -> None:
    file = file_of(saved, "ids")
    safetensors.torch.save_file({"other": torch.zeros(3)}, file)
    with pytest.raises(StorageError, match=rf"{file.name} is damaged: it holds \['other'\], the manifest says 'ids'"):
        LocalMemory.load(saved, mmap=True)


@pytest.mark.parametrize("name", ["keys", "ids", "outputs", "targets"])
@pytest.mark.parametrize("mmap", [False, True])
def test_missing_file(saved: Path, name: str, mmap: bool) -> None:
    (file := file_of(saved, name)).unlink()
    with pytest.raises(StorageError, match=f"{file.name} is missing"):
        LocalMemory.load(saved, mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True])
def test_other_shape_shows_both_sides(saved: Path, mmap: bool) -> None:
    file = file_of(saved, "keys")
    safetensors.torch.save_file({"keys": torch.zeros(3, 2)}, file)
    edited(saved, lambda manifest: manifest["tensors"]["keys"].update(sha256=files.sha256(file)))
    with pytest.raises(StorageError, match=r"shape \[3, 2\] and dtype float32, the manifest says \[200, 4\]"):
        LocalMemory.load(saved, mmap=mmap)


@pytest.mark.parametrize(
    "read", [LocalMemory.load, partial(LocalMemory.load, mmap=True), partial(RayMemory.load, num_shards=2)]
)
def test_a_file_that_was_cut_short_is_named(saved: Path, read: Callable[[Path], object]) -> None:
    for name in ("keys", "ids", "outputs", "targets"):
        file = file_of(saved, name)
        whole = file.read_bytes()
        for cut in (0, 4, 50, -100, -1):
            file.write_bytes(whole[:cut])
            with pytest.raises(StorageError, match=rf"{file.name} (is damaged|cannot be read)"):
                read(saved)
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["keys", "ids", "outputs", "targets"])
@pytest.mark.parametrize("missing", [1, 100, -8])
def test_a_file_of_another_size_is_not_mapped(saved: Path, name: str, missing: int) -> None:
    file = file_of(saved, name)
    whole = file.read_bytes()
    file.write_bytes(whole[:-missing] if missing > 0 else whole + bytes(-missing))
    message = rf"{file.name} is damaged: it has {len(whole) - missing} bytes, its header says {len(whole)}"
    with pytest.raises(StorageError, match=message):
        LocalMemory.load(saved, mmap=True)


@pytest.mark.parametrize("size", [0, 4, 50])
def test_a_file_without_its_header_is_not_mapped(saved: Path, size: int) -> None:
    file = file_of(saved, "targets")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(StorageError, match=rf"{file.name} cannot be read"):
        LocalMemory.load(saved, mmap=True)


@pytest.mark.parametrize(
    ("values", "name"), [("dense", "targets"), ("dense", "ids"), ("sparse", "targets"), ("sparse", "classes")]
)
def test_a_mapped_file_whose_rows_cannot_be_is_named(tmp_path: Path, values: str, name: str) -> None:
    memory = LocalMemory(params=ResMemParams(k=200), values=values)
    memory.add(torch.randn(200, 4), torch.randn(200, 5), torch.randint(5, (200,)))
    file = file_of(memory.save(tmp_path / "memory"), name)
    whole = file.read_bytes()
    file.write_bytes(whole[:-80] + b"\xff" * 80)  # as a disk may leave it: of the right size
    loaded = LocalMemory.load(tmp_path / "memory", mmap=True)
    with pytest.raises(StorageError, match=rf"{file.name} is damaged: its sha256 is"):
        loaded(torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=99), "version 99, this release reads version 1"),
        (lambda m: m.update(format="other"), r"does not describe .*: another program saved it\. Give the directory"),
        (lambda m: m.update(task="nonsense"), "its task is 'nonsense', this release knows multiclass, multilabel"),
        (lambda m: m.update(task=3), "task is 3, expected str"),
        (lambda m: m["values"].update(num_outputs=-1), r"num_outputs is -1, so outputs .*the file holds \(200, 5\)"),
        (lambda m: m["values"].update(num_outputs=7), r"should have shape \(200, 7\), the file holds \(200, 5\)"),
        (lambda m: m["values"].update(num_outputs="x"), "values.num_outputs is 'x', expected int"),
        (lambda m: m["values"].update(num_outputs=None), "values.num_outputs is None, expected int"),
        (lambda m: m["values"].update(top_m=0), "top_m=0"),
        (lambda m: m.update(rows=True), "rows is True, expected int"),
        (lambda m: m.update(provenance={"head": 5}), "provenance.head is 5, expected str"),
        (lambda m: m.update(provenance=None), "provenance is None, expected dict"),
        (lambda m: m["params"].pop("sigma"), "params.sigma is missing"),
        (lambda m: m["params"].update(sigma=-1), "damaged: sigma=-1"),
        (lambda m: m.update(tunable="no"), "tunable is 'no', expected bool"),
        (lambda m: m.update(index={"factory": "Flat", "evil": 1}), "damaged: .*'evil'"),
        (lambda m: m.update(index=None), "index is None"),
        (lambda m: m["tensors"].pop("ids"), "tensors.ids is missing"),
        (lambda m: m.update(rows=7), "says 7 rows"),
        (lambda m: m.pop("params"), "damaged"),
        (lambda m: m.pop("values"), "damaged"),
        (lambda m: m["tensors"].pop("ids"), "damaged"),
        (lambda m: m["tensors"]["keys"].update(file="../keys.safetensors"), "not in its directory"),
        (lambda m: m["tensors"]["keys"].update(file="/etc/passwd"), "not in its directory"),
        (lambda m: m.update(tensors=[]), "not complete"),
    ],
)
def test_manifest_that_does_not_fit(saved: Path, change: Callable[[dict], object], message: str) -> None:
    edited(saved, change)
    with pytest.raises(StorageError, match=message):
        LocalMemory.load(saved)


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"name": "app"}'])
def test_the_manifest_of_another_program(saved: Path, manifest: str) -> None:
    (saved / "manifest.json").write_text(manifest)
    with pytest.raises(
        StorageError, match=r"does not describe .*: another program saved it\. Give the directory of a mem"
    ):
        LocalMemory.load(saved)


def test_fewer_outputs_than_sparse_values_hold(tmp_path: Path) -> None:
    memory = LocalMemory(params=ResMemParams(k=3), values=SparseConfig(2))
    memory.add(torch.randn(50, 4), torch.eye(5).repeat(10, 1), torch.randint(5, (50,)))
    path = memory.save(tmp_path / "memory")
    edited(path, lambda manifest: manifest["values"].update(num_outputs=4))
    with pytest.raises(StorageError, match="num_outputs is 4, the files hold class 4"):
        LocalMemory.load(path)


def test_no_memory_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such directory"):
        LocalMemory.load(tmp_path / "nothing")
    with pytest.raises(StorageError, match=r"has no manifest.json"):
        LocalMemory.load(tmp_path)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(StorageError, match=r"notes.txt: it is a file"):
        LocalMemory.load(tmp_path / "notes.txt")


@pytest.mark.parametrize("directory", [None, 5])
def test_what_is_no_path(directory: object) -> None:
    for use in (LocalMemory.load, _memory().save):
        with pytest.raises(InputError, match=f"directory={directory} is not a path"):
            use(directory)


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(StorageError, match="is not a saved memory: it is left as it is"):
        _memory().save(tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


def test_failed_save_keeps_the_old_memory(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        _memory(rows=7).save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]  # nothing half-written is left


def test_the_old_memory_is_put_back_if_the_new_one_cannot_take_its_place(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def refused(path: Path, target: Path) -> Path:
        if target.name == "manifest.json":
            raise OSError(5, "Input/output error")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(StorageError, match="Input/output error"):
        _memory(rows=7).save(saved)
    assert len(LocalMemory.load(saved)) == 200
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert len(list(saved.iterdir())) == 5


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = _memory().save(tmp_path / "memory")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o750


def test_saving_again_replaces(saved: Path) -> None:
    _memory(rows=7).save(saved)
    assert len(LocalMemory.load(saved)) == 7
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_saving_over_its_own_mapped_files(saved: Path) -> None:
    memory = LocalMemory.load(saved, mmap=True)
    memory.remove(torch.tensor([0, 1]))
    memory.save(saved)
    assert torch.equal(LocalMemory.load(saved).ids, memory.ids)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="permissions"):
            _memory().save(tmp_path / "memory")
    finally:
        tmp_path.chmod(0o700)


def _damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _stale(file: Path) -> None:
    edited(file.parent, lambda manifest: manifest["extra"]["index.faiss"].update(keys_sha256="0" * 64))


def _of_fewer_rows(file: Path) -> None:
    other = _memory("HNSW8", rows=100).save(file.parent.parent / "other")
    file.write_bytes(file_of(other, "index.faiss").read_bytes())
    edited(file.parent, lambda manifest: manifest["extra"]["index.faiss"].update(sha256=files.sha256(file)))


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (Path.unlink, "is missing"),
        (_damage, "is damaged"),
        (_stale, "belongs to other keys"),
        (_of_fewer_rows, r"holds 100 x 4 keys, the memory (200, 4)"),
    ],
)
def test_faiss_file_is_built_again(
    tmp_path: Path, harm: Callable[[Path], None], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    memory, queries = _memory("HNSW8"), torch.randn(5, 4)
    path = memory.save(tmp_path / "memory")
    with caplog.at_level(logging.WARNING, "lightning_resmem"):
        assert torch.equal(LocalMemory.load(path)(queries), memory(queries))
        assert not caplog.records
        harm(file := file_of(path, "index.faiss"))
        assert torch.equal(LocalMemory.load(path)(queries), memory(queries))
    assert f"{file.name} {problem}: it is built again" in caplog.text


def test_mapped_memory_is_not_read_when_it_is_opened(tmp_path: Path) -> None:
    memory = _memory()
    path = memory.save(tmp_path / "memory")
    loaded = LocalMemory.load(path, mmap=True)
    assert loaded._rows.index is not None
    assert loaded._rows.index._precise._squared_norms is None  # the one pass over the keys comes with the first search
    assert torch.equal(loaded(torch.zeros(1, 4)), memory(torch.zeros(1, 4)))
