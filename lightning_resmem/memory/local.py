"""A memory in this process."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_resmem.errors import EmptyMemoryError, InputError
from lightning_resmem.functional import neighbor_weights
from lightning_resmem.memory.answers import Neighbors
from lightning_resmem.memory.checks import as_ids, check_different, checked_changes, checked_rows, repeated
from lightning_resmem.memory.exchange import all_gather_rows
from lightning_resmem.memory.growing import GrowingTensor
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.search import faiss_index
from lightning_resmem.memory.search.exact import ExactIndex
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.memory.search.faiss_search import FILE, FaissSearch
from lightning_resmem.memory.storage import disk
from lightning_resmem.memory.storage.saved import manifest, read_index, read_saved
from lightning_resmem.memory.values.dense import DenseConfig
from lightning_resmem.memory.values.interface import Values
from lightning_resmem.memory.values.sparse import SparseConfig
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Multiclass, Task, check_finite

_log = logging.getLogger("lightning_resmem")

# Outputs up to which values="auto" keeps them in full.
_DENSE_OUTPUTS = 1024
# Ids for each row up to which a table says where a row is; beyond, ids are searched for, which is slower.
_TABLE_IDS = 8


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

    Raises:
        InputError: If an argument is not one of these.

    Example:
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
        if not isinstance(index, str | FaissIndex) or index == "":
            raise InputError(f'index={index!r}: give "auto", "exact", a FAISS factory string or a FaissIndex.')
        if not isinstance(values, DenseConfig | SparseConfig) and values not in ("auto", "dense", "sparse"):
            raise InputError(f'values={values!r}: give "auto", "dense", "sparse", a DenseConfig or a SparseConfig.')
        if isinstance(values, SparseConfig) or values == "sparse":
            SparseConfig().build(self.task, 1)  # refuses other tasks here, not when the first rows arrive
        if key_dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"key_dtype={key_dtype!r}: give torch.float32, torch.float16 or torch.bfloat16.")
        if isinstance(index, str) and index not in ("auto", "exact"):
            index = FaissIndex(index)
        self.key_dtype = key_dtype
        self._wanted_index, self._wanted_values = index, values
        self._trained: bytes | None = None
        self._device = torch.device("cpu")
        self.clear()

    def clear(self) -> None:
        self._forget()
        self._keys, self._ids = GrowingTensor(), GrowingTensor()
        self._values: Values | None = None  # from the first rows on
        self._shape: tuple[int, int] | None = None  # (D, C)
        self._last_id = -1
        self._ordered = True  # ids arrived in ascending order so far
        self._reserved = 0
        self._unverified: tuple[str | os.PathLike[str], dict[str, Any]] | None = None  # directory and manifest
        self._index: ExactIndex | FaissSearch | None = None
        self._table: tuple[ExactIndex | FaissSearch, Tensor] | None = None  # where each id is, of an index

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> Tensor:
        self.build()
        return self._ids.finish()

    @property
    def num_outputs(self) -> int:
        return self._built_values().num_outputs

    @property
    def device(self) -> torch.device:
        return self._device

    def rehearse(self, rows: int | None, width: int) -> None:
        if isinstance(self._wanted_index, FaissIndex):
            faiss_index.check(self._wanted_index, rows, width, self._device)

    def reserve(self, rows: int) -> None:
        self._reserved = rows
        self._keys.reserve(rows)
        self._ids.reserve(rows)
        if self._values is not None:
            self._values.reserve(rows)

    def add(self, embeddings: Tensor, outputs: Tensor, targets: Tensor, ids: Tensor | None = None) -> None:
        embeddings, outputs, targets, ids = checked_rows(
            self.task, embeddings, outputs, targets, ids, self._shape, self._last_id + 1
        )
        self._check_new(ids)
        keys = self._stored_keys(embeddings, ids)
        # Values check what they store, and come first: a chunk is taken in whole or not at all.
        self._values_of(outputs.shape[1]).append(outputs.to(self._device), targets.to(self._device))
        self._keys.append(keys)
        self._took(ids, (embeddings.shape[1], outputs.shape[1]))

    def build(self) -> None:
        if self._index is not None:
            return
        self._settle()
        if not len(self):
            raise EmptyMemoryError("The memory is empty: add(embeddings, outputs, targets) before it is used.")
        self._index = self._new_index()

    @property
    def wanted_index(self) -> tuple[str | FaissIndex, bytes | None]:
        """What `build` builds: an index, and what `faiss_index.train` returned, if it shares its centroids."""
        return self._wanted_index, self._trained

    @property
    def is_built(self) -> bool:
        """Whether nothing has changed since the last `build`."""
        return self._index is not None

    @property
    def last_id(self) -> int:
        """The largest id that was ever added, -1 before."""
        return self._last_id

    def has(self, ids: Tensor) -> Tensor:
        """Which of the ids `(n,)` are in the built memory: shape `(n,)`, bool."""
        return self._positions(ids.to(self._device)) >= 0

    def places(self, ids: Tensor) -> Tensor:
        """Where the rows of ids `(n,)` are in the order of `ids`.

        Raises:
            InputError: If an id is not in the memory.
        """
        self.build()
        return self._known_positions(ids)

    def build_with(self, index: str | FaissIndex, trained: bytes | None = None) -> None:
        """Build another index, here and whenever rows change.

        Args:
            index: `"exact"` or a `FaissIndex`.
            trained: What `faiss_index.train` returned, for an index that shares its centroids with others.

        Raises:
            EmptyMemoryError: If no rows were added.
        """
        if (index, trained) != (self._wanted_index, self._trained):
            self._wanted_index, self._trained, self._index = index, trained, None
        self.build()

    def remove(self, ids: Tensor) -> None:
        ids = as_ids(ids)
        self._settle()
        positions = self._known_positions(ids)
        if not len(ids):
            return
        kept = torch.ones(len(self), dtype=torch.bool, device=self._device)
        kept[positions] = False
        for part in (self._keys, self._ids, self._values):
            if part is not None:
                part.keep(kept)
        self._index = None

    def update(
        self,
        ids: Tensor,
        embeddings: Tensor | None = None,
        outputs: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None:
        self._settle()
        positions = self._known_positions(as_ids(ids))
        if self._shape is None or self._values is None:
            return  # no row to change: unknown ids were refused
        ids, changes = checked_changes(self.task, ids, embeddings, outputs, targets, self._shape)
        changes = {name: rows.to(self._device) for name, rows in changes.items()}
        keys = self._stored_keys(changes["embeddings"], ids) if "embeddings" in changes else None
        self._values.assign(positions, changes.get("outputs"), changes.get("targets"))
        if keys is not None:
            self._keys.finish()[positions] = keys
            self._index = None

    def estimate_bytes(self, rows: int, width: int, num_outputs: int) -> dict[str, int]:
        values = self.values_config(num_outputs).bytes_per_row(num_outputs)
        # Index: a norm a row, or what FAISS keeps, at most about a copy of the keys with links or centroids.
        copied = isinstance(self._wanted_index, FaissIndex)
        return {
            "keys": rows * width * self.key_dtype.itemsize,
            "values": rows * (values + 16),  # a target and an id
            "index": rows * (width * 4 + 256 if copied else 4),
        }

    def gather(self, group: dist.ProcessGroup) -> None:
        """Give every rank the rows of all ranks, ascending by id.

        Beyond all rows, a rank needs room for its own rows and one chunk of 16 MiB meanwhile.
        """
        own: dict[str, Tensor] = {}
        shapes: list[tuple[int, int] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(shapes, self._shape, group=group)
        if self._values is not None and len(self):
            own = {"ids": self._ids.finish(), "keys": self._keys.finish(), **self._values.tensors()}
            own = {name: tensor.cpu() for name, tensor in own.items()}
        provenance, params = self.provenance, self._params
        self.clear()
        rows = all_gather_rows(own, group)
        self.provenance, self._params = provenance, params
        if rows:
            num_outputs = next(shape[1] for shape in shapes if shape is not None)
            self._hold(rows, self.values_config(num_outputs).build(self.task, num_outputs))

    def search(self, queries: Tensor, k: int) -> Neighbors:
        index = self._built()
        assert self._shape is not None
        queries, k = self._checked_search(queries, self._shape[0], k)
        distances, positions = index.search(queries.to(self._device), min(k, len(self)))
        ids = self._ids.finish()[positions.clamp_min(0)].masked_fill_(positions < 0, -1)
        missing = k - distances.shape[1]
        if missing > 0:
            distances = torch.nn.functional.pad(distances, (0, missing), value=torch.inf)
            ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
        return Neighbors(distances.to(queries.device), ids.to(queries.device))

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
        values = self._built_values()
        try:
            # A trainer's autocast would sum in half precision.
            with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                positions, weights = self._positions(ids.to(self._device)), weights.to(self._device)
                residual = values.residual_sum(positions, weights, softmax_temperature)
                return residual.to(ids.device), values.label_sum(positions, weights).to(ids.device)
        except (IndexError, RuntimeError):  # ids or classes that cannot be?
            if self._unverified is not None:
                disk.verify(*self._unverified)  # names the file that is damaged
            raise

    def fetch(self, ids: Tensor) -> Values:
        ids = as_ids(ids)
        return self._built_values().select(self._known_positions(ids))

    def stored(self, places: slice | Tensor) -> dict[str, Tensor]:
        """Rows as they are stored, for another memory of the same kind: see `add_stored`.

        Args:
            places: Which rows, in the order of `ids`.

        Returns:
            `keys`, `ids` and the tensors of the values.
        """
        self._settle()
        held = {} if self._values is None else self._values.tensors()
        rows = {"keys": self._keys.finish(), "ids": self._ids.finish(), **held}
        return {name: tensor[places] for name, tensor in rows.items()}

    def add_stored(self, rows: Mapping[str, Tensor], num_outputs: int) -> None:
        """Append rows that another memory of the same kind has stored.

        Args:
            rows: From `stored`.
            num_outputs: `C`.
        """
        ids = rows["ids"].cpu()
        self._check_new(ids)
        self._values_of(num_outputs).append_stored({name: rows.to(self._device) for name, rows in rows.items()})
        self._keys.append(rows["keys"].to(self._device, self.key_dtype))
        self._took(ids, (rows["keys"].shape[1], num_outputs))

    def stats(self) -> dict[str, Any]:
        """Rows, key width, outputs, bytes (keys, values and ids), index, values, key_dtype and device."""
        width, num_outputs = self._shape or (0, 0)
        stats = {
            "rows": len(self),
            "width": width,
            "outputs": num_outputs,
            "bytes": 0,
            "index": self._index_name(),
            "values": "" if self._values is None else self._values.name,
            "key_dtype": str(self.key_dtype).removeprefix("torch."),
            "device": str(self._device),
        }
        if self._values is not None:
            stats["bytes"] = self._values.nbytes() + self._keys.finish().nbytes + self._ids.finish().nbytes
        if isinstance(self._index, FaissSearch):
            stats.update(recall=self._index.recall, **self._index.settings())
        return stats

    def __repr__(self) -> str:
        wanted = self._wanted_values
        values: str = wanted if isinstance(wanted, str) else "sparse" if isinstance(wanted, SparseConfig) else "dense"
        rows = "empty"
        if self._values is not None and self._shape is not None:
            rows, values = f"{len(self)} rows x {self._shape[0]}, {self._shape[1]} outputs", self._values.name
        return f"{type(self).__name__}({rows}, index={self._index_name()!r}, values={values!r})"

    def _index_name(self) -> str:
        """What was built, or what is wanted as long as nothing is."""
        if isinstance(self._index, ExactIndex):
            return self._index.name
        config = self._wanted_index if self._index is None else self._index.config
        return config.factory if isinstance(config, FaissIndex) else config

    def save(self, directory: str | os.PathLike[str]) -> Path:
        disk.as_path(directory)  # refused before the memory is built
        index, values = self._built(), self._built_values()
        searched: dict[str, Any] | Literal["exact"] = "exact"
        if isinstance(index, FaissSearch):
            searched = {**dataclasses.asdict(index.config), **index.settings()}
        described = manifest(self.task, self.params, self.tunable, self.provenance, len(self), searched, values)
        tensors = {"keys": self._keys.finish(), "ids": self._ids.finish(), **values.tensors()}
        extra = {FILE: index.save} if isinstance(index, FaissSearch) else {}
        return disk.write(directory, described, tensors, extra)

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], device: str | torch.device = "cpu", mmap: bool = False
    ) -> "LocalMemory":
        """Load a saved memory.

        Args:
            directory: As given to `save`.
            device: Where the rows go.
            mmap: Map the files into memory instead of reading them: opens at once, rows are read when they are
                looked at, and several processes share them. The files' sizes are checked then, and checksums only when
                an answer fails. For the CPU.

        Raises:
            StorageError: If the directory is missing, incomplete, damaged or of another format version.
        """
        saved = read_saved(directory, mmap)
        memory = cls(saved.task, saved.params, saved.index, saved.config, saved.tensors["keys"].dtype)
        memory.provenance, memory.tunable = saved.provenance, saved.tunable
        memory._hold(saved.tensors, saved.values)
        memory._unverified = (directory, saved.manifest) if mmap else None
        memory.to(device)
        if isinstance(saved.index, FaissIndex):
            memory._index = read_index(directory, saved.manifest, memory._keys.finish(), saved.index)
        memory.build()
        return memory

    def _hold(self, rows: dict[str, Tensor], values: Values) -> None:
        """Hold exactly these rows, ascending by id; `values` takes its own."""
        rows = {name: tensor.to(self._device) for name, tensor in rows.items()}
        self._keys.replace(rows["keys"])
        self._ids.replace(rows["ids"])
        values.replace(rows)
        self._values, self._shape = values, (rows["keys"].shape[1], values.num_outputs)
        self._last_id, self._ordered, self._index = int(rows["ids"][-1]), True, None

    def _values_of(self, num_outputs: int) -> Values:
        """The values; the first rows decide of which kind and width."""
        if self._values is None:
            self._values = self.values_config(num_outputs).build(self.task, num_outputs)
            self._values.reserve(self._reserved)
        return self._values

    def _check_new(self, ids: Tensor) -> None:
        """Raise an error for ids that a built memory has; of others `build` finds those that are repeated."""
        if len(ids) and self._index is not None and int(ids.min()) <= self._last_id:
            known = ids[self.has(ids).cpu()]
            if len(known):
                raise repeated(known)

    def _took(self, ids: Tensor, shape: tuple[int, int]) -> None:
        """Note rows whose keys and values have just been appended."""
        if len(ids):
            self._ordered &= int(ids[0]) > self._last_id and bool((ids[1:] > ids[:-1]).all())
            self._last_id = max(self._last_id, int(ids.max()))
        self._ids.append(ids.to(self._device))
        self._shape, self._index = shape, None

    def _settle(self) -> None:
        """Join the chunks and put rows in the order of their ids."""
        if self._ordered:
            return
        ordered, order = self._ids.finish().sort()
        check_different(ordered)
        self._ids.replace(ordered)
        self._keys.reorder(order)
        if self._values is not None:
            self._values.reorder(order)
        self._ordered = True

    def _new_index(self) -> ExactIndex | FaissSearch:
        keys, wanted = self._keys.finish(), self._wanted_index
        config = faiss_index.choose_here(keys) if wanted == "auto" else wanted
        if not isinstance(config, FaissIndex):
            return ExactIndex(keys)
        if self._params is not None:
            faiss_index.check_gpu_k(keys.device, self._params.k * max(1, config.rerank), config)
        return FaissSearch(keys, config, trained=self._trained)

    def values_config(self, num_outputs: int) -> DenseConfig | SparseConfig:
        """The kind of values that is kept for outputs of width `C`."""
        wanted = self._wanted_values
        if isinstance(wanted, DenseConfig | SparseConfig):
            return wanted
        if wanted == "auto":
            sparse = isinstance(self.task, Multiclass) and num_outputs > _DENSE_OUTPUTS
            _log.info('values="auto" chose %s: %d outputs', "sparse" if sparse else "dense", num_outputs)
        else:
            sparse = wanted == "sparse"
        return SparseConfig() if sparse else DenseConfig()

    def _built(self) -> ExactIndex | FaissSearch:
        self.build()
        assert self._index is not None
        return self._index

    def _built_values(self) -> Values:
        self.build()
        assert self._values is not None
        return self._values

    def _move(self, device: torch.device) -> None:
        self._device = device
        if len(self):
            for rows in (self._keys, self._ids):
                rows.replace(rows.finish().to(device))
            if self._values is not None:
                self._values.to(device)
        if self._index is not None:
            self._index = self._new_index()

    def _query_rows(self, ids: Tensor) -> Tensor:
        return self._keys.finish()[self._known_positions(ids)].float()

    def _positions(self, ids: Tensor) -> Tensor:
        """Where rows are stored, -1 for ids that are not in the memory."""
        if not len(self):
            return torch.full_like(ids, -1)
        known = self._ids.finish()
        if int(known[-1]) == len(known) - 1:  # ids are 0, 1, 2, ...: the position is the id
            return ids.where(ids < len(known), -1)
        if self._index is None or int(known[-1]) >= _TABLE_IDS * len(known):
            positions = torch.searchsorted(known, ids).clamp_max(len(known) - 1)
            return positions.where(known[positions] == ids, -1)
        if self._table is None or self._table[0] is not self._index:  # it belongs to the rows as they are now
            table = torch.full((int(known[-1]) + 2,), -1, device=known.device)
            table[known] = torch.arange(len(known), device=known.device)
            self._table = self._index, table
        table = self._table[1]  # its last entry is for ids that are too large
        return table[ids.clamp(-1, len(table) - 1)]

    def _known_positions(self, ids: Tensor) -> Tensor:
        positions = self._positions(ids.to(self._device))
        if (positions < 0).any():
            unknown = ids[positions.to(ids.device) < 0][:5].tolist()
            raise InputError(f"ids {unknown} are not in the memory. `memory.ids` lists those that are.")
        return positions

    def _stored_keys(self, embeddings: Tensor, ids: Tensor) -> Tensor:
        """Embeddings as they are stored, on the device of the memory."""
        keys = embeddings.to(self._device, self.key_dtype)
        if self.key_dtype == torch.float16 and keys.dtype != embeddings.dtype:
            check_finite("embeddings (as key_dtype=torch.float16; use torch.bfloat16)", keys, ids)
        return keys
