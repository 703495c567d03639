"""A memory over a cluster: a pool of Ray actors, each with a shard, behind the interface of all memories."""

import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_resmem.cluster import ranks
from lightning_resmem.cluster.about import about_of
from lightning_resmem.cluster.address import check_address
from lightning_resmem.cluster.client import found_pool, in_store, queries_in_store
from lightning_resmem.cluster.config import PoolConfig, absolute
from lightning_resmem.cluster.files import to_files
from lightning_resmem.cluster.merging import PendingSearch, overview, total
from lightning_resmem.cluster.sharded_memory import ShardedMemory
from lightning_resmem.functional import neighbor_weights
from lightning_resmem.memory.answers import Neighbors, Sums
from lightning_resmem.memory.capacity import sample_of
from lightning_resmem.memory.checks import as_ids, checked_changes, checked_rows, checked_search, repeated
from lightning_resmem.memory.metric import Metric
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.memory.storage import disk
from lightning_resmem.memory.storage.saved import Saved, manifest, read_saved
from lightning_resmem.memory.transfer import CPU, moved
from lightning_resmem.memory.values.dense import DenseConfig
from lightning_resmem.memory.values.interface import Values
from lightning_resmem.memory.values.sparse import SparseConfig
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Multiclass, Task


class RayMemory(ShardedMemory):
    """A memory whose rows are spread over a Ray cluster: for rows that no single machine should hold.

    It answers as a `LocalMemory` with the same rows does. Making one contacts nothing; the cluster is reached when the
    first rows are added: the one that runs, or, on a single machine without one, one that is started here. Every rank
    of a job sends its rows straight to the shards, and all ranks ask the same ones.

    Methods, by what they are for. Rows: `add`, `remove`, `update`, `clear`, `ids`. Answers: `search`, `search_async`,
    `sums`, `fetch`, and what every memory makes of them (`forward`, `knn`, `predict`, ...). Numbers: `stats`,
    `metrics`, `rehearse`, `estimate_bytes`. Memories that are there already: `save`, `load`, `restored`, `connect`,
    `shutdown`. The ranks of a job: `join`, `gather`, `publish`. The shards, and what this process knows of them:
    `build`, `shards`, `shape`, `agree`, `build_shards`, `learn`.

    Args:
        num_shards: Over how many actors the rows are spread, by a hash of their ids.
        task: What a residual is; `Multiclass()` by default.
        params: How the memory is read; measured at `build` by default.
        index: As for `LocalMemory`, for each shard; trained once, if it has to be, on a sample of all rows.
        values: As for `LocalMemory`.
        key_dtype: As for `LocalMemory`.
        half_copy: As for `LocalMemory`.
        metric: As for `LocalMemory`; measured from the rows of all shards.
        address: Of the cluster; None finds a running one, or starts one on a single machine.
        namespace: Ray namespace of the actors.
        name: Keeps the actors when this process ends, for `RayMemory.connect(name)`, until `shutdown()`. By default
            they end with the process (rank 0) that made them.
        cpus_per_shard: CPUs of each actor; its searches use so many threads.
        gpus_per_shard: GPUs of each actor; its rows are kept there.
        placement: `"SPREAD"` over nodes as evenly as possible, `"STRICT_SPREAD"` each on its own, or `"PACK"` together.
        storage_path: Where shards keep their rows, so that they survive the end of a process: a path or a URL that
            fsspec knows, in which the pool makes a directory of its own and deletes it when it ends. A shard can only
            move to a node that sees it. By default `lightning_resmem-UID` in the temporary directory of each node.
        request_timeout_s: Seconds after which a request, or a place for the shards, is given up.
        replicas: Copies of each shard, on different nodes if possible. With 2, the death of one is not noticed.
        on_shard_loss: `"raise"` `ShardUnavailableError`, or answer from the rest with `"partial"`: `metrics()` tells
            which share of the rows was asked.

    Raises:
        InputError: If an argument is not one of these.

    Examples:
        >>> memory = RayMemory(num_shards=2, params=ResMemParams(k=50, sigma=0.5), placement="PACK")
        >>> len(memory)
        0
    """

    def __init__(
        self,
        num_shards: int = 1,
        task: Task | None = None,
        params: ResMemParams | None = None,
        index: str | FaissIndex = "auto",
        values: Literal["auto", "dense", "sparse"] | DenseConfig | SparseConfig = "auto",
        key_dtype: torch.dtype = torch.float32,
        *,
        half_copy: bool = True,
        metric: Metric = "euclidean",
        address: str | None = None,
        namespace: str = "lightning-resmem",
        name: str | None = None,
        cpus_per_shard: float = 1,
        gpus_per_shard: float = 0,
        placement: Literal["PACK", "SPREAD", "STRICT_SPREAD"] = "SPREAD",
        storage_path: str | os.PathLike[str] | None = None,
        request_timeout_s: float = 60.0,
        replicas: int = 1,
        on_shard_loss: Literal["raise", "partial"] = "raise",
    ) -> None:
        check_address(address)
        config = PoolConfig(
            num_shards=num_shards,
            task=Multiclass() if task is None else task,
            index=index,
            values=values,
            key_dtype=key_dtype,
            half_copy=half_copy,
            metric=metric,
            namespace=namespace,
            name=name,
            cpus_per_shard=cpus_per_shard,
            gpus_per_shard=gpus_per_shard,
            placement=placement,
            storage_path=absolute(storage_path),
            request_timeout_s=request_timeout_s,
            replicas=replicas,
            on_shard_loss=on_shard_loss,
        )
        super().__init__(config, address, params)

    # -- rows

    @property
    def ids(self) -> Tensor:
        self.build()
        return torch.cat([torch.from_numpy(part.copy()) for part in self._ask("ids")]).sort().values

    def add(
        self,
        embeddings: Tensor,
        outputs: Tensor,
        targets: Tensor,
        ids: Tensor | None = None,
        times: Tensor | None = None,
    ) -> None:
        self._drop_refused()
        embeddings, outputs, targets, ids = checked_rows(
            self.task, embeddings, outputs, targets, ids, self._shape, self._last_id + 1
        )
        if self._built and len(ids) and int(ids.min()) <= self._last_id:
            known = ids[self._shards.has(ids)]
            if len(known):
                raise repeated(known)
        self._shape = (embeddings.shape[1], outputs.shape[1])
        # What travels and is journaled is what a shard stores: with sparse values a small part of the outputs.
        chunk = self.staged()
        chunk.add(embeddings, outputs, targets, ids, times)
        self._send_rows(chunk.stored(slice(None)), outputs.shape[1])

    def remove(self, ids: Tensor) -> None:
        ids = as_ids(ids).cpu()
        self._check_known(ids)
        self._edit("remove", {"ids": ids})
        self._rows -= len(ids.unique())

    def update(
        self,
        ids: Tensor,
        embeddings: Tensor | None = None,
        outputs: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None:
        self._check_known(as_ids(ids).cpu())
        if self._shape is None:
            return
        ids, changes = checked_changes(self.task, ids, embeddings, outputs, targets, self._shape)
        self._edit("update", {"ids": ids, **changes})

    def _edit(self, operation: str, rows: dict[str, Tensor]) -> None:
        """Change rows in all shards, or in none: waits for them."""
        self._send(operation, rows)
        self._shards.flush()

    # -- answers

    def search(self, queries: Tensor, k: int) -> Neighbors:
        return self.search_async(queries, k).result()

    def search_async(self, queries: Tensor, k: int) -> PendingSearch:
        """Start a search and return at once: the shards look while this process does something else.

        Args:
            queries: Shape `(B, D)`, on any device.
            k: As for `search`.

        Returns:
            Its `result()` is what `search` returns.
        """
        self.build()
        assert self._shape is not None
        queries, k = checked_search(queries, self._shape[0], k, len(self))
        request = self._shards.ask(
            "search", queries_in_store(queries, self._asked(len(queries))), k, partial=self._is_partial
        )
        return PendingSearch(request, len(queries), k, queries.device)

    def sums(self, neighbors: Neighbors) -> Sums:
        self.build()
        with torch.no_grad():
            weights = neighbor_weights(neighbors.distances, self.params.sigma)
        ids, sent = moved(CPU, neighbors.ids, weights)
        answers = self._ask("weighted_sums", in_store(ids.numpy(), sent.numpy()), self.params.softmax_temperature)
        return total(answers, len(weights), self.num_outputs, neighbors.distances.device)

    def fetch(self, ids: Tensor) -> Values:
        rows, values = self._stored(as_ids(ids).cpu()), self._empty_values()
        values.replace(rows)
        return values

    # -- what is told

    def stats(self) -> dict[str, Any]:
        """Rows, key width, outputs, bytes, index, values, key_dtype and device, recall of an approximate index.

        `shards` lists for each replica of each shard whether it is alive, its rows, bytes, node, host, pid, restarts
        and the times of its searches, `search_p50_ms` and `search_p99_ms`.
        """
        width, num_outputs = self._shape or (0, 0)
        stats = self._template.stats() | {"rows": len(self), "width": width, "outputs": num_outputs, "shards": []}
        stats |= sample_of(self.provenance)
        if self._shards.name is None:
            return stats
        self._shards.flush()
        return stats | overview(self._shards.pool.stats(self._is_partial))

    def metrics(self) -> dict[str, float]:
        """`resmem/shards_alive`, how many shards answer, and `resmem/coverage`, the share of the rows they hold."""
        if not self._shards.is_open:
            return {}
        alive = self._shards.pool.liveness.alive()
        covered = sum(rows for rows, is_alive in zip(self._shard_rows, alive, strict=True) if is_alive)
        return {
            "resmem/shards_alive": float(sum(alive)),
            "resmem/coverage": covered / max(1, sum(self._shard_rows)),
        }

    # -- memories that are there already

    def save(self, directory: str | os.PathLike[str]) -> Path | disk.Url:
        """Save to one directory, as a `LocalMemory` does: it can be loaded as either, with any number of shards.

        Rows go from the shards to the files part by part; this process holds their ids and a few MiB. Where another
        process changes rows meanwhile, that is a StorageError.
        """
        disk.as_path(directory)  # refused before the memory is built
        self.build()
        files = to_files(self._shards)
        index, _ = self._shards.ask_one(self._filled_shard(), "index")
        described = manifest(
            self.task,
            self.params,
            self.tunable,
            self.provenance,
            files["ids"].shape[0],  # other processes may have added some
            index if isinstance(index, FaissIndex) else "exact",
            self._empty_values(),
        )
        return disk.write(directory, described, files)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], num_shards: int = 1, **options: Any) -> "RayMemory":
        """Spread a saved memory over a cluster; a `LocalMemory` or a `RayMemory` has saved it.

        Args:
            directory: As given to `save`, a path or a URL.
            num_shards: Any number.
            **options: The arguments of `RayMemory` from `address` on.

        Raises:
            StorageError: If the directory is missing, incomplete, damaged or of another format version.
        """
        with read_saved(directory, mmap=True) as saved:
            memory = cls._made_for(saved, num_shards, options)
            memory._take(saved)
        memory.build()
        return memory

    def restored(self, directory: str | os.PathLike[str], group: dist.ProcessGroup | None = None) -> "RayMemory":
        """A saved memory over the same cluster and in as many shards as this one, whatever rows this one has.

        A pool that was kept under this one's `name` is used as it is, if it has these rows.

        Args:
            directory: As given to `save`, a path or a URL.
            group: Of the ranks of a job, on the CPU: they share one pool, and each of them calls this.

        Raises:
            InputError: If the pool of this name has other rows.
            StorageError: As for `load`.
        """
        options = {"address": self._shards.address, **self._shards.config.arguments()}
        given = [options.pop(name) for name in ("num_shards", "task", "index", "values", "key_dtype", "metric")]
        first = ranks.alone if group is None else partial(ranks.on_rank_zero, group=group)
        with read_saved(directory, mmap=True) as saved:
            memory = self._made_for(saved, given[0], options)
            first(lambda: memory._find_kept(saved))
            if group is not None:
                memory.join(group)
            first(lambda: memory._take(saved))
        memory.build() if group is None else memory.gather(group)
        return memory

    @classmethod
    def _made_for(cls, saved: Saved, num_shards: int, options: dict[str, Any]) -> "RayMemory":
        """A memory without rows that can take those of a saved one."""
        dtype, metric = saved.tensors["keys"].dtype, saved.metric
        memory = cls(num_shards, saved.task, saved.params, saved.index, saved.config, dtype, metric=metric, **options)
        memory.provenance, memory.tunable = saved.provenance, saved.tunable
        return memory

    @classmethod
    def connect(
        cls,
        name: str,
        address: str | None = None,
        namespace: str = "lightning-resmem",
        request_timeout_s: float = 60.0,
        on_shard_loss: Literal["raise", "partial"] = "raise",
    ) -> "RayMemory":
        """The memory that another process made with `RayMemory(name=...)`, with its rows, params and provenance.

        Args:
            name: As given there.
            address: Of the cluster; None finds a running one.
            namespace: As given there.
            request_timeout_s: As for `RayMemory`.
            on_shard_loss: As for `RayMemory`.

        Raises:
            InputError: If there is no such pool, or an argument is wrong.
            ShardUnavailableError: If a shard of it does not answer.
        """
        given: dict[str, Any] = {"request_timeout_s": request_timeout_s, "on_shard_loss": on_shard_loss}
        cls(address=address, namespace=namespace, name=name, **given)  # refuses what is wrong before it is used
        pool = found_pool(name, namespace, address, request_timeout_s)
        memory = cls(address=address, **pool.config.arguments() | given)
        memory._shards.use(pool)
        states = pool.everywhere("state")
        memory.learn(states)
        about = about_of(states)
        if about is not None:
            memory._params, memory.tunable, memory.provenance = about
        return memory
