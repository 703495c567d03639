"""What a pool of shards is made with, checked. Knows nothing of Ray."""

import getpass
import os
import re
import tempfile
from dataclasses import dataclass, fields
from typing import Any, Literal

import fsspec
import torch

from lightning_resmem.errors import InputError
from lightning_resmem.memory.metric import Metric
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.memory.values.dense import DenseConfig
from lightning_resmem.memory.values.sparse import SparseConfig
from lightning_resmem.tasks import Task

# What a name may not hold: it is part of paths, URLs and the patterns that file systems understand.
_NOT_IN_NAMES = re.compile(r"[/\\:*?\[\]#\x00-\x1f]|\.\.")


@dataclass(frozen=True)
class PoolConfig:
    """The arguments of `RayMemory` of the same names. Ray keeps it to start actors again, so it is small.

    Raises:
        InputError: If one is not what it should be.
    """

    num_shards: int
    task: Task
    index: str | FaissIndex
    values: Literal["auto", "dense", "sparse"] | DenseConfig | SparseConfig
    key_dtype: torch.dtype
    namespace: str
    name: str | None
    cpus_per_shard: float
    gpus_per_shard: float
    placement: Literal["PACK", "SPREAD", "STRICT_SPREAD"]
    storage_path: str | None
    request_timeout_s: float
    replicas: int
    on_shard_loss: Literal["raise", "partial"]
    half_copy: bool = True
    metric: Metric = "euclidean"
    detached: bool = False

    def __post_init__(self) -> None:
        for name in ("num_shards", "replicas"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise InputError(f"{name}={count!r}: give a whole number of at least 1.")
        for name in ("cpus_per_shard", "gpus_per_shard", "request_timeout_s"):
            amount = getattr(self, name)
            if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < float("inf"):
                raise InputError(f"{name}={amount!r}: give a number of at least 0.")
        if not self.cpus_per_shard and not self.gpus_per_shard:
            raise InputError("cpus_per_shard=0 and gpus_per_shard=0: a shard needs one or the other.")
        if self.gpus_per_shard > 1 and self.gpus_per_shard % 1:
            raise InputError(f"gpus_per_shard={self.gpus_per_shard}: Ray gives a part of one GPU, or whole ones.")
        if not self.request_timeout_s:
            raise InputError("request_timeout_s=0: give the seconds after which a request is given up, e.g. 60.")
        if self.placement not in ("PACK", "SPREAD", "STRICT_SPREAD"):
            raise InputError(f'placement={self.placement!r}: give "SPREAD", "STRICT_SPREAD" or "PACK".')
        if self.on_shard_loss not in ("raise", "partial"):
            raise InputError(f'on_shard_loss={self.on_shard_loss!r}: give "raise" or "partial".')
        for name in ("namespace", "name", "storage_path"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text):
                raise InputError(f"{name}={text!r}: give a string that is not empty.")
        found = _NOT_IN_NAMES.search(self.name or "")
        if found is not None:
            raise InputError(
                f"name={self.name!r} names a directory in storage_path, and cannot have {found[0]!r} in it: use "
                "letters, digits, '-', '_' and '.'."
            )

    def arguments(self) -> dict[str, Any]:
        """As `RayMemory` takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "detached"}


def default_storage() -> str:
    """Where pools of this user are kept if nobody says where."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    return f"{tempfile.gettempdir()}/lightning_resmem-{user}"


def absolute(storage_path: str | os.PathLike[str] | None) -> str | None:
    """A path or URL as processes with other working directories understand it."""
    if storage_path is None:
        return None
    if not isinstance(storage_path, str | os.PathLike) or not os.fspath(storage_path):
        raise InputError(f"storage_path={storage_path!r}: give a path or a URL such as s3://bucket/directory.")
    text = os.fspath(storage_path)
    for part in text.split("::"):
        if "://" in part:
            try:
                fsspec.get_filesystem_class(part.partition("://")[0])
            except (ImportError, ValueError) as error:  # a package that is not installed, or no such storage
                raise InputError(f"storage_path={text!r} cannot be used: {error}.") from error
    return text if "://" in text or "::" in text else os.path.abspath(os.path.expanduser(text))
