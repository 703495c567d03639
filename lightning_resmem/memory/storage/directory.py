"""The directory of a saved memory here: what is in it, who may write to it, and what is left in there by the dead.

Files are named by their contents and never changed. What makes them a memory is the manifest, which is put in place in
one step: before that the directory is the old memory, after it the new one, whenever a process or a machine dies.
"""

import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lightning_resmem.errors import StorageError
from lightning_resmem.memory.storage import files
from lightning_resmem.memory.storage import manifest as manifests
from lightning_resmem.memory.storage.manifest import MANIFEST

# What a new disk has in its root.
_IGNORED = "lost+found"
# How often directories are made that somebody else removes.
_TRIES = 10


def check(target: Path) -> None:
    """Check that a memory may be saved to a directory: that it is a memory, or empty, or can be made.

    Raises:
        StorageError: If not; what is in the way is named.
    """
    try:
        found = _status(target)
        if found is None and target.is_symlink():
            raise StorageError(f"{target} is a symbolic link to {os.readlink(target)}, which does not exist: make it.")
        if found is not None and not stat.S_ISDIR(found.st_mode):
            raise _foreign(target, "it is not a directory")
        if found is not None:
            _check_entries(target)
        place = target if found is not None else next(path for path in target.parents if _status(path) is not None)
    except OSError as error:
        raise StorageError(f"{target} cannot be looked at: {error}. Name another directory.") from error
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "not a directory" if not place.is_dir() else "not writable"
        raise StorageError(f"The memory cannot be saved to {target}: {place} is {reason}. Name another directory.")


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _check_entries(target: Path) -> None:
    names = set(os.listdir(target))
    if MANIFEST in names:
        if (target / MANIFEST).is_symlink():
            raise _foreign(target, f"its {MANIFEST} is a symbolic link")
        if not manifests.describes_a_memory(read_manifest(target)):
            raise _foreign(target, f"its {MANIFEST} is not ours")
        return  # whatever else is in there stays as it is
    others = sorted(name for name in names if not manifests.is_ours(name) and name != _IGNORED)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise _foreign(target, f"it holds {', '.join(others[:3])}{more}")


def _foreign(target: Path, reason: str) -> StorageError:
    return StorageError(
        f"{target} exists and is not a saved memory: it is left as it is ({reason}). Name a new directory."
    )


def read_manifest(path: Path) -> bytes:
    """The bytes of the manifest of a saved memory, no more than one has.

    Raises:
        StorageError: If there is none, or it cannot be read.
    """
    try:
        if (found := _status(path)) is None:
            raise StorageError(f"There is no saved memory at {path}: no such directory. Was it moved or deleted?")
        if not stat.S_ISDIR(found.st_mode):
            raise StorageError(
                f"There is no saved memory at {path}: it is a file. Give the directory that was saved to."
            )
        if _status(path / MANIFEST) is None:
            raise StorageError(f"{path} is not a saved memory: it has no {MANIFEST}.")
        with files.open_regular(path / MANIFEST) as stream:
            return stream.read(manifests.MOST_BYTES + 1)
    except OSError as error:
        raise StorageError(f"{path / MANIFEST} cannot be read: {error}. Give another directory.") from error


@contextmanager
def locked(target: Path) -> Iterator[bool]:
    """Keep other processes and threads from saving to a directory; one that dies lets go.

    Yields:
        Whether the lock is held: some file systems have none.

    Raises:
        StorageError: If another one saves to it right now.
        FileNotFoundError: If it is not there, or was removed meanwhile.
    """
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    descriptor = os.open(target, os.O_RDONLY)
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"Another process or thread is saving a memory to {target} right now: it is left to that one. Name "
                "another directory, or save again later."
            ) from None
        except OSError:
            held = False
        if held and not os.fstat(descriptor).st_nlink:  # by one that had made it, and failed
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(target))
        yield held
        if held:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a child process has inherited it
    finally:
        os.close(descriptor)


def put_manifest(target: Path, data: bytes) -> None:
    """Make the files that are there a memory, in place of the one that was there, in one step."""
    temporary = target / manifests.unfinished("manifest", secrets.token_hex(8))
    files.sync_directory(target)
    with temporary.open("xb") as stream:
        stream.write(data)
        files.sync(stream)
    temporary.replace(target / MANIFEST)
    files.sync_directory(target)


def named_files(target: Path) -> set[str]:
    """The files that the manifest names; none, if there is no manifest that can be read."""
    try:
        return manifests.files(manifests.parsed(target, read_manifest(target)))
    except StorageError:
        return set()


def tidy(target: Path, ours: set[str], alone: bool) -> None:
    """Remove files that the manifest does not name.

    Args:
        target: The directory.
        ours: Those of the memory before, and those that were written just now.
        alone: Nobody else is saving, so what looks like ours was left behind by a process that died, and goes as well.
    """
    kept = named_files(target)
    for name in os.listdir(target):
        if name not in kept and (name in ours or (alone and manifests.is_ours(name))):
            with suppress(OSError):  # a reader on Windows holds it: the next save removes it
                (target / name).unlink()


def missing(target: Path) -> list[Path]:
    """The directories that have to be made for `target`, the innermost first."""
    return [path for path in (target, *target.parents) if not path.exists()]


def make(directories: list[Path]) -> None:
    """Make the `missing` ones, on the disk."""
    for path in reversed(directories):
        path.mkdir(exist_ok=True)
        files.sync_directory(path.parent)


def unmake(directories: list[Path]) -> None:
    """Remove those that were `missing`, as far as they are there and empty, and nobody is about to save to them."""
    for path in directories:
        with suppress(OSError, StorageError), locked(path):
            path.rmdir()


@contextmanager
def made(target: Path, directories: list[Path]) -> Iterator[bool]:
    """Make the `missing` ones, and keep others from saving to `target`: see `locked`."""
    with ExitStack() as stack:
        for attempt in range(1, _TRIES + 1):
            try:
                make(directories)
                held = stack.enter_context(locked(target))
                break
            except FileNotFoundError:  # others make and remove the same directories
                if attempt == _TRIES:
                    raise
        yield held
