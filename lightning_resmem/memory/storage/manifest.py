"""The manifest of a saved memory: JSON that names its files with their checksums, and has one of its own."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from lightning_resmem.errors import StorageError

MANIFEST = "manifest.json"
FORMAT = "lightning_resmem"
VERSION, DATED_VERSION = 2, 3
# The first version had no checksum of the manifest, and files named `keys.safetensors`. The third has times of rows,
# without which a release that does not know them would answer from the future.
_READABLE = (1, 2, 3)

# What is read at most: the manifests of real memories have a few KiB.
MOST_BYTES = 2**24
_MOST_DIGITS = 20
_MOST_DIMENSIONS = 8

# Of version 2: the name and the first digits of the checksum. Nobody else has files of such names.
_NAMED = re.compile(r"[a-z_]+-[0-9a-f]{16}\.(safetensors|faiss)")
_UNFINISHED = re.compile(r"\.[a-z_]+-[0-9a-f]{16}\.partial")
_PLAIN = re.compile(r"[a-z_]+\.(safetensors|faiss)")


def is_ours(file: str) -> bool:
    """Whether a file of this name was written by `save`; if no manifest names it, a process died or is at it."""
    return bool(_NAMED.fullmatch(file) or _UNFINISHED.fullmatch(file))


def was_ours(file: str) -> bool:
    """Whether a file of this name may be one of a memory of version 1: others have files of such names, too."""
    return file == MANIFEST or bool(_PLAIN.fullmatch(file))


def unfinished(name: str, token: str) -> str:
    """What the file of a tensor is called while it is written."""
    return f".{name}-{token}.partial"


def named(name: str, sha256: str, suffix: str) -> str:
    """What a file is called: other contents have another name, so no file is ever changed."""
    return f"{name}-{sha256[:16]}{suffix}"


def dumped(document: Mapping[str, Any]) -> bytes:
    """A manifest as it is stored."""
    version = DATED_VERSION if "times" in document.get("tensors", {}) else VERSION
    whole = {"format": FORMAT, "version": version, **document}
    return (json.dumps({**whole, "sha256": _checksum(whole)}, indent=2, allow_nan=False) + "\n").encode()


def parsed(place: str | os.PathLike[str], data: bytes) -> dict[str, Any]:
    """A manifest that was read, checked.

    Args:
        place: Of the saved memory, for messages.
        data: The bytes of its manifest.

    Raises:
        StorageError: If it is damaged, of another format version, or no manifest of a memory.
    """
    manifest = _json(place, data)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StorageError(
            f"{where(place)} does not describe a {FORMAT} memory: another program saved it. Give the directory of a "
            "memory, as ResMemCallback(dirpath=...), ResMemModule.save(...) or LocalMemory.save(...) made it."
        )
    version = manifest.get("version")
    if type(version) is not int or version not in _READABLE:
        raise StorageError(
            f"{os.fspath(place)} has format version {version!r}, this release reads version "
            f"{' and '.join(map(str, _READABLE))}. Load it with the release that wrote it, or memorize again."
        )
    if version > 1:
        told = manifest.pop("sha256", None)
        if told != (found := _checksum(manifest)):
            raise damaged(place, f"its own sha256 is {found}, it says {told}")
    _check_entries(place, manifest)
    return manifest


def describes_a_memory(data: bytes) -> bool:
    """Whether this is the manifest of a memory, of whatever version and however damaged."""
    try:
        manifest = _json("", data)
    except StorageError:
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def files(manifest: Mapping[str, Any]) -> set[str]:
    """The names of all files that a manifest stands for."""
    found = {entry["file"] for entry in manifest["tensors"].values()}
    return found | {file for name in manifest.get("extra", {}) if (file := extra_file(manifest, name))}


def extra_file(manifest: Mapping[str, Any], name: str) -> str | None:
    """The name of a file that was written as `extra`, None if there is none."""
    entry = manifest.get("extra", {}).get(name)
    return None if entry is None else entry.get("file", name)  # older memories call it as it is called here


def entry(place: str | os.PathLike[str], manifest: Mapping[str, Any], kind: type, *names: str) -> Any:
    """What the manifest says under these names, one within the other; `kind` is what it has to be."""
    found: Any = manifest
    for depth, name in enumerate(names, 1):
        if not isinstance(found, dict) or name not in found:
            raise damaged(place, f"{'.'.join(names[:depth])} is missing")
        found = found[name]
    if type(found) is not kind:  # JSON has no subclasses, and True is no number
        raise damaged(place, f"{'.'.join(names)} is {found!r}, expected {kind.__name__}")
    return found


def damaged(place: str | os.PathLike[str], problem: str) -> StorageError:
    """The error for a manifest that says something impossible."""
    return StorageError(f"{where(place)} is damaged: {problem}. Restore it from a backup, or memorize again.")


def where(place: str | os.PathLike[str]) -> str:
    """The manifest of a saved memory, for messages."""
    return f"{os.fspath(place)}/{MANIFEST}"


def _checksum(document: Mapping[str, Any]) -> str:
    """Of what a manifest says, whatever its line ends and indents."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _json(place: str | os.PathLike[str], data: bytes) -> Any:
    def refuse(text: str) -> NoReturn:
        raise ValueError(f"it holds a number {text[:_MOST_DIGITS]}{'...' * (len(text) > _MOST_DIGITS)}")

    def whole(text: str) -> int:
        return int(text) if len(text) <= _MOST_DIGITS else refuse(text)

    def real(text: str) -> float:
        return value if math.isfinite(value := float(text)) else refuse(text)

    try:
        if len(data) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        return json.loads(data, parse_int=whole, parse_float=real, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise StorageError(f"{where(place)} cannot be read: {error}. Save the memory again.") from error


def _check_entries(place: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
    """Check the form of the lists of files: a manifest that was edited by hand must not read other files."""
    tensors, extra = manifest.get("tensors"), manifest.get("extra", {})
    wanted = {"file": str, "shape": list, "dtype": str, "sha256": str}
    if not isinstance(tensors, dict) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in wanted.items())
        for entry in tensors.values()
    ):
        raise damaged(place, "its list of tensors is not complete")
    if not isinstance(extra, dict) or not all(isinstance(entry, dict) for entry in extra.values()):
        raise damaged(place, "its list of extra files is not complete")
    for file in [*(entry["file"] for entry in tensors.values()), *(extra_file(manifest, name) for name in extra)]:
        if not isinstance(file, str) or "/" in file or "\\" in file:
            raise StorageError(f"{where(place)} names the file {file!r}, which is not in its directory.")
        if not (_PLAIN.fullmatch(file) or _NAMED.fullmatch(file)):
            raise StorageError(f"{where(place)} names the file {file!r}, which `save` does not write.")
    for name, entry in tensors.items():
        shape = entry["shape"]
        if len(shape) > _MOST_DIMENSIONS or not all(type(length) is int and 0 <= length < 2**63 for length in shape):
            raise damaged(place, f"tensors.{name}.shape is {shape!r:.80}")
