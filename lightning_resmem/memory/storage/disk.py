"""One saved memory: a directory of `manifest.json` and safetensors files, with a checksum each. No pickle."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from lightning_resmem.errors import InputError, StorageError
from lightning_resmem.memory.storage import tensor_file
from lightning_resmem.memory.storage.tensor_file import Streamed

FORMAT = "lightning_resmem"
VERSION = 1
MANIFEST = "manifest.json"


def as_path(directory: str | os.PathLike[str]) -> Path:
    """The absolute path of a directory; raises an error for what is no path."""
    if not isinstance(directory, str | os.PathLike):
        raise InputError(f"directory={directory!r} is not a path: give a string or a pathlib.Path.")
    return Path(directory).expanduser().absolute()


def check_target(directory: str | os.PathLike[str]) -> Path:
    """The absolute path of a directory that a memory may be saved to.

    Raises:
        StorageError: If it holds something other than a memory, or cannot be made or written to.
    """
    target = as_path(directory)
    try:
        empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
        foreign = not empty and not (target / MANIFEST).is_file()
    except OSError as error:
        raise StorageError(f"{target} cannot be looked at: {error}. Name another directory.") from error
    if foreign:
        raise StorageError(f"{target} exists and is not a saved memory: it is left as it is. Name a new directory.")
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "not a directory" if not parent.is_dir() else "not writable"
        raise StorageError(f"The memory cannot be saved to {target}: {parent} is {reason}. Name another directory.")
    return target


def try_target(directory: str | os.PathLike[str]) -> None:
    """Make sure that a memory can be saved to a directory, by making and removing what `write` will.

    Raises:
        StorageError: As for `check_target`, or if the system refuses: a read-only file system, a name that is too long.
    """
    target = check_target(directory)
    missing = [path for path in target.parents if not path.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".replaced", dir=target.parent))
    except OSError as error:
        raise StorageError(f"The memory cannot be saved to {target}: {error}. Name another directory.") from error
    finally:
        for path in missing:
            with suppress(OSError):  # it was not made, or somebody uses it already
                path.rmdir()


def write(
    directory: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor | Streamed],
    extra: Mapping[str, Callable[[Path], None]] | None = None,
) -> Path:
    """Save atomically: everything is written beside `directory` and renamed into place at the end.

    Args:
        directory: Where to save. An older memory there is replaced; anything else is left alone.
        manifest: Plain JSON values, the description of the memory.
        tensors: One file is written per tensor.
        extra: Files that can be made again from the tensors, by name: what writes them. See `read_extra`.

    Returns:
        The absolute path of the directory.

    Raises:
        StorageError: If `directory` holds something other than a memory, or cannot be written.
    """
    target = check_target(directory)
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        staging.chmod(0o777 & ~_umask())  # mkdtemp makes it private; a saved memory follows the umask
        entries = {}
        for name, tensor in tensors.items():
            file = staging / f"{name}.safetensors"
            tensor_file.write(file, name, tensor)
            entries[name] = {
                "file": file.name,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "sha256": tensor_file.sha256(file),
            }
        derived = {}
        for name, write_file in (extra or {}).items():
            write_file(staging / name)
            derived[name] = {"sha256": tensor_file.sha256(staging / name), "keys_sha256": entries["keys"]["sha256"]}
        document = {"format": FORMAT, "version": VERSION, **manifest, "tensors": entries, "extra": derived}
        (staging / MANIFEST).write_text(json.dumps(document, indent=2) + "\n")
        _swap(staging, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise StorageError(
            f"The memory could not be saved to {target}: {error}. Check the free space and the permissions there, "
            "or name another directory."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def verify(directory: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
    """Check the checksums of all tensors without holding any.

    Raises:
        StorageError: On the first file that is missing or differs from the manifest.
    """
    path = as_path(directory)
    for entry in _entries(path, manifest).values():
        _check_sum(path / entry["file"], entry)


def _check_sum(file: Path, entry: Mapping[str, Any]) -> None:
    try:
        found = tensor_file.sha256(file)
    except FileNotFoundError:
        raise StorageError(f"{file} is missing. Restore it from a backup, or memorize again.") from None
    if found != entry["sha256"]:
        raise StorageError(
            f"{file} is damaged: its sha256 is {found}, the manifest says {entry['sha256']}. "
            "Restore it from a backup, or memorize again."
        )


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check the manifest of a saved memory.

    Raises:
        StorageError: If there is none, or it is damaged or of another format version.
    """
    path = as_path(directory)
    if path.is_file():
        raise StorageError(f"There is no saved memory at {path}: it is a file. Give the directory that was saved to.")
    if not path.is_dir():
        raise StorageError(f"There is no saved memory at {path}: no such directory. Was it moved or deleted?")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise StorageError(f"{path} is not a saved memory: it has no {MANIFEST}.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StorageError(f"{path / MANIFEST} cannot be read: {error}. Save the memory again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StorageError(f"{path / MANIFEST} does not describe a {FORMAT} memory.")
    if manifest.get("version") != VERSION:
        raise StorageError(
            f"{path} has format version {manifest.get('version')!r}, this release reads version {VERSION}. "
            "Load it with the release that wrote it, or memorize again."
        )
    return manifest


def entry(directory: str | os.PathLike[str], manifest: Mapping[str, Any], kind: type, *names: str) -> Any:
    """What the manifest says under these names, one within the other; `kind` is what it has to be."""
    found: Any = manifest
    for depth, name in enumerate(names, 1):
        if not isinstance(found, dict) or name not in found:
            raise damaged(directory, f"{'.'.join(names[:depth])} is missing")
        found = found[name]
    if type(found) is not kind:  # JSON has no subclasses, and True is no number
        raise damaged(directory, f"{'.'.join(names)} is {found!r}, expected {kind.__name__}")
    return found


def damaged(directory: str | os.PathLike[str], problem: str) -> StorageError:
    """The error for a manifest that says something impossible."""
    return StorageError(
        f"{as_path(directory) / MANIFEST} is damaged: {problem}. Restore it from a backup, or memorize again."
    )


def read_tensors(
    directory: str | os.PathLike[str], manifest: Mapping[str, Any], mmap: bool = False
) -> dict[str, Tensor]:
    """Read the tensors that the manifest lists; every file's checksum, shape and dtype is checked.

    Args:
        directory: Of the saved memory.
        manifest: From `read_manifest`.
        mmap: Map the files into memory instead of reading them. Checksums are not checked then (that would read
            everything), shapes and dtypes are. Changes to the tensors stay in this process.

    Raises:
        StorageError: On the first file that is missing or differs from the manifest; both sides are shown.
    """
    path = as_path(directory)
    tensors = {}
    for name, entry in _entries(path, manifest).items():
        file = path / entry["file"]
        try:
            if not mmap:
                _check_sum(file, entry)
            held = tensor_file.read_mapped(file) if mmap else safetensors.torch.load_file(file)
            if name not in held:
                raise StorageError(f"{file} is damaged: it holds {sorted(held)}, the manifest says {name!r}.")
            tensor = held[name]
        except StorageError:
            raise
        except FileNotFoundError:
            raise StorageError(f"{file} is missing. Restore it from a backup, or memorize again.") from None
        except (OSError, KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise StorageError(f"{file} cannot be read: {error}. Restore it from a backup.") from error
        saved = (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if saved != (entry["shape"], entry["dtype"]):
            raise StorageError(
                f"{file} holds shape {saved[0]} and dtype {saved[1]}, "
                f"the manifest says {entry['shape']} and {entry['dtype']}."
            )
        tensors[name] = tensor
    return tensors


def read_extra(directory: str | os.PathLike[str], manifest: Mapping[str, Any], name: str) -> tuple[Path, str | None]:
    """Find a file that was written as `extra`.

    Returns:
        Its path, and what is wrong with it: None if it is complete and belongs to the keys.
    """
    path = as_path(directory)
    extra = manifest.get("extra")
    entry = extra.get(name) if isinstance(extra, dict) else None
    file = path / name
    if not file.is_file() or not isinstance(entry, dict):
        return file, "is missing"
    if entry.get("keys_sha256") != _entries(path, manifest)["keys"]["sha256"]:
        return file, "belongs to other keys"
    return file, None if tensor_file.sha256(file) == entry.get("sha256") else "is damaged"


def _entries(path: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifest's list of tensors, checked for its form: a hand-edited manifest must not read other files."""
    entries = manifest.get("tensors")
    wanted = {"file": str, "shape": list, "dtype": str, "sha256": str}
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in wanted.items())
        for entry in entries.values()
    ):
        raise StorageError(f"{path / MANIFEST} is damaged: its list of tensors is not complete.")
    for entry in entries.values():
        if Path(entry["file"]).name != entry["file"]:
            raise StorageError(f"{path / MANIFEST} names the file {entry['file']!r}, which is not in its directory.")
    return entries


def _swap(staging: Path, target: Path) -> None:
    """Put `staging` in the place of `target`; a crash in between leaves one of the two complete."""
    if not target.exists():
        staging.rename(target)
        return
    replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".replaced", dir=target.parent))
    target.rename(replaced / target.name)
    try:
        staging.rename(target)
    except OSError:
        (replaced / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
