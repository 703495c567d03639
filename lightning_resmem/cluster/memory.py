"""A memory over a cluster: a pool of Ray actors, each with a shard, behind the interface of all memories."""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_resmem.cluster import ranks
from lightning_resmem.cluster.client import BYTES_UNDERWAY, ShardClient
from lightning_resmem.cluster.config import PoolConfig, absolute, check_address
from lightning_resmem.cluster.sharding import merge
from lightning_resmem.errors import EmptyMemoryError, InputError, ShardUnavailableError, StorageError
from lightning_resmem.functional import neighbor_weights
from lightning_resmem.memory.answers import Neighbors
from lightning_resmem.memory.checks import as_ids, checked_changes, checked_rows, repeated
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.memory.storage import disk
from lightning_resmem.memory.storage.saved import manifest, read_saved
from lightning_resmem.memory.storage.tensor_file import Streamed
from lightning_resmem.memory.values.dense import DenseConfig
from lightning_resmem.memory.values.interface import Values
from lightning_resmem.memory.values.sparse import SparseConfig
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Task

if TYPE_CHECKING:  # Ray takes a second to import: it is imported when a cluster is needed
    from lightning_resmem.cluster.requests import Request

_log = logging.getLogger("lightning_resmem")

# Bytes that are read from a shard or a file at once.
_CHUNK_BYTES = 16 * 2**20
# Arrays that are larger are put into Ray's object store once, not sent with every request.
_INLINE_BYTES = 2**16


class RayMemory(ResidualMemory):
    """A memory whose rows are spread over a Ray cluster: for rows that no single machine should hold.

    It answers as a `LocalMemory` with the same rows does. Making one contacts nothing; the cluster is reached when the
    first rows are added: the one that runs, or, on a single machine without one, one that is started here. Every rank
    of a job sends its rows straight to the shards, and all ranks ask the same ones.

    Args:
        num_shards: Over how many actors the rows are spread, by a hash of their ids.
        task: What a residual is; `Multiclass()` by default.
        params: How the memory is read; measured at `build` by default.
        index: As for `LocalMemory`, for each shard. An index that has to be trained is trained once, on a sample of
            all rows.
        values: As for `LocalMemory`.
        key_dtype: As for `LocalMemory`.
        address: Of the cluster; None finds a running one, or starts one on a single machine.
        namespace: Ray namespace of the actors.
        name: Keeps the actors when this process ends, for `RayMemory.connect(name)`, until `shutdown()`. By default
            they end with the process (rank 0) that made them.
        cpus_per_shard: CPUs of each actor; its searches use so many threads.
        gpus_per_shard: GPUs of each actor; its rows are kept there.
        placement: `"SPREAD"` over nodes as evenly as possible, `"STRICT_SPREAD"` each on its own, or `"PACK"` together.
        storage_path: Where shards keep their rows, so that they survive the end of a process: a path or a URL that
            fsspec knows, in which the pool makes a directory of its own and deletes it when it ends. A shard can only
            move to another node if that node sees the path, too. By default the temporary directory of each node.
        request_timeout_s: Seconds after which a request, or a place for the shards, is given up.
        replicas: Copies of each shard, on different nodes if possible. With 2, the death of one is not noticed.
        on_shard_loss: `"raise"` `ShardUnavailableError`, or answer from the rest with `"partial"`: `metrics()` tells
            which share of the rows was asked.

    Raises:
        InputError: If an argument is not one of these.

    Example:
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
        super().__init__(task, params)
        check_address(address)
        config = PoolConfig(
            num_shards=num_shards,
            task=self.task,
            index=index,
            values=values,
            key_dtype=key_dtype,
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
        # Checks what a shard is made with, and knows what it will keep.
        self._template = LocalMemory(self.task, params, index, values, key_dtype)
        self._shards = ShardClient(config, address)
        self._shape: tuple[int, int] | None = None
        self._rows, self._last_id, self._built = 0, -1, False
        self._reset()

    # -- rows

    def __len__(self) -> int:
        return self._rows

    @property
    def ids(self) -> Tensor:
        self.build()
        return torch.cat([torch.from_numpy(part.copy()) for part in self._ask("ids")]).sort().values

    @property
    def device(self) -> torch.device:
        """The CPU: answers come from there, wherever the shards keep their rows."""
        return torch.device("cpu")

    def add(self, embeddings: Tensor, outputs: Tensor, targets: Tensor, ids: Tensor | None = None) -> None:
        embeddings, outputs, targets, ids = checked_rows(
            self.task, embeddings, outputs, targets, ids, self._shape, self._last_id + 1
        )
        if self._built and len(ids) and int(ids.min()) <= self._last_id:
            known = ids[self._shards.has(ids)]
            if len(known):
                raise repeated(known)
        self._shape = (embeddings.shape[1], outputs.shape[1])
        # What travels and is journaled is what a shard stores: with sparse values a small part of the outputs.
        config = self._shards.config
        chunk = LocalMemory(self.task, ResMemParams(), "exact", config.values, config.key_dtype)
        chunk.add(embeddings, outputs, targets, ids)
        self._send("add", chunk.stored(slice(None)), {"num_outputs": torch.tensor(outputs.shape[1])})
        self._rows += len(ids)
        self._last_id = max(self._last_id, int(ids.max()) if len(ids) else -1)

    def build(self) -> None:
        if self._built:
            return
        self.learn(self.build_shards())

    def remove(self, ids: Tensor) -> None:
        ids = as_ids(ids).cpu()
        self._check_known(ids)
        self._send("remove", {"ids": ids})
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
        self._send("update", {"ids": ids, **changes})

    def clear(self) -> None:
        self._shards.forget()
        if self._shards.name is not None and self._shards.leads:
            try:
                self._shards.send_all("clear", {})
                self._shards.flush()
            except (ShardUnavailableError, StorageError) as error:
                _log.warning("The shards cannot be cleared, so they are ended; others will be started. %s", error)
                self._shards.close()
        self._reset()

    # -- answers

    @property
    def num_outputs(self) -> int:
        self.build()
        assert self._shape is not None
        return self._shape[1]

    def search(self, queries: Tensor, k: int) -> Neighbors:
        return self.search_async(queries, k).result()

    def search_async(self, queries: Tensor, k: int) -> "PendingSearch":
        """Start a search and return at once: the shards look while this process does something else.

        Args:
            queries: Shape `(B, D)`, on any device.
            k: As for `search`.

        Returns:
            Its `result()` is what `search` returns.
        """
        self.build()
        assert self._shape is not None
        queries, k = self._checked_search(queries, self._shape[0], k)
        held = _held(queries.detach().float().cpu().numpy())
        request = self._shards.ask("search", held, k, partial=self._is_partial)
        return PendingSearch(request, len(queries), k, queries.device)

    def sums(self, neighbors: Neighbors) -> tuple[Tensor, Tensor]:
        self.build()
        assert self._shape is not None
        device = neighbors.distances.device
        with torch.no_grad():
            weights = neighbor_weights(neighbors.distances, self.params.sigma)
        held = _held(neighbors.ids.cpu().numpy(), weights.cpu().numpy())
        temperature = self.params.softmax_temperature
        answers = [part for part in self._ask("weighted_sums", held, temperature) if part is not None]
        if not answers:
            zeros = torch.zeros(len(weights), self._shape[1], device=device)
            return zeros, zeros.clone()
        sums = answers[0].copy()
        for part in answers[1:]:
            sums += part
        total = torch.from_numpy(sums)
        return total[0].to(device), total[1].to(device)

    def fetch(self, ids: Tensor) -> Values:
        rows, values = self._stored(as_ids(ids).cpu()), self._empty_values()
        values.replace(rows)
        return values

    def stats(self) -> dict[str, Any]:
        """Rows, key width, outputs, bytes, index, values, key_dtype and device, recall of an approximate index.

        `shards` lists for each replica of each shard whether it is alive, its rows, bytes, node, host, pid, restarts
        and the times of its searches, `search_p50_ms` and `search_p99_ms`.
        """
        width, num_outputs = self._shape or (0, 0)
        stats = self._template.stats() | {"rows": len(self), "width": width, "outputs": num_outputs, "shards": []}
        if self._shards.name is None:
            return stats
        self._shards.flush()
        answers = self._shards.pool.stats(self._is_partial)
        stats["shards"] = [shard for replicas in answers for shard in replicas]
        alive = [max(replicas, key=lambda shard: bool(shard["alive"])) for replicas in answers]
        filled = [shard for shard in alive if shard["rows"]]
        stats["bytes"] = sum(shard["bytes"] for shard in filled)
        if filled:
            stats |= {name: filled[0][name] for name in ("index", "values", "device")}
            for name in filled[0].keys() & {"nprobe", "ef_search"}:
                stats[name] = max(shard[name] for shard in filled)
            if "recall" in filled[0]:
                rows = sum(shard["rows"] for shard in filled)
                stats["recall"] = sum(shard["recall"] * shard["rows"] for shard in filled) / rows
        return stats

    def metrics(self) -> dict[str, float]:
        """`resmem/shards_alive`, how many shards answer, and `resmem/coverage`, the share of the rows they hold."""
        if not self._shards.is_open:
            return {}
        alive = self._shards.pool.alive()
        covered = sum(rows for rows, is_alive in zip(self._shard_rows, alive, strict=True) if is_alive)
        return {
            "resmem/shards_alive": float(sum(alive)),
            "resmem/coverage": covered / max(1, sum(self._shard_rows)),
        }

    def rehearse(self, rows: int | None, width: int) -> None:
        self._shards.rehearse()
        self._template.rehearse(rows, width)

    def estimate_bytes(self, rows: int, width: int, num_outputs: int) -> dict[str, int]:
        # The shards hold the rows: this process only those on their way.
        return {"underway": min(BYTES_UNDERWAY, rows * (width + num_outputs + 4) * 4)}

    # -- disk

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Save to one directory, as a `LocalMemory` does: it can be loaded as either, with any number of shards.

        Rows go from the shards to the files part by part; this process holds their ids and a few MiB.
        """
        disk.as_path(directory)  # refused before the memory is built
        self.build()
        owned = [torch.from_numpy(part.copy()) for part in self._ask("ids")]
        ids, order = torch.cat(owned).sort()
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).split([len(o) for o in owned])
        first = next(shard for shard, own in enumerate(owned) if len(own))
        sample = self._shards.rows(first, 0, 1)

        def streamed(name: str) -> Streamed:
            step = max(1, _CHUNK_BYTES // max(1, sample[name].nbytes))

            def parts() -> Iterator[tuple[Tensor, Tensor]]:
                for shard, own in enumerate(places):
                    for start in range(0, len(own), step):
                        yield own[start : start + step], self._shards.rows(shard, start, start + step, [name])[name]

            return Streamed((len(ids), *sample[name].shape[1:]), sample[name].dtype, parts)

        index, _ = self._shards.ask_one(first, "index")
        described = manifest(
            self.task,
            self.params,
            self.tunable,
            self.provenance,
            len(ids),
            index if isinstance(index, FaissIndex) else "exact",
            self._empty_values(),
        )
        return disk.write(directory, described, {name: ids if name == "ids" else streamed(name) for name in sample})

    @classmethod
    def load(cls, directory: str | os.PathLike[str], num_shards: int = 1, **options: Any) -> "RayMemory":
        """Spread a saved memory over a cluster; a `LocalMemory` or a `RayMemory` has saved it.

        Args:
            directory: As given to `save`.
            num_shards: Any number.
            **options: The arguments of `RayMemory` from `address` on.

        Raises:
            StorageError: If the directory is missing, incomplete, damaged or of another format version.
        """
        saved = read_saved(directory, mmap=True)
        disk.verify(directory, saved.manifest)
        dtype = saved.tensors["keys"].dtype
        memory = cls(num_shards, saved.task, saved.params, saved.index, saved.config, dtype, **options)
        memory.provenance, memory.tunable = saved.provenance, saved.tunable
        num_outputs, ids = saved.values.num_outputs, saved.tensors["ids"]
        tensors = {name: saved.tensors[name] for name in ("keys", "ids", *saved.values.names)}
        step = max(1, _CHUNK_BYTES // sum(tensor[:1].nbytes for tensor in tensors.values()))
        memory._shape = saved.tensors["keys"].shape[1], num_outputs
        for start in range(0, len(ids), step):
            rows = {name: tensor[start : start + step] for name, tensor in tensors.items()}
            memory._send("add", rows, {"num_outputs": torch.tensor(num_outputs)})
            memory._rows += len(rows["ids"])
        memory.build()
        return memory

    # -- the pool

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
        from lightning_resmem.cluster import pool as pools

        given: dict[str, Any] = {"request_timeout_s": request_timeout_s, "on_shard_loss": on_shard_loss}
        cls(address=address, namespace=namespace, name=name, **given)  # refuses what is wrong before it is used
        pools.reach(address, starts=False)
        pool = pools.Pool.find(name, namespace, request_timeout_s)
        config = pool.config
        memory = cls(
            config.num_shards,
            config.task,
            None,
            config.index,
            config.values,
            config.key_dtype,
            address=address,
            namespace=namespace,
            name=name,
            cpus_per_shard=config.cpus_per_shard,
            gpus_per_shard=config.gpus_per_shard,
            placement=config.placement,
            storage_path=config.storage_path,
            request_timeout_s=request_timeout_s,
            replicas=config.replicas,
            on_shard_loss=on_shard_loss,
        )
        memory._shards.use(pool)
        states = pool.everywhere("state")
        memory.learn(states)
        memory._built = all(state["built"] for replicas in states for state in replicas if state["rows"])
        about = json.loads(next((state["about"] for (state, *_) in states if state["about"]), "{}"))
        if about:
            memory.tunable, memory.provenance = about["tunable"], about["provenance"]
            memory._params = None if about["params"] is None else ResMemParams(**about["params"])
        return memory

    def shutdown(self) -> None:
        """End the actors and delete what they kept, for all processes that use them. What was saved stays."""
        self._shards.close()
        self._reset()

    def join(self, group: dist.ProcessGroup) -> None:
        ranks.join(self._shards, group)

    def gather(self, group: dist.ProcessGroup) -> None:
        for known, shape in ranks.flush(self._shards, self._shape, group):
            self.agree(known, shape)
        self.learn(ranks.on_rank_zero(self.build_shards, group))

    def publish(self) -> None:
        if self._shards.name is not None and self._shards.leads:
            params = None if self._params is None else asdict(self._params)
            about = json.dumps({"params": params, "tunable": self.tunable, "provenance": self.provenance})
            self._shards.send_all("describe", {"about": torch.frombuffer(bytearray(about.encode()), dtype=torch.uint8)})
            self._shards.flush()

    # -- the shards together, and what a process knows of them

    @property
    def shards(self) -> ShardClient:
        """The way to the pool."""
        return self._shards

    @property
    def shape(self) -> tuple[int, int] | None:
        """`(D, C)`, as far as this process knows."""
        return self._shape

    def agree(self, known: list[list[int]], shape: tuple[int, int] | None) -> None:
        """Take in what another process knows."""
        self._shards.agree(known)
        if self._shape is not None and shape is not None and self._shape != shape:
            raise InputError(f"Ranks hold rows of widths {self._shape} and {shape}: does the model differ by rank?")
        self._shape = self._shape or shape

    def build_shards(self) -> list[list[dict[str, Any]]]:
        """Build all shards; what `learn` wants, for each replica of each."""
        self._shards.flush()
        if self._shape is None:
            raise EmptyMemoryError("The memory is empty: add(embeddings, outputs, targets) before it is used.")
        from lightning_resmem.cluster.building import build

        self.publish()
        states = build(self._shards.pool, self._shards.config.index, self.show_progress)
        if not any(state["rows"] for (state, *_) in states):
            raise EmptyMemoryError("The memory is empty: add(embeddings, outputs, targets) before it is used.")
        return states

    def learn(self, states: list[list[dict[str, Any]]]) -> None:
        """Take in what is known of shards that were built."""
        self.agree([[state["number"] for state in replicas] for replicas in states], None)
        firsts = [replicas[0] for replicas in states]
        self._shard_rows = [state["rows"] for state in firsts]
        self._rows, self._built = sum(self._shard_rows), True
        self._last_id = max(state["last_id"] for state in firsts)
        self._shape = next(((s["width"], s["outputs"]) for s in firsts if s["rows"]), self._shape)

    # -- details

    def _empty_values(self) -> Values:
        """Values of the kind that the shards keep, without rows."""
        assert self._shape is not None
        return self._template.values_config(self._shape[1]).build(self.task, self._shape[1])

    def _reset(self) -> None:
        self._forget()
        self._rows, self._last_id, self._built = 0, -1, False
        self._shape = None
        self._shard_rows = [0] * self._shards.config.num_shards

    @property
    def _is_partial(self) -> bool:
        return self._shards.config.on_shard_loss == "partial"

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all shards, None of those that are left out."""
        self.build()
        partial = self._is_partial and method == "weighted_sums"
        return self._shards.ask(method, *arguments, partial=partial).result()

    def _stored(self, ids: Tensor) -> dict[str, Tensor]:
        """Rows as they are stored, in the order of `ids` `(n,)`."""
        self.build()
        sample = self._shards.rows(next(shard for shard, rows in enumerate(self._shard_rows) if rows), 0, 1)
        rows = {name: row.new_empty(len(ids), *row.shape[1:]) for name, row in sample.items()}
        for positions, data in self._shards.ask_owners("fetch", ids):
            for name, tensor in safetensors.torch.load(data).items():
                rows[name][positions] = tensor
        return rows

    def _query_rows(self, ids: Tensor) -> Tensor:
        return self._stored(as_ids(ids).cpu())["keys"].float()

    def _check_known(self, ids: Tensor) -> None:
        if len(ids) and not len(self):
            raise InputError(f"ids {ids[:5].tolist()} are not in the memory: it is empty.")
        if len(ids):
            self.build()
            unknown = ids[~self._shards.has(ids)][:5].tolist()
            if unknown:
                raise InputError(f"ids {unknown} are not in the memory. `memory.ids` lists those that are.")

    def _send(self, operation: str, rows: dict[str, Tensor], extra: dict[str, Tensor] | None = None) -> None:
        self._shards.send(operation, rows, extra)
        self._built = False

    def __repr__(self) -> str:
        rows = "empty" if self._shape is None else f"{len(self)} rows x {self._shape[0]}, {self._shape[1]} outputs"
        return f"{type(self).__name__}({rows}, num_shards={self._shards.config.num_shards})"


class PendingSearch:
    """A search that the shards are at work on: see `RayMemory.search_async`."""

    def __init__(self, request: "Request", queries: int, k: int, device: torch.device) -> None:
        self._request, self._queries, self._k, self._device = request, queries, k, device

    def result(self, timeout: float | None = None) -> Neighbors:
        """The neighbours, when they are found.

        Args:
            timeout: Seconds from the start of the search; by default the memory's `request_timeout_s`.

        Raises:
            ShardUnavailableError: If a shard does not answer in time.
        """
        answers = [answer for answer in self._request.result(timeout) if answer is not None]
        parts = [(torch.from_numpy(distances.copy()), torch.from_numpy(ids.copy())) for distances, ids in answers]
        distances, ids = merge([*parts, (torch.empty(self._queries, 0), torch.empty(self._queries, 0).long())], self._k)
        missing = self._k - distances.shape[1]
        if missing > 0:
            distances = torch.nn.functional.pad(distances, (0, missing), value=torch.inf)
            ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
        return Neighbors(distances.to(self._device), ids.to(self._device))


def _held(*arrays: np.ndarray[Any, Any]) -> Any:
    """Arrays for all shards: in the object store, once, if they are large."""
    if sum(array.nbytes for array in arrays) <= _INLINE_BYTES:
        return arrays
    import ray

    return ray.put(arrays)
