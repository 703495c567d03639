"""All rows on every rank: chunked transfer on the CPU."""

from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_resmem.errors import InputError

# What travels at once, in bytes.
_CHUNK_BYTES = 16 * 2**20

# Shape and dtype of each tensor, by its name.
_Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def all_gather_rows(tensors: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Give every rank the rows of all ranks, ascending by id, whatever the number of ranks.

    Every rank broadcasts its rows chunk by chunk, and every rank writes each chunk to its final place. Beyond the
    result, a rank needs its own rows of the tensors that are still to come, two chunks of 16 MiB (one is being sent
    while the next is made) and 24 bytes for each row of the result (its place).

    Args:
        tensors: This rank's rows, on the CPU: `ids` `(n,)` and others `(n, ...)`; empty where a rank has no rows. The
            tensors are taken out of it, one after the other, so that they can be freed.
        group: A process group on the CPU.

    Returns:
        The rows of all ranks under the same names, or nothing if no rank has any.

    Raises:
        InputError: On all ranks, if an id is on two of them or their rows have different shapes or dtypes.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    layouts: list[_Layout] = [{}] * world
    dist.all_gather_object(
        layouts, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}, group=group
    )
    kind = _common_kind(layouts)
    if kind is None:
        return {}
    counts = [layout["ids"][0][0] if layout else 0 for layout in layouts]

    def broadcast(name: str, out: Tensor, places: list[Tensor] | None) -> None:
        """Write the rows of all ranks to `out`, one rank after the other, or each rank's rows to its `places`."""
        own = tensors.pop(name, None)
        chunk_rows = max(1, _CHUNK_BYTES // max(1, prod(out.shape[1:]) * out.element_size()))
        start = 0
        for source, count in enumerate(counts):
            for begin in range(0, count, chunk_rows):
                end = min(begin + chunk_rows, count)
                if source == rank:
                    assert own is not None
                    chunk = own[begin:end].contiguous()
                else:
                    chunk = torch.empty(end - begin, *out.shape[1:], dtype=out.dtype)
                # As bytes: gloo does not know every dtype.
                dist.broadcast(chunk.view(-1).view(torch.uint8), group=group, group_src=source)
                if places is None:
                    out[start + begin : start + end] = chunk
                else:
                    out[places[source][begin:end]] = chunk
            start += count

    total = sum(counts)
    by_rank = torch.empty(total, dtype=torch.int64)
    broadcast("ids", by_rank, None)
    ids, order = by_rank.sort()
    repeated = ids[1:][ids[1:] == ids[:-1]].unique()
    if len(repeated):
        raise InputError(
            f"ids are repeated on several ranks: {', '.join(map(str, repeated[:5].tolist()))}"
            f"{' and more' if len(repeated) > 5 else ''}. Every training row belongs to one rank: shard the dataset "
            "(an IterableDataset in its __iter__), or give an ids_fn that tells the rows apart."
        )
    places = list(torch.empty_like(order).scatter_(0, order, torch.arange(total)).split(counts))
    del by_rank, order
    gathered = {"ids": ids}
    for name, (shape, dtype) in kind.items():
        if name != "ids":
            gathered[name] = torch.empty(total, *shape, dtype=dtype)
            broadcast(name, gathered[name], places)
    return gathered


def _common_kind(layouts: list[_Layout]) -> _Layout | None:
    """Shape of a single row and dtype of each tensor, None if no rank has rows; raises an error where ranks differ."""
    kinds = {
        source: {name: (shape[1:], dtype) for name, (shape, dtype) in layout.items()}
        for source, layout in enumerate(layouts)
        if layout
    }
    if not kinds:
        return None
    first = next(iter(kinds))
    for source, kind in kinds.items():
        if kind != kinds[first]:
            raise InputError(
                f"Ranks hold rows of different kinds: rank {first} {kinds[first]}, rank {source} {kind}. "
                "Does the model or the data differ by rank?"
            )
    return kinds[first]
