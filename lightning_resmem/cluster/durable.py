"""The rows of a shard, and every change of them on disk before it is acknowledged. Knows nothing of Ray."""

import hashlib
import socket
import time
from functools import reduce
from operator import xor
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from lightning_resmem.cluster.config import PoolConfig
from lightning_resmem.cluster.journal import Entry, Journal
from lightning_resmem.errors import InputError, ResMemError, StaleMemoryError, StorageError
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.metric import KeyMap
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.params import ResMemParams

_WITHDRAWN = ".withdrawn"

# Which rows these are, as long as they were never cleared.
_FIRST_FILLING = "first"

# What cannot be read is tried again no sooner than this, and no sooner than so many times the seconds that it took.
_RETRY_SECONDS, _RETRY_FACTOR = 1.0, 10.0


class RowsLostError(ResMemError):
    """A shard was started again without the rows that it had acknowledged."""


class Undo(NamedTuple):
    """What takes back the last change, an edit: its key, and the rows as they were, as `LocalMemory` stores them."""

    key: str
    rows: dict[str, Tensor]


def withdrawal(key: str) -> str:
    """The key of the change that takes back another."""
    return f"{key}{_WITHDRAWN}"


class DurableMemory:
    """A LocalMemory and its journal, from which it is there again when it is made again. For one caller at a time.

    Args:
        config: Of the pool.
        url: Of its journal.

    Attributes:
        memory: The rows.
        number: Of the last change.
        keys: Of all changes.
        undo: Of the last change, if it has removed or updated rows and nothing was built since.
        restarts: How often it was made before.
    """

    def __init__(self, config: PoolConfig, url: str) -> None:
        self._config, self._journal = config, Journal(url)
        self._failure = ""  # why nothing can be answered
        self.number, self.keys, self.memory = 0, set[str](), self.empty()
        self.undo: Undo | None = None
        self.restarts, self._is_started, self._next_try = 0, False, 0.0
        self._load()

    def check(self, known: int) -> None:
        """Raise an error if the rows are not those after change `known`, or after a later one."""
        if self._failure:
            raise RowsLostError(self._failure)
        if self.number < known:
            raise RowsLostError(
                f"it was started again on {socket.gethostname()}, where {self._journal.url} does not hold its rows "
                f"(change {self.number} of {known})"
            )

    @property
    def filling(self) -> str:
        """Which rows these are: another word whenever all were cleared, the same for all replicas."""
        return self.memory.provenance.get("filling", _FIRST_FILLING)

    @property
    def version(self) -> str:
        """What changes with every change of rows, and is the same for replicas that have made the same in any order."""
        return self.memory.provenance.get("version", "")

    def check_version(self, version: str) -> None:
        """Raise an error if rows were changed since `version`."""
        if version != self.version:
            raise StorageError(
                f"The rows of the pool {self._config.name!r} were changed while they were read: save, or load, again "
                "when no other process adds, removes or updates any."
            )

    def check_filling(self, filling: str | None) -> None:
        """Raise an error if a caller knows of other rows than these; None if it knows of none."""
        if filling not in (None, self.filling):
            name = self._config.name
            raise StaleMemoryError(
                f"Another process, or another copy of this memory, has cleared the pool {name!r} since this one was "
                f"built, and may have filled it with other rows: RayMemory.connect({name!r}) gives the memory as it is "
                "now, clear() starts with other rows."
            )

    def lacks(self, known: int) -> bool:
        """Whether `check` would raise an error."""
        return bool(self._failure) or self.number < known

    def recover(self, known: int) -> None:
        """Where `check` would raise an error, read the rows again, now and then: their storage may be back."""
        if self.lacks(known) and time.monotonic() >= self._next_try:
            self._load()

    def change(self, key: str, operation: str, data: bytes, known: int) -> int:
        """Make a change, unless one of that key was made: see `Shard.apply`."""
        if key in self.keys:
            return self.number
        if operation == "clear":  # makes good whatever was lost
            self._failure, self.number = "", max(self.number, known, self._journal.last())
        self.check(known)
        if operation in ("withdraw", "restore"):
            operation = self._withdrawing(key.removesuffix(_WITHDRAWN), operation)
        entry = Entry(self.number + 1, operation, key, data)
        try:
            self._make(entry)
            self._journal.write(entry)
        except InputError:  # refused before anything was changed
            raise
        except Exception:
            self._load()
            if key not in self.keys:  # else it was kept, and the storage only failed to say so
                raise
            return self.number
        self._made(entry)
        return self.number

    def build(self, index: str | FaissIndex, trained: bytes | None) -> None:
        """Build the index, and keep all rows in the form they are loaded from."""
        self.undo = None
        if len(self.memory):
            self.memory.build_with(index, trained)
            if self._journal.base() < self.number:
                self._journal.write_base(self.number, self.memory.save)

    def replace(self, memory: LocalMemory, known: int, keys: set[str], undo: Undo | None) -> None:
        """Take the rows of another replica, and keep them in place of all that was kept here.

        Args:
            memory: The rows.
            known: The last change that callers know of; the number of this one is larger.
            keys: Of all changes of these rows.
            undo: Of the last one.
        """
        self._journal.start()
        number = max(self._journal.last(), known) + 1
        if len(memory):
            self._journal.write_base(number, memory.save)
        else:
            filling = memory.provenance["filling"]
            self._journal.write(Entry(number, "clear", filling, safetensors.torch.save({})))
        self.memory, self.number, self.keys, self.undo, self._failure = memory, number, keys, undo, ""

    def remove(self) -> None:
        """Delete what was kept."""
        self._journal.remove()

    def empty(self) -> LocalMemory:
        """A memory of this kind, without rows."""
        config = self._config
        # Params stay with the callers, who weigh; those of a shard only fill its manifest.
        memory = LocalMemory(
            config.task, ResMemParams(), config.index, config.values, config.key_dtype, half_copy=config.half_copy
        )
        memory.to(self._device())
        return memory

    def _make(self, entry: Entry) -> None:
        memory, operation, tensors = self.memory, entry.operation, safetensors.torch.load(entry.data)
        undo = None
        if operation == "add":
            memory.add_stored(tensors, int(tensors.pop("num_outputs")))
        elif operation in ("remove", "update"):
            undo = Undo(entry.key, memory.stored_of(tensors["ids"]))
            getattr(memory, operation)(**tensors)
        elif operation == "restore":
            assert self.undo is not None
            memory.put_back(self.undo.rows)
        elif operation == "withdraw":
            pass  # the change has not arrived, and its key is now that of one that was made
        elif operation == "measure":
            memory.measure_with(KeyMap(**tensors))
        elif operation == "describe":
            # Kept and given back, never read: what the params and the provenance of the whole memory are.
            memory.provenance["about"] = tensors["about"].numpy().tobytes().decode()
        elif operation == "clear":
            self.memory = self.empty()
            self.memory.provenance["filling"] = entry.key
        else:
            raise InputError(f"operation={operation!r} is not known.")
        self.undo = undo

    def _withdrawing(self, key: str, operation: str) -> str:
        """What takes back the change of a key: an `add` (`withdraw`) or an edit (`restore`)."""
        if key not in self.keys:
            return "withdraw"
        if operation == "withdraw":
            return "remove"
        if self.undo is None or self.undo.key != key:
            raise StorageError(
                f"{self._journal.url}: rows that were edited cannot be taken back, as another process has changed or "
                "built them since. clear() and fill the memory again, or load one that was saved."
            )
        return operation

    def _made(self, entry: Entry) -> None:
        self.number = entry.number
        new = {entry.key, entry.key.removesuffix(_WITHDRAWN)} - self.keys
        self.keys |= new
        if entry.operation != "describe":
            hashes = (int(hashlib.sha256(key.encode()).hexdigest(), 16) for key in new)
            self.memory.provenance["version"] = f"{reduce(xor, hashes, int(self.version or '0', 16)):x}"

    def _load(self) -> None:
        """Read what is kept; where that cannot be, `check` says why."""
        begun = time.monotonic()
        try:
            if not self._is_started:
                self.restarts, self._is_started = self._journal.start(), True
            self._restore()
            self._failure = ""
        except Exception as error:  # whatever it is: an actor whose constructor fails is not started again
            self._failure = str(error) or type(error).__name__
        now = time.monotonic()
        self._next_try = now + max(_RETRY_SECONDS, _RETRY_FACTOR * (now - begun))

    def _restore(self) -> None:
        number = self.number = self._journal.base()
        self.keys, self.memory, self.undo = set(), self.empty(), None
        if number:
            with self._journal.reading_base() as directory:
                self.memory = LocalMemory.load(directory, self._device())
        for entry in self._journal.entries():
            try:
                self._make(entry)
            except Exception as error:  # of a file that was written before there were checksums, say
                raise StorageError(
                    f"{self._journal.url} is damaged: change {entry.number} ({entry.operation}) cannot be made again "
                    f"({type(error).__name__}: {error})."
                ) from error
            self._made(entry)

    def _device(self) -> torch.device:
        if not self._config.gpus_per_shard:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise InputError(
                f"gpus_per_shard={self._config.gpus_per_shard}, but torch sees no GPU on {socket.gethostname()}: "
                "install torch with CUDA there, or use gpus_per_shard=0."
            )
        return torch.device("cuda")
