"""Saved memories on file systems that fsspec knows: copied from a directory here, and to one, the manifest last."""

import secrets
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from lightning_resmem.errors import StorageError
from lightning_resmem.memory.storage import files
from lightning_resmem.memory.storage import manifest as manifests
from lightning_resmem.memory.storage.manifest import MANIFEST
from lightning_resmem.memory.storage.paths import Url

# How often reading starts over because the memory was replaced meanwhile.
_TRIES = 10


def check(target: Url, probe: bool = False) -> None:
    """Check that a memory may be saved to a URL; with `probe` also whether it can be written to.

    Raises:
        StorageError: If not.
    """
    with _failing(target, "saved to"):
        fs, root = target.fs, target.root
        existed = fs.exists(root)
        paths = fs.ls(root, detail=False) if existed else []
        names = [str(path).rstrip("/").rpartition("/")[2] for path in paths]
        ours = manifests.describes_a_memory(read_manifest(target)) if MANIFEST in names else None
        others = sorted(name for name in names if not manifests.is_ours(name))
        if ours is False or (ours is None and others):
            raise StorageError(
                f"{target} exists and is not a saved memory: it is left as it is (it holds {', '.join(others[:3])}). "
                "Name a new directory."
            )
        if probe:
            file = f"{root}/{manifests.unfinished('probe', secrets.token_hex(8))}"
            fs.makedirs(root, exist_ok=True)
            fs.pipe_file(file, b"resmem")
            fs.rm_file(file)
            if not existed and "/" in root:
                with suppress(OSError, NotImplementedError):  # where there are directories, it would look taken
                    fs.rmdir(root)


def read_manifest(place: Url) -> bytes:
    """The bytes of a manifest.

    Raises:
        StorageError: If there is none, or it cannot be read.
    """
    with _failing(place, "read"):
        fs, file = place.fs, f"{place.root}/{MANIFEST}"
        fs.invalidate_cache(place.root)
        try:
            data: bytes = fs.cat_file(file, start=0, end=min(fs.size(file), manifests.MOST_BYTES + 1))
        except FileNotFoundError:
            raise StorageError(f"There is no saved memory at {place}: it has no {MANIFEST}.") from None
        return data


def upload(saved: Path, target: Url) -> None:
    """Put a memory that was saved here in the place of what is there.

    Raises:
        StorageError: If it cannot be written. The old memory is whole then.
    """
    with _failing(target, "saved to"):
        fs, root = target.fs, target.root
        old = _files(target)
        data = (saved / MANIFEST).read_bytes()
        new = manifests.files(manifests.parsed(saved, data))
        fs.makedirs(root, exist_ok=True)
        try:
            for name in sorted(new):
                fs.put_file(str(saved / name), f"{root}/{name}")
            fs.pipe_file(f"{root}/{MANIFEST}", data)
        except BaseException:
            _remove(target, new - _files(target))
            raise
        if read_manifest(target) != data:
            raise StorageError(f"Another process has saved a memory to {target} meanwhile: that one is there.")
        _remove(target, old - new)


def download(place: Url, directory: Path) -> None:
    """Copy a memory to an empty directory here; if it is replaced meanwhile, the next one is copied.

    Raises:
        StorageError: If it is missing or damaged, or cannot be read.
    """
    for _ in range(_TRIES):
        data = read_manifest(place)
        with _failing(place, "read"):
            try:
                for name in sorted(manifests.files(manifests.parsed(place, data))):
                    if not (directory / name).exists():
                        place.fs.get_file(f"{place.root}/{name}", str(directory / name))
            except FileNotFoundError as error:
                if read_manifest(place) == data:
                    raise StorageError(f"{place}/{name} is missing. Restore it, or memorize again.") from error
                continue
        (directory / MANIFEST).write_bytes(data)
        return
    raise StorageError(f"{place} is replaced again and again: load it when nobody saves to it.")


def _remove(target: Url, names: set[str]) -> None:
    for name in names:
        with suppress(FileNotFoundError):
            target.fs.rm_file(f"{target.root}/{name}")


def _files(place: Url) -> set[str]:
    """The files that the manifest there names."""
    try:
        return manifests.files(manifests.parsed(place, read_manifest(place)))
    except StorageError:
        return set()


def _failing(place: Url, doing: str) -> AbstractContextManager[None]:
    way_out = "Check the address and the permissions there, or name another directory."
    return files.failing(f"{place} cannot be {doing}", way_out)
