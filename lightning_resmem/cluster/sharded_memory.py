"""The shards behind a `RayMemory`: what a process knows of them, and what the processes of a job agree on."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_resmem.cluster import ranks
from lightning_resmem.cluster.about import About, about_of
from lightning_resmem.cluster.client import BYTES_UNDERWAY, ShardClient
from lightning_resmem.cluster.config import PoolConfig
from lightning_resmem.cluster.files import in_parts
from lightning_resmem.cluster.measuring import measure_alike
from lightning_resmem.errors import EmptyMemoryError, InputError, ShardUnavailableError, StorageError
from lightning_resmem.memory.checks import as_ids
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.storage.saved import Saved
from lightning_resmem.memory.values.interface import Values
from lightning_resmem.params import ResMemParams

_log = logging.getLogger("lightning_resmem")

_EMPTY = "The memory is empty: add(embeddings, outputs, targets) before it is used."


class ShardedMemory(ResidualMemory):
    """A memory in shards, without a way to put rows in or to ask for any: `RayMemory` adds those.

    Methods, by what they are for. The shards: `shards`, `build`, `build_shards`, `clear`, `shutdown`. What this process
    knows of them: `shape`, `num_outputs`, `device`, `learn`, `agree`. The ranks of a job: `join`, `gather`, `publish`.
    Before there are rows: `rehearse`, `estimate_bytes`.

    Args:
        config: What the pool is made with, when it is needed.
        address: Of the cluster; None finds a running one, or starts one on a single machine.
        params: As for `RayMemory`.
    """

    def __init__(self, config: PoolConfig, address: str | None, params: ResMemParams | None) -> None:
        super().__init__(config.task, params)
        # Checks what a shard is made with, and knows what it will keep.
        self._template = LocalMemory(
            config.task,
            params,
            config.index,
            config.values,
            config.key_dtype,
            half_copy=config.half_copy,
            metric=config.metric,
        )
        self._shards = ShardClient(config, address)
        self._shape: tuple[int, int] | None = None
        self._rows, self._last_id, self._built = 0, -1, False
        self._reset()

    def __len__(self) -> int:
        self._drop_refused()
        return self._rows

    @property
    def device(self) -> torch.device:
        """The CPU: answers come from there, wherever the shards keep their rows."""
        return torch.device("cpu")

    @property
    def num_outputs(self) -> int:
        self.build()
        assert self._shape is not None
        return self._shape[1]

    @property
    def are_dated(self) -> bool:
        self.build()
        return self._are_dated

    def build(self) -> None:
        if self._built:
            return
        self.learn(self.build_shards())

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

    def shutdown(self) -> None:
        """End the actors and delete what they kept, for all processes that use them. What was saved stays."""
        self._shards.close()
        self._reset()

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
            raise EmptyMemoryError(_EMPTY)
        from lightning_resmem.cluster.building import build

        self.publish()
        if self._shards.config.metric == "within_class":
            measure_alike(self._shards)
        states = build(self._shards.pool, self._shards.config.index, self.show_progress)
        if not any(state["rows"] for (state, *_) in states):
            raise EmptyMemoryError(_EMPTY)
        return states

    def learn(self, states: list[list[dict[str, Any]]]) -> None:
        """Take in what is known of the shards."""
        self.agree([[state["number"] for state in replicas] for replicas in states], None)
        self._shards.take_refused()  # not counted below
        firsts = [replicas[0] for replicas in states]
        self._shards.learn_fillings([state["filling"] for state in firsts])
        self._shard_rows = [state["rows"] for state in firsts]
        self._rows = sum(self._shard_rows)
        self._built = all(state["built"] for replicas in states for state in replicas if state["rows"])
        self._last_id = max(state["last_id"] for state in firsts)
        self._are_dated = any(state["dated"] for state in firsts)
        self._shape = next(((s["width"], s["outputs"]) for s in firsts if s["rows"]), self._shape)

    # -- rows

    def staged(self) -> LocalMemory:
        config = self._shards.config
        return LocalMemory(self.task, ResMemParams(), config.index, config.values, config.key_dtype)

    def take(self, staged: LocalMemory) -> None:
        for rows in in_parts(staged.stored(slice(None))):
            self._send_rows(rows, staged.stats()["outputs"])

    def _send_rows(self, rows: dict[str, Tensor], num_outputs: int) -> None:
        """Send rows as the shards store them."""
        self._shape = rows["keys"].shape[1], num_outputs
        self._send("add", rows, {"num_outputs": torch.tensor(num_outputs)})
        self._rows += len(rows["ids"])
        self._last_id = max(self._last_id, int(rows["ids"].max()) if len(rows["ids"]) else -1)

    # -- the ranks of a job

    def join(self, group: dist.ProcessGroup) -> None:
        ranks.join(self._shards, group)

    def gather(self, group: dist.ProcessGroup) -> None:
        for known, shape in ranks.flush(self._shards, self._shape, group):
            self.agree(known, shape)
        self.learn(ranks.on_rank_zero(self.build_shards, group))

    def publish(self) -> None:
        if self._shards.name is not None and self._shards.leads:
            about = About(self._params, self.tunable, self.provenance)
            self._shards.send_all("describe", {"about": about.tensor()})
            self._shards.flush()

    # -- before there are any

    def rehearse(self, rows: int | None, width: int) -> None:
        self._shards.rehearse()
        self._template.rehearse(rows, width)

    def estimate_bytes(self, rows: int, width: int, num_outputs: int) -> dict[str, int]:
        # The shards hold the rows: this process only those on their way.
        return {"underway": min(BYTES_UNDERWAY, rows * (width + num_outputs + 4) * 4)}

    def __repr__(self) -> str:
        rows = "empty" if self._shape is None else f"{len(self)} rows x {self._shape[0]}, {self._shape[1]} outputs"
        return f"{type(self).__name__}({rows}, num_shards={self._shards.config.num_shards})"

    # -- details

    def _find_kept(self, saved: Saved) -> None:
        """Use the pool that another process has kept under this memory's name, if there is one.

        Raises:
            InputError: If it has other rows than were saved.
        """
        if not self._shards.find():
            return
        pool, wanted = self._shards.pool, self._shards.config.num_shards
        states = pool.everywhere("state")
        about = about_of(states)
        held = {} if about is None else about.provenance
        rows, fingerprint = sum(first["rows"] for first, *_ in states), held.get("fingerprint")
        found = (pool.config.num_shards, rows, fingerprint, pool.config.metric)
        if found != (wanted, len(saved.tensors["ids"]), saved.provenance.get("fingerprint"), saved.metric):
            name = self._shards.name
            raise InputError(
                f"name={name!r} is a pool of {found[0]} shards with {rows:,} rows, metric={found[3]!r}, not of "
                f"{wanted} shards with the {len(saved.tensors['ids']):,} rows, metric={saved.metric!r}, that are "
                f"saved in {saved.files.path}: end it by RayMemory.connect({name!r}).shutdown(), or give another name."
            )
        self.learn(states)

    def _take(self, saved: Saved) -> None:
        """Send the rows of a saved memory to the shards, unless these have them.

        Raises:
            StorageError: If it is damaged.
        """
        if self._rows:
            return
        saved.verify()
        for rows in in_parts(saved.rows):
            self._send_rows(rows, saved.values.num_outputs)
        if saved.key_map is not None:
            self._shards.send_all("measure", saved.key_map._asdict())

    def _send(self, operation: str, rows: dict[str, Tensor], extra: dict[str, Tensor] | None = None) -> None:
        self._shards.send(operation, rows, extra)
        self._built = False

    def _stored(self, ids: Tensor) -> dict[str, Tensor]:
        """Rows as they are stored, in the order of `ids` `(n,)`."""
        self.build()
        return self._shards.rows_of(ids, like=self._filled_shard())

    def _query_rows(self, ids: Tensor) -> Tensor:
        return self._stored(as_ids(ids).cpu())["keys"].float()

    def _row_times(self, ids: Tensor) -> Tensor:
        return self._stored(as_ids(ids).cpu())["times"]

    def _drop_refused(self) -> None:
        """Count the chunks no more that the shards did not take."""
        for ids in reversed(self._shards.take_refused()):
            self._rows -= len(ids)
            first, last = int(ids.min()), int(ids.max())
            if last == self._last_id and last - first + 1 == len(ids):  # added again, it gets the same ids
                self._last_id = first - 1

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all shards, None of those that are left out."""
        self.build()
        partial = self._is_partial and method == "weighted_sums"
        return self._shards.ask(method, *arguments, partial=partial).result()

    @property
    def _is_partial(self) -> bool:
        return self._shards.config.on_shard_loss == "partial"

    def _filled_shard(self) -> int:
        """A shard that has rows."""
        return next(shard for shard, rows in enumerate(self._shard_rows) if rows)

    def _check_known(self, ids: Tensor) -> None:
        if len(ids) and not len(self):
            raise InputError(f"ids {ids[:5].tolist()} are not in the memory: it is empty.")
        if len(ids):
            self.build()
            unknown = ids[~self._shards.has(ids)][:5].tolist()
            if unknown:
                raise InputError(f"ids {unknown} are not in the memory. `memory.ids` lists those that are.")

    def _empty_values(self) -> Values:
        """Values of the kind that the shards keep, without rows."""
        assert self._shape is not None
        return self._template.values_config(self._shape[1]).build(self.task, self._shape[1])

    def _reset(self) -> None:
        self._forget()
        self._rows, self._last_id, self._built = 0, -1, False
        self._shape, self._are_dated = None, False
        self._shard_rows = [0] * self._shards.config.num_shards
