"""A memory in this process."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_resmem.functional import neighbor_weights
from lightning_resmem.memory.answers import Neighbors
from lightning_resmem.memory.checks import as_ids, checked_changes, checked_rows
from lightning_resmem.memory.exchange import all_gather_rows
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.local_config import LocalConfig
from lightning_resmem.memory.rows import Rows
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.memory.search.faiss_search import FILE, FaissSearch
from lightning_resmem.memory.storage import disk
from lightning_resmem.memory.storage.saved import Saved, manifest, read_index, read_saved
from lightning_resmem.memory.values.dense import DenseConfig
from lightning_resmem.memory.values.interface import Values
from lightning_resmem.memory.values.sparse import SparseConfig
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Task


class LocalMemory(ResidualMemory):
    """Index, values and ids in this process, on any torch device (move it with `.to(device)`).

    Rows are kept in the order of their ids, so that results do not depend on the order in which chunks arrive.

    Args:
        task: What a residual is; `Multiclass()` by default.
        params: How the memory is read; measured at `build` by default.
        index: `"exact"` compares all keys. A FAISS factory string such as `"HNSW32"`, or a `FaissIndex`, searches
            approximately. `"auto"` is exact up to 2**30 key entries (rows x width), and on a GPU always; beyond that,
            a FAISS IVF index with recall 0.95 (see `faiss_index.choose`). The choice is logged.
        values: `"dense"`, or a `DenseConfig`, keeps outputs in full; `"sparse"`, or a `SparseConfig`, only the largest
            probabilities. `"auto"` is sparse for `Multiclass` with more than 1,024 outputs.
        key_dtype: What keys are stored as; `torch.float16` halves their bytes and rounds them to 3 digits.

    Methods beyond those of every memory are for one that is a part of a larger one: `wanted_index`, `is_built` and
    `last_id` say what state it is in, and `values_config` what it keeps; `build_with` builds another index; `has` and
    `places` find rows by their ids; `stored` and `add_stored` hand rows over; `weighted_sums` takes weights that were
    made elsewhere.

    Raises:
        InputError: If an argument is not one of these.

    Examples:
        >>> memory = LocalMemory(params=ResMemParams(k=2, sigma=0.5))
        >>> memory.add(torch.eye(2), outputs=torch.zeros(2, 2), targets=torch.tensor([0, 1]))
        >>> memory.build()
        >>> memory.predict(torch.tensor([[0.9, 0.1]]), torch.zeros(1, 2))
        tensor([[0.9057, 0.0943]])
    """

    def __init__(
        self,
        task: Task | None = None,
        params: ResMemParams | None = None,
        index: str | FaissIndex = "auto",
        values: Literal["auto", "dense", "sparse"] | DenseConfig | SparseConfig = "auto",
        key_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(task, params)
        self.key_dtype = key_dtype
        self._config = LocalConfig(self.task, index, values, key_dtype)
        self._rows = Rows(torch.device("cpu"))

    def clear(self) -> None:
        self._forget()
        self._rows = Rows(self.device)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def ids(self) -> Tensor:
        return self._built().ids.finish()

    @property
    def num_outputs(self) -> int:
        return self._built().values.num_outputs

    @property
    def device(self) -> torch.device:
        return self._rows.device

    @property
    def wanted_index(self) -> tuple[str | FaissIndex, bytes | None]:
        """What `build` builds: an index, and what `faiss_search.train` returned, if it shares its centroids."""
        return self._config.index, self._config.trained

    @property
    def is_built(self) -> bool:
        """Whether nothing has changed since the last `build`."""
        return self._rows.index is not None

    @property
    def last_id(self) -> int:
        """The largest id that was ever added, -1 before."""
        return self._rows.ids.last

    def rehearse(self, rows: int | None, width: int) -> None:
        self._config.check_index(rows, width, self.device)

    def reserve(self, rows: int) -> None:
        self._rows.reserve(rows)

    def values_config(self, num_outputs: int) -> DenseConfig | SparseConfig:
        """The kind of values that is kept for outputs of width `C`."""
        return self._config.values_config(num_outputs)

    def estimate_bytes(self, rows: int, width: int, num_outputs: int) -> dict[str, int]:
        return self._config.estimate_bytes(rows, width, num_outputs)

    def add(self, embeddings: Tensor, outputs: Tensor, targets: Tensor, ids: Tensor | None = None) -> None:
        rows = self._rows
        embeddings, outputs, targets, ids = checked_rows(
            self.task, embeddings, outputs, targets, ids, rows.shape, rows.ids.last + 1
        )
        rows.check_new(ids)
        keys = self._config.stored_keys(embeddings, ids, self.device)
        # Values check what they store, and come first: a chunk is taken in whole or not at all.
        values = self._rows.growing_values(self._config, outputs.shape[1])
        values.append(outputs.to(self.device), targets.to(self.device))
        rows.append(keys, ids, values)

    def stored(self, places: slice | Tensor) -> dict[str, Tensor]:
        """Rows as they are stored, for another memory of the same kind: see `add_stored`.

        Args:
            places: Which rows, in the order of `ids`.

        Returns:
            `keys`, `ids` and the tensors of the values.
        """
        self._rows.settle()
        return {name: tensor[places] for name, tensor in self._rows.tensors().items()}

    def add_stored(self, rows: Mapping[str, Tensor], num_outputs: int) -> None:
        """Append rows that another memory of the same kind has stored.

        Args:
            rows: From `stored`.
            num_outputs: `C`.
        """
        ids = rows["ids"].cpu()
        self._rows.check_new(ids)
        values = self._rows.growing_values(self._config, num_outputs)
        values.append_stored({name: tensor.to(self.device) for name, tensor in rows.items()})
        self._rows.append(rows["keys"].to(self.device, self.key_dtype), ids, values)

    def remove(self, ids: Tensor) -> None:
        ids = as_ids(ids)
        self._rows.settle()
        positions = self._positions(ids)
        if len(ids):
            self._rows.drop(positions)

    def update(
        self,
        ids: Tensor,
        embeddings: Tensor | None = None,
        outputs: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None:
        rows = self._rows
        rows.settle()
        positions = self._positions(as_ids(ids))
        if rows.shape is None:
            return  # no row to change: unknown ids were refused
        ids, changes = checked_changes(self.task, ids, embeddings, outputs, targets, rows.shape)
        changes = {name: part.to(self.device) for name, part in changes.items()}
        given = changes.get("embeddings")
        keys = None if given is None else self._config.stored_keys(given, ids, self.device)
        rows.assign(positions, keys, changes.get("outputs"), changes.get("targets"))

    def gather(self, group: dist.ProcessGroup) -> None:
        """Give every rank the rows of all ranks, ascending by id.

        Beyond all rows, a rank needs room for its own rows and one chunk of 16 MiB meanwhile.
        """
        shapes: list[tuple[int, int] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(shapes, self._rows.shape, group=group)
        own = {name: tensor.cpu() for name, tensor in self._rows.tensors().items()} if len(self) else {}
        provenance, params = self.provenance, self._params
        self.clear()
        gathered = all_gather_rows(own, group)
        self.provenance, self._params = provenance, params
        if gathered:
            num_outputs = next(shape[1] for shape in shapes if shape is not None)
            self._rows.replace(gathered, self._config.new_values(num_outputs))

    def build(self) -> None:
        self._rows.build(self._config, None if self._params is None else self._params.k)

    def build_with(self, index: str | FaissIndex, trained: bytes | None = None) -> None:
        """Build another index, here and whenever rows change.

        Args:
            index: `"exact"` or a `FaissIndex`.
            trained: What `faiss_index.train` returned, for an index that shares its centroids with others.

        Raises:
            EmptyMemoryError: If no rows were added.
        """
        if (index, trained) != self.wanted_index:
            self._config = dataclasses.replace(self._config, index=index, trained=trained)
            self._rows.index = None
        self.build()

    def has(self, ids: Tensor) -> Tensor:
        """Which of the ids `(n,)` are in the built memory: shape `(n,)`, bool."""
        return self._rows.ids.positions(ids.to(self.device)) >= 0

    def places(self, ids: Tensor) -> Tensor:
        """Where the rows of ids `(n,)` are in the order of `ids`.

        Raises:
            InputError: If an id is not in the memory.
        """
        self.build()
        return self._positions(ids)

    def search(self, queries: Tensor, k: int) -> Neighbors:
        rows = self._built()
        queries, k = self._checked_search(queries, rows.keys.finish().shape[1], k)
        return rows.search(queries, k)

    def sums(self, neighbors: Neighbors) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            weights = neighbor_weights(neighbors.distances, self.params.sigma)
        return self.weighted_sums(neighbors.ids, weights, self.params.softmax_temperature)

    def weighted_sums(self, ids: Tensor, weights: Tensor, softmax_temperature: float) -> tuple[Tensor, Tensor]:
        """Sums over rows with given weights.

        Args:
            ids: Shape `(B, k)`, int64; ids that are not in the memory add nothing.
            weights: Shape `(B, k)`.
            softmax_temperature: What the logits are divided by for the residuals.

        Returns:
            The residual sum and the label sum, both `(B, C)`, on the device of the ids.
        """
        rows = self._built()
        try:
            return rows.weighted_sums(ids, weights, softmax_temperature)
        except (IndexError, RuntimeError):  # ids or classes that cannot be?
            if rows.mapped is not None:
                disk.verify(*rows.mapped)  # names the file that is damaged
            raise

    def fetch(self, ids: Tensor) -> Values:
        ids = as_ids(ids)
        return self._built().values.select(self._positions(ids))

    def stats(self) -> dict[str, Any]:
        """Rows, key width, outputs, bytes (keys, values and ids), index, values, key_dtype and device."""
        return self._rows.stats() | {
            "index": self._rows.index_name or self._config.index_name,
            "key_dtype": str(self.key_dtype).removeprefix("torch."),
            "device": str(self.device),
        }

    def __repr__(self) -> str:
        held, config = self._rows, self._config
        rows, index, values = "empty", held.index_name or config.index_name, config.values_name
        if held.shape is not None:
            rows, values = f"{len(held)} rows x {held.shape[0]}, {held.shape[1]} outputs", held.values.name
        return f"{type(self).__name__}({rows}, index={index!r}, values={values!r})"

    def save(self, directory: str | os.PathLike[str]) -> Path | disk.Url:
        disk.as_path(directory)  # refused before the memory is built
        rows = self._built()
        faiss = rows.index if isinstance(rows.index, FaissSearch) else None
        described = manifest(
            self.task, self.params, self.tunable, self.provenance, len(rows), faiss or "exact", rows.values
        )
        extra = {} if faiss is None else {FILE: faiss.save}
        return disk.write(directory, described, rows.tensors(), extra)

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], device: str | torch.device = "cpu", mmap: bool = False
    ) -> "LocalMemory":
        """Load a saved memory.

        Args:
            directory: As given to `save`, a path or a URL.
            device: Where the rows go.
            mmap: Map the files into memory instead of reading them: opens at once, rows are read when they are
                looked at, and several processes share them. The files' sizes are checked then, and checksums only when
                an answer fails. For the CPU.

        Raises:
            StorageError: If the directory is missing, incomplete, damaged or of another format version.
        """
        with read_saved(directory, mmap) as saved:
            memory = cls.of_saved(saved, device)
            memory._rows.mapped = (directory, saved.files.manifest) if mmap else None
            return memory

    @classmethod
    def of_saved(cls, saved: Saved, device: str | torch.device = "cpu") -> "LocalMemory":
        """The memory that was read, on a device."""
        memory = cls(saved.task, saved.params, saved.index, saved.config, saved.tensors["keys"].dtype)
        memory.provenance, memory.tunable = saved.provenance, saved.tunable
        rows = memory._rows
        rows.replace(saved.tensors, saved.values)
        memory.to(device)
        if isinstance(saved.index, FaissIndex):
            rows.index = read_index(saved.files, rows.keys.finish(), saved.index)
        memory.build()
        return memory

    def _built(self) -> Rows:
        self.build()
        return self._rows

    def _positions(self, ids: Tensor) -> Tensor:
        """Where the rows of ids `(n,)` are; raises an error for ids that are not in the memory."""
        return self._rows.ids.known_positions(ids.to(self.device))

    def _move(self, device: torch.device) -> None:
        built = self.is_built
        self._rows.to(device)
        if built:
            self.build()

    def _query_rows(self, ids: Tensor) -> Tensor:
        return self._rows.keys.finish()[self._positions(ids)].float()
