"""Searches of few queries as CUDA graphs: kernels that the host starts together, and not one by one."""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_resmem.memory.search.interface import Found, Nearest
from lightning_resmem.together import Lock

_log = logging.getLogger("lightning_resmem")

# Graphs that there are at most, and the bytes of what goes in and out of them; searches that are counted at once.
_GRAPHS, _KEPT_BYTES, _COUNTED = 16, 32 * 2**20, 256
# Queries up to which their number is padded to a power of two; from there to a multiple, which kernels take at once;
# and from where on it is not, as that would take longer than to start the kernels.
_BLOCK, _PADDED = 128, 1024

_Find = Callable[[Tensor, Found], None]


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    queries: Tensor
    found: Found


class Replays:
    """Records a search for so many queries and neighbours when it is asked for again, and replays it from then on.

    To start a graph takes the host a fraction of what its kernels take it one by one, which for few queries or keys is
    longer than they take the GPU. Numbers of queries are padded, so that there are few graphs; what is asked for after
    the first few is not recorded.

    The main thread alone records: torch refuses random numbers of that GPU to all other threads meanwhile.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._asked: Counter[tuple[int, int]] = Counter()
        self._lock, self._works = Lock(), True
        self._pool = torch.cuda.graph_pool_handle()  # which all graphs share
        self._stream: torch.cuda.Stream | None = None

    @property
    def nbytes(self) -> int:
        """Of what goes in and out of the graphs; beside it they share room for the largest search."""
        return sum(tensor.nbytes for graph in list(self._graphs.values()) for tensor in (graph.queries, *graph.found))

    def search(self, queries: Tensor, k: int, find: _Find) -> Nearest | None:
        """What a search finds; None where it is not recorded.

        One search at a time, and until it is finished: they share memory, on whichever streams they are.

        Args:
            queries: Shape `(b, D)`, b at least 1.
            k: How many neighbours each has.
            find: Writes what it finds for queries into tensors of their device, which it does not wait for. Always the
                same, and kept by the caller.
        """
        asked = padded(len(queries)), k
        if not self._is_recorded(asked, queries.shape[1]):
            return None  # whoever replays another need not be waited for
        with self._lock, torch.cuda.device_of(queries):
            recorded = self._recorded(asked, queries, find)
            if recorded is None:
                return None
            try:
                return _replayed(recorded, queries)
            except BaseException:  # the next search must not begin before this one ended
                recorded.found.wait()
                raise

    def _is_recorded(self, asked: tuple[int, int], width: int) -> bool:
        """Whether a search for so many queries and neighbours is, or will be now."""
        if asked in self._graphs:
            return True
        if len(self._asked) >= _COUNTED:
            self._asked.clear()
        self._asked[asked] += 1
        if self._asked[asked] == 1 or not self._has_room(*asked, width):
            return False
        return threading.current_thread() is threading.main_thread()

    def _recorded(self, asked: tuple[int, int], queries: Tensor, find: _Find) -> _Graph | None:
        recorded = self._graphs.get(asked)
        if recorded is not None:
            return recorded
        try:
            self._graphs[asked] = self._record(queries, *asked, find)
        except RuntimeError as error:  # out of memory, or what else is going on does not allow it
            self._works = False
            _log.debug("Searches are started kernel by kernel, as they cannot be recorded: %s", error)
            return None
        return self._graphs[asked]

    def _has_room(self, rows: int, k: int, width: int) -> bool:
        taken = self.nbytes + rows * width * torch.float32.itemsize + Found.bytes_of(rows, k)
        return self._works and len(self._graphs) < _GRAPHS and taken <= _KEPT_BYTES

    def _record(self, queries: Tensor, rows: int, k: int, find: _Find) -> _Graph:
        self._stream = stream = self._stream or torch.cuda.Stream(queries.device)
        with torch.inference_mode(False), torch.no_grad():
            asked = queries[-1:].expand(rows, -1).clone()
            found, graph = Found.empty(rows, k, queries.device), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    find(asked, found)  # everything is compiled and loaded then, which cannot be recorded
                    # Other threads go on meanwhile.
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    try:
                        find(asked, found)
                    finally:
                        graph.capture_end()
            finally:  # also if it cannot be recorded: nothing that is written to may be freed before
                stream.synchronize()
        return _Graph(graph, asked, found)


def _replayed(recorded: _Graph, queries: Tensor) -> Nearest:
    graph, asked, found = recorded
    distances, positions, count = found.distances, found.positions, len(queries)
    if count < len(asked):
        asked[count:].copy_(queries[-1:])  # any whose neighbours are as sure
        asked, distances, positions = asked[:count], distances[:count], positions[:count]
    asked.copy_(queries)
    found.all_sure.fill_(value=True)
    graph.replay()
    return Nearest(distances.clone(), positions.clone(), found.unsure(count))


def padded(count: int) -> int:
    """For how many queries a search is recorded that `count` are asked for.

    Examples:
        >>> [padded(count) for count in (1, 3, 100, 129, 1025)]
        [1, 4, 128, 256, 1025]
    """
    if count <= _BLOCK:
        return 1 << (count - 1).bit_length()
    return count if count > _PADDED else -(-count // _BLOCK) * _BLOCK
