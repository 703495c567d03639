"""Directories of pools whose process has ended without deleting them. Knows nothing of Ray.

The process that makes a pool holds a lock in its directory, in a file that names the machine's boot, the mount and the
directory: where these are the same and the lock is free, the process is dead. Nothing else tells that for sure: process
numbers are given again, and what is mounted twice may keep the locks of one from the other. A copy has another name.
"""

import os
import secrets
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def claim(storage_path: str) -> int | None:
    """Have a pool's directory removed by others once this process has ended.

    Returns:
        The descriptor that holds the lock, for as long as it is open; None where this process does not see the
        directory, may not write to it, or could not tell whether another one has ended.
    """
    directory = _here(storage_path)
    if directory is None:
        return None
    with suppress(OSError):
        owner = directory / _owner(directory)
        unlocked = owner.with_name(f"{secrets.token_hex(4)}.partial")  # nobody takes it for one that was left
        descriptor = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with suppress(OSError):
            if _lock(descriptor):
                unlocked.rename(owner)
                return descriptor
        os.close(descriptor)
        unlocked.unlink()
    return None


def sweep(root: str) -> None:
    """Remove the directories of pools below `root` whose process has ended on this machine."""
    directory = _here(root)
    for pool in directory.glob("*/") if directory is not None else ():
        with suppress(OSError):  # it is nobody's, or another process has removed it meanwhile
            descriptor = os.open(pool / _owner(pool), os.O_RDWR)
            try:
                if _lock(descriptor):
                    shutil.rmtree(pool)
            finally:
                os.close(descriptor)


def remove(storage_path: str) -> None:
    """Delete what is left of a pool, as far as this process sees it."""
    fs, root = fsspec.core.url_to_fs(storage_path)
    if fs.exists(root):
        fs.rm(root, recursive=True)


def _here(url: str) -> Path | None:
    fs, root = fsspec.core.url_to_fs(url)
    return Path(root) if isinstance(fs, LocalFileSystem) else None


def _owner(directory: Path) -> str:
    """The name of the file with the lock; OSError where machines do not say when they were started."""
    return f"owner-{_BOOT_ID.read_text().strip()}-{directory.stat().st_dev}-{directory.name}"


def _lock(descriptor: int) -> bool:
    """Whether this process has got the lock; some file systems have none."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
