"""A memory in this process."""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_resmem.errors import EmptyMemoryError, InputError, StorageError
from lightning_resmem.functional import neighbor_weights
from lightning_resmem.memory import storage
from lightning_resmem.memory.base import Neighbors, ResidualMemory
from lightning_resmem.memory.exchange import all_gather_rows
from lightning_resmem.memory.index import ExactIndex
from lightning_resmem.memory.rows import GrowingTensor
from lightning_resmem.memory.values import DenseValues, Values
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import TASKS, Task, check_finite


class LocalMemory(ResidualMemory):
    """Index, values and ids in this process, on any torch device (move it with `.to(device)`).

    Rows are kept in the order of their ids, so that results do not depend on the order in which chunks arrive.

    Args:
        task: What a residual is; `Multiclass()` by default.
        params: How the memory is read; measured at `build` by default.
        index: `"exact"`: all keys are compared; `"auto"` is the same.
        values: `"dense"`: outputs are kept in full; `"auto"` is the same.
        key_dtype: What keys are stored as; `torch.float16` halves their bytes and rounds them to 3 digits.

    Raises:
        InputError: If an argument is not one of these.

    Example:
        >>> memory = LocalMemory(params=ResMemParams(k=2, sigma=0.5))
        >>> memory.add(torch.eye(2), outputs=torch.zeros(2, 2), targets=torch.tensor([0, 1]))
        >>> memory.build()
        >>> memory.predict(torch.tensor([[0.9, 0.1]]), torch.zeros(1, 2))
        tensor([[0.9056, 0.0944]])
    """

    def __init__(
        self,
        task: Task | None = None,
        params: ResMemParams | None = None,
        index: Literal["auto", "exact"] = "auto",
        values: Literal["auto", "dense"] = "auto",
        key_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(task, params)
        if index not in ("auto", "exact"):
            raise InputError(f'index={index!r} is not known: give "auto" or "exact".')
        if values not in ("auto", "dense"):
            raise InputError(f'values={values!r} is not known: give "auto" or "dense".')
        if key_dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"key_dtype={key_dtype!r}: give torch.float32, torch.float16 or torch.bfloat16.")
        self.key_dtype = key_dtype
        self._device = torch.device("cpu")
        self.clear()

    def clear(self) -> None:
        self._forget()
        self._keys, self._ids = GrowingTensor(), GrowingTensor()
        self._values: Values = DenseValues(self.task)
        self._shape: tuple[int, int] | None = None  # (D, C)
        self._last_id = -1
        self._ordered = True  # ids arrived in ascending order so far
        self._index: ExactIndex | None = None

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> Tensor:
        self.build()
        return self._ids.finish()

    @property
    def device(self) -> torch.device:
        return self._device

    def reserve(self, rows: int) -> None:
        for part in (self._keys, self._ids, self._values):
            part.reserve(rows)

    def add(self, embeddings: Tensor, outputs: Tensor, targets: Tensor, ids: Tensor | None = None) -> None:
        count = embeddings.shape[0] if embeddings.ndim else 0
        self._check_shapes(embeddings, outputs, targets)
        if ids is None:
            ids = torch.arange(self._last_id + 1, self._last_id + 1 + count)
        ids = self._checked_ids(ids, count)
        embeddings, outputs = embeddings.detach(), outputs.detach()
        check_finite("embeddings", embeddings, ids)
        check_finite("outputs", outputs, ids)
        keys = embeddings.to(self._device, self.key_dtype)
        if self.key_dtype == torch.float16 and keys.dtype != embeddings.dtype:
            check_finite("embeddings (as key_dtype=torch.float16; use torch.bfloat16)", keys, ids)
        targets = self.task.check_targets(targets.detach(), outputs.shape[1], ids)
        # Everything is checked: from here on nothing can leave half a chunk behind.
        self._shape = (embeddings.shape[1], outputs.shape[1])
        if count:
            self._ordered &= int(ids[0]) > self._last_id and bool((ids[1:] > ids[:-1]).all())
            self._last_id = max(self._last_id, int(ids.max()))
        self._keys.append(keys)
        self._values.append(outputs.to(self._device), targets.to(self._device))
        self._ids.append(ids.to(self._device))
        self._index = None

    def build(self) -> None:
        if self._index is not None:
            return
        if not len(self):
            raise EmptyMemoryError("The memory is empty: add(embeddings, outputs, targets) before it is used.")
        ids, order = self._ids.finish(), None
        if not self._ordered:
            sorted_ids, order = ids.sort()
            repeated = sorted_ids[1:][sorted_ids[1:] == sorted_ids[:-1]].unique()
            if len(repeated):
                raise _repeated(repeated)
            self._ids.replace(sorted_ids)
        keys = self._keys.finish()
        if order is not None:
            keys = keys[order]
            self._keys.replace(keys)
        self._values.finish(order)
        self._ordered = True
        self._index = ExactIndex(keys)
        self._measure_params()

    def estimate_bytes(self, rows: int, width: int, num_outputs: int) -> dict[str, int]:
        # Values: outputs and the residuals derived from them, a target and an id a row. Index: a norm a row.
        return {
            "keys": rows * width * self.key_dtype.itemsize,
            "values": rows * (2 * num_outputs * 4 + 16),
            "index": rows * 4,
        }

    def gather(self, group: dist.ProcessGroup) -> None:
        """Give every rank the rows of all ranks, ascending by id.

        Beyond all rows, a rank needs room for its own rows and one chunk of 16 MiB meanwhile.
        """
        own: dict[str, Tensor] = {}
        if len(self):
            own = {"ids": self._ids.finish(), "keys": self._keys.finish(), **self._values.tensors()}
            own = {name: tensor.cpu() for name, tensor in own.items()}
        provenance, params = self.provenance, self._params
        self.clear()
        rows = all_gather_rows(own, group)
        self.provenance, self._params = provenance, params
        if rows:
            self._hold(rows)

    def search(self, queries: Tensor, k: int) -> Neighbors:
        index = self._built()
        assert self._shape is not None
        self._check_queries(queries, self._shape[0], k)
        distances, positions = index.search(queries.to(self._device), min(k, len(self)))
        ids = self._ids.finish()[positions]
        missing = k - distances.shape[1]
        if missing > 0:
            distances = torch.nn.functional.pad(distances, (0, missing), value=torch.inf)
            ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
        return Neighbors(distances.to(queries.device), ids.to(queries.device))

    def sums(self, neighbors: Neighbors) -> tuple[Tensor, Tensor]:
        self._built()
        device = neighbors.distances.device
        weights = neighbor_weights(neighbors.distances, self.params.sigma).to(self._device)
        positions = self._positions(neighbors.ids.to(self._device))
        residual = self._values.residual_sum(positions, weights, self.params.softmax_temperature)
        return residual.to(device), self._values.label_sum(positions, weights).to(device)

    def fetch(self, ids: Tensor) -> Values:
        self._built()
        return self._values.select(self._known_positions(ids))

    def stats(self) -> dict[str, Any]:
        """Rows, key width, outputs, bytes (keys, values and ids), index, values, key_dtype and device."""
        width, num_outputs = self._shape or (0, 0)
        stored = (
            self._values.nbytes() + sum(part.nbytes for part in (self._keys.finish(), self._ids.finish()))
            if len(self)
            else 0
        )
        return {
            "rows": len(self),
            "width": width,
            "outputs": num_outputs,
            "bytes": stored,
            "index": ExactIndex.name,
            "values": self._values.name,
            "key_dtype": str(self.key_dtype).removeprefix("torch."),
            "device": str(self._device),
        }

    def save(self, directory: str | os.PathLike[str]) -> Path:
        self.build()
        manifest = {
            "task": self.task.name,
            "params": dataclasses.asdict(self.params),
            "tunable": self.tunable,
            "rows": len(self),
            "index": ExactIndex.name,
            "values": self._values.name,
            "provenance": self.provenance,
        }
        tensors = {"keys": self._keys.finish(), "ids": self._ids.finish(), **self._values.tensors()}
        return storage.write(directory, manifest, tensors)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], device: str | torch.device = "cpu") -> "LocalMemory":
        """Load a saved memory.

        Args:
            directory: As given to `save`.
            device: Where the rows go.

        Raises:
            StorageError: If the directory is missing, incomplete, damaged or of another format version.
        """
        manifest = storage.read_manifest(directory)
        tensors = storage.read_tensors(directory, manifest)
        try:
            task, params = TASKS[manifest["task"]](), ResMemParams(**manifest["params"])
            keys, outputs, targets, ids = (tensors[name] for name in ("keys", "outputs", "targets", "ids"))
            provenance, tunable = dict(manifest["provenance"]), bool(manifest["tunable"])
            rows = manifest["rows"]
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{Path(directory) / storage.MANIFEST} is damaged: {error!r}.") from error
        if any(len(part) != rows for part in (keys, outputs, targets, ids)):
            found = {name: list(tensor.shape) for name, tensor in tensors.items()}
            raise StorageError(f"{directory} is damaged: the manifest says {rows} rows, the files hold {found}.")
        memory = cls(task, params, key_dtype=keys.dtype)
        memory.add(keys, outputs, targets, ids)
        memory.provenance, memory.tunable = provenance, tunable
        memory.to(device)
        memory.build()
        return memory

    def _built(self) -> ExactIndex:
        self.build()
        assert self._index is not None
        return self._index

    def _hold(self, rows: dict[str, Tensor]) -> None:
        """Hold exactly these rows, ascending by id."""
        ids, keys = rows.pop("ids"), rows.pop("keys")
        self._ids.replace(ids.to(self._device))
        self._keys.replace(keys.to(self._device))
        self._values.replace({name: tensor.to(self._device) for name, tensor in rows.items()})
        self._shape = (keys.shape[1], self._values.num_outputs)
        self._last_id, self._ordered, self._index = int(ids[-1]), True, None

    def _move(self, device: torch.device) -> None:
        self._device = device
        if len(self):
            for rows in (self._keys, self._ids):
                rows.replace(rows.finish().to(device))
            self._values.to(device)
        if self._index is not None:
            self._index = ExactIndex(self._keys.finish())

    def _query_rows(self, ids: Tensor) -> Tensor:
        return self._keys.finish()[self._known_positions(ids)].float()

    def _positions(self, ids: Tensor) -> Tensor:
        """Where rows are stored, -1 for ids that are not in the memory."""
        known = self._ids.finish()
        if int(known[-1]) == len(known) - 1:  # ids are 0, 1, 2, ...: the position is the id
            return ids.where(ids < len(known), -1)
        positions = torch.searchsorted(known, ids).clamp_max(len(known) - 1)
        return positions.where(known[positions] == ids, -1)

    def _known_positions(self, ids: Tensor) -> Tensor:
        positions = self._positions(ids.to(self._device))
        if (positions < 0).any():
            unknown = ids[positions.to(ids.device) < 0][:5].tolist()
            raise InputError(f"ids {unknown} are not in the memory. `memory.ids` lists those that are.")
        return positions

    def _check_shapes(self, embeddings: Tensor, outputs: Tensor, targets: Tensor) -> None:
        for name, tensor in (("embeddings", embeddings), ("outputs", outputs)):
            if tensor.ndim != 2 or not tensor.shape[1]:
                raise InputError(
                    f"{name} has shape {tuple(tensor.shape)}, expected (N, {'D' if name[0] == 'e' else 'C'})."
                )
            if not tensor.is_floating_point():
                raise InputError(f"{name} has dtype {tensor.dtype}, expected a floating-point one.")
        if not len(embeddings) == len(outputs) == (len(targets) if targets.ndim else -1):
            raise InputError(
                f"embeddings, outputs and targets have shapes {tuple(embeddings.shape)}, {tuple(outputs.shape)} and "
                f"{tuple(targets.shape)}: the number of rows must be the same."
            )
        shape = (embeddings.shape[1], outputs.shape[1])
        if self._shape is not None and shape != self._shape:
            raise InputError(
                f"embeddings and outputs have widths {shape[0]} and {shape[1]}, the memory holds rows of widths "
                f"{self._shape[0]} and {self._shape[1]}. Use one model and one embedding for all rows of a memory."
            )

    def _checked_ids(self, ids: Tensor, count: int) -> Tensor:
        if ids.shape != (count,) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"ids has shape {tuple(ids.shape)} and dtype {ids.dtype}, expected ({count},) and int64.")
        ids = ids.detach().cpu().to(torch.int64)
        if count and int(ids.min()) < 0:
            raise InputError(f"ids holds {int(ids.min())}: ids are at least 0 (-1 marks a missing neighbour).")
        ordered = ids if bool((ids[1:] > ids[:-1]).all()) else ids.sort().values
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if count and self._index is not None and int(ordered[0]) <= self._last_id:
            repeated = torch.cat([repeated, ids[(self._positions(ids.to(self._device)) >= 0).cpu()]])
        if len(repeated):
            raise _repeated(repeated.unique())
        return ids


def _repeated(ids: Tensor) -> InputError:
    listed = ", ".join(str(int(i)) for i in ids[:5])
    return InputError(
        f"ids are repeated: {listed}{' and more' if len(ids) > 5 else ''}. Every row of a memory has its own id: the "
        "position in the training dataset."
    )
