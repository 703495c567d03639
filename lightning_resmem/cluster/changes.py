"""Changes on their way to the shards: kept by all that they concern, or taken back from all."""

import logging
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import safetensors.torch
from torch import Tensor

from lightning_resmem.cluster.sharding import split
from lightning_resmem.errors import ResMemError, ShardUnavailableError

if TYPE_CHECKING:
    from lightning_resmem.cluster.pool import Pool, Write

_log = logging.getLogger("lightning_resmem")

# Changes of rows that all shards make or none: what the error says of them, and what is to be done.
_REPEATABLE = {
    "add": ("added", "add it again"),
    "remove": ("removed", "remove it again"),
    "update": ("updated", "update it again"),
}

# How long a shard may take to take a change back before the error is raised for which it has to.
_TAKE_BACK_SECONDS = 10.0


class Change(NamedTuple):
    """A change of rows with these ids `(n,)`, and what was sent for it."""

    operation: str
    ids: Tensor
    writes: "list[Write]"

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(write.size for write in self.writes)


class Changes:
    """What a process has sent and not heard of.

    Args:
        num_shards: Of the pool.
    """

    def __init__(self, num_shards: int) -> None:
        self._num_shards = num_shards
        self._underway: deque[Change] = deque()
        self._withdrawn: list[tuple[Write, bytes]] = []  # what has to be taken back, and the ids of rows to remove
        self._refused: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._underway or self._withdrawn)

    def sent(self, operation: str, ids: Tensor, writes: "list[Write]") -> None:
        """Note a change."""
        self._underway.append(Change(operation, ids, writes))

    def take_refused(self) -> list[Tensor]:
        """See `ShardClient.take_refused`."""
        refused, self._refused = self._refused, []
        return refused

    def settle(self, pool: "Pool", underway: int = 0) -> None:
        """Wait until the shards keep all changes but the last few; after one that they do not keep, for all.

        Args:
            pool: Where they were sent.
            underway: Bytes that need not be waited for.

        Raises:
            ResMemError: If a change is not kept, or cannot be taken back: that is tried again by the next call.
        """
        self._take_back(pool, pool.timeout)
        failure: Exception | None = None
        deadline = 0.0
        while self._underway and (failure or sum(change.size for change in self._underway) > underway):
            if failure is None:  # what follows has to answer in the same time
                deadline = time.monotonic() + pool.timeout
            failed = self._settle_one(pool, self._underway.popleft(), deadline)
            failure = failure or failed
        if failure is not None:
            try:
                self._take_back(pool, min(pool.timeout, _TAKE_BACK_SECONDS))
            except Exception as error:  # tried again by the next call
                _log.warning("A change that was refused is not yet taken back from all shards. %s", error)
            raise failure

    def _settle_one(self, pool: "Pool", change: Change, deadline: float) -> Exception | None:
        """Wait for a change; what went wrong, if anything did."""
        failure: Exception | None = None
        made = []
        for write in change.writes:
            try:
                pool.confirm(write, deadline)
            except Exception as error:  # whatever it is, the others have to be asked
                failure = failure or error
                if not isinstance(error, ShardUnavailableError):
                    continue
            made.append(write)  # or may be made yet, by a shard that does not answer
        if failure is None or change.operation not in _REPEATABLE:
            return failure
        if change.operation == "add":
            self._refused.append(change.ids)
        parts = split(change.ids, self._num_shards)
        for write in made:
            ids = change.ids[parts[write.shard]].cpu().contiguous()
            self._withdrawn.append((write, safetensors.torch.save({"ids": ids})))
        return _of_rows(failure, change)

    def _take_back(self, pool: "Pool", seconds: float) -> None:
        sent = [(pool.withdraw(write, ids), (write, ids)) for write, ids in self._withdrawn]
        deadline, failure = time.monotonic() + seconds, None
        self._withdrawn = []
        for withdrawal, again in sent:
            try:
                pool.confirm(withdrawal, deadline)
            except Exception as error:  # whatever it is, the others have to be asked
                failure = failure or error
                self._withdrawn.append(again)
        if failure is not None:
            raise failure


def _of_rows(failure: Exception, change: Change) -> Exception:
    """The error, which says what became of the rows."""
    if not isinstance(failure, ResMemError):
        return failure
    ids, (done, again) = change.ids, _REPEATABLE[change.operation]
    first = ", ".join(str(id) for id in ids[:5].tolist())
    error = type(failure)(
        f"{failure} The chunk of {len(ids)} rows with the ids {first}{', ...' if len(ids) > 5 else ''} was not "
        f"{done}: {again}."
    )
    error.__cause__ = failure
    return error
