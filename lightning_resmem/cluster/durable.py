"""The rows of a shard, and every change of them on disk before it is acknowledged. Knows nothing of Ray."""

import socket
import time
import uuid

import safetensors.torch
import torch

from lightning_resmem.cluster.config import PoolConfig
from lightning_resmem.cluster.journal import Entry, Journal
from lightning_resmem.errors import InputError, ResMemError, StorageError
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.params import ResMemParams

_WITHDRAWN = ".withdrawn"

# What cannot be read is tried again no sooner than this, and no sooner than so many times the seconds that it took.
_RETRY_SECONDS, _RETRY_FACTOR = 1.0, 10.0


class RowsLostError(ResMemError):
    """A shard was started again without the rows that it had acknowledged."""


def withdrawal(key: str) -> str:
    """The key of the change that takes back the rows of another."""
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
        restarts: How often it was made before.
    """

    def __init__(self, config: PoolConfig, url: str) -> None:
        self._config, self._journal = config, Journal(url)
        self._failure = ""  # why nothing can be answered
        self.number, self.keys, self.memory = 0, set[str](), self.empty()
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
        if operation == "withdraw" and key.removesuffix(_WITHDRAWN) in self.keys:
            operation = "remove"
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
        if len(self.memory):
            self.memory.build_with(index, trained)
            if self._journal.base() < self.number:
                self._journal.write_base(self.number, self.memory.save)

    def replace(self, memory: LocalMemory, known: int, keys: set[str]) -> None:
        """Take the rows of another replica, and keep them in place of all that was kept here.

        Args:
            memory: The rows.
            known: The last change that callers know of; the number of this one is larger.
            keys: Of all changes of these rows.
        """
        self._journal.start()
        number = max(self._journal.last(), known) + 1
        if len(memory):
            self._journal.write_base(number, memory.save)
        else:
            self._journal.write(Entry(number, "clear", uuid.uuid4().hex, safetensors.torch.save({})))
        self.memory, self.number, self.keys, self._failure = memory, number, keys, ""

    def remove(self) -> None:
        """Delete what was kept."""
        self._journal.remove()

    def empty(self) -> LocalMemory:
        """A memory of this kind, without rows."""
        config = self._config
        # Params stay with the callers, who weigh; those of a shard only fill its manifest.
        memory = LocalMemory(config.task, ResMemParams(), config.index, config.values, config.key_dtype)
        memory.to(self._device())
        return memory

    def _make(self, entry: Entry) -> None:
        memory, operation, tensors = self.memory, entry.operation, safetensors.torch.load(entry.data)
        if operation == "add":
            memory.add_stored(tensors, int(tensors.pop("num_outputs")))
        elif operation == "remove":
            memory.remove(tensors["ids"])
        elif operation == "withdraw":
            pass  # the rows have not arrived, and their key is now that of a change that was made
        elif operation == "update":
            memory.update(**tensors)
        elif operation == "describe":
            # Kept and given back, never read: what the params and the provenance of the whole memory are.
            memory.provenance = {"about": tensors["about"].numpy().tobytes().decode()}
        elif operation == "clear":
            self.memory = self.empty()
        else:
            raise InputError(f"operation={operation!r} is not known.")

    def _made(self, entry: Entry) -> None:
        self.number = entry.number
        self.keys |= {entry.key, entry.key.removesuffix(_WITHDRAWN)}

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
        self.keys, self.memory = set(), self.empty()
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
