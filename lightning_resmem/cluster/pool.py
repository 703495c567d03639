"""The pool of a memory: handles of its actors, changes to all of them, and answers that come or end in an error."""

import logging
import os
import time
import uuid
from typing import Any, NamedTuple, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from lightning_resmem.cluster import abandoned, placement
from lightning_resmem.cluster.config import PoolConfig
from lightning_resmem.cluster.durable import RowsLostError, withdrawal
from lightning_resmem.cluster.liveness import Liveness
from lightning_resmem.cluster.placement import actor_name
from lightning_resmem.errors import InputError, ResMemError, ShardUnavailableError, first_line

_log = logging.getLogger("lightning_resmem")

# How long shards may take to delete what they kept when they are ended.
_CLOSE_SECONDS = 10.0


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
    """Handles of the actors of all shards; its `liveness` is what is known of them.

    Args:
        config: What the pool was made with.
        actors: For each shard its replicas.
        timeout: How long a request may take, in seconds.
    """

    def __init__(self, config: PoolConfig, actors: list[list[Any]], timeout: float) -> None:
        self.config, self.actors, self.timeout = config, actors, timeout
        # The last change that each replica has acknowledged to this process.
        self.known = [[0] * config.replicas for _ in actors]
        # Which rows each shard has, as far as this process knows: see `DurableMemory.filling`.
        self.fillings: list[str | None] = [None] * len(actors)
        self.liveness = Liveness(config, actors, self.known)
        self._job = ray.get_runtime_context().get_job_id()
        self._claim: int | None = None

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
        assert config.storage_path is not None
        abandoned.sweep(os.path.dirname(config.storage_path))
        pool = cls(config, placement.start(config, timeout), timeout)
        try:
            pool.ping()
        except ShardUnavailableError:
            pool.close()  # those that have started
            raise
        if not config.detached:
            pool._claim = abandoned.claim(config.storage_path)
        return pool

    @classmethod
    def find(cls, name: str, namespace: str, timeout: float) -> "Pool":
        """The pool that another process has made.

        Raises:
            InputError: If there is none of that name.
            ShardUnavailableError: If a shard of it does not answer.
        """
        try:
            first = ray.get_actor(actor_name(name, 0, 0), namespace)
            config = cast(PoolConfig, ray.get(first.config.remote(), timeout=timeout))
            actors = [
                [ray.get_actor(actor_name(name, shard, replica), namespace) for replica in range(config.replicas)]
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
        is_down = self.liveness.is_down
        refs = [
            [
                None if partial and is_down(shard, replica) else getattr(actor, method).remote(*arguments)
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
        answers, nodes = self.everywhere("stats", partial=partial), self.liveness.nodes
        return [
            [
                {"shard": shard, "replica": replica, "alive": False, "node": nodes[shard][replica], "rows": 0}
                if stats is None
                else {**stats, "alive": True}
                for replica, stats in enumerate(replicas)
            ]
            for shard, replicas in enumerate(answers)
        ]

    def ping(self) -> None:
        """Wait until all replicas are there, and learn where."""
        for shard, replicas in enumerate(self.everywhere("ping")):
            self.liveness.nodes[shard] = [node for node, _ in replicas]

    def unavailable(self, shard: int, reason: str) -> ShardUnavailableError:
        """The error for a shard that does not answer."""
        return self.liveness.unavailable(shard, reason, self.timeout)

    # -- changes, to all replicas

    def write(self, shard: int, operation: str, data: bytes) -> list[Write]:
        """Send a change to all replicas of a shard; `confirm` waits for each."""
        key = uuid.uuid4().hex
        held = ray.put(data) if self.config.replicas > 1 else data
        return [self._send(shard, replica, key, operation, held, len(data)) for replica in range(self.config.replicas)]

    def withdraw(self, write: Write, ids: bytes) -> Write:
        """Have a replica take back a change that it was sent, and not make it if it arrives later.

        Args:
            write: What was sent.
            ids: Of its rows, as a safetensors file.
        """
        operation = "withdraw" if write.operation == "add" else "restore"
        return self._send(write.shard, write.replica, withdrawal(write.key), operation, ids, len(ids))

    def confirm(self, write: Write, deadline: float | None = None) -> None:
        """Wait until a change is made and kept.

        Args:
            write: What was sent.
            deadline: When to give up, as `time.monotonic()` tells; by default after the timeout.

        Raises:
            InputError: If the shard refuses it.
            ShardUnavailableError: If it cannot be reached within the timeout, or has lost its rows.
        """
        deadline = time.monotonic() + self.timeout if deadline is None else deadline
        while True:
            try:
                number = self.receive(write.ref, write.shard, write.replica, deadline)
            except _LostRowsError as error:
                if self.config.replicas == 1 or time.monotonic() > deadline:
                    raise ShardUnavailableError(str(error)) from error
                copied = self.liveness.have_copied(write.shard, write.replica)
                ray.wait([copied], timeout=max(0.0, deadline - time.monotonic()))
                write = self._send(*write[1:])
                continue
            self.known[write.shard][write.replica] = max(self.known[write.shard][write.replica], number)
            return

    def _send(self, shard: int, replica: int, key: str, operation: str, data: Any, size: int) -> Write:
        actor, known = self.actors[shard][replica], self.known[shard][replica]
        ref = actor.apply.remote(key, operation, data, known, self.fillings[shard])
        return Write(ref, shard, replica, key, operation, data, size)

    def mend(self) -> None:
        """Have replicas that have lost their rows copy those of another, and wait for that.

        Raises:
            ShardUnavailableError: If there is no other, or it does not answer within the timeout.
        """
        deadline = time.monotonic() + self.timeout
        pings = [
            (actor.ping.remote(self.known[shard][replica]), shard, replica)
            for shard, replicas in enumerate(self.actors)
            for replica, actor in enumerate(replicas)
        ]
        for ping in pings:
            try:
                self.receive(*ping, deadline)
            except _LostRowsError as error:
                if self.config.replicas == 1:
                    raise ShardUnavailableError(str(error)) from error
                _, shard, replica = ping
                self.receive(self.liveness.have_copied(shard, replica), shard, replica, deadline)

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
        self.liveness.answered(shard)
        return answer

    def close(self) -> None:
        """End all actors and delete what they kept; calling it again does nothing."""
        actors = [actor for replicas in self.actors for actor in replicas]
        self.actors = []
        if not actors:
            return
        if self.is_reachable:
            destroyed = [actor.destroy.options(max_task_retries=0).remote() for actor in actors]
            ray.wait(destroyed, num_returns=len(actors), timeout=min(_CLOSE_SECONDS, self.timeout))
            for actor in actors:
                ray.kill(actor)
        elif self.config.detached:  # it lives on
            return
        self._delete_kept()

    def _delete_kept(self) -> None:
        """Delete what the actors have not: one that has just died does not do it itself."""
        assert self.config.storage_path is not None
        try:
            abandoned.remove(self.config.storage_path)
        except Exception as error:  # whatever a file system raises; the pool is ended all the same
            _log.warning("%s cannot be deleted, do so by hand: %s", self.config.storage_path, first_line(error))
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None


class _LostRowsError(ShardUnavailableError):
    """A replica has lost its rows."""
