"""What the answers of all shards are together: neighbours, sums, numbers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_resmem.cluster.sharding import merge
from lightning_resmem.memory.answers import Neighbors, Sums
from lightning_resmem.memory.transfer import moved

if TYPE_CHECKING:  # Ray takes a second to import: it is imported when a cluster is needed
    from lightning_resmem.cluster.requests import Request


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
        return Neighbors(*moved(self._device, distances, ids))


def total(answers: Sequence[Any], queries: int, num_outputs: int, device: torch.device) -> Sums:
    """The sums over the rows of all shards.

    Args:
        answers: Of each shard as `Shard.weighted_sums` returns it; None without rows.
        queries: How many, B.
        num_outputs: C.
        device: Where the sums go.
    """
    parts = [answer for answer in answers if answer is not None]
    if not parts:
        nothing = torch.zeros(queries, num_outputs, device=device)
        return Sums(nothing, nothing.clone())
    sums, *tail = (column[0].copy() for column in zip(*parts, strict=True))
    for part in parts[1:]:
        sums += part[0]
        for whole, added in zip(tail, part[1:], strict=True):
            whole += added
    return Sums(*moved(device, *torch.from_numpy(sums), *map(torch.from_numpy, tail)))


def overview(answers: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Numbers about a memory from those about each replica of each of its shards.

    Args:
        answers: As `Pool.stats` returns them.

    Returns:
        `shards`, all of them one after the other; of one living replica of each shard the `bytes` and what they have
        in common, with the `recall` weighted by rows.
    """
    alive = [max(replicas, key=lambda shard: bool(shard["alive"])) for replicas in answers]
    filled = [shard for shard in alive if shard["rows"]]
    stats: dict[str, Any] = {
        "shards": [shard for replicas in answers for shard in replicas],
        "bytes": sum(shard["bytes"] for shard in filled),
    }
    if filled:
        stats |= {name: filled[0][name] for name in ("index", "values", "device")}
        for name in filled[0].keys() & {"nprobe", "ef_search"}:
            stats[name] = max(shard[name] for shard in filled)
        if "recall" in filled[0]:
            rows = sum(shard["rows"] for shard in filled)
            stats["recall"] = sum(shard["recall"] * shard["rows"] for shard in filled) / rows
    return stats
