"""Build all shards of a pool: one choice of index, trained once for all."""

import logging
import time
from typing import Any

import ray
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_resmem.cluster.pool import Pool
from lightning_resmem.memory.search import faiss_index
from lightning_resmem.memory.search.faiss_index import FaissIndex

_log = logging.getLogger("lightning_resmem")

# How often a shard that builds for long is asked whether it is still there, in seconds.
_LOOK_SECONDS = 10.0


def build(pool: Pool, index: str | FaissIndex, show_progress: bool) -> list[list[dict[str, Any]]]:
    """Build every replica of every shard, and have it keep its rows.

    Args:
        pool: The shards.
        index: As for `LocalMemory`.
        show_progress: Whether to show a bar.

    Returns:
        The state of each replica of each shard.

    Raises:
        ShardUnavailableError: If a shard dies and does not come back with its rows.
        StorageError: If a shard cannot keep its rows.
    """
    pool.mend()
    states = [replicas[0] for replicas in pool.everywhere("state")]
    config = _choose(states) if index == "auto" else index
    trained = _train(pool, states, config) if isinstance(config, FaissIndex) else None
    built: list[list[Any]] = [[None] * pool.config.replicas for _ in pool.actors]
    waiting = {
        actor.build.remote(config, trained, pool.known[shard][replica], pool.fillings[shard]): (shard, replica)
        for shard, replicas in enumerate(pool.actors)
        for replica, actor in enumerate(replicas)
    }
    columns = TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)  # of its own: a trainer's bar may hold the live display of the shared one
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not show_progress) as progress:
        bar = progress.add_task("Building shards", total=sum(s["rows"] for s in states) * pool.config.replicas)
        while waiting:
            ready, _ = ray.wait([*waiting], timeout=_LOOK_SECONDS)
            for ref in ready:
                shard, replica = waiting.pop(ref)
                state = built[shard][replica] = pool.receive(ref, shard, replica, time.monotonic() + pool.timeout)
                pool.known[shard][replica] = max(pool.known[shard][replica], state["number"])
                progress.advance(bar, state["rows"])
            if not ready:  # it may take hours; dead is who does not answer
                for shard, replica in waiting.values():
                    ping = pool.actors[shard][replica].ping.remote()
                    pool.receive(ping, shard, replica, time.monotonic() + pool.timeout)
    return built


def _choose(states: list[dict[str, Any]]) -> str | FaissIndex:
    """What `index="auto"` is, the same for all shards."""
    if any(state["dated"] for state in states):
        return "exact"
    largest = max(states, key=lambda state: int(state["rows"]))
    config, reason = faiss_index.choose(
        largest["rows"],
        largest["width"],
        torch.device(largest["device"]),
        min(state["free_bytes"] for state in states),
        faiss_index.is_usable(),
    )
    _log.info('index="auto" chose for each shard %s', reason)
    return config or "exact"


def _train(pool: Pool, states: list[dict[str, Any]], config: FaissIndex) -> Any:
    """An index trained on a random sample of all rows, in the object store; None if it needs no training."""
    total = sum(state["rows"] for state in states)
    first = max(range(len(states)), key=lambda shard: int(states[shard]["rows"]))

    def asked(shard: int, method: str, *arguments: Any) -> Any:
        return getattr(pool.actors[shard][0], method).remote(*arguments)

    deadline = time.monotonic() + pool.timeout
    count = pool.receive(asked(first, "sample_size", config), first, 0, deadline)
    if not count:
        return None
    # Shard by shard in proportion to its rows; samples go from shard to shard, not through this process.
    samples = [asked(shard, "sample", -(-count * state["rows"] // total)) for shard, state in enumerate(states)]
    trained = asked(first, "train", config, *samples)
    while not ray.wait([trained], timeout=_LOOK_SECONDS, fetch_local=False)[0]:
        pool.receive(asked(first, "ping"), first, 0, time.monotonic() + pool.timeout)
    pool.receive(trained, first, 0, time.monotonic() + pool.timeout)  # raises what went wrong there
    return trained
