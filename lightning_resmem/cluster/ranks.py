"""The ranks of a job and one pool: who makes it, who builds it, and that an error on one of them is one on all."""

import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

from lightning_resmem.cluster.client import ShardClient
from lightning_resmem.errors import ResMemError


class Known(NamedTuple):
    """What a rank knows of the shards.

    Attributes:
        changes: The last change that each replica of each shard has acknowledged to it.
        shape: `(D, C)` of its rows, None without any.
    """

    changes: list[list[int]]
    shape: tuple[int, int] | None


def join(shards: ShardClient, group: dist.ProcessGroup) -> None:
    """Have all ranks use the pool of rank 0, which makes it if it has none.

    Args:
        shards: Of this rank.
        group: On the CPU.

    Raises:
        ResMemError: On all ranks, if rank 0 cannot make it.
    """
    hosts: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(hosts, socket.gethostname(), group=group)
    address, name, mode = on_rank_zero(lambda: shards.open(hosts), group)
    if dist.get_rank(group):
        # Ray reads this when it is imported; the token itself is in a file that ranks of one machine share.
        os.environ.setdefault("RAY_AUTH_MODE", mode)
        shards.follow(address, name)


def flush(shards: ShardClient, shape: tuple[int, int] | None, group: dist.ProcessGroup) -> list[Known]:
    """Wait until the rows of all ranks have arrived.

    Args:
        shards: Of this rank.
        shape: `(D, C)` of its rows, None without any.
        group: On the CPU.

    Returns:
        What each rank knows.

    Raises:
        ResMemError: On all ranks, if one of them fails.
    """
    failure = None
    try:
        shards.flush()
    except ResMemError as error:
        failure = error
    outcomes: list[tuple[str | None, Known]] = [(None, Known([], None))] * len(dist.get_process_group_ranks(group))
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    dist.all_gather_object(outcomes, (text, Known(shards.known(), shape)), group=group)
    if failure is not None:
        raise failure
    for rank, (failed, _) in enumerate(outcomes):
        if failed is not None:
            raise ResMemError(f"Rank {rank} could not hand over its rows. {failed}")
    return [known for _, known in outcomes]


def alone(action: Callable[[], Any]) -> Any:
    """`on_rank_zero` for a process without others."""
    return action()


def on_rank_zero(action: Callable[[], Any], group: dist.ProcessGroup) -> Any:
    """What `action` returned on rank 0, on all ranks; an error there is one on all."""
    outcome: list[Any] = [None, None]
    own: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            outcome[0] = action()
        except Exception as error:  # the others wait for an answer, whatever it is
            own, outcome[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    if own is not None:
        raise own
    if outcome[1] is not None:
        raise ResMemError(f"Rank 0 failed. {outcome[1]}")
    return outcome[0]
