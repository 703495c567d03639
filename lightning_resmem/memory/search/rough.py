"""Candidates of an exact search from products in bfloat16, on CPUs that multiply it natively."""

import functools
import importlib.util
import logging
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

_log = logging.getLogger("lightning_resmem")

# Keys of one matrix product and queries compared with them: their scores stay in a core's cache.
_PIECE = 4096
_QUERIES = 256
# Keys that are squared at once, and numbers that are rounded at once.
_CHUNK = 16384
_ROUNDED = 2**18
# Pieces whose scores are held at once (16 MiB).
_PIECES = 8
# The smallest score of every group of so many keys decides whether the group is looked at. Larger ones are faster, but
# there have to be clearly more groups than candidates.
_GROUPS = (64, 32, 16)
# The last columns of widened rows; before them comes an empty one if the rows had an odd width else.
_EXTRA = 5
# Keys in bfloat16 that are kept from search to search.
_CACHED_BYTES = 128 * 2**20
# Queries below which rounding more keys than that costs more than the faster product gains.
_MIN_QUERIES = 128
# A number rounded to bfloat16 is off by at most this part of itself.
_ROUNDING = 2.0**-8
# Times `wanted`: candidates of a query, or groups to look at, beyond which this way is not worth it.
_TOO_MANY = 8
# A query and a position share an int64.
_POSITION_BITS = 40
# Times this, a bound is still one after it and what it is multiplied with were rounded.
_UP = 1 + 2 * _ROUNDING
# Squared norms within which neither scores nor their bounds overflow, or vanish.
_SQUARES = (1e-24, 1e30)


def is_worthwhile(queries: Tensor, keys: Tensor, wanted: int) -> bool:
    """Whether `Screen.candidates` is faster than products in float32."""
    return (
        keys.device.type == "cpu"
        and (len(queries) >= _MIN_QUERIES or _bytes(keys) <= _CACHED_BYTES)
        and len(keys) >= max(_PIECE, 2 * _GROUPS[-1] * wanted)
        and 2 * _GROUPS[-1] * wanted <= _PIECES * _PIECE
        and _multiplies_bfloat16()
    )


@functools.cache
def _multiplies_bfloat16() -> bool:
    # Elsewhere a product in bfloat16 is emulated, slower than one in float32.
    return _has("avx512_bf16") or _has("amx_bf16")


def _has(capability: str) -> bool:
    """Whether this CPU has it; torch < 2.13 cannot tell."""
    return hasattr(torch.cpu, "get_capabilities") and bool(torch.cpu.get_capabilities().get(capability))


@functools.cache
def _fused() -> ModuleType | None:
    """The compiled loop, where Numba is installed. AMX multiplies so fast that torch, which uses it, is left to it."""
    if not _has("avx512_bf16") or _has("amx_bf16") or importlib.util.find_spec("numba") is None:
        return None
    try:
        from lightning_resmem.memory.search import fused

        return fused if fused.is_usable() else None
    except Exception as error:  # whatever it is, the same search works without
        _log.warning(
            "Exact search does without Numba, which does not work here (%s: %s). If its cache is damaged or has no "
            "room, delete it, or set NUMBA_CACHE_DIR to another directory.",
            type(error).__name__,
            error,
        )
        return None


def _width(keys: Tensor) -> int:
    """Of widened rows: even."""
    return (keys.shape[1] + _EXTRA + 1) // 2 * 2


def _bytes(keys: Tensor) -> int:
    """Of all keys in bfloat16, with what goes with them."""
    return -(-len(keys) // _PIECE) * _PIECE * _width(keys) * 2


class Screen:
    """Finds the keys that may be among the nearest, from products in bfloat16.

    One matrix product of widened rows gives, for query x and key z, both less the mean of the keys,

        s = raised - 2 x.z + |z|^2 - error

    where `error` bounds what rounding x to x' and z to z' changes: 2 |x| |z - z'| + 2 |x - x'| |z'|, by the
    Cauchy-Schwarz inequality. So `s + |x|^2 - raised` never exceeds the squared distance, and as rounding the result is
    monotone, a key whose rounded s lies above a bfloat16 limit is farther than `limit + |x|^2 - raised`. `raised` is
    so much above |x|^2 that every s is positive: then the bits of bfloat16, read as int16, have the order of the
    numbers, and comparing them is fast. The compiled loop compares them before they are rounded.

    Args:
        keys: Shape `(N, D)`, on the CPU. Up to 128 MiB of them are kept in bfloat16, more are rounded at every search.
        center: Their mean, shape `(D,)`, float32.
    """

    def __init__(self, keys: Tensor, center: Tensor) -> None:
        self._keys, self._center = keys, center
        self._squared_norms = squared_norms(keys, center)
        self._largest = self._squared_norms.max()
        self._fused = _fused() if len(keys) < 2**32 else None  # it keeps 32 bits of a position
        self._pieces = -(-len(keys) // _PIECE)
        self._cached = self._room(self._pieces) if _bytes(keys) <= _CACHED_BYTES else None
        if self._cached is not None:
            self._prepare(0, self._cached)

    def candidates(self, queries: Tensor, wanted: int) -> tuple[Tensor, Tensor] | None:
        """The keys that may be among the nearest, and how near any other key can be at most.

        Args:
            queries: Shape `(B, D)`, float32.
            wanted: How many candidates a query has at least.

        Returns:
            Positions, ascending, shape `(B, n)`, padded with -1, and squared distances `(B,)`: no key that is no
            candidate is nearer; -inf for a query with too many candidates, of which none is returned. None where
            squares could overflow, or too many keys are equally near to tell them apart.
        """
        queries = queries - self._center
        squared, largest = queries.square().sum(dim=1), self._largest
        if not bool(torch.maximum(largest, squared.max()) < _SQUARES[1]) or not bool(largest > _SQUARES[0]):
            return None
        width = _width(queries)
        # Rounding while the product adds up, in float32.
        slack = 8 * torch.finfo(torch.float32).eps * width**0.5 * (squared.sqrt() + largest.sqrt()).square()
        # Over all |z|, 2 error - (|x| - |z|)^2 is at most about 8u |x|^2, u being the rounding.
        raised = ((squared * (1 + 12 * _ROUNDING) + slack) * (1 + 2 * _ROUNDING)).bfloat16()
        rows = queries.new_zeros(len(queries), width, dtype=torch.bfloat16)
        rounded = rows[:, : queries.shape[1]]
        rounded.copy_(queries * -2)
        rows[:, -5:-3], rows[:, -3] = 1, raised
        rows[:, -2] = squared.sqrt() * -_UP
        rows[:, -1] = torch.linalg.vector_norm(rounded.float() / 2 + queries, dim=1) * -_UP
        found = self._search(rows, wanted) if self._fused is None else self._search_fused(rows, wanted)
        if found is None:
            return None
        positions, limits = found
        return positions, limits - (raised.float() - squared + slack)

    def _search_fused(self, rows: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """Positions of candidates `(B, n)` and limits of scores `(B,)`."""
        assert self._fused is not None
        scan = self._fused.Scan(rows, wanted)
        for start, keys in self._chunks(self._pieces if self._cached is not None else _PIECES):
            scan.compare(keys, start)
        found: tuple[Tensor, Tensor] = scan.found()
        return found

    def _search(self, rows: Tensor, wanted: int) -> tuple[Tensor, Tensor] | None:
        """The same without the compiled loop; None if too many scores are alike."""
        first = min(self._pieces, _PIECES)
        first_keys = min(len(self._keys), first * _PIECE)
        group = next((size for size in _GROUPS if first_keys >= 2 * size * wanted), _GROUPS[-1])
        blocks = [_Block(block, wanted, group) for block in rows.split(_QUERIES)]
        scores = torch.empty(first * min(_QUERIES, len(rows)) * _PIECE, dtype=torch.bfloat16)
        for start, keys in self._chunks(_PIECES):
            for block in blocks:
                if not block.compare(keys, scores, start):
                    return None
        found, counts = zip(*(block.found() for block in blocks), strict=True)
        limits = torch.cat([block.limit for block in blocks])[:, 0].view(torch.bfloat16).float()
        count = torch.cat(counts)
        return _padded(torch.cat(found), count, wanted), limits.masked_fill(count == 0, -torch.inf)

    def _chunks(self, pieces: int) -> Iterator[tuple[int, Tensor]]:
        """So many pieces at once: the position of the first key, and what `_prepare` writes, over the last ones."""
        starts = range(0, self._pieces, pieces)
        if self._cached is not None:
            for first, part in zip(starts, self._cached.split(pieces), strict=True):
                yield first * _PIECE, part
            return
        room = self._room(min(pieces, self._pieces))
        for first in starts:
            yield first * _PIECE, self._prepare(first, room[: self._pieces - first])

    def _room(self, pieces: int) -> Tensor:
        """Memory for so many."""
        width = _width(self._keys)
        if self._fused is None:
            return torch.empty(pieces, _PIECE, width, dtype=torch.bfloat16)
        together = self._fused.KEYS
        return torch.empty(pieces, _PIECE // together, width // 2, together, dtype=torch.int32)

    def _prepare(self, first: int, out: Tensor) -> Tensor:
        """Write pieces of the keys, widened and, for the compiled loop, packed; returns `out`."""
        if self._fused is None:
            for index, piece in enumerate(out, first):
                self._widen(index, piece)
            return out
        wide = torch.empty(_PIECE, _width(self._keys), dtype=torch.bfloat16)
        for index, piece in enumerate(out, first):
            self._widen(index, wide)
            piece.copy_(self._fused.packed(wide, self._fused.KEYS))
        return out

    def _widen(self, index: int, out: Tensor) -> None:
        """Write a piece of the keys, and what goes with them, into `out` `(4096, W)`; behind the last come no keys."""
        keys = self._keys[index * _PIECE : (index + 1) * _PIECE]
        squared = self._squared_norms[index * _PIECE : (index + 1) * _PIECE]
        count, width = keys.shape
        errors = torch.empty(count, dtype=torch.float32)
        rows = max(1, _ROUNDED // width)
        shifted = torch.empty(min(rows, count), width, dtype=torch.float32)
        for part, rounded, error in zip(
            keys.split(rows), out[:count, :width].split(rows), errors.split(rows), strict=True
        ):
            difference = torch.sub(part, self._center, out=shifted[: len(part)])
            rounded.copy_(difference)
            torch.linalg.vector_norm(difference.sub_(rounded), dim=1, out=error)
        out[:count, width:-5] = 0
        out[:count, -5:-3], out[:count, -3] = _split(squared), 1
        out[:count, -2], out[:count, -1] = errors * (2 * _UP), squared.sqrt() * (2 * _UP)
        out[count:] = 0
        out[count:, -5] = 1e38  # never near


class _Block:
    """A few queries, and the keys that are near them so far."""

    def __init__(self, rows: Tensor, wanted: int, group: int) -> None:
        self._rows, self._wanted, self._group = rows, wanted, group
        self._best = torch.empty(len(rows), 0, dtype=torch.int16)  # minima of groups, of different keys therefore
        self._pairs: list[Tensor] = []  # query << _POSITION_BITS | position
        self._scores: list[Tensor] = []
        self.limit = self._best  # (b, 1): at least `wanted` keys have scores up to it

    def compare(self, chunk: Tensor, buffer: Tensor, start: int) -> bool:
        """Look at keys `(pieces, 4096, width)`, the first at position `start`; false if too many of them are near."""
        pieces, count, size = len(chunk), len(self._rows), self._group
        groups = _PIECE // size
        scores = buffer[: pieces * count * _PIECE].view(pieces, count, _PIECE)
        for keys, out in zip(chunk, scores, strict=True):
            torch.mm(self._rows, keys.T, out=out)
        bits = scores.view(torch.int16).view(-1, size)
        # (b, groups of all pieces): what is found is then ascending by query and position
        minima = bits.amin(dim=1).view(pieces, count, groups).transpose(0, 1).reshape(count, -1)
        seen = torch.cat([self._best, minima], dim=1)
        self._best = torch.from_numpy(np.partition(seen.numpy(), self._wanted - 1, axis=1)[:, : self._wanted].copy())
        self.limit = self._best[:, -1:]
        hit = _up_to(minima, self.limit)
        if len(hit) > _TOO_MANY * self._wanted * count:
            return False
        query, group = hit // (pieces * groups), hit % (pieces * groups)
        member = bits.index_select(0, (group // groups * count + query) * groups + group % groups)
        near = _up_to(member, self.limit.index_select(0, query))
        self._scores.append(member.view(-1).index_select(0, near))
        first = (query << _POSITION_BITS) + (start + group * size)
        self._pairs.append(first.index_select(0, near // size) + near % size)
        return True

    def found(self) -> tuple[Tensor, Tensor]:
        """Positions of the candidates of one query after the other, ascending, and how many each query has."""
        pairs, scores = torch.cat(self._pairs), torch.cat(self._scores)
        pairs = pairs.index_select(0, _up_to(scores, self.limit[:, 0].index_select(0, pairs >> _POSITION_BITS)))
        counts = (pairs >> _POSITION_BITS).bincount(minlength=len(self._rows))
        if int(counts.max()) > _TOO_MANY * self._wanted:
            counts = counts.masked_fill(counts > _TOO_MANY * self._wanted, 0)
            pairs = pairs[counts.index_select(0, pairs >> _POSITION_BITS) > 0]
        # Sorted runs, one of each chunk: a stable sort merges them.
        return torch.from_numpy(np.sort(pairs.numpy(), kind="stable")) & (1 << _POSITION_BITS) - 1, counts


def _padded(positions: Tensor, counts: Tensor, least: int) -> Tensor:
    """Rows of `counts` `(B,)` positions each, all filled up to the longest, and to `least`."""
    width = max(least, int(counts.max()))
    places = torch.arange(len(positions)) + (
        torch.arange(len(counts)) * width - counts.cumsum(0) + counts
    ).repeat_interleave(counts)
    return torch.full((len(counts) * width,), -1).index_copy_(0, places, positions).view(len(counts), width)


def squared_norms(keys: Tensor, center: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Of keys `(N, D)` times `scale`, less `center` if it is given: shape `(N,)`, float32."""
    squared = torch.empty(len(keys), dtype=torch.float32, device=keys.device)
    # Into one tensor: small results between large temporary ones would keep the memory of the latter from being used
    # again, and in the end as much as the keys take.
    for part, out in zip(keys.split(_CHUNK), squared.split(_CHUNK), strict=True):
        rows = part.float() if scale == 1 else part.float() * scale
        rows = rows if center is None else rows - center
        torch.sum(rows.square(), dim=1, out=out)
    return squared


def _split(numbers: Tensor) -> Tensor:
    """Float32 `(n,)` as the sum of two bfloat16, shape `(n, 2)`, never above it and less than 2^-14 of it below."""
    high = numbers.bfloat16()
    rest = numbers - high
    return torch.stack([high, (rest - 2 * _ROUNDING * rest.abs()).bfloat16()], dim=1)


def _up_to(values: Tensor, limits: Tensor) -> Tensor:
    """Where values are at most their limits, as flat positions; NumPy is several times faster at it than torch."""
    return torch.from_numpy(np.flatnonzero(values.numpy() <= limits.numpy()))
