"""The files of a saved memory, for tests that damage or edit them."""

import json
from collections.abc import Callable
from pathlib import Path

from lightning_resmem.memory.storage import manifest as manifests


def file_of(directory: Path, name: str) -> Path:
    """The file of a tensor, such as `keys`, or of another part, such as `index.faiss`."""
    manifest = json.loads((directory / "manifest.json").read_text())
    return directory / {**manifest["tensors"], **manifest["extra"]}[name]["file"]


def edited(directory: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest as somebody would who makes its checksum hold."""
    file = directory / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["sha256"]
    change(manifest)
    file.write_bytes(manifests.dumped(manifest))
