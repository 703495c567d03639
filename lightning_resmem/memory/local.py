"""A memory in this process."""

import os
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_resmem.functional import neighbor_weights
from lightning_resmem.memory.answers import Neighbors, Sums
from lightning_resmem.memory.capacity import sample_of
from lightning_resmem.memory.checks import as_ids, checked_changes, checked_rows, checked_search
from lightning_resmem.memory.exchange import all_gather_rows
from lightning_resmem.memory.local_config import LocalConfig
from lightning_resmem.memory.locks import exclusive
from lightning_resmem.memory.metric import Metric
from lightning_resmem.memory.part import PartMemory
from lightning_resmem.memory.rows import Rows
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.memory.search.faiss_search import FILE, FaissSearch
from lightning_resmem.memory.storage import disk
from lightning_resmem.memory.storage.saved import Saved, manifest, map_tensors, read_index, read_saved
from lightning_resmem.memory.times import checked_times
from lightning_resmem.memory.values.dense import DenseConfig
from lightning_resmem.memory.values.interface import Values
from lightning_resmem.memory.values.sparse import SparseConfig
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Task


class LocalMemory(PartMemory):
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
        half_copy: Whether exact search on a CUDA GPU keeps a copy of the keys in half precision. Without it they are
            rounded at every search, which takes longer.
        metric: In which space rows are near each other. `"euclidean"` is that of the embeddings. `"within_class"` (for
            `Multiclass`) whitens them by their covariance within classes, as it is when all rows are there and the
            memory is first built: later changes of rows leave it, until `clear`. Keys are kept twice then, as they are
            and in this space, in float32.

    Methods come in the order of a row's way: `rehearse` to `update` bring rows in and change them, `build` and `gather`
    make them ready, `search` to `fetch` answer, `stats` tells, `save` and `load` keep; the others serve those.

    Threads may use one at the same time: each answer is that of the memory before or after a change.

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
        *,
        half_copy: bool = True,
        metric: Metric = "euclidean",
    ) -> None:
        super().__init__(task, params)
        self.key_dtype = key_dtype
        self._config = LocalConfig(self.task, index, values, key_dtype, half_copy, metric)

    @exclusive
    def clear(self) -> None:
        self._forget()
        self._rows = Rows(self.device)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def ids(self) -> Tensor:
        with self.reading():
            return self._rows.ids.finish()

    @property
    def num_outputs(self) -> int:
        with self.reading():
            return self._rows.values.num_outputs

    @property
    def device(self) -> torch.device:
        return self._rows.device

    def rehearse(self, rows: int | None, width: int) -> None:
        self._config.check_index(rows, width, self.device)

    @exclusive
    def reserve(self, rows: int) -> None:
        self._rows.reserve(rows)

    def estimate_bytes(self, rows: int, width: int, num_outputs: int) -> dict[str, int]:
        return self._config.estimate_bytes(rows, width, num_outputs, self.device)

    @exclusive
    def add(
        self,
        embeddings: Tensor,
        outputs: Tensor,
        targets: Tensor,
        ids: Tensor | None = None,
        times: Tensor | None = None,
    ) -> None:
        rows = self._rows
        embeddings, outputs, targets, ids = checked_rows(
            self.task, embeddings, outputs, targets, ids, rows.shape, rows.ids.last + 1
        )
        rows.check_new(ids)
        values = rows.growing_values(self._config, outputs.shape[1])
        keys = self._config.stored_keys(embeddings, ids, self.device)
        stored = values.stored(outputs.to(self.device), targets.to(self.device))
        if times is not None:
            self._config.check_dated()
            stored["times"] = checked_times(times, len(ids)).to(self.device)
        rows.append({"keys": keys, "ids": ids, **stored}, values)

    @exclusive
    def remove(self, ids: Tensor) -> None:
        positions = self._rows.ids.all_positions(as_ids(ids).to(self.device))
        if len(positions):
            self._rows.drop(positions)

    @exclusive
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
        stored = rows.values.stored(changes.get("outputs"), changes.get("targets"))
        if "embeddings" in changes:
            stored["keys"] = self._config.stored_keys(changes["embeddings"], ids, self.device)
        rows.assign(positions, stored)

    @exclusive
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

    def search(self, queries: Tensor, k: int) -> Neighbors:
        with self.reading():
            assert self._rows.shape is not None
            queries, k = checked_search(queries, self._rows.shape[0], k, len(self))
            return self._rows.search(queries, k, self._asked(len(queries)))

    def sums(self, neighbors: Neighbors) -> Sums:
        with self.reading(), torch.no_grad():
            weights = neighbor_weights(neighbors.distances, self.params.sigma)
            return self.weighted_sums(neighbors.ids, weights, self.params.softmax_temperature)

    def fetch(self, ids: Tensor) -> Values:
        ids = as_ids(ids)
        with self.reading():
            return self._rows.values.select(self._positions(ids))

    def stats(self) -> dict[str, Any]:
        """Rows, key width, outputs, bytes, index, values, key_dtype, metric and device, and of which they are a sample.

        Bytes are those of keys, values and ids, and of what exact search keeps on a GPU from the first search on.
        """
        with self._lock.reading():
            return self._rows.stats() | {
                "index": self._rows.index_name or self._config.index_name,
                "key_dtype": str(self.key_dtype).removeprefix("torch."),
                "metric": self._config.metric if self._rows.key_map is None else "within_class",
                "device": str(self.device),
                **sample_of(self.provenance),
            }

    def __repr__(self) -> str:
        held, config = self._rows, self._config
        rows, index, values = "empty", held.index_name or config.index_name, config.values_name
        if held.shape is not None:
            rows, values = f"{len(held)} rows x {held.shape[0]}, {held.shape[1]} outputs", held.values.name
        return f"{type(self).__name__}({rows}, index={index!r}, values={values!r})"

    def save(self, directory: str | os.PathLike[str]) -> Path | disk.Url:
        disk.as_path(directory)  # refused before the memory is built
        with self.reading():
            rows = self._rows
            faiss = rows.index if isinstance(rows.index, FaissSearch) else None
            described = manifest(
                self.task, self.params, self.tunable, self.provenance, len(rows), faiss or "exact", rows.values
            )
            extra = {} if faiss is None else {FILE: faiss.save}
            return disk.write(directory, described, rows.tensors() | map_tensors(rows.key_map), extra)

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
        memory = cls(
            saved.task, saved.params, saved.index, saved.config, saved.tensors["keys"].dtype, metric=saved.metric
        )
        memory.provenance, memory.tunable = saved.provenance, saved.tunable
        rows = memory._rows
        rows.replace(saved.rows, saved.values)
        rows.key_map = saved.key_map
        memory.to(device)
        if isinstance(saved.index, FaissIndex):
            rows.index = read_index(saved.files, rows.compared(), saved.index)
        memory.build()
        return memory

    @exclusive
    def _move(self, device: torch.device) -> None:
        built = self.is_built
        self._rows.to(device)
        if built:
            self.build()

    def _query_rows(self, ids: Tensor) -> Tensor:
        with self.reading():
            return self._rows.keys.finish()[self._positions(ids)].float()

    def _row_times(self, ids: Tensor) -> Tensor:
        with self.reading():
            return self._rows.times.finish()[self._positions(ids)]
