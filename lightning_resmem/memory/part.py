"""A memory in this process, as a larger one sees it that it is a part of."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor

from lightning_resmem.memory.answers import Sums
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.local_config import LocalConfig
from lightning_resmem.memory.locks import exclusive
from lightning_resmem.memory.metric import KeyMap, Moments
from lightning_resmem.memory.rows import Rows
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.memory.storage import disk
from lightning_resmem.memory.values.dense import DenseConfig
from lightning_resmem.memory.values.sparse import SparseConfig
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Task


class PartMemory(ResidualMemory):
    """Rows in this process, what state they are in, and ways to hand them over as they are stored.

    `wanted_index`, `is_built`, `are_dated` and `last_id` say what state it is in, `values_config` what it keeps, and
    `bytes_on` what that takes; `build_with` builds another index; `key_map`, `moments` and `measure_with` have it
    compare keys as other parts do; `has` and `places` find rows by their ids; `stored` and `add_stored` hand rows over,
    `stored_of` and `put_back` undo an edit; `of_columns` and `keep_columns` take one of several keys that stand side by
    side; `weighted_sums` takes weights that were made elsewhere.

    Args:
        task: What a residual is; `Multiclass()` by default.
        params: How the memory is read; measured at `build` by default.
    """

    key_dtype: torch.dtype
    _config: LocalConfig

    def __init__(self, task: Task | None, params: ResMemParams | None) -> None:
        super().__init__(task, params)
        self._rows = Rows(torch.device("cpu"))

    @property
    def is_built(self) -> bool:
        """Whether nothing has changed since the last `build`."""
        return self._rows.index is not None

    @property
    def are_dated(self) -> bool:
        """Whether rows have times."""
        return self._rows.are_dated

    @property
    def last_id(self) -> int:
        """The largest id that was ever added, -1 before."""
        return self._rows.ids.last

    @property
    def wanted_index(self) -> tuple[str | FaissIndex, bytes | None]:
        """What `build` builds: an index, and what `faiss_search.train` returned, if it shares its centroids."""
        return self._config.index, self._config.trained

    def bytes_on(self, device: torch.device) -> int:
        """What its rows, and the search among them, will take on a device."""
        with self._lock.reading():
            width, _ = self._rows.shape or (0, 0)
            return int(self._rows.stats()["bytes"]) + self._config.index_bytes(len(self._rows), width, device)

    def values_config(self, num_outputs: int) -> DenseConfig | SparseConfig:
        """The kind of values that is kept for outputs of width `C`."""
        return self._config.values_config(num_outputs)

    def build(self) -> None:
        if not self.is_built:
            with self._lock.writing():
                self._rows.build(self._config, None if self._params is None else self._params.k)

    @property
    def key_map(self) -> KeyMap | None:
        """What keys and queries are mapped by before they are compared, on this device; None if they are not."""
        return self._rows.key_map

    @exclusive
    def moments(self) -> Moments:
        """What a map of the keys of several parts is fitted from: see `metric.within_class`."""
        self._rows.settle()
        return self._rows.moments()

    @exclusive
    def measure_with(self, key_map: KeyMap) -> None:
        """Map keys and queries before they are compared, from now on and until `clear`."""
        self._rows.measure_with(key_map)

    @exclusive
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

    @contextmanager
    def reading(self) -> Iterator[None]:
        while True:
            with self._lock.reading():
                if self.is_built:
                    yield
                    return
            self.build()

    def has(self, ids: Tensor) -> Tensor:
        """Which of the ids `(n,)` are in the built memory: shape `(n,)`, bool."""
        with self._lock.reading():
            return self._rows.ids.positions(ids.to(self.device)) >= 0

    def places(self, ids: Tensor) -> Tensor:
        """Where the rows of ids `(n,)` are in the order of `ids`.

        Raises:
            InputError: If an id is not in the memory.
        """
        with self.reading():
            return self._positions(ids)

    def weighted_sums(self, ids: Tensor, weights: Tensor, softmax_temperature: float) -> Sums:
        """Sums over rows with given weights.

        Args:
            ids: Shape `(B, k)`, int64; ids that are not in the memory add nothing.
            weights: Shape `(B, k)`.
            softmax_temperature: What the logits are divided by for the residuals.

        Returns:
            On the device of the ids.
        """
        with self.reading():
            try:
                return self._rows.weighted_sums(ids, weights, softmax_temperature)
            except (IndexError, RuntimeError):  # ids or classes that cannot be?
                if self._rows.mapped is not None:
                    disk.verify(*self._rows.mapped)  # names the file that is damaged
                raise

    @exclusive
    def stored(self, places: slice | Tensor) -> dict[str, Tensor]:
        """Rows as they are stored, for another memory of the same kind: see `add_stored`.

        Args:
            places: Which rows, in the order of `ids`.

        Returns:
            `keys`, `ids`, `times` if rows have any, and the tensors of the values.
        """
        self._rows.settle()
        return {name: tensor[places] for name, tensor in self._rows.tensors().items()}

    @exclusive
    def stored_of(self, ids: Tensor) -> dict[str, Tensor]:
        """Rows of these ids as `stored` returns them, in any order; looks at no index.

        Args:
            ids: Shape `(n,)`.

        Raises:
            InputError: If an id is not in the memory.
        """
        places = self._rows.ids.all_positions(ids.unique().to(self.device))
        return {name: tensor[places] for name, tensor in self._rows.tensors().items()} if len(self) else {}

    @exclusive
    def put_back(self, rows: Mapping[str, Tensor]) -> None:
        """Have rows as they were when `stored_of` returned them, whether they were removed or changed since."""
        self._rows.settle()
        places = self._rows.ids.positions(rows["ids"])
        self._rows.drop(places[places >= 0])
        assert self._rows.shape is not None
        self.add_stored(rows, self._rows.shape[1])

    @exclusive
    def add_stored(self, rows: Mapping[str, Tensor], num_outputs: int) -> None:
        """Append rows that another memory of the same kind has stored.

        Args:
            rows: From `stored`.
            num_outputs: `C`.
        """
        ids = rows["ids"].cpu()
        self._rows.check_new(ids)
        values = self._rows.growing_values(self._config, num_outputs)
        keys = rows["keys"].to(self.device, self.key_dtype)
        stored = {name: tensor.to(self.device) for name, tensor in rows.items()}
        self._rows.append({**stored, "keys": keys, "ids": ids}, values)

    @exclusive
    def of_columns(self, columns: slice) -> Self:
        """A memory of the same rows that are found by some columns of their keys: to be asked, not to be changed."""
        narrow = copy.copy(self)
        narrow._rows = self._rows.of_columns(columns)
        return narrow

    @exclusive
    def keep_columns(self, columns: slice) -> None:
        """Forget all other columns of the keys; has to be built again."""
        self._rows = self._rows.of_columns(columns)

    def _positions(self, ids: Tensor) -> Tensor:
        """Where the rows of ids `(n,)` are; raises an error for ids that are not in the memory."""
        return self._rows.ids.known_positions(ids.to(self.device))
