"""Which shard a row belongs to, where shards go, and how their answers become one. Pure functions."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_resmem.functional import ascending

# Sorts behind every id.
_NO_ID = torch.iinfo(torch.int64).max


def shards_of(ids: Tensor, num_shards: int) -> Tensor:
    """The shard that each row belongs to: fixed by its id, and even for any pattern of ids.

    Args:
        ids: Shape `(n,)`, int64, at least 0.
        num_shards: At least 1.

    Returns:
        Shape `(n,)`, int64, in `[0, num_shards)`.

    Examples:
        >>> shards_of(torch.arange(0, 80_000, 8), 4).bincount().tolist()
        [2538, 2427, 2503, 2532]
    """
    # The finalizer of SplitMix64: a remainder alone would leave shards empty where ids share a factor with num_shards.
    mixed = ids.cpu().numpy().astype(np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed % np.uint64(num_shards)).astype(np.int64))


def split(ids: Tensor, num_shards: int) -> list[Tensor]:
    """Positions in `ids` `(n,)` of the rows of each shard, in their order.

    Examples:
        >>> [part.tolist() for part in split(torch.arange(6), 2)]
        [[0, 2, 3, 4, 5], [1]]
    """
    shards = shards_of(ids, num_shards)
    return [(shards == shard).nonzero()[:, 0] for shard in range(num_shards)]


def merge(parts: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of several lists of neighbours; equally near ones in the order of their ids.

    It does not matter in which order and grouping lists are merged, and a list `(B, 0)` changes nothing.

    Args:
        parts: Distances and ids, both `(B, m)` with any `m` for each part; id -1 and distance inf are missing places.
        k: How many to keep.

    Returns:
        Distances, ascending, and ids, both `(B, min(k, sum of m))`; missing places come last.

    Examples:
        >>> near = torch.tensor([[1.0, 3.0]]), torch.tensor([[7, 2]])
        >>> far = torch.tensor([[1.0, torch.inf]]), torch.tensor([[4, -1]])
        >>> merge([near, far], k=3)
        (tensor([[1., 1., 3.]]), tensor([[4, 7, 2]]))
    """
    distances = torch.cat([distances for distances, _ in parts], dim=1)
    ids = torch.cat([ids for _, ids in parts], dim=1)
    distances, order = ascending(distances)
    ids = ids.gather(1, order)
    ties = distances[:, 1:] == distances[:, :-1]
    ranks = ids.masked_fill(ids < 0, _NO_ID)
    wrong = (ties & (ranks[:, 1:] < ranks[:, :-1])).any(dim=1).nonzero()[:, 0]
    if len(wrong):  # few queries: sorting all of them again would take several times as long as the rest
        order = ranks[wrong].argsort(dim=1)
        order = order.gather(1, distances[wrong].gather(1, order).argsort(dim=1, stable=True))
        distances[wrong], ids[wrong] = distances[wrong].gather(1, order), ids[wrong].gather(1, order)
    return distances[:, :k], ids[:, :k]


def assign(nodes: Sequence[str], num_shards: int) -> list[int]:
    """Give each of the places on some nodes a shard, so that copies of a shard are on different nodes if possible.

    Args:
        nodes: The node of every place; their number is a multiple of `num_shards`.
        num_shards: At least 1.

    Returns:
        The shard of each place; every shard has equally many. No node holds two copies of a shard, unless it has more
        than `num_shards` places.

    Examples:
        >>> assign(["a", "b", "a", "b"], num_shards=2)
        [0, 0, 1, 1]
    """
    shards = [0] * len(nodes)
    for turn, place in enumerate(sorted(range(len(nodes)), key=lambda place: nodes[place])):
        shards[place] = turn % num_shards
    return shards
