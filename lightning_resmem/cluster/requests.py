"""A question to every shard of a pool, and the answers, from whichever replica is alive."""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from lightning_resmem.cluster.durable import RowsLostError
from lightning_resmem.cluster.pool import Pool
from lightning_resmem.errors import ResMemError, first_line

# After so many seconds without an answer, another replica is asked as well.
_HEDGE_SECONDS = 2.0


class Request:
    """A question to every shard, which the shards work on until `result` is called.

    Args:
        pool: The shards.
        method: Of `Shard`.
        arguments: For each shard; None where it is not asked.
        partial: Whether shards that do not answer may be left out.
    """

    def __init__(self, pool: Pool, method: str, arguments: Sequence[Sequence[Any] | None], partial: bool) -> None:
        self._pool, self._method, self._arguments, self._partial = pool, method, arguments, partial
        self._started = time.monotonic()
        self._deadline = self._started + pool.timeout
        self._pending: dict[Any, tuple[int, int]] = {}
        self._patient: set[Any] = set()  # those that Ray repeats until the actor is back
        self._answers: dict[int, Any] = {}
        self._reasons: dict[int, str] = {}
        self._untried: dict[int, list[int]] = {}
        for shard, given in enumerate(arguments):
            if given is not None:
                self._untried[shard] = pool.liveness.replicas_in_any_order(shard)
                if self._untried[shard] or not partial:
                    self._try_next(shard)

    def result(self, timeout: float | None = None) -> list[Any]:
        """The answer of each shard; None where it was not asked, or does not answer and may be left out.

        Args:
            timeout: Seconds from the time the question was sent; by default the pool's.

        Raises:
            ShardUnavailableError: If a shard does not answer in time.
        """
        timeout = self._pool.timeout if timeout is None else timeout
        deadline, hedge = self._started + timeout, self._started + _HEDGE_SECONDS
        self._deadline = deadline
        while self._pending:
            now = time.monotonic()
            until = min(deadline, hedge) if now < hedge else deadline
            ready, _ = ray.wait([*self._pending], timeout=max(0.0, until - now))
            for ref in ready:
                self._take(ref)
            if not ready and time.monotonic() >= deadline:
                break
            if not ready:
                for shard in {shard for shard, _ in self._pending.values()}:
                    if self._untried[shard]:
                        self._try_next(shard)
        for shard, given in enumerate(self._arguments):
            if given is None or shard in self._answers:
                continue
            for replica in range(self._pool.config.replicas):
                self._pool.liveness.mark_down(shard, replica)
            if not self._partial:
                reason = self._reasons.get(shard, f"it did not answer within {timeout:g} s")
                raise self._pool.unavailable(shard, reason)
            self._pool.liveness.left_out(shard)
        return [self._answers.get(shard) for shard in range(len(self._arguments))]

    def _take(self, ref: Any) -> None:
        shard, replica = self._pending.pop(ref)
        if shard in self._answers:  # another replica was faster
            return
        try:
            self._answers[shard] = ray.get(ref)
        except RayActorError as error:
            # After shutdown() elsewhere, say: asked again, it would only fail again at once.
            is_final = ref in self._patient and isinstance(error, ActorDiedError)
            self._failed(shard, replica, f"its process is gone ({first_line(error)})", is_final=is_final)
        except RayTaskError as error:
            if isinstance(error.cause, RowsLostError):
                self._failed(shard, replica, str(error.cause), is_final=True, lost_rows=True)
            elif isinstance(error.cause, ResMemError):
                for late in self._pending:
                    late.future()  # as below
                raise error.cause from None
            else:
                raise
        else:
            self._pool.liveness.answered(shard)
            for late in [ref for ref, where in self._pending.items() if where[0] == shard]:
                # Until it answers a ping: Ray keeps requests to an actor that it starts again, without an error.
                self._pool.liveness.mark_down(*self._pending.pop(late))
                late.future()  # whatever it is, Ray must not report it as an error that nobody looked at

    def _failed(self, shard: int, replica: int, reason: str, is_final: bool = False, lost_rows: bool = False) -> None:
        self._reasons[shard] = reason
        self._pool.liveness.mark_down(shard, replica, lost_rows)
        if self._untried[shard]:
            self._try_next(shard)
        elif (
            not is_final
            and time.monotonic() < self._deadline
            and shard not in {shard for shard, _ in self._pending.values()}
        ):
            self._send(shard, replica, retries=-1)

    def _try_next(self, shard: int) -> None:
        """Ask the next replica: at once to fail where there are others, else for as long as it takes."""
        untried = self._untried[shard]
        if untried:
            self._send(shard, untried.pop(0), retries=0 if self._pool.config.replicas > 1 else -1)
        else:
            for replica in range(self._pool.config.replicas):
                self._send(shard, replica, retries=-1)

    def _send(self, shard: int, replica: int, retries: int) -> None:
        method = getattr(self._pool.actors[shard][replica], self._method)
        arguments = self._arguments[shard]
        assert arguments is not None
        known = self._pool.known[shard][replica], self._pool.fillings[shard]
        ref = method.options(max_task_retries=retries).remote(*arguments, *known)
        self._pending[ref] = shard, replica
        if retries:
            self._patient.add(ref)
