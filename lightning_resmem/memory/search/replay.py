"""Searches of few queries as CUDA graphs: kernels that the host starts together, and not one by one."""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_resmem.memory.search.interface import Found
from lightning_resmem.together import Lock

_log = logging.getLogger("lightning_resmem")

# Graphs that are kept, those that were used last; and searches that are counted before all counts start again.
_GRAPHS, _COUNTED = 16, 256
# Queries up to which their number is padded to a power of two, and above to a multiple: what kernels take at once.
_BLOCK = 128


_Find = Callable[[Tensor, Found], None]


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    queries: Tensor
    room: Tensor


class Replays:
    """Records a search for so many queries and neighbours when it is asked for again, and replays it from then on.

    To start a graph takes the host a fraction of what its kernels take it one by one, which for few queries or keys is
    longer than they take the GPU. Numbers of queries are padded, so that there are few graphs.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple[int, int], _Graph] = OrderedDict()
        self._asked: Counter[tuple[int, int]] = Counter()
        self._lock, self._works = Lock(), True
        # One search at a time uses what all graphs share, on whichever streams they are.
        self._pool, self._finished = torch.cuda.graph_pool_handle(), torch.cuda.Event()

    def search(self, queries: Tensor, k: int, find: _Find) -> Found | None:
        """What a search finds; None where it is not recorded yet.

        Args:
            queries: Shape `(b, D)`.
            k: How many neighbours each has.
            find: Writes what it finds for queries into tensors of their device, which it does not wait for. Always the
                same, and kept by the caller.
        """
        with self._lock, torch.cuda.device_of(queries):
            recorded = self._recorded(queries, k, find)
            if recorded is None:
                return None
            stream, count = torch.cuda.current_stream(), len(queries)
            stream.wait_event(self._finished)
            recorded.queries[:count].copy_(queries)
            recorded.graph.replay()
            room = recorded.room.clone()
            self._finished.record(stream)
        found = Found.within(room, len(recorded.queries), k)
        if count == len(recorded.queries):
            return found
        return found._replace(**{name: getattr(found, name)[:count] for name in ("distances", "positions", "sure")})

    def _recorded(self, queries: Tensor, k: int, find: _Find) -> _Graph | None:
        asked = padded(len(queries)), k
        recorded = self._graphs.get(asked)
        if recorded is not None:
            self._graphs.move_to_end(asked)
            return recorded
        if len(self._asked) >= _COUNTED:
            self._asked.clear()
        self._asked[asked] += 1
        if self._asked[asked] == 1 or not self._works:
            return None
        self._finished.synchronize()  # what is let go of, and what is used again, is not in use
        if len(self._graphs) == _GRAPHS:
            self._graphs.popitem(last=False)
        try:
            self._graphs[asked] = self._record(queries, *asked, find)
        except RuntimeError as error:  # out of memory, or something else that is going on cannot be at the same time
            self._works = False
            _log.debug("Searches are started kernel by kernel, as they cannot be recorded: %s", error)
            return None
        return self._graphs[asked]

    def _record(self, queries: Tensor, rows: int, k: int, find: _Find) -> _Graph:
        with torch.inference_mode(False), torch.no_grad():
            asked = torch.zeros(rows, queries.shape[1], device=queries.device)
            room = Found.room(rows, k, queries.device)
            found = Found.within(room, rows, k)
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(queries.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                find(asked, found)  # everything is compiled and loaded then, which cannot be recorded
                # Other threads go on meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    find(asked, found)
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)
        return _Graph(graph, asked, room)


def padded(count: int) -> int:
    """For how many queries a search is recorded that `count` are asked for.

    Examples:
        >>> [padded(count) for count in (1, 3, 100, 129)]
        [1, 4, 128, 256]
    """
    return 1 << (count - 1).bit_length() if count <= _BLOCK else -(-count // _BLOCK) * _BLOCK
