"""Exact search by products in float32, in torch, on any device."""

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from lightning_resmem.memory.search import few, measuring, rough
from lightning_resmem.memory.search.few import GROUP
from lightning_resmem.memory.search.measuring import FARTHEST, largest_number, measure
from lightning_resmem.tasks import check_finite
from lightning_resmem.together import Lock

# Scores computed at once. On a CPU they stay in its cache (16 MiB), which is worth a factor of two; a GPU wants more.
_CPU_SCORES = 2**22
_GPU_SCORES = 2**26
_CPU_KEYS = 8192
_CPU_PRODUCT = 1024  # keys of one matrix product, which stay in a core's cache
_FEW_MEASURED = 2**17  # numbers of candidates on a CPU, up to which an operation of torch takes longer than they do
_GPU_QUERIES = 1024
_GPU_SORTED = 2**23  # scores of which a GPU finds the smallest at once, and not those of groups first
_GPU_FEW, _GPU_NARROW = 2**22, 64  # numbers of keys, once for every query, up to which all distances are measured
_GPU_SHIFTED = 2**24  # numbers of keys that are not multiplied as they are
# Candidates beyond k that are measured, so that rounding in the scores cannot push a neighbour out.
_SPARE = 16
# Keys that one pass over all of them looks at together.
_CHUNK = 65536
# Keys whose largest number lies between these are squared as they are: nothing that matters overflows or vanishes.
ORDINARY = (1e-6, 1e15)


class Precise:
    """Finds the nearest keys by products in float32, on any device.

    A block of scores `|z|^2 - 2 q.z` comes from one matrix product; on CPUs only scores below a running threshold are
    looked at one by one. The `k + 16` best candidates are measured again by direct differences, so that distances have
    no cancellation error; of few keys a GPU measures all. A query whose candidates could have missed a neighbour by
    rounding (huge norms, tiny distances, many equal keys) is searched again over all keys that could matter.

    Where the squares of keys would overflow or vanish, scores are those of keys and queries times a power of two; a
    query so far away that its own do is compared with every key directly.

    Args:
        keys: Shape `(N, D)`, floating point.
        turns: The turn at which each key became known, from 0, shape `(N,)`, if a query may not see all of them.
    """

    def __init__(self, keys: Tensor, turns: Tensor | None = None) -> None:
        self._keys, self._turns = keys, turns
        self._center: Tensor | None = None
        self._squared_norms: Tensor | None = None
        self._longest = keys.new_empty(())  # the largest norm
        self._preparing = Lock()

    @property
    def nbytes(self) -> int:
        """Of what is kept beside the keys."""
        return 0 if self._squared_norms is None else self._squared_norms.nbytes

    def search(self, queries: Tensor, k: int, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k nearest keys of queries `(B, D)` in float32: distances and positions `(B, k)`.

        With `counts` `(B,)` a query sees only the keys of so many turns; where these are fewer than k, missing places
        have position -1 and distance inf, and come last.
        """
        self._prepare()
        wanted = min(k + _SPARE, len(self._keys))
        query_block, key_block = _blocks(queries, wanted)
        blocks = queries.split(query_block)
        seen = [None] * len(blocks) if counts is None else counts.split(query_block)
        found = [
            self._search_block(block, k, wanted, key_block, count) for block, count in zip(blocks, seen, strict=True)
        ]
        distances, positions, bounds, sure = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        unsure = (~sure).nonzero()[:, 0].tolist()  # the only time that a GPU is waited for
        if unsure:
            check_finite("queries", queries)
        for row in unsure:
            count = None if counts is None else counts[row]
            distances[row], positions[row] = self._scan(queries[row], bounds[row], k, count)
        return distances, positions

    def _prepare(self) -> None:
        """One pass over the keys, at the first search: opening a memory-mapped memory must not read all of it."""
        if self._squared_norms is not None:
            return
        with self._preparing:
            if self._squared_norms is not None:
                return
            # Distances do not change when everything is moved by the mean, and the scores lose fewer digits. It takes
            # a copy of every block at every search, though, so it is done only where the mean is far from zero.
            center = self.mean
            squared = rough.squared_norms(self._keys, center, self.scale)
            if bool(center.square().sum() > 16 * squared.mean()):
                self._center = center
            else:
                squared = rough.squared_norms(self._keys, scale=self.scale)
            self._longest = squared.max().sqrt()
            if squared.is_cuda:  # whichever stream searches finds them finished
                torch.cuda.current_stream(squared.device).synchronize()
            self._squared_norms = squared  # last: who sees them does not wait

    @cached_property
    def scale(self) -> float:
        """The power of two that scores are computed with."""
        largest = largest_number(self._keys)
        if ORDINARY[0] < largest < ORDINARY[1] or not largest:
            return 1.0
        return 2.0 ** -min(126, max(-126, math.frexp(largest)[1]))  # as far as float32 has the power itself

    @cached_property
    def mean(self) -> Tensor:
        """Of the keys times the scale."""
        chunks = self._keys.split(_CHUNK)
        total = torch.stack([self._scaled(chunk).sum(dim=0, dtype=torch.float32) for chunk in chunks]).sum(dim=0)
        return total / len(self._keys)

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows if self.scale == 1 else rows.float() * self.scale

    def _shifted(self, rows: Tensor) -> Tensor:
        """Rows in float32, in the coordinates that scores are computed in."""
        rows = self._scaled(rows).float()
        return rows if self._center is None else rows - self._center

    def _search_block(
        self, queries: Tensor, k: int, wanted: int, key_block: int, counts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Distances and positions `(b, k)`, the score `(b,)` up to which keys could matter, and whether none does."""
        if counts is None and self._are_few(queries, wanted):
            return self._search_few(queries, k, wanted)
        shifted = self._shifted(queries)
        find = self._candidates if measuring.on_cpu(queries) else self._best_of_blocks
        scores, positions = find(shifted, wanted, key_block, counts)
        if counts is not None:
            positions = positions.masked_fill(scores == torch.inf, -1)
        distances, positions = measure(self._keys, queries, positions)
        if counts is None:
            return self._judged(shifted, scores.amax(dim=1), distances, positions, k)
        bounds, sure = self._bounds(shifted, scores.amax(dim=1), distances[:, k - 1])
        sees_no_more = torch.isfinite(scores).sum(dim=1) >= counts
        return distances[:, :k].clone(), positions[:, :k].clone(), bounds, sure | sees_no_more

    def _judged(
        self, shifted: Tensor, worst: Tensor, distances: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `_search_block` returns, of candidates `(b, n)` whose scores are at most `worst` `(b,)`."""
        farthest = distances[:, k - 1]
        bounds, sure = self._bounds(shifted, worst, farthest)
        if distances.shape[1] == len(self._keys):
            sure = farthest < FARTHEST
        return distances[:, :k].clone(), positions[:, :k].clone(), bounds, sure

    def _bounds(self, shifted: Tensor, worst: Tensor, farthest: Tensor) -> tuple[Tensor, Tensor]:
        """The score up to which keys could matter, and whether those with scores up to `worst` are all of these."""
        bounds = self._score_bounds(shifted, farthest)
        # Neither holds where squares overflow: NaN compares as false.
        return bounds, (bounds < worst) & (worst < torch.inf)

    def _are_few(self, queries: Tensor, wanted: int) -> bool:
        """Whether blocks of queries and keys would take longer than `_search_few`."""
        count, (rows, width) = len(queries), self._keys.shape
        if not measuring.on_cpu(queries):
            return count * rows * max(_GPU_NARROW, width) <= _GPU_FEW
        return count * wanted * width <= _FEW_MEASURED and count * rows <= _CPU_SCORES and self._are_as_they_are

    def _search_few(self, queries: Tensor, k: int, wanted: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `_search_block` returns, by few operations."""
        if measuring.on_cpu(queries):
            assert self._squared_norms is not None
            scores = torch.addmm(self._squared_norms, queries * -2, self._keys.T)
            distances, positions, worst = few.nearest(self._keys, queries, scores, wanted)
            return self._judged(queries, worst, distances, positions, k)
        everywhere = torch.arange(len(self._keys), device=queries.device).expand(len(queries), -1)
        distances, positions = measure(self._keys, queries, everywhere, in_order=True)
        distances, positions = distances[:, :k].clone(), positions[:, :k].clone()
        return distances, positions, queries.new_full((len(queries),), torch.inf), distances[:, -1] < FARTHEST

    @property
    def _are_as_they_are(self) -> bool:
        """Whether keys are multiplied as they are."""
        return self._center is None and self.scale == 1 and self._keys.dtype == torch.float32

    def _best_of_blocks(
        self, shifted: Tensor, wanted: int, key_block: int, counts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What `_candidates` returns, by few operations that a GPU is not waited for."""
        blocks = self._score_blocks(shifted, key_block, counts)
        best, positions = _smallest_by_groups(next(blocks)[1], wanted)
        for start, scores in blocks:
            found, columns = _smallest_by_groups(scores, wanted)
            best, positions = torch.cat([best, found], dim=1), torch.cat([positions, columns + start], dim=1)
            best, positions = _keep(best, positions, wanted)
        return best, positions

    def _candidates(self, shifted: Tensor, wanted: int, key_block: int, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """The `wanted` smallest scores of each query and their positions, both `(b, wanted)`, unsorted."""
        best = shifted.new_empty(len(shifted), 0)
        positions = torch.empty(len(shifted), 0, dtype=torch.int64, device=shifted.device)
        threshold: Tensor | None = None
        for start, scores in self._score_blocks(shifted, key_block, counts):
            if threshold is None or scores.shape[1] % GROUP:
                found, columns = _smallest(scores, min(wanted, scores.shape[1]))
            else:
                found, columns = _below(scores, threshold)
            best = torch.cat([best, found], dim=1)
            positions = torch.cat([positions, columns + start], dim=1)
            if threshold is None or best.shape[1] > 4 * wanted:
                best, positions = _keep(best, positions, wanted)
                threshold = best.amax(dim=1, keepdim=True)
        return _keep(best, positions, wanted)

    def _score_blocks(self, shifted: Tensor, key_block: int, counts: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """Positions of first keys and scores `(b, n)`, block by block; the next block is written over the last.

        Keys that a query does not see have the score inf.
        """
        assert self._squared_norms is not None
        product = _CPU_PRODUCT if measuring.on_cpu(shifted) else self._gpu_product(key_block)
        doubled = shifted * -2
        buffer = shifted.new_empty(len(shifted) * min(key_block, len(self._keys)))
        for start in range(0, len(self._keys), key_block):
            end = min(start + key_block, len(self._keys))
            scores = buffer[: len(shifted) * (end - start)].view(len(shifted), end - start)
            for first in range(start, end, product):
                last = min(first + product, end)
                keys = self._shifted(self._keys[first:last])
                norms = self._squared_norms[first:last]
                torch.addmm(norms, doubled, keys.T, out=scores[:, first - start : last - start])
            if counts is not None:
                assert self._turns is not None
                scores.masked_fill_(self._turns[start:end] >= counts[:, None], torch.inf)
            yield start, scores

    def _gpu_product(self, key_block: int) -> int:
        """Keys of one matrix product: as many as are shifted at once, if they have to be."""
        return key_block if self._are_as_they_are else min(key_block, max(1, _GPU_SHIFTED // self._keys.shape[1]))

    def _score_bounds(self, shifted: Tensor, farthest: Tensor) -> Tensor:
        """The score `(b,)` that a key nearer than `farthest` `(b,)`, or as near, cannot exceed."""
        squared = shifted.square().sum(dim=1)
        # The standard bound of rounding errors of a product, with their usual growth by sqrt(D).
        slack = 4 * torch.finfo(torch.float32).eps * shifted.shape[1] ** 0.5
        rounding = slack * (squared.sqrt() + self._longest).square()
        bounds: Tensor = (farthest * self.scale).square() * (1 + 1e-6) - squared + rounding
        return bounds.masked_fill(farthest >= FARTHEST, torch.inf)  # it may be farther than float32 can tell

    def _scan(self, query: Tensor, bound: Tensor, k: int, count: Tensor | None) -> tuple[Tensor, Tensor]:
        """The k nearest keys of one query `(D,)` among all whose score is not above `bound`."""
        assert self._squared_norms is not None
        shifted = self._shifted(query)
        distances, positions = [], []
        missing = query.new_full((k,), torch.inf), torch.full((k,), -1, device=query.device)  # where it sees fewer
        for start in range(0, len(self._keys), _CHUNK):
            keys = self._keys[start : start + _CHUNK]
            scores = torch.addmv(self._squared_norms[start : start + _CHUNK], self._shifted(keys), shifted * -2)
            near = ~(scores > bound)
            if count is not None:
                assert self._turns is not None
                near &= self._turns[start : start + _CHUNK] < count
            near = near.nonzero()[:, 0]
            measured, order = measure(self._keys, query[None], near[None] + start)
            distances.append(measured[0, :k])
            positions.append(order[0, :k])
        nearest, chosen = torch.cat([*distances, missing[0]]).sort(
            stable=True
        )  # chunks come by position, so ties stay in order
        return nearest[:k], torch.cat([*positions, missing[1]])[chosen[:k]]


def _blocks(queries: Tensor, wanted: int) -> tuple[int, int]:
    """How many queries and keys are compared at once."""
    if not measuring.on_cpu(queries):
        rows = max(1, min(_GPU_QUERIES, len(queries), _GPU_SCORES // (4 * wanted)))
        return rows, _GPU_SCORES // rows
    # The first block's groups must outnumber the candidates clearly, or their minima say nothing.
    keys = max(_CPU_KEYS, 4 * GROUP * wanted)
    return max(16, _CPU_SCORES // keys), keys


def _smallest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest entries of each row of `scores` `(b, n)`, and perhaps more; see `_below`.

    The `count` groups with the smallest minima hold at least `count` entries up to the largest of these minima.
    """
    groups = scores.shape[1] // GROUP
    if groups < 2 * count or scores.shape[1] % GROUP:
        return scores.topk(count, dim=1, largest=False, sorted=False)
    minima = scores.unflatten(1, (groups, GROUP)).amin(dim=2)
    limit = minima.topk(count, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
    if not bool(torch.isfinite(limit).all()):  # squares overflow
        return scores.topk(count, dim=1, largest=False, sorted=False)
    return _below(scores, torch.nextafter(limit, torch.full_like(limit, torch.inf)))


def _smallest_by_groups(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest entries of each row of `scores` `(b, n)`, or all if it has fewer, and their columns.

    Of many they are in the `count` groups with the smallest minima, which are found among far fewer numbers. A group is
    every so many columns: so a GPU reads what lies side by side at once.
    """
    count, groups = min(count, scores.shape[1]), scores.shape[1] // GROUP
    if scores.numel() <= _GPU_SORTED or groups < 2 * count:
        return scores.topk(count, dim=1, largest=False, sorted=False)
    parts = scores[:, : groups * GROUP].unflatten(1, (GROUP, groups))
    group = parts.amin(dim=1).topk(count, dim=1, largest=False, sorted=False).indices
    members = parts.gather(2, group[:, None].expand(-1, GROUP, -1)).flatten(1)
    if scores.shape[1] % GROUP:
        members = torch.cat([members, scores[:, groups * GROUP :]], dim=1)
    found, member = members.topk(count, dim=1, largest=False, sorted=False)
    columns = group.gather(1, member % count) + member // count * groups
    return found, columns.where(member < count * GROUP, member + (groups - count) * GROUP)


def _keep(scores: Tensor, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest scores of each row, and their positions."""
    kept, chosen = scores.topk(min(count, scores.shape[1]), dim=1, largest=False, sorted=False)
    return kept, positions.gather(1, chosen)


def _below(scores: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of `scores` `(b, n)` below `threshold` `(b, 1)`, and their columns.

    Returns:
        Both `(b, m)`, where `m` is the largest number of such entries in a row; shorter rows end with inf.
    """
    groups = scores.shape[1] // GROUP
    minima = scores.unflatten(1, (groups, GROUP)).amin(dim=2)
    group = (minima < threshold).flatten().nonzero()[:, 0]  # ascending, and so are the rows below
    members = scores.view(-1, GROUP).index_select(0, group)
    found, member = (members < threshold[:, 0].index_select(0, group // groups)[:, None]).nonzero(as_tuple=True)
    group = group.index_select(0, found)
    rows = group // groups
    counts = rows.bincount(minlength=len(scores))
    width = int(counts.max())
    place = rows * width + torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    values = scores.new_full((len(scores) * width,), torch.inf)
    values[place] = members.view(-1).index_select(0, found * GROUP + member)
    columns = group.new_zeros(len(scores) * width)
    columns[place] = group % groups * GROUP + member
    return values.view(len(scores), width), columns.view(len(scores), width)
