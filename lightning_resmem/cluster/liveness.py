"""Which shards answer: one that a request found dead is left alone until it is back, and told to copy lost rows."""

import random
import threading
import time
import warnings
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from lightning_resmem.cluster.config import PoolConfig
from lightning_resmem.cluster.durable import RowsLostError
from lightning_resmem.errors import ResMemWarning, ShardUnavailableError


class Liveness:
    """What a process knows of the actors of a pool, from the answers that it got and those that did not come.

    Args:
        config: Of the pool.
        actors: For each shard its replicas.
        known: The last change that each has acknowledged; whoever sends changes keeps it up to date.

    Attributes:
        nodes: For each shard the nodes of its replicas, when they were last heard of.
    """

    def __init__(self, config: PoolConfig, actors: list[list[Any]], known: list[list[int]]) -> None:
        self._config, self._actors, self._known = config, actors, known
        self.nodes = [["unknown"] * config.replicas for _ in actors]
        self._down: dict[tuple[int, int], Any] = {}  # and a request that will tell when they are back
        self._answered = [time.monotonic()] * len(actors)
        self._left_out: set[int] = set()
        self._random = random.Random()  # its own: users seed the global one, and all ranks alike
        self._lock = threading.Lock()

    def replicas_in_any_order(self, shard: int) -> list[int]:
        """The replicas of a shard that answer as far as is known, shuffled: each gets its share of the requests."""
        count = self._config.replicas
        return [r for r in self._random.sample(range(count), count) if not self.is_down(shard, r)]

    def is_down(self, shard: int, replica: int) -> bool:
        """Whether a replica has failed and not come back."""
        probe = self._down.get((shard, replica))
        if probe is None:
            return False
        if not ray.wait([probe], timeout=0)[0]:
            return True
        with self._lock:
            self._down.pop((shard, replica), None)
        try:
            self.nodes[shard][replica], _ = ray.get(probe)
        except RayActorError:
            return self.mark_down(shard, replica)
        except RayTaskError as error:
            return self.mark_down(shard, replica, isinstance(error.cause, RowsLostError))
        return False

    def mark_down(self, shard: int, replica: int, lost_rows: bool = False) -> bool:
        """Leave a replica alone until it answers again; without its rows it is told to copy them from another."""
        with self._lock:
            if (shard, replica) not in self._down:
                if lost_rows and self._config.replicas > 1:
                    self.have_copied(shard, replica)
                self._down[shard, replica] = self._actors[shard][replica].ping.remote(self._known[shard][replica])
        return True

    def have_copied(self, shard: int, replica: int) -> Any:
        """Have a replica that lost its rows copy those of another; the reference tells when it has."""
        peer = self._actors[shard][(replica + 1) % self._config.replicas]
        return self._actors[shard][replica].copy_from.remote(peer, self._known[shard][replica])

    def alive(self) -> list[bool]:
        """Whether each shard has a replica that is not down."""
        return [
            not all(self.is_down(shard, replica) for replica in range(self._config.replicas))
            for shard in range(self._config.num_shards)
        ]

    def answered(self, shard: int) -> None:
        """Note that a shard has answered."""
        self._answered[shard] = time.monotonic()
        self._left_out.discard(shard)

    def left_out(self, shard: int) -> None:
        """Note that an answer has nothing of a shard; warns when that begins."""
        if shard not in self._left_out:
            self._left_out.add(shard)
            warnings.warn(
                f"on_shard_loss='partial': answers have nothing from shard {shard} of {self._config.num_shards} until "
                "it is back. `memory.metrics()` tells what share of the rows is asked.",
                ResMemWarning,
                stacklevel=2,
            )

    def unavailable(self, shard: int, reason: str, timeout: float) -> ShardUnavailableError:
        """The error for a shard that does not answer within the timeout."""
        nodes = ", ".join(node[:12] for node in self.nodes[shard])
        age = time.monotonic() - self._answered[shard]
        return ShardUnavailableError(
            f"Shard {shard} of {self._config.num_shards} (pool {self._config.name!r}, last on node {nodes}) is not "
            f"available: {reason.rstrip('.')}. Its last answer was {age:.1f} s ago. `ray status` and `ray list nodes` "
            "show what is left of the cluster; a shard comes back when a node has room for it and can read "
            f"{self._config.storage_path}. request_timeout_s={timeout:g} can be raised, replicas=2 survives the "
            'loss of a node, and on_shard_loss="partial" answers without it.'
        )
