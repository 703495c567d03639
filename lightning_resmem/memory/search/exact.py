"""Exact nearest-neighbour search, on any device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_resmem.memory.search import groups, measuring, rough
from lightning_resmem.memory.search.interface import Nearest
from lightning_resmem.memory.search.measuring import measure
from lightning_resmem.memory.search.precise import Precise
from lightning_resmem.tasks import check_finite
from lightning_resmem.together import Lock, together

# Queries whose candidates are held at once on a CPU.
_ROWS = 4096
# Queries after which it is known whether candidates in half precision suffice.
_TRIED = 128


class ExactIndex:
    """Euclidean k-nearest-neighbour search over all keys.

    Candidates come from products in half precision where that is faster: on CUDA GPUs with Triton (see `groups`), and
    on CPUs that multiply bfloat16 natively (see `rough` and `fused`). They are measured in float32 by direct
    differences, and a bound on what rounding changed tells whether they are certainly the nearest. Where it does not,
    only those queries are searched again, by products in float32 (see `precise`); elsewhere all are searched so.

    Of equally near keys those at the lowest positions are found, so results do not depend on how the work is divided.
    Keys and queries may have any magnitude that float32 has.

    Args:
        keys: Shape `(N, D)`, floating point; half precision is searched in float32, block by block.
        half_copy: Whether a GPU keeps a copy of the keys in half precision, from the first search on; otherwise they
            are rounded at every search, which takes longer. Without effect where keys are searched in another way.
        available_at: Since when each key is known, shape `(N,)`, if a query may not see all of them: such keys are
            searched by products in float32.
    """

    name = "exact"

    def __init__(self, keys: Tensor, half_copy: bool = True, available_at: Tensor | None = None) -> None:
        self.keys, self.half_copy = keys.detach().resolve_neg(), half_copy
        # Of n keys that a query may see, the last became known as the n-th: whole numbers say all that there is to say.
        self._available_at: Tensor | None = None
        turns: Tensor | None = None
        if available_at is not None:
            self._available_at, order = available_at.sort()
            turns = order.argsort()
        self._precise = Precise(self.keys, turns)
        self._screen: rough.Screen | None = None
        self._groups: groups.Groups | None = None
        self._preparing = Lock()
        self._tried = self._unsure = 0  # queries that half precision was tried for, and did not suffice for

    @property
    def nbytes(self) -> int:
        """Of what a GPU keeps beside the keys: nothing before the first search."""
        return 0 if self._groups is None else self._groups.nbytes

    def search(self, queries: Tensor, k: int, asked_at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        queries = queries.detach().float().resolve_neg()
        if not len(queries):
            empty = queries.new_empty(0, k)
            return empty, empty.long()
        if asked_at is None and self._is_rough and groups.is_worthwhile(queries, self.keys, k):
            # Nothing that autocast or TF32 would change.
            return self._certified(queries, k, self._grouped.nearest(queries, k))
        on_cpu = measuring.on_cpu(queries)
        if on_cpu or asked_at is not None:  # a GPU would be waited for: there, what is not finite is found unsure
            check_finite("queries", queries)
        if asked_at is not None:
            assert self._available_at is not None
            with _full_precision(queries.device):
                return self._precise.search(queries, k, torch.searchsorted(self._available_at, asked_at, right=True))
        with _full_precision(queries.device):
            found = [self._search_rows(part, k) for part in queries.split(_ROWS if on_cpu else len(queries))]
        if len(found) == 1:
            return found[0]
        return torch.cat([distances for distances, _ in found]), torch.cat([positions for _, positions in found])

    def _search_rows(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """By half precision, where that is faster; by float32 otherwise."""
        found = self._search_roughly(queries, k) if self._is_rough else None
        return self._precise.search(queries, k) if found is None else self._certified(queries, k, found)

    def _certified(self, queries: Tensor, k: int, found: Nearest) -> tuple[Tensor, Tensor]:
        """Distances and positions `(B, k)`: what was found, and by float32 what is not sure."""
        distances, positions, unsure = found
        self._tried += len(queries)
        if unsure is not None:
            check_finite("queries", queries)
            self._unsure += len(unsure)
            with _full_precision(queries.device):
                distances[unsure], positions[unsure] = self._precise.search(queries[unsure], k)
        return distances, positions

    def _search_roughly(self, queries: Tensor, k: int) -> Nearest | None:
        """What is found by half precision; None where that is not tried."""
        wanted = k + k // 4 + 16  # more than enough for nearly all queries
        if not rough.is_worthwhile(queries, self.keys, wanted) or self._precise.scale != 1:
            return None
        found = self._screened.candidates(queries, wanted)
        if found is None:
            self._tried += len(queries)
            self._unsure += len(queries)
            return None
        candidates, limits = found
        distances, positions = measure(self.keys, queries, candidates, in_order=True)
        sure = distances[:, k - 1].square() * (1 + 1e-6) < limits
        unsure = (~sure).nonzero()[:, 0]
        return Nearest(distances[:, :k].contiguous(), positions[:, :k].contiguous(), unsure if len(unsure) else None)

    @property
    def _grouped(self) -> groups.Groups:
        if self._groups is None:
            with self._preparing:  # once, whoever else waits for it
                self._groups = self._groups or groups.Groups(self.keys, self.half_copy)
        return self._groups

    @property
    def _screened(self) -> rough.Screen:
        if self._screen is None:
            with self._preparing:
                self._screen = self._screen or rough.Screen(self.keys, self._precise.mean)
        return self._screen

    @property
    def _is_rough(self) -> bool:
        """Whether half precision is worth a try: it suffices for most queries, as far as that is known."""
        return self._tried < _TRIED or 2 * self._unsure < self._tried


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products with all their digits: no autocast, no TF32 (scores decide which keys are looked at)."""
    with together("float32", _highest), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _highest() -> Iterator[None]:
    """What `torch.set_float32_matmul_precision("highest")` does, for a while.

    Once `torch.backends.cuda.matmul.fp32_precision` or one like it was set, torch refuses to tell that precision.
    """
    backends: Any = torch.backends
    kinds: list[Any] = [backends.cuda.matmul, getattr(backends.mkldnn, "matmul", None)]
    if not all(hasattr(kind, "fp32_precision") for kind in kinds):  # torch < 2.9
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    everywhere = backends.fp32_precision
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            # One that was not set is that of everything, and stays so when that changes.
            kind.fp32_precision = "none" if precision == everywhere else precision
