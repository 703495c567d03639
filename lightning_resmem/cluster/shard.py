"""One shard: rows that are kept, for many callers at once. `placement.py` makes a Ray actor of it."""

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import safetensors.torch
import torch
from torch import Tensor

from lightning_resmem.cluster.config import PoolConfig
from lightning_resmem.cluster.durable import DurableMemory, RowsLostError, Undo
from lightning_resmem.cluster.meters import Meters
from lightning_resmem.memory.capacity import available_bytes
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.locks import ReadWriteLock
from lightning_resmem.memory.metric import KeyMap
from lightning_resmem.memory.search import faiss_search
from lightning_resmem.memory.search.faiss_index import FaissIndex

# Rows that travel at once from one replica to another.
_COPIED_ROWS = 65536
# How long a chunk of them may take.
_COPY_SECONDS = 60.0

# The calls that compute: one at a time, as each uses all CPUs of the shard, and always in the same thread, whose memory
# is warm.
SEARCHES = "searches"

Array = npt.NDArray[Any]


class Shard:
    """Rows of one shard, what changes them, and what reads them.

    Every change has a number. It is made, written to the journal, and only then acknowledged with that number; callers
    hand the last number they know back with every request, so that a shard which lost rows (its storage was on a
    machine that is gone) says so instead of answering without them. A repeated request for a change is recognised by
    its key.

    Methods, by what they are for. Changes: `apply`, `build`, `copy_from`, `destroy`. Answers: `search`,
    `weighted_sums`. Rows: `fetch`, `stored`, `ids`, `has`, `version`. For what all shards share, an index or a map of
    keys: `sample_size`, `sample`, `train`, `index`, `moments`, `key_map`. Its state: `changes`, `state`, `config`,
    `stats`, `ping`.

    Args:
        config: Of the pool.
        shard: Which shard, from 0.
        replica: Which copy of it, from 0.
    """

    def __init__(self, config: PoolConfig, shard: int, replica: int) -> None:
        torch.set_num_threads(max(1, int(config.cpus_per_shard)))
        self._config, self._shard, self._replica = config, shard, replica
        self._lock, self._copying = ReadWriteLock(), threading.Lock()
        self._rows = DurableMemory(config, f"{config.storage_path}/shard-{shard:04d}-{replica}")
        self._meters = Meters(config, shard, replica)

    # -- changes

    def apply(self, key: str, operation: str, data: bytes, known: int, filling: str | None = None) -> int:
        """Make a change, unless a change of that key was made.

        Args:
            key: Unique to the change.
            operation: `add`, `withdraw` (of an `add`), `remove`, `update`, `restore` (of either), `measure`, `describe`
                or `clear`.
            data: Its tensors, as a safetensors file.
            known: The last change that the caller knows of.
            filling: Which rows the caller knows of.

        Returns:
            The number of the last change.

        Raises:
            InputError: As `LocalMemory` does; nothing is changed then.
            StaleMemoryError: If there are others now; nothing is changed then.
            StorageError: If the change cannot be kept; it is undone then.
        """
        with self._lock.writing():
            self._rows.recover(known)
            if operation != "clear":
                self._rows.check_filling(filling)
            return self._rows.change(key, operation, data, known)

    def build(
        self, index: str | FaissIndex, trained: bytes | None, known: int, filling: str | None = None
    ) -> dict[str, Any]:
        """Build the index, and keep all rows under `storage_path` in the form they are loaded from.

        Args:
            index: What to build.
            trained: What `train` returned, if the index has to be trained.
            known: The last change that the caller knows of.
            filling: Which rows the caller knows of.

        Returns:
            As `state`.
        """
        with self._lock.writing():
            self._rows.recover(known)
            self._rows.check(known)
            self._rows.check_filling(filling)
            self._rows.build(index, trained)
            return self._state()

    def copy_from(self, peer: Any, known: int) -> int:
        """Take all rows from another replica of this shard, after the own ones were lost.

        Args:
            peer: The actor of the other replica.
            known: The last change that the caller knows of.
        """
        with self._copying:
            return self._copied_from(peer, known)

    def destroy(self) -> None:
        """Delete what was kept under `storage_path`."""
        with self._lock.writing():
            self._rows.remove()

    # -- questions; who asks says what it knows, the last change and which rows

    @ray.method(concurrency_group=SEARCHES)
    def search(self, held: tuple[Array, ...], k: int, known: int, filling: str | None = None) -> tuple[Array, Array]:
        """The nearest rows of this shard to queries `(B, D)`: distances and ids, both `(B, min(k, rows))`.

        Where rows have times, those of the queries `(B,)` come with them.
        """
        queries, *asked_at = held
        with self._reading(known, filling) as memory:
            started = time.perf_counter()
            if not len(memory):
                return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
            asked = memory.at(_tensor(asked_at[0]) if asked_at else None)
            found = asked.search(_tensor(queries), min(k, len(memory)))
            seconds = time.perf_counter() - started
        self._meters.searched(seconds)
        return found.distances.numpy(), found.ids.numpy()

    @ray.method(concurrency_group=SEARCHES)
    def weighted_sums(
        self, held: tuple[Array, Array], softmax_temperature: float, known: int, filling: str | None = None
    ) -> tuple[Array, ...] | None:
        """This shard's part of the residual and the label sum over rows of these ids and weights, both `(B, k)`.

        Returns:
            Both sums, shape `(2, B, C)`, and, where base predictions are cut, the weighted mass of what was cut,
            `(B,)`; None if it has no rows.
        """
        ids, weights = held
        with self._reading(known, filling) as memory:
            if not len(memory):
                return None
            sums = memory.weighted_sums(_tensor(ids), _tensor(weights), softmax_temperature)
            tail = () if sums.tail is None else (sums.tail.numpy(),)
            return np.stack([sums.residual.numpy(), sums.labels.numpy()]), *tail

    def fetch(self, ids: Array, known: int, filling: str | None = None) -> bytes:
        """Rows by their ids, as they are stored."""
        with self._reading(known, filling) as memory:
            return _packed(memory.stored(memory.places(_tensor(ids))))

    def stored(
        self, start: int, stop: int, names: Sequence[str], version: str, known: int, filling: str | None = None
    ) -> bytes:
        """Rows as they are stored, in the order of their ids; only the tensors of these names, if any is given.

        Raises:
            StorageError: If rows were changed since `version`, if one is given: places are others then.
        """
        with self._reading(known, filling) as memory:
            if version:
                self._rows.check_version(version)
            rows = memory.stored(slice(start, stop))
            return _packed({name: rows[name] for name in names} if names else rows)

    def ids(self, known: int, filling: str | None = None) -> Array:
        """Ids of all rows, ascending."""
        with self._reading(known, filling) as memory:
            return memory.stored(slice(None))["ids"].cpu().numpy() if len(memory) else np.empty(0, np.int64)

    def version(self, known: int, filling: str | None = None) -> str:
        """What changes with every change of rows: see `stored`."""
        with self._reading(known, filling):
            return self._rows.version

    def has(self, ids: Array, known: int, filling: str | None = None) -> Array:
        """Which of the ids belong to rows of this shard, `(n,)`."""
        with self._reading(known, filling) as memory:
            return memory.has(_tensor(ids)).cpu().numpy()

    def sample(self, count: int) -> Array:
        """So many keys at random, or all, `(n, D)` float32."""
        with self._reading(0) as memory:
            if not len(memory):
                return np.empty((0, 0), np.float32)
            chosen = torch.randperm(len(memory), generator=torch.Generator().manual_seed(self._shard))[:count]
            keys = memory.stored(chosen.sort().values.to(memory.device))["keys"]
            compared = keys if memory.key_map is None else memory.key_map(keys)
            return compared.float().cpu().numpy()

    def sample_size(self, config: FaissIndex) -> int:
        """How many keys an index is trained on."""
        return faiss_search.sample_size(self.state()["width"], config)

    def train(self, config: FaissIndex, *samples: Array) -> bytes:
        """An index trained on keys `(n, D)` from all shards, without rows."""
        return faiss_search.train(_tensor(np.concatenate([keys for keys in samples if len(keys)])), config)

    def index(self, known: int, filling: str | None = None) -> tuple[str | FaissIndex, bytes | None]:
        """What `build` was called with."""
        with self._reading(known, filling) as memory:
            return memory.wanted_index

    def moments(self, known: int, filling: str | None = None) -> bytes:
        """Of its rows, for a map of the keys of all shards; nothing if it has none."""
        with self._asking(known):
            self._rows.check_filling(filling)
            memory = self._rows.memory
            return _packed(memory.moments()._asdict()) if len(memory) else b""

    def key_map(self, known: int, filling: str | None = None) -> bytes:
        """What it maps keys by before they are compared; nothing if it does not."""
        with self._asking(known):
            self._rows.check_filling(filling)
            found = self._rows.memory.key_map
            return b"" if found is None else _packed(found._asdict())

    def changes(self) -> tuple[int, set[str], Undo | None]:
        """The number of the last change, the keys of all, and what takes back the last one."""
        with self._asking(1):
            return self._rows.number, set(self._rows.keys), self._rows.undo

    def state(self) -> dict[str, Any]:
        """What a pool has to know: see `_state`."""
        with self._asking(0):
            return self._state()

    def config(self) -> PoolConfig:
        """What the pool was made with."""
        return self._config

    def stats(self) -> dict[str, Any]:
        """Numbers about this shard, for `RayMemory.stats`."""
        with self._asking(0):
            stats = self._rows.memory.stats()
            self._meters.holds(stats["rows"], stats["bytes"])
            return {
                "shard": self._shard,
                "replica": self._replica,
                **stats,
                "node": ray.get_runtime_context().get_node_id(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "restarts": self._rows.restarts,
                **self._meters.times(),
            }

    def ping(self, known: int = 0) -> tuple[str, int]:
        """The node and the process that this shard runs on; raises an error if its rows are lost."""
        with self._asking(known):
            pass
        return ray.get_runtime_context().get_node_id(), os.getpid()

    # -- details

    def _state(self) -> dict[str, Any]:
        """Rows, shape, number of changes, description, which rows, their version, device and free bytes."""
        memory = self._rows.memory
        stats = memory.stats()
        return {
            **{name: stats[name] for name in ("rows", "width", "outputs", "bytes", "values")},
            "last_id": memory.last_id,
            "built": memory.is_built,
            "dated": memory.are_dated,
            "number": self._rows.number,
            "about": memory.provenance.get("about", ""),
            "filling": self._rows.filling,
            "version": self._rows.version,
            "device": str(memory.device),
            "free_bytes": available_bytes() or 0,
        }

    def _copied_from(self, peer: Any, known: int) -> int:
        if not self._rows.lacks(known):
            return self._rows.number
        number: int
        number, keys, undo = ray.get(peer.changes.remote(), timeout=_COPY_SECONDS)
        state, memory = ray.get(peer.state.remote(), timeout=_COPY_SECONDS), self._rows.empty()
        for start in range(0, state["rows"], _COPIED_ROWS):
            stored = ray.get(peer.stored.remote(start, start + _COPIED_ROWS, (), "", number), timeout=_COPY_SECONDS)
            memory.add_stored(safetensors.torch.load(stored), state["outputs"])
        memory.provenance = {name: state[name] for name in ("about", "filling", "version")}
        if key_map := ray.get(peer.key_map.remote(number), timeout=_COPY_SECONDS):
            memory.measure_with(KeyMap(**safetensors.torch.load(key_map)))
        if len(memory):
            memory.build_with(*ray.get(peer.index.remote(number), timeout=_COPY_SECONDS))
        with self._lock.writing():
            if ray.get(peer.changes.remote(), timeout=_COPY_SECONDS)[0] != number:
                raise RowsLostError("the other replica changed while it was copied")
            if self._rows.lacks(known):  # it may have found its own meanwhile
                self._rows.replace(memory, known, keys, undo)
            return self._rows.number

    @contextmanager
    def _asking(self, known: int) -> Iterator[None]:
        """While nobody changes the rows; raises an error if they are lost."""
        if self._rows.lacks(known):
            with self._lock.writing():
                self._rows.recover(known)
        with self._lock.reading():
            self._rows.check(known)
            yield

    @contextmanager
    def _reading(self, known: int, filling: str | None = None) -> Iterator[LocalMemory]:
        """The memory, built, while nobody changes it; raises an error if the caller knows of other rows."""
        while True:
            with self._asking(known):
                self._rows.check_filling(filling)
                memory = self._rows.memory
                if memory.is_built or not len(memory):
                    yield memory
                    return
            with self._lock.writing():
                if len(self._rows.memory):
                    self._rows.memory.build()


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def _tensor(array: Array) -> Tensor:
    """A tensor of an array from Ray, which must not be written to: torch warns of those."""
    return torch.from_numpy(array.copy())
