"""One tensor in one safetensors file: written in one go with its checksum, and read by mapping."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lightning_resmem.errors import StorageError
from lightning_resmem.memory.storage import files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
}
# Bytes that are written and hashed at a time.
_CHUNK = 2**22
# What a safetensors file has at most besides its data.
_MOST_HEADER = 2**16


@dataclass(frozen=True)
class Streamed:
    """A tensor that is written to its file part by part, and never held in whole.

    Attributes:
        shape: Of the whole.
        dtype: Of the whole.
        parts: Yields places `(n,)` along the first dimension and the rows `(n, ...)` that belong there.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterator[tuple[Tensor, Tensor]]]


def described(tensor: Tensor | Streamed) -> dict[str, Any]:
    """What a manifest says about a tensor besides its file."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def write(name: str, tensor: Tensor | Streamed, file: Path) -> str:
    """Write a new safetensors file (8 bytes of header length, JSON header, data) to the disk.

    Returns:
        Its checksum.
    """
    size = prod(tensor.shape) * tensor.dtype.itemsize
    code = next(code for code, dtype in _DTYPES.items() if dtype == tensor.dtype)
    entry = {"dtype": code, "shape": [*tensor.shape], "data_offsets": [0, size]}
    header = json.dumps({name: entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    with file.open("xb") as stream:
        stream.write(header)
        if isinstance(tensor, Tensor):
            digest = hashlib.sha256(header)
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, size, _CHUNK):
                stream.write(data[start : start + _CHUNK])
                digest.update(data[start : start + _CHUNK])
            files.sync(stream)
            return digest.hexdigest()
        stream.flush()
        _allocate(stream, len(header) + size)
        mapped = np.memmap(file, np.uint8, mode="r+", offset=len(header), shape=(size,))
        rows = torch.from_numpy(mapped).view(tensor.dtype).view(tensor.shape)
        for places, part in tensor.parts():
            rows[places] = part
        mapped.flush()
        files.sync(stream)
    return files.sha256(file)


def _allocate(stream: BinaryIO, size: int) -> None:
    """Make the file that long, with room on the disk: writing to a mapping that has none kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(stream.fileno(), 0, size)
    else:
        stream.truncate(size)


def read(stream: FileIO, file: Path, name: str, entry: Mapping[str, Any], mmap: bool) -> Tensor:
    """Map a tensor's file, copy-on-write, and compare it with what the manifest says.

    Args:
        stream: The file, opened once: what is hashed is what is used.
        file: Its name, for messages.
        name: Of the tensor.
        entry: What the manifest says about it.
        mmap: Do not read it, for its checksum.

    Raises:
        StorageError: If the file differs from the manifest; both sides are shown.
    """
    try:
        size = os.fstat(stream.fileno()).st_size
        dtype = next((d for d in _DTYPES.values() if str(d) == f"torch.{entry['dtype']}"), torch.float64)
        most = _MOST_HEADER + prod(entry["shape"]) * dtype.itemsize
        if size > most:
            raise StorageError(f"{file} is damaged: it has {size} bytes, the manifest says at most {most}.")
        if not mmap:
            files.check_sum(stream, file, entry["sha256"])
        data = torch.from_numpy(np.memmap(stream, np.uint8, mode="c"))
        tensor = _tensor(data, file, name)
    except StorageError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise files.unreadable(file, error) from error
    saved = described(tensor)
    if saved != {"shape": entry["shape"], "dtype": entry["dtype"]}:
        raise StorageError(
            f"{file} holds shape {saved['shape']} and dtype {saved['dtype']}, "
            f"the manifest says {entry['shape']} and {entry['dtype']}."
        )
    return tensor


def _tensor(data: Tensor, file: Path, name: str) -> Tensor:
    """The one tensor of a safetensors file, without a copy."""
    length = int.from_bytes(data[:8].numpy().tobytes(), "little")
    if length > _MOST_HEADER:
        raise ValueError(f"its header has {length} bytes")
    header = json.loads(data[8 : 8 + length].numpy().tobytes())
    header.pop("__metadata__", None)
    if list(header) != [name]:
        raise StorageError(f"{file} is damaged: it holds {sorted(header)}, the manifest says {name!r}.")
    dtype, shape, offsets = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
    size = 8 + length + offsets[1]
    if len(data) != size:
        raise StorageError(
            f"{file} is damaged: it has {len(data)} bytes, its header says {size}. Restore it from a backup, or "
            "memorize again."
        )
    return data[8 + length + offsets[0] : size].view(_DTYPES[dtype]).view(shape)
