"""One tensor in one safetensors file: written in parts, read by mapping, and its checksum."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from lightning_resmem.errors import StorageError

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
}


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


def write(file: Path, name: str, tensor: Tensor | Streamed) -> None:
    """Write one tensor."""
    if isinstance(tensor, Tensor):
        safetensors.torch.save_file({name: tensor.detach().cpu().contiguous()}, file)
    else:
        _write_parts(file, name, tensor)


def read_mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file (8 bytes of header length, JSON header, data), mapped copy-on-write."""
    data = np.memmap(file, np.uint8, mode="c")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    size = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if len(data) != size:
        raise StorageError(
            f"{file} is damaged: it has {len(data)} bytes, its header says {size}. Restore it from a backup, or "
            "memorize again."
        )
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        flat = torch.from_numpy(data[start + first : start + last])
        tensors[name] = flat.view(_SAFETENSORS_DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def sha256(file: Path) -> str:
    """The checksum of a file, as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_parts(file: Path, name: str, tensor: Streamed) -> None:
    """Write a safetensors file (8 bytes of header length, JSON header, data) in place."""
    size = prod(tensor.shape) * tensor.dtype.itemsize
    code = next(code for code, dtype in _SAFETENSORS_DTYPES.items() if dtype == tensor.dtype)
    entry = {"dtype": code, "shape": [*tensor.shape], "data_offsets": [0, size]}
    header = json.dumps({name: entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size)
    data = np.memmap(file, np.uint8, mode="r+", offset=8 + len(header))
    rows = torch.from_numpy(data).view(tensor.dtype).view(tensor.shape)
    for places, part in tensor.parts():
        rows[places] = part
    data.flush()
