"""Products in bfloat16 of which only the smallest are ever written to memory, compiled by Numba for AVX-512.

A tile of 6 queries and 64 keys fills the registers: 24 of 32 hold scores while the products are summed up, and there
they are compared with the limits of the queries. Few are below; these are collected, and lower the limits.
"""
# Numba and llvmlite have hardly any types.
# mypy: disable-error-code="attr-defined, call-arg, misc, no-any-return, no-untyped-call, no-untyped-def"

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

# Keys and queries of a tile.
KEYS = 64
QUERIES = 6
_LANES = 16
_VECTORS = KEYS // _LANES
# Candidates that are kept beyond those wanted, because finding a limit for exactly so many would take longer.
_SPARE = 16
# Queries below which another thread takes longer to start than it saves.
_QUERIES_PER_THREAD = 48
# The limit of a query that has found nothing yet: above all scores, below that of a key that fills a block up.
_NO_LIMIT = 1e37

_BIT, _INT16, _INT32, _INT64, _FLOAT = ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_FLOAT, _LANES), ir.VectorType(_INT32, _LANES)


class _BFloat(ir.Type):
    """LLVM's type for which llvmlite has none."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), 2 * _LANES)


def is_usable() -> bool:
    """Whether Numba compiles here; raises whatever keeps it from that, such as a damaged cache or a full disk."""
    if numba.config.DISABLE_JIT:
        return False
    scan = Scan(torch.ones(1, 2, dtype=torch.bfloat16), 1)
    scan.compare(packed(torch.ones(1, KEYS, 2, dtype=torch.bfloat16), KEYS).contiguous(), 0)
    return len(scan.found()[0]) == 1


def packed(wide: Tensor, together: int) -> Tensor:
    """A view of rows in the order that a tile reads them in.

    Args:
        wide: Bfloat16, shape `(..., n, W)`, n a multiple of `together`, W even.
        together: `KEYS` or `QUERIES`.

    Returns:
        Pairs of bfloat16 as int32, shape `(..., n / together, W / 2, together)`.
    """
    return wide.view(torch.int32).unflatten(-2, (-1, together)).transpose(-1, -2)


class Scan:
    """A few queries, and the keys whose scores are the smallest so far.

    Args:
        rows: Bfloat16 `(b, W)`, W even: a product with a key is a score, which is positive.
        wanted: How many candidates a query has at least.
    """

    def __init__(self, rows: Tensor, wanted: int) -> None:
        tiles = -(-len(rows) // QUERIES)
        filled = torch.zeros(tiles * QUERIES, rows.shape[1], dtype=torch.bfloat16)
        filled[: len(rows)] = rows
        self._rows, self._wanted, self._count = packed(filled, QUERIES).contiguous().numpy(), wanted, len(rows)
        self._limits = np.full((tiles, QUERIES), _NO_LIMIT, np.float32)
        self._limits.reshape(-1)[len(rows) :] = -np.inf
        self._found = np.empty((tiles * QUERIES, 2 * wanted + KEYS), np.int64)
        self._counts = np.zeros(tiles * QUERIES, np.int64)

    def compare(self, keys: Tensor, start: int) -> None:
        """Look at packed keys `(pieces, blocks, W / 2, 64)`, the first of them at position `start`."""
        blocks = keys.flatten(0, 1).numpy()
        # At random, or keys in an unlucky order (from far to near) would all be candidates for a while.
        order = np.random.default_rng(0).permutation(len(blocks))
        tiles = len(self._limits)
        threads = max(1, min(torch.get_num_threads(), self._count // _QUERIES_PER_THREAD))
        edges = [tiles * thread // threads for thread in range(threads + 1)]
        _each(partial(self._compare, blocks, order, start), list(pairwise(edges)))

    def _compare(self, blocks: np.ndarray, order: np.ndarray, start: int, tiles: tuple[int, int]) -> None:
        part, rows = slice(*tiles), slice(tiles[0] * QUERIES, tiles[1] * QUERIES)
        found, counts = self._found[rows], self._counts[rows]
        _scan(blocks, order, start, self._rows[part], self._limits[part], found, counts, self._wanted)

    def found(self) -> tuple[Tensor, Tensor]:
        """Positions of candidates, ascending, `(b, n)`, padded with -1, and limits `(b,)` that no other is below."""
        _finish(self._limits, self._found, self._counts, self._wanted)
        counts = self._counts[: self._count]
        positions = self._found[: self._count, : counts.max()] & 0xFFFFFFFF
        missing = np.arange(positions.shape[1]) >= counts[:, None]
        positions[missing] = np.iinfo(np.int64).max
        positions.sort(axis=1)
        positions[missing] = -1
        return torch.from_numpy(positions), torch.from_numpy(self._limits.reshape(-1)[: self._count])


def _each(function: Callable[[tuple[int, int]], None], parts: list[tuple[int, int]]) -> None:
    """Call a function that lets go of the interpreter once for each part, all at once."""
    if len(parts) == 1:
        function(parts[0])
        return
    with ThreadPoolExecutor(len(parts)) as threads:
        list(threads.map(function, parts))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compile_ = partial(numba.njit, nogil=True)
    try:
        return compile_(cache=True)(function)
    except RuntimeError:  # no directory where the result could be kept
        return compile_()(function)


def _number(value):
    return ir.Constant(_INT64, value)


def _everywhere(builder, value):
    """One number in all lanes of a vector."""
    nothing = ir.Constant(ir.VectorType(value.type, _LANES), ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_INTS, None))


@intrinsic
def _tile(typing_context, keys, block, rows, tile, limits, masks, scores):
    """Multiply 64 keys with 6 queries.

    Args:
        typing_context: Numba's, as for every intrinsic.
        keys: Int32 `(blocks, W / 2, 64)`: pairs of bfloat16.
        block: Which keys.
        rows: Int32 `(tiles, W / 2, 6)`.
        tile: Which queries.
        limits: Float32 `(tiles, 6)`.
        masks: Uint64 `(6,)`: written to, a bit for each key whose score is below the limit.
        scores: Float32 `(6, 64)`: written to if any score is below.

    Returns:
        Whether any is.
    """

    def generate(context, builder, signature, values):
        keys, block, rows, tile, limits, masks, scores = (
            context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, values, strict=True)
        )
        steps = cgutils.unpack_tuple(builder, rows.shape)[1]

        def pointer(array, kind, first=None):
            return builder.gep(builder.bitcast(array.data, kind.as_pointer()), [first or _number(0)])

        def load(start, index):
            return builder.load(builder.gep(start, [index]), align=4)

        def store(value, start, index):
            builder.store(value, builder.gep(start, [_number(index)]), align=4)

        def place(step, index, count):
            return builder.add(builder.mul(step, _number(count)), _number(index))

        key = pointer(keys, _INTS, builder.mul(builder.mul(block, steps), _number(_VECTORS)))
        row = pointer(rows, _INT32, builder.mul(builder.mul(tile, steps), _number(QUERIES)))
        limit = pointer(limits, _FLOAT, builder.mul(tile, _number(QUERIES)))
        mask, score = pointer(masks, _INT64), pointer(scores, _FLOATS)

        name, kind = "llvm.x86.avx512bf16.dpbf16ps.512", ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS])
        multiply_add = cgutils.get_or_insert_function(builder.module, kind, name)
        # LLVM keeps these in registers.
        sums = [
            [cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, None)) for _ in range(_VECTORS)]
            for _ in range(QUERIES)
        ]
        with cgutils.for_range(builder, steps) as loop:
            vectors = [builder.bitcast(load(key, place(loop.index, v, _VECTORS)), _PAIRS) for v in range(_VECTORS)]
            for q in range(QUERIES):
                pair = builder.bitcast(_everywhere(builder, load(row, place(loop.index, q, QUERIES))), _PAIRS)
                for total, vector in zip(sums[q], vectors, strict=True):
                    builder.store(builder.call(multiply_add, [builder.load(total), vector, pair]), total)

        every = _number(0)
        for q in range(QUERIES):
            highest, bits = _everywhere(builder, load(limit, _number(q))), _number(0)
            for v, total in enumerate(sums[q]):
                below = builder.bitcast(builder.fcmp_ordered("<", builder.load(total), highest), _INT16)
                bits = builder.or_(bits, builder.shl(builder.zext(below, _INT64), _number(v * _LANES)))
            store(bits, mask, q)
            every = builder.or_(every, bits)
        any_below = builder.icmp_unsigned("!=", every, _number(0))
        with builder.if_then(any_below):
            for q in range(QUERIES):
                for v, total in enumerate(sums[q]):
                    store(builder.load(total), score, q * _VECTORS + v)
        return any_below

    return types.boolean(keys, block, rows, tile, limits, masks, scores), generate


@intrinsic
def _lowest_bit(typing_context, mask):
    """Its position."""

    def generate(context, builder, signature, values):
        return builder.cttz(values[0], ir.Constant(_BIT, 1))

    return types.int64(types.uint64), generate


@intrinsic
def _as_float(typing_context, bits):
    """The number with these 32 bits."""

    def generate(context, builder, signature, values):
        return builder.bitcast(builder.trunc(values[0], _INT32), _FLOAT)

    return types.float32(types.int64), generate


@_compiled
def _keep(entries, count, wanted):
    """Keep the `wanted` smallest of distinct `entries[:count]`, and perhaps a few more.

    Returns:
        How many are kept, and a score that none of the others is below.
    """
    low, high = entries[0], entries[0]
    for index in range(count):
        low, high = min(low, entries[index]), max(high, entries[index])
    while True:
        middle = low + (high - low) // 2
        inside = 0
        for index in range(count):
            inside += entries[index] <= middle
        if inside < wanted:
            low = middle + 1
        elif inside > wanted + _SPARE:
            high = middle
        else:
            break
    kept = 0
    for index in range(count):
        entry = entries[index]
        entries[kept] = entry
        kept += entry <= middle
    return kept, _as_float(middle >> 32)


@_compiled
def _scan(keys, order, start, rows, limits, found, counts, wanted):
    """Collect the smallest scores.

    Args:
        keys: Int32 `(blocks, W / 2, 64)`.
        order: Int64 `(blocks,)`: the order in which they are looked at.
        start: Position of the first key.
        rows: Int32 `(tiles, W / 2, 6)`.
        limits: Float32 `(tiles, 6)`: scores that are not below do not matter.
        found: Int64 `(6 tiles, 2 wanted + 64)`: the bits of a score, then 32 of a position.
        counts: Int64 `(6 tiles,)`: how many a query has.
        wanted: How many a query needs.
    """
    masks = np.empty(QUERIES, np.uint64)
    scores = np.empty((QUERIES, KEYS), np.float32)
    bits = scores.view(np.int32)
    for block in order:
        first = start + block * KEYS
        for tile in range(len(rows)):
            if not _tile(keys, block, rows, tile, limits, masks, scores):
                continue
            for row in range(QUERIES):
                mask = masks[row]
                if mask == 0:
                    continue
                query = tile * QUERIES + row
                count = counts[query]
                while mask != 0:
                    key = _lowest_bit(mask)
                    mask &= mask - np.uint64(1)
                    found[query, count] = np.int64(bits[row, key]) << 32 | first + key
                    count += 1
                if count > 2 * wanted:
                    count, limits[tile, row] = _keep(found[query], count, wanted)
                counts[query] = count


@_compiled
def _finish(limits, found, counts, wanted):
    """Keep what is wanted of what `_scan` found."""
    for tile in range(len(limits)):
        for row in range(QUERIES):
            query = tile * QUERIES + row
            if counts[query] > wanted + _SPARE:
                counts[query], limits[tile, row] = _keep(found[query], counts[query], wanted)
