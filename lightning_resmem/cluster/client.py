"""What one process knows of a pool of shards: how to reach it, what is on its way there, and what was asked."""

import atexit
import os
import uuid
import weakref
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from lightning_resmem.cluster.address import check_answers
from lightning_resmem.cluster.changes import Changes
from lightning_resmem.cluster.config import PoolConfig, default_storage
from lightning_resmem.cluster.sharding import split
from lightning_resmem.errors import InputError, ShardUnavailableError
from lightning_resmem.memory.checks import as_compared
from lightning_resmem.memory.transfer import CPU, moved
from lightning_resmem.tasks import check_finite

if TYPE_CHECKING:  # Ray takes a second to import: it is imported when a cluster is needed
    from lightning_resmem.cluster.pool import Pool, Write
    from lightning_resmem.cluster.requests import Request

# Bytes of rows on their way to the shards; a process that sends more waits.
BYTES_UNDERWAY = 64 * 2**20
# Arrays that are larger are put into the object store once, not sent with every request.
_INLINE_BYTES = 2**16


def found_pool(name: str, namespace: str, address: str | None, seconds: float) -> "Pool":
    """The pool that another process has kept under a name.

    Raises:
        InputError: If there is none, or no cluster.
    """
    from lightning_resmem.cluster.connecting import reach
    from lightning_resmem.cluster.pool import Pool

    reach(address, starts=False)
    return Pool.find(name, namespace, seconds)


class ShardClient:
    """Reaches a pool when it is first needed, or makes it; a copy of it asks the same shards.

    Args:
        config: Of the pool.
        address: Of the cluster; None finds a running one, or starts one on a single machine.

    Attributes:
        config: Of the pool.
        address: Of the cluster, if it is known.
        name: Of the pool, None as long as there is none.
        leads: Whether this process clears the pool; of the ranks of a job only the first does.
    """

    def __init__(self, config: PoolConfig, address: str | None) -> None:
        self.config, self.address = config, address
        self.name: str | None = None
        self.leads = True
        self._pool: Pool | None = None
        self._fillings: list[str | None] = [None] * config.num_shards  # as the pool's, which may have to be found again
        self._changes = Changes(config.num_shards)

    def rehearse(self) -> None:
        """Raise an error if the address is one where nothing listens."""
        check_answers(self.address)

    def open(self, hosts: Collection[str] = ()) -> tuple[str, str, str]:
        """Reach the pool, or make it.

        Args:
            hosts: The machines of the job; this one by default.

        Returns:
            The address of the cluster, the name of the pool, and Ray's mode of authentication: for `follow`.
        """
        from lightning_resmem.cluster.connecting import reach
        from lightning_resmem.cluster.pool import Pool

        config = self.config
        places = config.num_shards * config.replicas
        address = reach(self.address, hosts, cpus=places * config.cpus_per_shard)
        if self._pool is None and self.name is not None:
            self.use(Pool.find(self.name, config.namespace, config.request_timeout_s))
        elif self._pool is None:
            token = f"{config.name or 'resmem'}-{uuid.uuid4().hex[:8]}"
            root = config.storage_path or default_storage()
            name = config.name or token
            made = replace(config, name=name, storage_path=f"{root.rstrip('/')}/{token}", detached=bool(config.name))
            pool = Pool.create(made, config.request_timeout_s)
            self.use(pool)
            if not made.detached:
                # Actors end with this process in any case; what they keep on disk would stay.
                close = weakref.finalize(self, Pool.close, pool)
                atexit.register(close)  # before Ray's own, which was registered when it was imported
        assert self.name is not None
        return address, self.name, os.environ.get("RAY_AUTH_MODE", "disabled")

    def follow(self, address: str, name: str) -> None:
        """Use the pool of the first rank."""
        self.leads = False
        if self.name != name or self._pool is None:
            self.address, self.name, self._pool = address, name, None
            self.open()

    def find(self) -> bool:
        """Use the pool that another process has kept under the config's name, if there is one."""
        config = self.config
        if config.name is None:
            return False
        try:
            self.use(found_pool(config.name, config.namespace, self.address, config.request_timeout_s))
        except InputError:  # no such pool, or no cluster
            return False
        return True

    def use(self, pool: "Pool") -> None:
        """Use a pool that was found or made."""
        self.name, self._pool = pool.config.name, pool
        pool.fillings = self._fillings

    @property
    def is_open(self) -> bool:
        """Whether this process has reached the pool."""
        return self._pool is not None

    @property
    def pool(self) -> "Pool":
        """The pool, reached if it was not yet.

        Raises:
            ShardUnavailableError: If this process has left Ray, and the pool ended with that.
        """
        if self._pool is not None and not self._pool.is_reachable:
            if self.config.name is None:
                raise ShardUnavailableError(
                    "The shards ended when this process left Ray (ray.shutdown()): save a memory before, or give "
                    "RayMemory(name=...) to keep its pool. clear() starts with new shards."
                )
            self._pool = None  # it lives on without this process
        if self._pool is None:
            self.open()
        assert self._pool is not None
        return self._pool

    def close(self) -> None:
        """End the pool, for all processes."""
        if self.name is not None:
            self.forget()
            if self._pool is None or self._pool.is_reachable or self.config.name is not None:
                self.pool.close()
            self._pool, self.name = None, None

    def learn_fillings(self, fillings: Sequence[str]) -> None:
        """Take in which rows each shard has; from here on others are refused."""
        self._fillings[:] = fillings

    # -- changes

    def send(self, operation: str, rows: dict[str, Tensor], extra: dict[str, Tensor] | None = None) -> None:
        """Send each shard what concerns its rows; `flush` waits until they have it."""
        writes: list[Write] = []
        self._changes.settle(self.pool, BYTES_UNDERWAY)
        for shard, part in enumerate(split(rows["ids"], self.config.num_shards)):
            if len(part):
                mine = {name: tensor.cpu()[part].contiguous() for name, tensor in rows.items()}
                writes += self.pool.write(shard, operation, safetensors.torch.save(mine | (extra or {})))
        self._changes.sent(operation, rows["ids"], writes)

    def send_all(self, operation: str, tensors: dict[str, Tensor]) -> None:
        """Send every shard the same."""
        data = safetensors.torch.save(tensors)
        writes: list[Write] = []
        for shard in range(self.config.num_shards):
            writes += self.pool.write(shard, operation, data)
            if operation == "clear":
                self._fillings[shard] = writes[-1].key
        self._changes.sent(operation, torch.empty(0, dtype=torch.int64), writes)

    def flush(self) -> None:
        """Wait until all changes that this process made are kept by the shards.

        Raises:
            ResMemError: If one is not. Rows that were added with it are then in no shard: see `take_refused`.
        """
        if self._changes:
            self._changes.settle(self.pool)

    def take_refused(self) -> list[Tensor]:
        """The ids `(n,)` of each chunk that was sent and is in no shard, since this was last asked."""
        return self._changes.take_refused()

    def forget(self) -> None:
        """Wait for nothing that is on its way, and know nothing of the rows."""
        self._changes = Changes(self.config.num_shards)
        self._fillings[:] = [None] * self.config.num_shards

    def known(self) -> list[list[int]]:
        """The last change that each replica of each shard has acknowledged."""
        return self.pool.known

    def agree(self, known: list[list[int]]) -> None:
        """Take in what another process knows."""
        own = self.pool.known
        for shard, numbers in enumerate(known):
            own[shard] = [max(pair) for pair in zip(own[shard], numbers, strict=True)]

    # -- questions

    def ask(self, method: str, *arguments: Any, partial: bool = False) -> "Request":
        """Ask all shards the same; those that do not answer may be left out if `partial`."""
        return self._request(method, [arguments] * self.config.num_shards, partial)

    def ask_one(self, shard: int, method: str, *arguments: Any) -> Any:
        """The answer of one shard."""
        asked = [arguments if other == shard else None for other in range(self.config.num_shards)]
        return self._request(method, asked).result()[shard]

    def ask_owners(self, method: str, ids: Tensor) -> list[tuple[Tensor, Any]]:
        """Of each shard that owns some of the ids `(n,)`: their positions, and its answer."""
        parts = split(ids, self.config.num_shards)
        wanted = [(ids[part].numpy(),) if len(part) else None for part in parts]
        answers = self._request(method, wanted).result()
        return [(part, answer) for part, answer in zip(parts, answers, strict=True) if len(part)]

    def has(self, ids: Tensor) -> Tensor:
        """Which of the ids `(n,)` are in the memory."""
        found = torch.zeros(len(ids), dtype=torch.bool)
        for positions, has in self.ask_owners("has", ids):
            found[positions] = torch.from_numpy(has.copy())
        return found

    def rows(
        self, shard: int, start: int, stop: int, names: Sequence[str] = (), version: str = ""
    ) -> dict[str, Tensor]:
        """Rows of a shard as it stores them, in the order of their ids: see `Shard.stored`."""
        loaded: dict[str, Tensor] = safetensors.torch.load(self.ask_one(shard, "stored", start, stop, names, version))
        return loaded

    def rows_of(self, ids: Tensor, like: int) -> dict[str, Tensor]:
        """Rows as they are stored, in the order of their ids `(n,)`; `like` is a shard that has rows of that form."""
        rows = {name: row.new_empty(len(ids), *row.shape[1:]) for name, row in self.rows(like, 0, 1).items()}
        for positions, data in self.ask_owners("fetch", ids):
            for name, tensor in safetensors.torch.load(data).items():
                rows[name][positions] = tensor
        return rows

    def _request(self, method: str, arguments: Sequence[Sequence[Any] | None], partial: bool = False) -> "Request":
        from lightning_resmem.cluster.requests import Request

        return Request(self.pool, method, arguments, partial)

    def __getstate__(self) -> dict[str, Any]:
        # A copy asks the same shards, which end with the process that made them.
        self.flush()
        return {**self.__dict__, "_pool": None}


def queries_in_store(queries: Tensor, asked_at: Tensor | None) -> Any:
    """Queries `(B, D)`, and when they are asked, for all shards; raises an error unless they are finite."""
    [sent] = moved(CPU, as_compared(queries.detach()))
    check_finite("queries", sent)
    times = [] if asked_at is None else [asked_at.cpu().numpy()]
    return in_store(sent.float().numpy(), *times)


def in_store(*arrays: np.ndarray[Any, Any]) -> Any:
    """Arrays for all shards: in Ray's object store, once, if they are large."""
    if sum(array.nbytes for array in arrays) <= _INLINE_BYTES:
        return arrays
    import ray

    return ray.put(arrays)
