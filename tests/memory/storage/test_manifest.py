"""What a manifest may say: its own checksum, the versions that are read, and bounds on what is read."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_resmem import LocalMemory, StorageError
from lightning_resmem.memory.storage.disk import read_manifest
from tests.saved_files import edited, file_of

SAVED_BEFORE = Path(__file__).parents[2] / "data" / "saved_before"


@pytest.mark.parametrize("name", ["dense-with-gate", "faiss", "multilabel", "regression", "sparse"])
@pytest.mark.parametrize("mmap", [False, True])
def test_memories_saved_before_can_be_read_and_replaced(
    tmp_path: Path, name: str, mmap: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = shutil.copytree(SAVED_BEFORE / name, tmp_path / "memory")
    loaded = LocalMemory.load(path, mmap=mmap)
    queries, outputs = (torch.randn(50, loaded.stats()[name]) for name in ("width", "outputs"))
    expected = loaded(queries, outputs)
    (path / "mine.safetensors").write_text("stays")
    loaded.save(path)
    assert torch.equal(LocalMemory.load(path)(queries, outputs), expected)
    assert "built again" not in caplog.text
    manifest = json.loads((path / "manifest.json").read_text())
    named = {file_of(path, part).name for part in [*manifest["tensors"], *manifest["extra"]]}
    assert {file.name for file in path.iterdir()} == {"manifest.json", "mine.safetensors", *named}


def test_every_value_is_covered(saved: Path) -> None:
    file = saved / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["params"]["strength"] = 3.0
    file.write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match=r"manifest.json is damaged: its own sha256 is \w+, it says \w+"):
        LocalMemory.load(saved)


def test_line_ends_are_not(saved: Path) -> None:
    file = saved / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert len(LocalMemory.load(saved)) == 200


@pytest.mark.parametrize("mmap", [False, True])
def test_flipped_bits_of_the_manifest_change_nothing_unnoticed(saved: Path, mmap: bool) -> None:
    file, draw = saved / "manifest.json", random.Random(0)
    whole = file.read_bytes()
    expected, noticed = json.loads(whole), 0
    for _ in range(300):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        try:
            LocalMemory.load(saved, mmap=mmap)
        except StorageError:
            noticed += 1
        else:
            assert json.loads(bytes(data)) == expected  # white space
    assert noticed > 200


@pytest.mark.parametrize("name", ["keys", "ids", "outputs", "targets", "index.faiss"])
def test_flipped_bits_of_the_files_are_noticed(
    tmp_path: Path, make: Callable[..., LocalMemory], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(rows=20, index="HNSW4").save(tmp_path / "memory")
    file, draw = file_of(path, name), random.Random(1)
    whole = file.read_bytes()
    expected = LocalMemory.load(path)(torch.zeros(1, 4))
    for _ in range(300):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        if name == "index.faiss":
            caplog.clear()
            assert torch.equal(LocalMemory.load(path)(torch.zeros(1, 4)), expected)
            assert "is damaged: it is built again" in caplog.text
        else:
            with pytest.raises(StorageError, match="is damaged"):
                LocalMemory.load(path)


def test_a_manifest_that_was_cut_short_is_named(saved: Path) -> None:
    whole = (saved / "manifest.json").read_bytes()
    for length in range(len(whole) - 1):  # the last byte ends the line
        (saved / "manifest.json").write_bytes(whole[:length])
        with pytest.raises(StorageError, match=r"manifest.json (cannot be read|is damaged)"):
            read_manifest(saved)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000, "cannot be read"),
        (b'{"rows": ' + b"9" * 5000 + b"}", "it holds a number 99999999999999999999..."),
        (b'{"rows": NaN}', "it holds a number NaN"),
        (b'{"rows": 1e999}', "it holds a number 1e999"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "cannot be read"),
        (b" " * 2**25, "it has more than 16777216 bytes"),
    ],
)
def test_manifests_that_are_none(saved: Path, data: bytes, message: str) -> None:
    (saved / "manifest.json").write_bytes(data)
    with pytest.raises(StorageError, match=f"manifest.json cannot be read: .*{message}|manifest.json {message}"):
        LocalMemory.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["tensors"]["keys"].update(shape=[2**62, 2**62]), "holds shape"),
        (lambda m: m["tensors"]["keys"].update(shape=[-1, 4]), "tensors.keys.shape is"),
        (lambda m: m["tensors"]["keys"].update(shape=[1] * 1000), "tensors.keys.shape is"),
        (lambda m: m["tensors"]["keys"].update(shape=["a"]), "tensors.keys.shape is"),
        (lambda m: m["tensors"]["keys"].update(shape=[2, 4]), "bytes, the manifest says at most|holds shape"),
        (lambda m: m["tensors"]["keys"].update(dtype="nonsense"), "holds shape .* and nonsense"),
        (lambda m: m["tensors"]["keys"].update(file="notes.txt"), "'notes.txt', which `save` does not write"),
        (lambda m: m["tensors"]["keys"].update(file=".."), "'..', which `save` does not write"),
        (lambda m: m["extra"].update({"../x": {"sha256": ""}}), "not in its directory"),
        (lambda m: m["extra"].update(x=1), "not complete"),
        (lambda m: m.update(index={"factory": "Flat" * 10_000}), "has 40000 characters, at most 200 are read"),
        (lambda m: m["values"].update(num_outputs=2**62), "num_outputs is 4611686018427387904, at most"),
        (lambda m: m.update(index={"factory": "IVF4,Flat", "nprobe": 2**62}), "nprobe=4611686018427387904"),
        (lambda m: m.update(index={"factory": "HNSW999999"}), "'HNSW999999' has to lie between 2 and 1024"),
    ],
)
@pytest.mark.parametrize("mmap", [False, True])
def test_what_cannot_be_is_refused_before_anything_is_allocated(
    saved: Path, change: Callable[[dict], object], message: str, mmap: bool
) -> None:
    edited(saved, change)
    with pytest.raises(StorageError, match=message):
        LocalMemory.load(saved, mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_is_no_longer_than_its_manifest_says(saved: Path, mmap: bool) -> None:
    with file_of(saved, "keys").open("r+b") as stream:
        stream.truncate(2**42)  # takes no room on the disk
    with pytest.raises(StorageError, match="it has 4398046511104 bytes, the manifest says at most"):
        LocalMemory.load(saved, mmap=mmap)
