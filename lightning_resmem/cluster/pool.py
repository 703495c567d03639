"""The actors of a pool: finding a cluster, placing shards on it, and requests that end, whatever dies."""

import itertools
import logging
import math
import os
import random
import re
import socket
import tempfile
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util import list_named_actors
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lightning_resmem.cluster.config import PoolConfig, check_answers, host_and_port, knock, no_cluster
from lightning_resmem.cluster.shard import SEARCHES, RowsLostError, Shard
from lightning_resmem.cluster.sharding import assign
from lightning_resmem.errors import InputError, ResMemError, ResMemWarning, ShardUnavailableError, first_line

_log = logging.getLogger("lightning_resmem")

# Calls that a shard works on at the same time.
_CONCURRENCY = 16
# How long shards may take to delete what they kept when they are ended.
_CLOSE_SECONDS = 10.0
# What a Ray that is started here keeps for objects in flight.
_OBJECT_STORE_BYTES = 512 * 2**20


def reach(address: str | None, hosts: Collection[str] = (), cpus: float = 1, starts: bool = True) -> str:
    """Connect this process to a cluster, unless it is already: a running one, or one that is started here.

    Args:
        address: Of a cluster; None looks for a running one.
        hosts: The machines of this job: on more than one of them nothing is started here.
        cpus: What shards need; a cluster that is started here has at least so many.
        starts: Whether one may be started here.

    Returns:
        The address that others connect to.

    Raises:
        InputError: If no cluster answers, or there is none.
    """
    if not ray.is_initialized():
        running = address or os.environ.get("RAY_ADDRESS") or _latest_cluster()
        if running is not None:
            _join(running)
        elif not starts:
            raise InputError("address=None, but no Ray cluster is running on this machine: give the address of one.")
        elif len(set(hosts)) > 1:
            raise InputError(
                f"address=None, but no Ray cluster is running and this job has {len(set(hosts))} machines "
                f"({', '.join(sorted(set(hosts)))}). Start one before the job: `ray start --head --port=6379` on the "
                "first machine and `ray start --address=FIRST:6379` on the others (under SLURM: `srun ray "
                "symmetric-run --address FIRST:6379 -- python script.py`)."
            )
        else:
            count = max(os.cpu_count() or 1, math.ceil(cpus))
            ray.init(
                address="local",
                num_cpus=count,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
            )
            _log.info("No Ray cluster is running: started a local one with %d CPUs.", count)
    connected = str(ray.get_runtime_context().gcs_address)
    if address and not _is_same(address, connected):
        raise InputError(
            f"address={address!r}, but this process is connected to the Ray cluster at {connected}, and it can be in "
            "one only: leave address out, or call ray.shutdown() before."
        )
    return connected


def _is_same(address: str, connected: str) -> bool:
    """Whether two addresses `HOST:PORT` are one; also where that cannot be told, as for "auto"."""
    try:
        first, second = ((socket.gethostbyname(host), port) for host, port in map(host_and_port, (address, connected)))
    except OSError:
        return True
    return "://" in address or ":" not in address or first == second


class Write(NamedTuple):
    """A change on its way to one replica."""

    ref: Any
    shard: int
    replica: int
    key: str
    operation: str
    data: Any
    size: int


class Pool:
    """Handles of the actors of all shards, and what is known of them.

    Args:
        config: What the pool was made with.
        actors: For each shard its replicas.
        timeout: How long a request may take, in seconds.
    """

    def __init__(self, config: PoolConfig, actors: list[list[Any]], timeout: float) -> None:
        self.config, self.actors, self.timeout = config, actors, timeout
        # The last change that each replica has acknowledged to this process.
        self.known = [[0] * config.replicas for _ in actors]
        self.down: dict[tuple[int, int], Any] = {}  # and a request that will tell when they are back
        self._nodes = [["unknown"] * config.replicas for _ in actors]
        self._answered = [time.monotonic()] * len(actors)
        self._left_out: set[int] = set()
        self._random = random.Random()  # its own: users seed the global one, and all ranks alike
        self._lock = threading.Lock()
        self._job = ray.get_runtime_context().get_job_id()

    @property
    def is_reachable(self) -> bool:
        """Whether this process is still connected to Ray as it was; `ray.shutdown()` ends that."""
        return ray.is_initialized() and bool(ray.get_runtime_context().get_job_id() == self._job)

    @classmethod
    def create(cls, config: PoolConfig, timeout: float) -> "Pool":
        """Start the actors.

        Raises:
            InputError: If there is a pool of that name.
            ShardUnavailableError: If the cluster has no room for them within the timeout.
        """
        assert config.name is not None
        nodes = _reserve(config, timeout)
        copies = [itertools.count() for _ in range(config.num_shards)]
        actors: list[list[Any]] = [[None] * config.replicas for _ in range(config.num_shards)]
        # Ray's annotations do not know of the groups.
        actor = cast(Any, ray.remote)(concurrency_groups={SEARCHES: 1})(Shard)
        # Shard 0 first: if there is a pool of that name, the others are not started.
        for shard, node in sorted(zip(assign(nodes, config.num_shards), nodes, strict=True)):
            replica = next(copies[shard])
            try:
                actors[shard][replica] = actor.options(
                    name=_actor_name(config.name, shard, replica),
                    namespace=config.namespace,
                    lifetime="detached" if config.detached else None,
                    num_cpus=config.cpus_per_shard,
                    num_gpus=config.gpus_per_shard,
                    max_restarts=-1,
                    max_task_retries=-1,
                    max_concurrency=_CONCURRENCY,
                    # Soft: when its node is gone, an actor is started again wherever there is room.
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
                ).remote(config, shard, replica)
            except ValueError as error:
                if "already" not in str(error):
                    raise
                raise InputError(
                    f"name={config.name!r} is a pool that is there already: RayMemory.connect({config.name!r}) finds "
                    "it, and its shutdown() ends it. Or choose another name."
                ) from error
        pool = cls(config, actors, timeout)
        try:
            pool.ping()
        except ShardUnavailableError:
            pool.close()  # those that have started
            raise
        return pool

    @classmethod
    def find(cls, name: str, namespace: str, timeout: float) -> "Pool":
        """The pool that another process has made.

        Raises:
            InputError: If there is none of that name.
            ShardUnavailableError: If a shard of it does not answer.
        """
        try:
            first = ray.get_actor(_actor_name(name, 0, 0), namespace)
            config = cast(PoolConfig, ray.get(first.config.remote(), timeout=timeout))
            actors = [
                [ray.get_actor(_actor_name(name, shard, replica), namespace) for replica in range(config.replicas)]
                for shard in range(config.num_shards)
            ]
        except ValueError as error:
            raise InputError(
                f"name={name!r} is no pool in the namespace {namespace!r} of this cluster. A pool without a name ends "
                "with the process that made it: give RayMemory(name=...) to find it from elsewhere."
            ) from error
        except (GetTimeoutError, RayActorError) as error:
            raise ShardUnavailableError(
                f"name={name!r} is a pool whose first shard does not answer within request_timeout_s={timeout:g} "
                f"({first_line(error)}). `ray status` shows whether a node has room for it; give a longer "
                "request_timeout_s if it has to read many rows."
            ) from error
        pool = cls(config, actors, timeout)
        pool.ping()
        return pool

    # -- questions

    def everywhere(self, method: str, *arguments: Any, partial: bool = False) -> list[list[Any]]:
        """The answers of all replicas of all shards.

        Args:
            method: Of `Shard`.
            *arguments: The same for all.
            partial: Whether those that are known to be down are left out: their answer is None.
        """
        refs = [
            [
                None if partial and self.is_down(shard, replica) else getattr(actor, method).remote(*arguments)
                for replica, actor in enumerate(replicas)
            ]
            for shard, replicas in enumerate(self.actors)
        ]
        deadline = time.monotonic() + self.timeout

        def answer(ref: Any, shard: int, replica: int) -> Any:
            try:
                return None if ref is None else self.receive(ref, shard, replica, deadline)
            except _LostRowsError as error:
                raise self.unavailable(shard, str(error)) from error

        return [[answer(ref, shard, replica) for replica, ref in enumerate(found)] for shard, found in enumerate(refs)]

    def stats(self, partial: bool) -> list[list[dict[str, Any]]]:
        """Numbers about all replicas of all shards; those that are down, where allowed, only say so."""
        answers = self.everywhere("stats", partial=partial)
        return [
            [
                {"shard": shard, "replica": replica, "alive": False, "node": self._nodes[shard][replica], "rows": 0}
                if stats is None
                else {**stats, "alive": True}
                for replica, stats in enumerate(replicas)
            ]
            for shard, replicas in enumerate(answers)
        ]

    def ping(self) -> None:
        """Wait until all replicas are there, and learn where."""
        for shard, replicas in enumerate(self.everywhere("ping")):
            self._nodes[shard] = [node for node, _ in replicas]

    def replicas_in_any_order(self, shard: int) -> list[int]:
        """The replicas of a shard that answer as far as is known, shuffled: each gets its share of the requests."""
        count = self.config.replicas
        return [r for r in self._random.sample(range(count), count) if not self.is_down(shard, r)]

    def is_down(self, shard: int, replica: int) -> bool:
        """Whether a replica has failed and not come back."""
        probe = self.down.get((shard, replica))
        if probe is None:
            return False
        if not ray.wait([probe], timeout=0)[0]:
            return True
        with self._lock:
            self.down.pop((shard, replica), None)
        try:
            self._nodes[shard][replica], _ = ray.get(probe)
        except RayActorError:
            return self.mark_down(shard, replica)
        except RayTaskError as error:
            return self.mark_down(shard, replica, isinstance(error.cause, RowsLostError))
        return False

    def mark_down(self, shard: int, replica: int, lost_rows: bool = False) -> bool:
        """Leave a replica alone until it answers again; without its rows it is told to copy them from another."""
        with self._lock:
            if (shard, replica) not in self.down:
                actor = self.actors[shard][replica]
                if lost_rows and self.config.replicas > 1:
                    self._copy(shard, replica)
                self.down[shard, replica] = actor.ping.remote(self.known[shard][replica])
        return True

    def answered(self, shard: int) -> None:
        """Note that a shard has answered."""
        self._answered[shard] = time.monotonic()
        self._left_out.discard(shard)

    def left_out(self, shard: int) -> None:
        """Note that an answer has nothing of a shard; warns when that begins."""
        if shard not in self._left_out:
            self._left_out.add(shard)
            warnings.warn(
                f"on_shard_loss='partial': answers have nothing from shard {shard} of {self.config.num_shards} until "
                "it is back. `memory.metrics()` tells what share of the rows is asked.",
                ResMemWarning,
                stacklevel=2,
            )

    def alive(self) -> list[bool]:
        """Whether each shard has a replica that is not down."""
        return [
            not all(self.is_down(shard, replica) for replica in range(self.config.replicas))
            for shard in range(self.config.num_shards)
        ]

    def unavailable(self, shard: int, reason: str) -> ShardUnavailableError:
        """The error for a shard that does not answer."""
        nodes = ", ".join(node[:12] for node in self._nodes[shard])
        age = time.monotonic() - self._answered[shard]
        return ShardUnavailableError(
            f"Shard {shard} of {self.config.num_shards} (pool {self.config.name!r}, last on node {nodes}) is not "
            f"available: {reason.rstrip('.')}. Its last answer was {age:.1f} s ago. `ray status` and `ray list nodes` "
            "show what is left of the cluster; a shard comes back when a node has room for it and can read "
            f"{self.config.storage_path}. request_timeout_s={self.timeout:g} can be raised, replicas=2 survives the "
            'loss of a node, and on_shard_loss="partial" answers without it.'
        )

    # -- changes, to all replicas

    def write(self, shard: int, operation: str, data: bytes) -> list[Write]:
        """Send a change to all replicas of a shard; `confirm` waits for each."""
        key = uuid.uuid4().hex
        held = ray.put(data) if self.config.replicas > 1 else data
        return [self._send(shard, replica, key, operation, held, len(data)) for replica in range(self.config.replicas)]

    def confirm(self, write: Write) -> None:
        """Wait until a change is made and kept.

        Raises:
            InputError: If the shard refuses it.
            ShardUnavailableError: If it cannot be reached within the timeout, or has lost its rows.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                number = self.receive(write.ref, write.shard, write.replica, deadline)
            except _LostRowsError:
                if self.config.replicas == 1 or time.monotonic() > deadline:
                    raise
                copied = self._copy(write.shard, write.replica)
                ray.wait([copied], timeout=max(0.0, deadline - time.monotonic()))
                write = self._send(*write[1:])
                continue
            self.known[write.shard][write.replica] = max(self.known[write.shard][write.replica], number)
            return

    def _send(self, shard: int, replica: int, key: str, operation: str, data: Any, size: int) -> Write:
        actor, known = self.actors[shard][replica], self.known[shard][replica]
        return Write(actor.apply.remote(key, operation, data, known), shard, replica, key, operation, data, size)

    def _copy(self, shard: int, replica: int) -> Any:
        peer = self.actors[shard][(replica + 1) % self.config.replicas]
        return self.actors[shard][replica].copy_from.remote(peer, self.known[shard][replica])

    # -- both

    def receive(self, ref: Any, shard: int, replica: int, deadline: float) -> Any:
        """An answer, or the error that it is."""
        try:
            answer = ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
        except GetTimeoutError:
            raise self.unavailable(shard, f"it did not answer within {self.timeout:g} s") from None
        except RayActorError as error:
            raise self.unavailable(shard, f"its process is gone ({first_line(error)})") from error
        except RayTaskError as error:
            if isinstance(error.cause, RowsLostError):
                raise _LostRowsError(str(self.unavailable(shard, str(error.cause)))) from error
            if isinstance(error.cause, ResMemError):
                raise error.cause from None
            raise
        self.answered(shard)
        return answer

    def close(self) -> None:
        """End all actors and delete what they kept; calling it again does nothing."""
        actors = [actor for replicas in self.actors for actor in replicas]
        self.actors = []
        if not self.is_reachable or not actors:
            return
        destroyed = [actor.destroy.options(max_task_retries=0).remote() for actor in actors]
        ray.wait(destroyed, num_returns=len(actors), timeout=min(_CLOSE_SECONDS, self.timeout))
        for actor in actors:
            ray.kill(actor)


class _LostRowsError(ShardUnavailableError):
    """A replica has lost its rows."""


def _latest_cluster() -> str | None:
    """The address of the cluster that `ray start` started on this machine, where Ray notes it.

    `address="auto"` would also join the Ray that another process keeps for itself, and that ends with that process.
    """
    noted = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    try:
        address = noted.read_text().strip()
        knock(address)  # what a Ray that was killed has noted stays
    except (OSError, ValueError):
        return None
    return address


def _join(address: str) -> None:
    check_answers(address)
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, ValueError) as error:  # no answer, or an address that there cannot be
        raise no_cluster(address, error) from error


def _reserve(config: PoolConfig, timeout: float) -> list[str]:
    """The node of each place that Ray finds for the shards."""
    bundle = {"CPU": config.cpus_per_shard, "GPU": config.gpus_per_shard}
    bundle = {name: amount for name, amount in bundle.items() if amount}
    count = config.num_shards * config.replicas
    group = placement_group([bundle] * count, strategy=config.placement)
    try:
        if not group.wait(timeout):
            free = ray.available_resources()
            existing = "; ".join(
                f"node {node['NodeID'][:12]} ({node['NodeManagerHostname']}): "
                + ", ".join(f"{name} {node['Resources'].get(name, 0):g}" for name in ("CPU", "GPU"))
                for node in ray.nodes()
                if node["Alive"]
            )
            raise ShardUnavailableError(
                f"There is no room for {config.num_shards} shards x {config.replicas} replicas with placement="
                f"{config.placement!r} within {timeout:g} s. Asked: {count} x {bundle}"
                f"{', each on a node of its own' if config.placement == 'STRICT_SPREAD' else ''}. The cluster has: "
                f"{existing}; free are CPU {free.get('CPU', 0):g}, GPU {free.get('GPU', 0):g}. {_others()}Use fewer "
                "shards, less for each (cpus_per_shard, gpus_per_shard), another placement, or add nodes."
            )
        nodes = placement_group_table(group)["bundles_to_node_id"]
        return [nodes[place] for place in range(count)]
    finally:
        # Only asked for: actors that live in a group die with it, and cannot move when a node is gone.
        remove_placement_group(group)


def _others() -> str:
    """What to do about the pools that the cluster has already, of this process and of others."""
    names = (re.fullmatch(r"(.+)/\d+\.\d+", actor["name"]) for actor in list_named_actors(all_namespaces=True))
    pools = Counter(name[1] for name in names if name)
    if not pools:
        return ""
    held = ", ".join(f"{name!r} ({count} actor{'s' * (count > 1)})" for name, count in sorted(pools.items()))
    return (
        f"Other pools of RayMemory hold a part of it: {held}. The shutdown() of a memory frees what its pool holds, "
        "RayMemory.connect(name).shutdown() that of a process which has ended. "
    )


def _actor_name(pool: str, shard: int, replica: int) -> str:
    return f"{pool}/{shard}.{replica}"
