"""The rows of a memory in this process, and the index over their keys."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_resmem.errors import EmptyMemoryError
from lightning_resmem.memory.answers import Neighbors, Sums
from lightning_resmem.memory.checks import narrowed, repeated
from lightning_resmem.memory.growing import GrowingTensor
from lightning_resmem.memory.local_config import LocalConfig
from lightning_resmem.memory.metric import KeyMap, Moments, moments, within_class
from lightning_resmem.memory.row_ids import RowIds
from lightning_resmem.memory.search.exact import ExactIndex
from lightning_resmem.memory.search.faiss_search import FaissSearch
from lightning_resmem.memory.times import check_asked, mixed_times
from lightning_resmem.memory.transfer import moved
from lightning_resmem.memory.values.interface import Values


class Rows:
    """Keys, ids and values of the same rows, in the same order, which is that of the ids once they have settled.

    Methods come in the order of a row's way: `reserve` to `replace` bring rows in, `settle` to `of_columns` make them
    ready, `drop` to `to` change them, and `search` to `stats` answer.

    Args:
        device: Where they are; who adds rows brings them there.

    Attributes:
        device: Where they are.
        keys: `(N, D)`.
        ids: `(N,)`.
        times: When each was asked for and known, `(N, 2)`, or nothing.
        shape: `(D, C)`; None before the first rows.
        key_map: Of keys and queries before they are compared; None where they are compared as they are.
        index: Finds keys; None where rows have changed since it was built, if it was.
        mapped: Where the rows are mapped from, directory and manifest, if their checksums were not looked at.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.keys, self.ids, self.times = GrowingTensor(), RowIds(), GrowingTensor()
        self._values: Values | None = None
        self.shape: tuple[int, int] | None = None
        self.key_map: KeyMap | None = None
        self.index: ExactIndex | FaissSearch | None = None
        self._reserved = 0
        self.mapped: tuple[str | os.PathLike[str], dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def values(self) -> Values:
        """Of `N` rows; there are none before the first."""
        assert self._values is not None
        return self._values

    @property
    def are_dated(self) -> bool:
        """Whether rows have times."""
        return len(self.times) > 0

    def reserve(self, rows: int) -> None:
        """Expect `rows` more rows."""
        self._reserved = rows
        self.keys.reserve(rows)
        self.ids.reserve(rows)
        if self._values is not None:
            self._values.reserve(rows)

    def growing_values(self, config: LocalConfig, num_outputs: int) -> Values:
        """The values that rows are added to; the first rows decide of which kind and width."""
        if self._values is not None:
            return self._values
        values = config.new_values(num_outputs)
        values.reserve(self._reserved)
        return values

    def check_new(self, ids: Tensor) -> None:
        """Raise an error for ids `(n,)` that are there, if rows were built; others are found when they settle."""
        if len(ids) and self.index is not None and int(ids.min()) <= self.ids.last:
            known = ids[(self.ids.positions(ids.to(self.device)) >= 0).cpu()]
            if len(known):
                raise repeated(known)

    def append(self, tensors: Mapping[str, Tensor], values: Values) -> None:
        """Add rows, all or none.

        Args:
            tensors: `keys` `(n, D)`, `ids` `(n,)`, on the CPU, what `values` stores, and perhaps `times` `(n, 2)`.
            values: From `growing_values`.

        Raises:
            InputError: If a number is too large for the dtype that other rows are stored as, or some have times and
                others none.
        """
        ids, parts = tensors["ids"], {"keys": self.keys, **values.parts()}
        if "times" in tensors:
            parts["times"] = self.times
        if len(self) and len(ids) and self.are_dated != ("times" in tensors):
            raise mixed_times(self.are_dated)
        stored = {name: narrowed(name, tensors[name], part.dtype, ids) for name, part in parts.items()}
        before, ids_before = {name: part.mark() for name, part in parts.items()}, self.ids.mark()
        try:
            for name, part in parts.items():
                part.append(stored[name])
            self.ids.append(ids, self.device)
        except BaseException:
            for name, part in parts.items():
                part.restore(before[name])
            self.ids.restore(ids_before)
            raise
        values.changed()
        self._values, self.shape, self.index = values, (stored["keys"].shape[1], values.num_outputs), None

    def replace(self, tensors: Mapping[str, Tensor], values: Values) -> None:
        """Hold exactly these rows, named as by `tensors` and ascending by id; `values` takes its own."""
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self.keys.replace(tensors["keys"])
        self.ids.replace(tensors["ids"])
        self.times = GrowingTensor()
        if "times" in tensors:
            self.times.replace(tensors["times"])
        values.replace(tensors)
        self._values, self.shape, self.index = values, (tensors["keys"].shape[1], values.num_outputs), None

    def settle(self) -> None:
        """Put rows in the order of their ids.

        Raises:
            InputError: If an id is repeated.
        """
        order = self.ids.sort()
        if order is not None:
            self.keys.reorder(order)
            if self.are_dated:
                self.times.reorder(order)
            if self._values is not None:
                self._values.reorder(order)

    def build(self, config: LocalConfig, k: int | None) -> None:
        """Finish the rows after some were added, and build an index if there is none; `k` as for `new_index`.

        Raises:
            EmptyMemoryError: If there are no rows.
            InputError: If an id is repeated.
        """
        if self.index is None:
            self.settle()
            if not len(self):
                raise EmptyMemoryError("The memory is empty: add(embeddings, outputs, targets) before it is used.")
            self.values.tensors()  # joins them: threads that read change nothing
            if config.metric == "within_class" and self.key_map is None:
                self.measure_with(within_class([self.moments()]))
            self.index = config.new_index(self.compared(), k, self._available_at())

    def moments(self) -> Moments:
        """What a map of the keys is fitted from."""
        return moments(self.keys.finish(), self.values.targets, self.values.num_outputs)

    def measure_with(self, key_map: KeyMap) -> None:
        """Map keys and queries before they are compared."""
        self.key_map, self.index = key_map.to(self.device), None

    def compared(self) -> Tensor:
        """The keys `(N, D)` as an index is built of them."""
        keys = self.keys.finish()
        return keys if self.key_map is None else self.key_map(keys)

    def of_columns(self, columns: slice) -> "Rows":
        """The same rows, found by these columns of their keys alone, which are copied; the values are shared."""
        self.settle()
        tensors, narrow = self.tensors(), Rows(self.device)
        narrow.replace(tensors | {"keys": tensors["keys"][:, columns].contiguous()}, self.values.like())
        return narrow

    def drop(self, positions: Tensor) -> None:
        """Forget the rows at `positions` `(n,)`."""
        kept = torch.ones(len(self), dtype=torch.bool, device=self.device)
        kept[positions] = False
        for part in (self.keys, self.ids, self._values, self.times if self.are_dated else None):
            if part is not None:
                part.keep(kept)
        self.index = None

    def assign(self, positions: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Replace what is given of the rows at `positions` `(n,)`, named as for `append`; all or nothing.

        Raises:
            InputError: As for `append`.
        """
        held, ids = self.tensors(), self.ids.finish()[positions].cpu()
        stored = {name: narrowed(name, rows, held[name].dtype, ids) for name, rows in tensors.items()}
        before = {name: held[name][positions] for name in stored}
        try:
            for name, rows in stored.items():
                held[name][positions] = rows
        except BaseException:
            for name, rows in before.items():
                held[name][positions] = rows
            raise
        finally:
            self.values.changed()
            if "keys" in stored:
                self.index = None

    def to(self, device: torch.device) -> None:
        """Move all rows."""
        self.device, self.index = device, None
        if self.key_map is not None:
            self.measure_with(self.key_map)
        if len(self):
            for part in (self.keys, *([self.times] if self.are_dated else [])):
                part.replace(part.finish().to(device))
            self.ids.to(device)
            if self._values is not None:
                self._values.to(device)

    def search(self, queries: Tensor, k: int, asked_at: Tensor | None = None) -> Neighbors:
        """The nearest rows of built ones, as `ResidualMemory.search` returns them, for checked queries and `k`."""
        check_asked(asked_at, self.are_dated)
        [own] = moved(self.device, queries)
        own = own if self.key_map is None else self.key_map(own)
        if asked_at is None:
            assert self.index is not None
            distances, positions = self.index.search(own, min(k, len(self)))
        else:
            assert isinstance(self.index, ExactIndex)
            distances, positions = self.index.search(own, min(k, len(self)), asked_at.to(self.device))
        ids = self.ids.at(positions)
        missing = k - distances.shape[1]
        if missing > 0:
            distances = torch.nn.functional.pad(distances, (0, missing), value=torch.inf)
            ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
        return Neighbors(*moved(queries.device, distances, ids))

    def weighted_sums(self, ids: Tensor, weights: Tensor, softmax_temperature: float) -> Sums:
        """Sums over rows with given weights, as `LocalMemory.weighted_sums` returns them."""
        # A trainer's autocast would sum in half precision.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            own, weights = moved(self.device, ids, weights)
            positions = self.ids.positions(own)
            residual, tail = self.values.residual_sum(positions, weights, softmax_temperature)
            found = (residual, self.values.label_sum(positions, weights), *(() if tail is None else (tail,)))
            return Sums(*moved(ids.device, *found))

    def tensors(self) -> dict[str, Tensor]:
        """`keys`, `ids`, `times` if there are any, and the tensors of the values; there have to be some."""
        held = {} if self._values is None else self._values.tensors()
        if self.are_dated:
            held["times"] = self.times.finish()
        return {"keys": self.keys.finish(), "ids": self.ids.finish(), **held}

    @property
    def index_name(self) -> str:
        """What was built, in a word; empty as long as nothing is."""
        if self.index is None:
            return ""
        return self.index.config.factory if isinstance(self.index, FaissSearch) else self.index.name

    def stats(self) -> dict[str, Any]:
        """Rows, key width, outputs, bytes, values, and how well an approximate index does."""
        width, num_outputs = self.shape or (0, 0)
        stats: dict[str, Any] = {"rows": len(self), "width": width, "outputs": num_outputs, "bytes": 0, "values": ""}
        if self._values is not None:
            stats["bytes"] = self._values.nbytes() + self.keys.nbytes + self.ids.nbytes + self.times.nbytes
            stats["values"] = self._values.name
        if self.key_map is not None:
            stats["bytes"] += len(self) * width * torch.float32.itemsize
        if isinstance(self.index, ExactIndex):
            stats["bytes"] += self.index.nbytes
        if isinstance(self.index, FaissSearch):
            stats |= {"recall": self.index.recall, **self.index.settings()}
        return stats

    def _available_at(self) -> Tensor | None:
        return self.times.finish()[:, 1].contiguous() if self.are_dated else None

    def __getstate__(self) -> dict[str, Any]:
        # An index refers to the keys, which would be written twice; of an exact one there is nothing else.
        index = self.index.half_copy if isinstance(self.index, ExactIndex) else self.index and self.index.packed()
        return {**self.__dict__, "index": index, "mapped": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        index = state["index"]
        if index is not None:
            keys = self.compared()
            is_exact = isinstance(index, bool)
            self.index = (
                ExactIndex(keys, index, self._available_at()) if is_exact else FaissSearch.unpacked(keys, *index)
            )
