"""One shard: a LocalMemory with a journal, for many callers at once. `pool.py` makes a Ray actor of it."""

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import safetensors.torch
import torch
from ray.util.metrics import Gauge, Histogram
from torch import Tensor

from lightning_resmem.cluster.config import PoolConfig
from lightning_resmem.cluster.journal import Entry, Journal
from lightning_resmem.errors import InputError, ResMemError, StorageError
from lightning_resmem.memory.capacity import available_bytes
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.locks import ReadWriteLock
from lightning_resmem.memory.search import faiss_search
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.params import ResMemParams

# Searches that the times of `stats` are of.
_TIMED_SEARCHES = 1000
# Rows that travel at once from one replica to another.
_COPIED_ROWS = 65536
# How long a chunk of them may take.
_COPY_SECONDS = 60.0

# The calls that compute: one at a time, as each uses all CPUs of the shard, and always in the same thread, whose memory
# is warm.
SEARCHES = "searches"

Array = npt.NDArray[Any]


class RowsLostError(ResMemError):
    """A shard was started again without the rows that it had acknowledged."""


class Shard:
    """Rows of one shard, what changes them, and what reads them.

    Every change has a number. It is made, written to the journal, and only then acknowledged with that number; callers
    hand the last number they know back with every request, so that a shard which lost rows (its storage was on a
    machine that is gone) says so instead of answering without them. A repeated request for a change is recognised by
    its key.

    Args:
        config: Of the pool.
        shard: Which shard, from 0.
        replica: Which copy of it, from 0.
    """

    def __init__(self, config: PoolConfig, shard: int, replica: int) -> None:
        torch.set_num_threads(max(1, int(config.cpus_per_shard)))
        self._config, self._shard, self._replica = config, shard, replica
        self._lock, self._copying = ReadWriteLock(), threading.Lock()
        self._journal = Journal(f"{config.storage_path}/shard-{shard:04d}-{replica}")
        self._restarts, self._failure = 0, ""  # why nothing can be answered
        self._number, self._keys, self._memory = 0, set[str](), self._empty()
        self._seconds: deque[float] = deque(maxlen=_TIMED_SEARCHES)
        tags = {"pool": str(config.name), "shard": str(shard), "replica": str(replica)}
        self._histogram = Histogram(
            "resmem_search_seconds", boundaries=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0], tag_keys=(*tags,)
        )
        self._histogram.set_default_tags(tags)
        self._rows_gauge, self._bytes_gauge = (
            Gauge(f"resmem_shard_{kind}", tag_keys=(*tags,)) for kind in ("rows", "bytes")
        )
        for gauge in (self._rows_gauge, self._bytes_gauge):
            gauge.set_default_tags(tags)
        try:
            self._restarts = self._journal.start()
            self._restore()
        except ResMemError as error:  # raised to whoever asks: an actor whose constructor fails is not started again
            self._failure = str(error)

    # -- changes

    def apply(self, key: str, operation: str, data: bytes, known: int) -> int:
        """Make a change, unless a change of that key was made.

        Args:
            key: Unique to the change.
            operation: `add`, `remove`, `update`, `describe` or `clear`.
            data: Its tensors, as a safetensors file.
            known: The last change that the caller knows of.

        Returns:
            The number of the last change.

        Raises:
            InputError: As `LocalMemory` does; nothing is changed then.
            StorageError: If the change cannot be kept; it is undone then.
        """
        with self._lock.writing():
            if key in self._keys:
                return self._number
            if operation == "clear":  # makes good whatever was lost
                self._failure, self._number = "", max(self._number, known)
            self._check(known)
            self._make(operation, safetensors.torch.load(data))
            try:
                self._journal.write(Entry(self._number + 1, operation, key, data))
            except StorageError as error:
                self._undo(error)
                raise
            self._number += 1
            self._keys.add(key)
            return self._number

    def build(self, index: str | FaissIndex, trained: bytes | None, known: int) -> dict[str, Any]:
        """Build the index, and keep all rows under `storage_path` in the form they are loaded from.

        Args:
            index: What to build.
            trained: What `train` returned, if the index has to be trained.
            known: The last change that the caller knows of.

        Returns:
            As `state`.
        """
        with self._lock.writing():
            self._check(known)
            if len(self._memory):
                self._memory.build_with(index, trained)
                if self._journal.base() < self._number:
                    self._journal.write_base(self._number, self._memory.save)
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
            self._journal.remove()

    # -- questions

    @ray.method(concurrency_group=SEARCHES)
    def search(self, held: tuple[Array], k: int, known: int) -> tuple[Array, Array]:
        """The nearest rows of this shard to queries `(B, D)`: distances and ids, both `(B, min(k, rows))`."""
        [queries] = held
        with self._reading(known) as memory:
            started = time.perf_counter()
            if not len(memory):
                return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
            found = memory.search(_tensor(queries), min(k, len(memory)))
            self._seconds.append(time.perf_counter() - started)
        self._histogram.observe(self._seconds[-1])
        return found.distances.numpy(), found.ids.numpy()

    @ray.method(concurrency_group=SEARCHES)
    def weighted_sums(self, held: tuple[Array, Array], softmax_temperature: float, known: int) -> Array | None:
        """This shard's part of the residual and the label sum over rows of these ids and weights, both `(B, k)`.

        Returns:
            Shape `(2, B, C)`; None if it has no rows.
        """
        ids, weights = held
        with self._reading(known) as memory:
            if not len(memory):
                return None
            sums = memory.weighted_sums(_tensor(ids), _tensor(weights), softmax_temperature)
            return np.stack([part.numpy() for part in sums])

    def fetch(self, ids: Array, known: int) -> bytes:
        """Rows by their ids, as they are stored."""
        with self._reading(known) as memory:
            return _packed(memory.stored(memory.places(_tensor(ids))))

    def stored(self, start: int, stop: int, names: Sequence[str], known: int) -> bytes:
        """Rows as they are stored, in the order of their ids; only the tensors of these names, if any is given."""
        with self._reading(known) as memory:
            rows = memory.stored(slice(start, stop))
            return _packed({name: rows[name] for name in names} if names else rows)

    def ids(self, known: int) -> Array:
        """Ids of all rows, ascending."""
        with self._reading(known) as memory:
            return memory.stored(slice(None))["ids"].cpu().numpy() if len(memory) else np.empty(0, np.int64)

    def has(self, ids: Array, known: int) -> Array:
        """Which of the ids belong to rows of this shard, `(n,)`."""
        with self._reading(known) as memory:
            return memory.has(_tensor(ids)).cpu().numpy()

    def sample(self, count: int) -> Array:
        """So many keys at random, or all, `(n, D)` float32."""
        with self._reading(0) as memory:
            if not len(memory):
                return np.empty((0, 0), np.float32)
            chosen = torch.randperm(len(memory), generator=torch.Generator().manual_seed(self._shard))[:count]
            keys = memory.stored(chosen.sort().values.to(memory.device))["keys"]
            return keys.float().cpu().numpy()

    def sample_size(self, config: FaissIndex) -> int:
        """How many keys an index is trained on."""
        return faiss_search.sample_size(self.state()["width"], config)

    def train(self, config: FaissIndex, *samples: Array) -> bytes:
        """An index trained on keys `(n, D)` from all shards, without rows."""
        return faiss_search.train(_tensor(np.concatenate([keys for keys in samples if len(keys)])), config)

    def index(self, known: int) -> tuple[str | FaissIndex, bytes | None]:
        """What `build` was called with."""
        with self._reading(known) as memory:
            return memory.wanted_index

    def changes(self) -> tuple[int, set[str]]:
        """The number of the last change, and the keys of all."""
        with self._lock.reading():
            self._check(1)
            return self._number, set(self._keys)

    def state(self) -> dict[str, Any]:
        """What a pool has to know: see `_state`."""
        with self._lock.reading():
            self._check(0)
            return self._state()

    def config(self) -> PoolConfig:
        """What the pool was made with."""
        return self._config

    def stats(self) -> dict[str, Any]:
        """Numbers about this shard, for `RayMemory.stats`."""
        with self._lock.reading():
            self._check(0)
            stats = self._memory.stats()
            times = np.array(self._seconds or [0.0]) * 1e3
            self._rows_gauge.set(stats["rows"])
            self._bytes_gauge.set(stats["bytes"])
            return {
                "shard": self._shard,
                "replica": self._replica,
                **stats,
                "node": ray.get_runtime_context().get_node_id(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "restarts": self._restarts,
                "searches": len(self._seconds),
                "search_p50_ms": float(np.percentile(times, 50)),
                "search_p99_ms": float(np.percentile(times, 99)),
            }

    def ping(self, known: int = 0) -> tuple[str, int]:
        """The node and the process that this shard runs on; raises an error if its rows are lost."""
        with self._lock.reading():
            self._check(known)
        return ray.get_runtime_context().get_node_id(), os.getpid()

    # -- details

    def _state(self) -> dict[str, Any]:
        """Rows, shape, number of changes, description, device and free bytes."""
        stats = self._memory.stats()
        return {
            **{name: stats[name] for name in ("rows", "width", "outputs", "bytes", "values")},
            "last_id": self._memory.last_id,
            "built": self._memory.is_built,
            "number": self._number,
            "about": self._memory.provenance.get("about", ""),
            "device": str(self._memory.device),
            "free_bytes": available_bytes() or 0,
        }

    def _make(self, operation: str, tensors: dict[str, Tensor]) -> None:
        memory = self._memory
        if operation == "add":
            memory.add_stored(tensors, int(tensors.pop("num_outputs")))
        elif operation == "remove":
            memory.remove(tensors["ids"])
        elif operation == "update":
            memory.update(**tensors)
        elif operation == "describe":
            # Kept and given back, never read: what the params and the provenance of the whole memory are.
            memory.provenance = {"about": tensors["about"].numpy().tobytes().decode()}
        elif operation == "clear":
            self._memory = self._empty()
        else:
            raise InputError(f"operation={operation!r} is not known.")

    def _copied_from(self, peer: Any, known: int) -> int:
        if not self._failure and self._number >= known:
            return self._number
        number: int
        number, keys = ray.get(peer.changes.remote(), timeout=_COPY_SECONDS)
        state, memory = ray.get(peer.state.remote(), timeout=_COPY_SECONDS), self._empty()
        for start in range(0, state["rows"], _COPIED_ROWS):
            stored = ray.get(peer.stored.remote(start, start + _COPIED_ROWS, (), number), timeout=_COPY_SECONDS)
            memory.add_stored(safetensors.torch.load(stored), state["outputs"])
        memory.provenance = {"about": state["about"]}
        if len(memory):
            memory.build_with(*ray.get(peer.index.remote(number), timeout=_COPY_SECONDS))
        with self._lock.writing():
            if ray.get(peer.changes.remote(), timeout=_COPY_SECONDS)[0] != number:
                raise RowsLostError("the other replica changed while it was copied")
            self._journal.start()
            self._memory, self._number, self._keys, self._failure = memory, number, keys, ""
            if len(memory):
                self._journal.write_base(number, memory.save)
            return number

    def _undo(self, error: Exception) -> None:
        """Go back to what is kept; if that is gone, too, nothing is answered until `clear`."""
        try:
            self._restore()
        except ResMemError:
            self._failure = str(error)

    def _restore(self) -> None:
        number = self._number = self._journal.base()
        self._keys, self._memory = set(), self._empty()
        if number:
            with self._journal.reading_base() as directory:
                self._memory = LocalMemory.load(directory, self._device())
        for entry in self._journal.entries():
            self._make(entry.operation, safetensors.torch.load(entry.data))
            self._number = entry.number
            self._keys.add(entry.key)

    def _empty(self) -> LocalMemory:
        config = self._config
        # Params stay with the callers, who weigh; those of a shard only fill its manifest.
        memory = LocalMemory(config.task, ResMemParams(), config.index, config.values, config.key_dtype)
        memory.to(self._device())
        return memory

    def _device(self) -> torch.device:
        if not self._config.gpus_per_shard:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise InputError(
                f"gpus_per_shard={self._config.gpus_per_shard}, but torch sees no GPU on {socket.gethostname()}: "
                "install torch with CUDA there, or use gpus_per_shard=0."
            )
        return torch.device("cuda")

    def _check(self, known: int) -> None:
        if self._failure:
            raise RowsLostError(self._failure)
        if self._number < known:
            raise RowsLostError(
                f"it was started again on {socket.gethostname()}, where {self._journal.url} does not hold its rows "
                f"(change {self._number} of {known})"
            )

    @contextmanager
    def _reading(self, known: int) -> Iterator[LocalMemory]:
        """The memory, built, while nobody changes it."""
        while True:
            with self._lock.reading():
                self._check(known)
                if self._memory.is_built or not len(self._memory):
                    yield self._memory
                    return
            with self._lock.writing():
                if len(self._memory):
                    self._memory.build()


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def _tensor(array: Array) -> Tensor:
    """A tensor of an array from Ray, which must not be written to: torch warns of those."""
    return torch.from_numpy(array.copy())
