"""Save a memory as files with a manifest, and read it again: JSON and safetensors, a checksum each, no pickle."""

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_resmem.errors import StorageError
from lightning_resmem.memory.storage import directory as directories
from lightning_resmem.memory.storage import files, leftovers, remote, tensor_file
from lightning_resmem.memory.storage import manifest as manifests
from lightning_resmem.memory.storage.glance import read_manifest
from lightning_resmem.memory.storage.manifest import MANIFEST, damaged, entry
from lightning_resmem.memory.storage.paths import Url, as_path
from lightning_resmem.memory.storage.tensor_file import Streamed

__all__ = [
    "MANIFEST",
    "Opened",
    "Streamed",
    "Url",
    "as_path",
    "check_target",
    "damaged",
    "entry",
    "local",
    "opened",
    "read_manifest",
    "try_target",
    "verify",
    "write",
]

# How often reading starts over because the memory was replaced meanwhile.
_TRIES = 100


def check_target(directory: str | os.PathLike[str]) -> Path | Url:
    """Where a path or URL leads that a memory may be saved to; on a URL this is tried with a small file.

    Raises:
        InputError: If it is no path, or a URL that cannot be used here.
        StorageError: If it holds something other than a memory, or cannot be made or written to.
    """
    target = as_path(directory)
    if isinstance(target, Url):
        remote.check(target, probe=True)
    else:
        directories.check(target)
    return target


def try_target(directory: str | os.PathLike[str]) -> None:
    """Make sure that a memory can be saved somewhere, by writing what is removed again at once.

    Raises:
        InputError: As for `check_target`.
        StorageError: As for `check_target`, or if the system refuses: a read-only file system, a name that is too long.
    """
    target = check_target(directory)
    if isinstance(target, Url):  # tried just now
        return
    missing = directories.missing(target)
    try:
        directories.make(missing)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise StorageError(f"The memory cannot be saved to {target}: {error}. Name another directory.") from error
    finally:
        directories.unmake(missing)


def write(
    directory: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor | Streamed],
    extra: Mapping[str, Callable[[Path], None]] | None = None,
) -> Path | Url:
    """Save in whole or not at all, and wait until everything is on the disk.

    Args:
        directory: Where to save, a path or a URL. An older memory there is replaced; anything else is left alone.
        manifest: Plain JSON values, the description of the memory.
        tensors: One file is written per tensor.
        extra: Files that can be made again from the tensors, by name: what writes them. See `Opened.extra`.

    Returns:
        The absolute path of the directory, or the URL.

    Raises:
        InputError: If `directory` is no path, or a URL that cannot be used here.
        StorageError: If `directory` holds something other than a memory, cannot be written, or another process is
            saving to it.
    """
    target = as_path(directory)
    if not isinstance(target, Url):
        _write_here(target, manifest, tensors, extra or {})
        return target
    remote.check(target)
    with tempfile.TemporaryDirectory(prefix="resmem-") as temporary:
        _write_here(saved := Path(temporary) / "memory", manifest, tensors, extra or {})
        remote.upload(saved, target)
    return target


def _write_here(
    target: Path,
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor | Streamed],
    extra: Mapping[str, Callable[[Path], None]],
) -> None:
    directories.check(target)
    missing = directories.missing(target)
    try:
        with directories.made(target, missing) as alone:
            directories.check(target)  # again, now that nobody else can change it
            ours = directories.named_files(target)
            try:
                document = {**manifest, **_write_files(target, tensors, extra, ours)}
                directories.put_manifest(target, manifests.dumped(document))
            finally:
                directories.tidy(target, ours, alone)
            leftovers.remove(target)
    except OSError as error:
        raise StorageError(
            f"The memory could not be saved to {target}: {error}. Check the free space and the permissions there, "
            "or name another directory."
        ) from error
    finally:
        directories.unmake(missing)  # nothing, unless saving has failed


def _write_files(
    target: Path,
    tensors: Mapping[str, Tensor | Streamed],
    extra: Mapping[str, Callable[[Path], None]],
    ours: set[str],
) -> dict[str, dict[str, Any]]:
    """Write all files but the manifest; their names join `ours`. Returns what the manifest says about them."""
    token = secrets.token_hex(8)

    def put(name: str, suffix: str, write_file: Callable[[Path], str]) -> dict[str, str]:
        unfinished = manifests.unfinished(name, token)
        ours.add(unfinished)
        checksum = write_file(target / unfinished)
        file = manifests.named(name, checksum, suffix)
        ours.add(file)
        (target / unfinished).replace(target / file)
        return {"file": file, "sha256": checksum}

    entries, derived = {}, {}
    for name, tensor in tensors.items():
        entry = put(name, ".safetensors", partial(tensor_file.write, name, tensor))
        entries[name] = {**tensor_file.described(tensor), **entry}
    for name, write_file in extra.items():
        entry = put(*os.path.splitext(name), partial(files.write_by, write_file))
        derived[name] = {**entry, "keys_sha256": entries["keys"]["sha256"]}
    return {"tensors": entries, "extra": derived}


@contextmanager
def local(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """The directory of a saved memory on this machine: of one at a URL, a copy that goes away at the end."""
    place = as_path(directory)
    if not isinstance(place, Url):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="resmem-") as temporary:
        remote.download(place, Path(temporary))
        yield Path(temporary)


@dataclass(frozen=True)
class Opened:
    """A saved memory whose files are open, so that they stay what they are when another one is saved in its place.

    Attributes:
        path: Where it is.
        manifest: As it was read.
        tensors: As the manifest lists them; shapes and dtypes were checked.
        streams: Its files, by name of the tensor or of the extra file.
    """

    path: Path
    manifest: dict[str, Any]
    tensors: dict[str, Tensor]
    streams: dict[str, FileIO]

    @property
    def is_complete(self) -> bool:
        """Whether the extra files are there, too."""
        return all(name in self.streams for name in self.manifest.get("extra", {}))

    @property
    def nbytes(self) -> int:
        """The size of its files."""
        return sum(os.fstat(stream.fileno()).st_size for stream in self.streams.values())

    def verify(self) -> None:
        """Check the checksums of all tensors.

        Raises:
            StorageError: On the first file that differs from the manifest.
        """
        for name, told in self.manifest["tensors"].items():
            files.check_sum(self.streams[name], self.path / told["file"], told["sha256"])

    def extra(self, name: str) -> tuple[FileIO, Path]:
        """A file that was written as `extra`, and its path for messages.

        Raises:
            StorageError: If it is missing, damaged, or belongs to other keys.
        """
        file = self.path / (manifests.extra_file(self.manifest, name) or name)
        told = self.manifest.get("extra", {}).get(name)
        if told is None or name not in self.streams:
            raise StorageError(f"{file} is missing")
        if told.get("keys_sha256") != self.manifest["tensors"]["keys"]["sha256"]:
            raise StorageError(f"{file} belongs to other keys")
        if files.checksum(self.streams[name]) != told.get("sha256"):
            raise StorageError(f"{file} is damaged")
        return self.streams[name], file


@contextmanager
def opened(directory: str | os.PathLike[str], mmap: bool = False) -> Iterator[Opened]:
    """Open a saved memory; if another one is saved in its place meanwhile, it is that one, in whole.

    Args:
        directory: Of the saved memory, a path or a URL.
        mmap: Map the files into memory instead of reading them. Checksums are not checked then (that would read
            everything), shapes and dtypes are. Changes to the tensors stay in this process.

    Raises:
        StorageError: On the first file that is missing or differs from the manifest; both sides are shown.
    """
    with ExitStack() as stack:
        path = stack.enter_context(local(directory))
        for _ in range(_TRIES):
            data = directories.read_manifest(path)
            with ExitStack() as attempt:
                try:
                    found = _opened(path, manifests.parsed(path, data), mmap, attempt)
                except StorageError:
                    if directories.read_manifest(path) == data:
                        raise
                    continue
                if found.is_complete or directories.read_manifest(path) == data:
                    stack.enter_context(attempt.pop_all())
                    break
        else:
            raise StorageError(f"{path} is replaced again and again: load it when nobody saves to it.")
        yield found


def _opened(path: Path, manifest: dict[str, Any], mmap: bool, stack: ExitStack) -> Opened:
    entries: dict[str, dict[str, Any]] = manifest["tensors"]
    places = {name: path / entry["file"] for name, entry in entries.items()}
    for name in manifest.get("extra", {}):
        file = path / str(manifests.extra_file(manifest, name))
        if file.is_file():  # it can be made again
            places[name] = file
    streams = {name: stack.enter_context(files.open_regular(file)) for name, file in places.items()}
    with ThreadPoolExecutor() as pool:  # hashing and reading leave Python to the others
        read = [
            pool.submit(tensor_file.read, streams[name], places[name], name, entries[name], mmap) for name in entries
        ]
        tensors = {name: each.result() for name, each in zip(entries, read, strict=True)}
    return Opened(path, manifest, tensors, streams)


def verify(directory: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
    """Check the checksums of all tensors without holding any.

    Raises:
        StorageError: On the first file that is missing or differs from the manifest.
    """
    with local(directory) as path:
        for entry in manifest["tensors"].values():
            with files.open_regular(path / entry["file"]) as stream:
                files.check_sum(stream, path / entry["file"], entry["sha256"])
