"""What kind of memory `LocalMemory` is to be: decided before there are rows."""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.memory.metric import Metric
from lightning_resmem.memory.search import faiss_index, groups
from lightning_resmem.memory.search.exact import ExactIndex
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.memory.search.faiss_search import FaissSearch, new_search
from lightning_resmem.memory.values.dense import DenseConfig
from lightning_resmem.memory.values.interface import Values
from lightning_resmem.memory.values.sparse import SparseConfig
from lightning_resmem.tasks import Multiclass, Task, check_finite

_log = logging.getLogger("lightning_resmem")

# Outputs up to which values="auto" keeps them in full.
_DENSE_OUTPUTS = 1024


@dataclass(frozen=True)
class LocalConfig:
    """How rows are kept and searched, and what follows from it once there are some.

    Args:
        task: What a residual is.
        index: As for `LocalMemory`; a FAISS factory string becomes a `FaissIndex`.
        values: As for `LocalMemory`.
        key_dtype: As for `LocalMemory`.
        half_copy: As for `LocalMemory`.
        metric: As for `LocalMemory`.
        trained: What `faiss_search.train` returned, for an index that shares its centroids with others.

    Raises:
        InputError: If an argument is not one of these.
    """

    task: Task
    index: str | FaissIndex
    values: Literal["auto", "dense", "sparse"] | DenseConfig | SparseConfig
    key_dtype: torch.dtype
    half_copy: bool = True
    metric: Metric = "euclidean"
    trained: bytes | None = None

    def __post_init__(self) -> None:
        index, values = self.index, self.values
        if not isinstance(index, str | FaissIndex) or index == "":
            raise InputError(f'index={index!r}: give "auto", "exact", a FAISS factory string or a FaissIndex.')
        if not isinstance(values, DenseConfig | SparseConfig) and values not in ("auto", "dense", "sparse"):
            raise InputError(f'values={values!r}: give "auto", "dense", "sparse", a DenseConfig or a SparseConfig.')
        if isinstance(values, SparseConfig) or values == "sparse":
            SparseConfig().build(self.task, 1)  # refuses other tasks here, not when the first rows arrive
        if self.key_dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"key_dtype={self.key_dtype!r}: give torch.float32, torch.float16 or torch.bfloat16.")
        if not isinstance(self.half_copy, bool):
            raise InputError(f"half_copy={self.half_copy!r}: give True or False.")
        if self.metric not in ("euclidean", "within_class"):
            raise InputError(f'metric={self.metric!r}: give "euclidean" or "within_class".')
        if self.metric == "within_class" and not isinstance(self.task, Multiclass):
            raise InputError(
                'metric="within_class" looks at the keys of each class, and rows of '
                f"task={type(self.task).__name__}() have no class: leave it out."
            )
        if isinstance(index, str) and index not in ("auto", "exact"):
            object.__setattr__(self, "index", FaissIndex(index))

    def values_config(self, num_outputs: int) -> DenseConfig | SparseConfig:
        """The kind of values that is kept for outputs of width `C`."""
        if isinstance(self.values, DenseConfig | SparseConfig):
            return self.values
        if self.values == "auto":
            sparse = isinstance(self.task, Multiclass) and num_outputs > _DENSE_OUTPUTS
            _log.info('values="auto" chose %s: %d outputs', "sparse" if sparse else "dense", num_outputs)
        else:
            sparse = self.values == "sparse"
        return SparseConfig() if sparse else DenseConfig()

    def new_values(self, num_outputs: int) -> Values:
        """Values without rows, of that kind."""
        return self.values_config(num_outputs).build(self.task, num_outputs)

    def stored_keys(self, embeddings: Tensor, ids: Tensor, device: torch.device) -> Tensor:
        """Embeddings `(n, D)` of rows `ids` `(n,)` as they are stored on the device.

        Raises:
            InputError: If a number is too large for the dtype.
        """
        keys = embeddings.to(device, self.key_dtype)
        if self.key_dtype != torch.float32 and keys.dtype != embeddings.dtype:
            way_out = "bfloat16" if self.key_dtype == torch.float16 else "float32"
            check_finite(f"embeddings (as key_dtype={self.key_dtype}; use torch.{way_out})", keys, ids)
        return keys

    def check_index(self, rows: int | None, width: int, device: torch.device) -> None:
        """Raise an error if no index can be built of `N` rows, if that is known, of width `D` on the device."""
        if isinstance(self.index, FaissIndex):
            faiss_index.check(self.index, rows, width, device)

    def check_dated(self) -> None:
        """Raise an error if the index cannot search among the rows that were known at some time."""
        if isinstance(self.index, FaissIndex):
            raise InputError(
                f"index={self.index.factory!r} finds the nearest of all rows, and rows with times are searched as they "
                'were known when they are asked for, exactly: give index="exact".'
            )

    def new_index(self, keys: Tensor, k: int | None, available_at: Tensor | None = None) -> ExactIndex | FaissSearch:
        """An index over keys `(N, D)`, from which `k` neighbours will be asked for, if that is known.

        `available_at` `(N,)` is since when they are known, if a query may not see all of them.
        """
        if available_at is not None:
            self.check_dated()
            return ExactIndex(keys, self.half_copy, available_at)
        config = faiss_index.choose_here(keys) if self.index == "auto" else self.index
        if not isinstance(config, FaissIndex):
            return ExactIndex(keys, self.half_copy)
        if k is not None:
            faiss_index.check_gpu_k(keys.device, k * max(1, config.rerank), config)
        return new_search(keys, config, self.trained)

    def estimate_bytes(self, rows: int, width: int, num_outputs: int, device: torch.device) -> dict[str, int]:
        """Bytes of `keys`, `values` and `index` for `N` rows of widths `D` and `C` on a device."""
        values = self.values_config(num_outputs).bytes_per_row(num_outputs)
        return {
            "keys": rows * width * self.key_dtype.itemsize,
            "values": rows * (values + 16),  # a target and an id
            "index": self.index_bytes(rows, width, device),
        }

    def index_bytes(self, rows: int, width: int, device: torch.device) -> int:
        """Bytes of what a search over `N` rows of width `D` keeps on a device, and on a GPU takes, beside the rows."""
        mapped = 0 if self.metric == "euclidean" else rows * width * torch.float32.itemsize
        if isinstance(self.index, FaissIndex):  # at most about a copy of the keys with links or centroids
            return mapped + rows * (width * 4 + 256)
        if device.type == "cuda":
            return mapped + groups.kept_bytes(rows, width, self.key_dtype, self.half_copy) + groups.WORK_BYTES
        return mapped + rows * 4  # a norm a row

    @property
    def index_name(self) -> str:
        """What is wanted, in a word."""
        return self.index.factory if isinstance(self.index, FaissIndex) else self.index

    @property
    def values_name(self) -> str:
        """What is wanted, in a word."""
        if isinstance(self.values, str):
            return self.values
        return "sparse" if isinstance(self.values, SparseConfig) else "dense"
