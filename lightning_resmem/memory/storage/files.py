"""Single files: opened once, read to their checksums, and brought to the disk."""

import hashlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from lightning_resmem.errors import StorageError


@contextmanager
def failing(what: str, way_out: str) -> Iterator[None]:
    """Have whatever goes wrong on a file system told as a `StorageError`: every one has errors of its own.

    Args:
        what: Cannot be done.
        way_out: What to do about it.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        raise StorageError(f"{what} ({type(error).__name__}: {error}). {way_out}") from error


def sync(stream: BinaryIO) -> None:
    """Wait until what was written is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_file(file: Path) -> None:
    """Wait until a file that is closed is on the disk."""
    with file.open("r+b") as stream:
        sync(stream)


def write_by(write_file: Callable[[Path], None], file: Path) -> str:
    """Let another library write a file to the disk; returns its checksum."""
    write_file(file)
    sync_file(file)
    return sha256(file)


def sync_directory(directory: Path) -> None:
    """Wait until the names of what is in a directory are on the disk."""
    if sys.platform == "win32":
        return  # it cannot be asked for there
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(file: Path) -> FileIO:
    """Open a file to read.

    Raises:
        StorageError: If it is missing, cannot be opened, or is a pipe or a device, which might never end.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise StorageError(f"{file} is missing. Restore it from a backup, or memorize again.") from None
    except OSError as error:
        raise unreadable(file, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StorageError(f"{file} cannot be read: it is not a regular file. Restore it from a backup.")
    return FileIO(descriptor, "rb")


def unreadable(file: Path, error: Exception) -> StorageError:
    """The error for a file that cannot be read."""
    return StorageError(f"{file} cannot be read: {error}. Restore it from a backup.")


def sha256(file: Path) -> str:
    """The checksum of a file, as hexadecimal digits."""
    with open_regular(file) as stream:
        return checksum(stream)


def checksum(stream: FileIO) -> str:
    """Read an open file to its end, and go back to its start."""
    stream.seek(0)
    digest = hashlib.file_digest(stream, "sha256").hexdigest()
    stream.seek(0)
    return digest


def check_sum(stream: FileIO, file: Path, expected: str) -> None:
    """Raise an error unless the checksum of an open file is as expected."""
    found = checksum(stream)
    if found != expected:
        raise StorageError(
            f"{file} is damaged: its sha256 is {found}, the manifest says {expected}. "
            "Restore it from a backup, or memorize again."
        )
