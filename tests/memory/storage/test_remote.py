"""Memories at URLs: saved in whole or not at all, the manifest last, and refused where they cannot be had."""

import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from lightning_resmem import InputError, LocalMemory, StorageError
from lightning_resmem.memory.storage import disk

Make = Callable[..., LocalMemory]


class Breaking(MemoryFileSystem):
    """A storage whose connection breaks at a file."""

    protocol = "breaking"
    store: dict = {}  # noqa: RUF012 -- of its class, as that of the original
    pseudo_dirs = [""]  # noqa: RUF012
    broken = ""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("breaking://", "memory://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: object) -> None:
        self._break(path)
        super().pipe_file(path, value, mode=mode, **options)

    def put_file(self, lpath: str, rpath: str, **options: object) -> None:
        self._break(rpath)
        super().put_file(lpath, rpath, **options)

    def _break(self, path: str) -> None:
        if self.broken and self.broken in path:
            raise TimeoutError("the connection broke")


fsspec.register_implementation("breaking", Breaking, clobber=True)


def names(url: str) -> set[str]:
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {str(path).rpartition("/")[2] for path in fs.ls(root, detail=False)}


@pytest.fixture(params=["memory", "breaking", "simplecache", "simplecache of files"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    kind, name = request.param, uuid.uuid4().hex
    if kind == "simplecache of files":
        return f"simplecache::{(tmp_path / 'bucket' / 'memory').as_uri()}"
    return f"{'simplecache::memory' if kind == 'simplecache' else kind}://{name}/a/memory"


@pytest.mark.parametrize("index", ["exact", "HNSW8"])
@pytest.mark.parametrize("mmap", [False, True])
def test_saved_and_loaded(url: str, make: Make, index: str, mmap: bool, caplog: pytest.LogCaptureFixture) -> None:
    memory, queries = make(index=index), torch.randn(20, 4)
    assert disk.check_target(url) == url
    for _ in range(2):  # a new one, and one in the place of another
        assert memory.save(url) == url
        assert torch.equal(LocalMemory.load(url, mmap=mmap)(queries), memory(queries))
        memory.remove(memory.ids[:10])
    assert "built again" not in caplog.text
    assert len(names(url)) == 5 + (index == "HNSW8")  # nothing of the memory before, and no probe
    assert disk.read_manifest(url)["rows"] == 190


def test_a_file_url_is_a_path(tmp_path: Path, make: Make) -> None:
    url = (tmp_path / "memory").as_uri()
    assert make().save(url) == tmp_path / "memory"
    assert len(LocalMemory.load(tmp_path / "memory")) == len(LocalMemory.load(url)) == 200


@pytest.mark.parametrize("broken", ["keys-", "targets-", "manifest.json"])
def test_a_connection_that_breaks_leaves_the_old_memory(
    make: Make, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"breaking://{uuid.uuid4().hex}/memory"
    for rows in (None, 200):
        if rows is not None:
            make(rows).save(url)
        before = names(url) if rows is not None else set()
        monkeypatch.setattr(Breaking, "broken", broken)
        with pytest.raises(StorageError, match=r"breaking://.* cannot be saved to .TimeoutError: the connection"):
            make(7).save(url)
        monkeypatch.setattr(Breaking, "broken", "")
        assert names(url) == before
    assert len(LocalMemory.load(url)) == 200


def test_what_cannot_be_written_to_is_refused_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breaking, "broken", "probe")
    with pytest.raises(StorageError, match="cannot be saved to"):
        disk.check_target(f"breaking://{uuid.uuid4().hex}/memory")


def test_other_directories_are_left_alone(make: Make) -> None:
    url = f"memory://{uuid.uuid4().hex}/web"
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe({f"{root}/manifest.json": b'{"name": "web project"}', f"{root}/index.html": b"precious"})
    for use in (disk.check_target, make().save):
        with pytest.raises(StorageError, match=r"exists and is not a saved memory: .* \(it holds index.html"):
            use(url)
    assert fs.cat_file(f"{root}/index.html") == b"precious"
    assert names(url) == {"manifest.json", "index.html"}


@pytest.mark.parametrize("mmap", [False, True])
def test_damage_is_told(make: Make, mmap: bool) -> None:
    url = f"memory://{uuid.uuid4().hex}/memory"
    with pytest.raises(StorageError, match=f"There is no saved memory at {url}"):
        LocalMemory.load(url, mmap=mmap)
    make().save(url)
    fs, root = fsspec.core.url_to_fs(url)
    [keys] = [name for name in names(url) if name.startswith("keys-")]
    fs.pipe_file(f"{root}/{keys}", fs.cat_file(f"{root}/{keys}")[:-8])
    with pytest.raises(StorageError, match=f"{keys} is damaged"):
        LocalMemory.load(url, mmap=mmap)
    fs.rm_file(f"{root}/{keys}")
    with pytest.raises(StorageError, match=f"{url}/{keys} is missing"):
        LocalMemory.load(url, mmap=mmap)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense://bucket/memory", "Protocol not known: nonsense"),
        ("nonsense::/tmp/memory", "Protocol not known: nonsense"),
        (Path("s3://bucket/memory"), "is what pathlib.Path makes of a URL: give the URL as a string"),
    ],
)
def test_what_cannot_be_used_is_refused(url: str | Path, message: str, make: Make) -> None:
    for use in (disk.check_target, make().save, LocalMemory.load):
        with pytest.raises(InputError, match=message):
            use(url)
    assert not Path("s3:").exists()


def test_what_is_not_installed_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for use in (disk.check_target, make().save, LocalMemory.load):
        with pytest.raises(InputError, match=r"directory='s3://bucket/memory' cannot be used: Install s3fs"):
            use("s3://bucket/memory")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InputError, match=r'URLs need fsspec: pip install "lightning-resmem\[ray\]"'):
        disk.check_target("memory://bucket/memory")
