"""What a shard keeps on disk: its rows as they were last built, and every change since. On any storage fsspec knows."""

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lightning_resmem.errors import StorageError
from lightning_resmem.memory.storage import directory as directories
from lightning_resmem.memory.storage import disk, files

# The checksum is missing in entries that were written before there was one.
_ENTRY = re.compile(r"(\d{10})-([a-z_]+)-([0-9a-z.]+)(?:-([0-9a-f]{16}))?\.safetensors")
_BASE = re.compile(r"base-(\d{10})")
_STARTED = re.compile(r"started-\d+")
# Changes that are worth nothing without all before them.
_EDITS = ("remove", "update", "restore", "withdraw")


class Entry(NamedTuple):
    """A change: its number, what to do, the name that tells a repeated request from a new one, and its data."""

    number: int
    operation: str
    key: str
    data: bytes

    @property
    def checksum(self) -> str:
        """Of all of it."""
        said = f"{self.number}-{self.operation}-{self.key}-".encode()
        return hashlib.sha256(said + hashlib.sha256(self.data).digest()).hexdigest()[:16]


class Journal:
    """A directory `base-NUMBER/` with rows as a saved memory, and a file for every change after that number.

    Files and bases appear under their names when they are complete, so whatever a process that is killed leaves behind
    is either there in whole or ignored. Changes are numbered without gaps, and each has a checksum.

    Bases and changes survive a power cut, too, when they are written; rows that were added, when the next base or edit
    is. There are many of those, and waiting for the disk with each takes longer than all else that is done with it.

    Args:
        url: A path, or a URL such as `s3://bucket/directory`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._unsynced: list[str] = []  # files of this process that may not be on the disk

    def start(self) -> int:
        """Make the directory, and count how often that was done before."""
        with self._failing("made"):
            if self._is_local:
                directories.make(directories.missing(Path(self._root)))
            else:
                self._fs.makedirs(self._root, exist_ok=True)
            starts = sum(bool(_STARTED.fullmatch(name)) for name in self._names())
            self._fs.pipe_file(f"{self._root}/started-{starts}", b"")
            return starts

    def write(self, entry: Entry) -> None:
        """Keep a change; one named `clear` is all that is kept."""
        name = f"{entry.number:010d}-{entry.operation}-{entry.key}-{entry.checksum}.safetensors"
        is_synced = self._is_local and entry.operation != "add"
        with self._failing("written to"):
            self._check_there()
            try:
                self._fs.pipe_file(f"{self._root}/{name}.partial", entry.data)
                if is_synced:
                    self._sync(f"{name}.partial", needs_others=entry.operation in _EDITS)
            except Exception:
                with suppress(Exception):  # makes room: others may have to take this change back
                    self._fs.rm(f"{self._root}/{name}.partial")
                raise
            self._fs.mv(f"{self._root}/{name}.partial", f"{self._root}/{name}")
            if is_synced:
                files.sync_directory(Path(self._root))
            elif self._is_local:
                self._unsynced.append(name)
            if entry.operation == "clear":
                self._drop(entry.number, but=name)

    def base(self) -> int:
        """The number of the newest base; 0 if there is none, or if it was cleared away."""
        with self._failing("read"):
            return self._last_base_and_entries()[0]

    def last(self) -> int:
        """The largest number that anything has, whether it can be read or not; 0 if there is nothing."""
        with self._failing("read"):
            found = (_ENTRY.fullmatch(name) or _BASE.fullmatch(name) for name in self._names())
            return max((int(each[1]) for each in found if each is not None), default=0)

    def entries(self) -> Iterator[Entry]:
        """The changes since the newest base, in their order.

        Raises:
            StorageError: If one is missing, is there twice, or is not as it was written.
        """
        with self._failing("read"):
            base, found = self._last_base_and_entries()
            first = found[0] if found else None
            expected = int(first[1]) if first is not None and first[2] == "clear" else base + 1
            for number, name in enumerate(found, expected):
                yield self._read(name, number)

    @contextmanager
    def reading_base(self) -> Iterator[Path]:
        """A local directory with the newest base."""
        name = f"{self._root}/base-{self.base():010d}"
        if self._is_local:
            yield Path(name)
            return
        with tempfile.TemporaryDirectory(prefix="resmem-") as directory:
            with self._failing("read"):
                self._fs.get(name, f"{directory}/base", recursive=True)
            yield Path(directory) / "base"

    def write_base(self, number: int, save: Callable[[Path], object]) -> None:
        """Keep all rows as they are after change `number`, and drop what was kept of them before.

        Args:
            number: Of the last change that they contain.
            save: Saves them to a directory.
        """
        name = f"{self._root}/base-{number:010d}"
        with self._failing("written to"):
            self._check_there()
            if self._is_local:
                save(Path(name))
            else:
                with tempfile.TemporaryDirectory(prefix="resmem-") as directory:
                    save(Path(directory) / "base")
                    files = (Path(directory) / "base").iterdir()
                    for file in sorted(files, key=lambda file: file.name == disk.MANIFEST):
                        self._fs.put_file(str(file), f"{name}/{file.name}")  # the manifest last: it makes a base
            self._drop(number, but=name.rpartition("/")[2])

    def remove(self) -> None:
        """Delete everything, and the directory around it if nothing else is left in there."""
        with self._failing("removed"):
            if self._fs.exists(self._root):
                self._fs.rm(self._root, recursive=True)
        with suppress(OSError, NotImplementedError):
            self._fs.rmdir(self._root.rpartition("/")[0])

    def _check_there(self) -> None:
        if not self._fs.exists(self._root):  # some file systems would make it again, without what was in it
            raise FileNotFoundError("it has vanished")

    def _last_base_and_entries(self) -> tuple[int, list[re.Match[str]]]:
        """The number of the newest base, 0 if there is none or a `clear` after it, and the entries from there on."""
        names = sorted(self._names())
        base = max(self._bases(names), default=0)
        found = [entry for name in names if (entry := _ENTRY.fullmatch(name)) is not None and int(entry[1]) > base]
        cleared = [place for place, entry in enumerate(found) if entry[2] == "clear"]
        return (0, found[cleared[-1] :]) if cleared else (base, found)

    def _read(self, name: re.Match[str], expected: int) -> Entry:
        entry = Entry(int(name[1]), name[2], name[3], self._fs.cat_file(f"{self._root}/{name[0]}"))
        if entry.number != expected:
            what = "is missing" if entry.number > expected else "comes after one of the same number"
            raise StorageError(f"{self.url} is damaged: change {min(entry.number, expected)} {what} at {name[0]}.")
        if name[4] is not None and name[4] != entry.checksum:
            raise StorageError(f"{self.url}/{name[0]} is damaged: it is not what was written (its checksum is wrong).")
        return entry

    def _sync(self, name: str, needs_others: bool) -> None:
        """Wait until a file is on the disk, and those before it."""
        while needs_others and self._unsynced:
            files.sync_file(Path(self._root, self._unsynced[-1]))
            self._unsynced.pop()
        files.sync_file(Path(self._root, name))

    def _drop(self, number: int, but: str) -> None:
        """Delete what is not newer than a number, but one file or directory, and what is half written."""
        self._unsynced.clear()
        for name in self._names():
            found = _ENTRY.fullmatch(name) or _BASE.fullmatch(name)
            if ".partial" in name or (found is not None and int(found[1]) <= number and name != but):
                self._fs.rm(f"{self._root}/{name}", recursive=True)

    def _bases(self, names: list[str]) -> list[int]:
        numbers = [int(base[1]) for base in map(_BASE.fullmatch, names) if base is not None]
        return [n for n in numbers if self._fs.exists(f"{self._root}/base-{n:010d}/{disk.MANIFEST}")]

    def _names(self) -> list[str]:
        self._check_there()
        self._fs.invalidate_cache(self._root)
        return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False)]

    def _failing(self, doing: str) -> AbstractContextManager[None]:
        way_out = "Check the free space and the permissions there, or give a RayMemory another storage_path."
        return files.failing(f"storage_path {self.url} cannot be {doing}", way_out)
