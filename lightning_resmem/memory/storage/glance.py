"""What is known of a saved memory from its manifest and the sizes of its files, without torch and without its rows."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from lightning_resmem.errors import StorageError
from lightning_resmem.memory.storage import directory as directories
from lightning_resmem.memory.storage import files, remote
from lightning_resmem.memory.storage import manifest as manifests
from lightning_resmem.memory.storage.paths import Url, as_path


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check the manifest of a saved memory.

    Raises:
        StorageError: If there is none, or it is damaged or of another format version.
    """
    place = as_path(directory)
    data = remote.read_manifest(place) if isinstance(place, Url) else directories.read_manifest(place)
    return manifests.parsed(place, data)


def at_a_glance(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Numbers and words about a saved memory, as plain JSON values.

    Args:
        directory: As given to `save`, a path or a URL.

    Returns:
        By name: `path`, `format_version`, `task`, `rows`, `width` (of the keys), `outputs`, `bytes` (of all files),
        `index` (`"exact"`, or what FAISS builds and its settings), `values`, the dtypes of its `tensors`, `params`,
        `tunable` and `provenance`.

    Raises:
        StorageError: If the memory or one of its files is missing, or the manifest is damaged.
    """
    place, manifest = as_path(directory), read_manifest(directory)
    entry = partial(manifests.entry, place, manifest)
    tensors = entry(dict, "tensors")
    return {
        "path": str(place),
        "format_version": entry(int, "version"),
        "task": entry(str, "task"),
        "rows": entry(int, "rows"),
        "width": entry(list, "tensors", "keys", "shape")[-1],
        "outputs": entry(int, "values", "num_outputs"),
        "bytes": sum(_size(place, name) for name in manifests.files(manifest)),
        "index": manifest.get("index"),
        "values": entry(dict, "values"),
        "tensors": {name: told["dtype"] for name, told in tensors.items()},
        "params": entry(dict, "params"),
        "tunable": entry(bool, "tunable"),
        "provenance": entry(dict, "provenance"),
    }


def _size(place: Path | Url, name: str) -> int:
    if isinstance(place, Url):
        try:
            return int(place.fs.size(f"{place.root}/{name}"))
        except Exception as error:  # every file system has errors of its own
            raise StorageError(f"{place}/{name} cannot be read ({type(error).__name__}: {error}).") from error
    with files.open_regular(place / name) as stream:
        return os.fstat(stream.fileno()).st_size
