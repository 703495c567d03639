"""The kernels of `groups`, in Triton: products whose scores are never written, and true distances of what they find."""
# Triton has hardly any types, and what it compiles is no ordinary Python.
# mypy: disable-error-code="no-any-return, no-untyped-def, untyped-decorator"

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

# Rows of keys that a program looks at are padded to a multiple of this: what any tile is a part of.
PADDED = 2048
# Keys that a program measures.
_MEASURED = 32
# Programs for each processor of a GPU: each goes through its part of the keys, so that few have to begin.
_PROGRAMS = 2
# Tiles of a program where keys are so wide that their parts are on their way meanwhile.
_WIDE_TILES = 8
# Of a tile. More are faster where shared memory has room for them.
_MOST_KEYS, _FEWEST_KEYS = 256, 64
# The largest float16. Minima above do not matter.
_MOST_HALF = tl.constexpr(65504.0)
# The length that queries have when they are rounded to float16: no number overflows, and few vanish.
_LENGTH = tl.constexpr(2.0**15)
# Queries shorter than this count as so long, so that nothing is divided by zero.
_LEAST_LENGTH = tl.constexpr(2.0**-60)
_MOST = tl.constexpr(torch.finfo(torch.float32).max)


class Tile(NamedTuple):
    """What one program of `group_minima` multiplies at once.

    Attributes:
        queries: How many.
        keys: How many.
        width: How many numbers of each.
        stages: How many tiles are on their way from memory.
        warps: How many share the work.
    """

    queries: int
    keys: int
    width: int
    stages: int
    warps: int


def choose_tile(queries: int, width: int, shared_bytes: int) -> Tile:
    """The fastest tile, of those that were tried, for so many queries of a width.

    How much of the shared memory it takes is an estimate, which differs between GPUs.

    Examples:
        >>> choose_tile(1024, 128, shared_bytes=232_448)
        Tile(queries=128, keys=256, width=128, stages=3, warps=8)
        >>> choose_tile(1, 128, shared_bytes=101_376)
        Tile(queries=16, keys=128, width=128, stages=2, warps=4)
    """
    rows, warps = (16, 4) if queries <= 16 else (64, 4) if queries <= 64 else (128, 8)
    step = max(16, triton.next_power_of_2(width)) if width <= 128 else 64
    keys, stages = 2 * _MOST_KEYS, 0
    while stages < 2 and keys > _FEWEST_KEYS:
        keys //= 2
        once, each = (rows, keys) if width <= step else (0, rows + keys)
        stages = min(3, (shared_bytes - once * step * 2) // (each * step * 2))
    return Tile(rows, keys, step, max(1, stages), warps)


# Tiles that shared memory has no room for, and what takes their place.
_fitting: dict[tuple[torch.device, int, int, Tile], Tile] = {}


def round_queries(queries: Tensor, center: Tensor, scale: float, typical: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Queries as `group_minima` takes them.

    Args:
        queries: Shape `(B, D)`, float32.
        center: Shape `(D,)`, float32, in the coordinates of the scaled keys.
        scale: The power of two that keys were multiplied with.
        typical: Shape `()`, float32: how far from the center the k-th nearest key of any query is at most.
        width: `W`, at least D.

    Returns:
        Float16 `(B, W)`, and float32 `(5, B)`: see `_round_queries`.
    """
    count, columns = queries.shape
    rounded = torch.empty(count, width, dtype=torch.float16, device=queries.device)
    numbers = torch.empty(5, count, dtype=torch.float32, device=queries.device)
    block = triton.next_power_of_2(width)
    _round_queries[(count,)](
        queries, center, typical, rounded, numbers, scale, 1 - slack(columns), count, columns, width, block
    )
    return rounded, numbers


def group_minima(
    queries: tuple[Tensor, Tensor], keys: Tensor, about: tuple[Tensor, Tensor], group: int, tile: Tile, out: Tensor
) -> None:
    """How near the keys of each group can be at least.

    Args:
        queries: From `round_queries`.
        keys: Float16 `(N, W)`, contiguous, W a multiple of 8.
        about: Of the keys: the squared norm of each, `(P,)`, P being N up to the next multiple of `PADDED`, infinite
            beyond N; and the two errors of each group, `(2, P / group)`. See `groups.Groups`.
        group: How many keys a group has.
        tile: From `choose_tile`.
        out: Float16 `(B, P / group)`, its rows perhaps parts of longer ones whose length is a multiple of 16: written
            to, the squared distance times the square of the fifth number of the query, rounded down.
    """
    asked = queries[0].device, queries[0].shape[1], group, tile
    while True:
        fitting = _fitting.get(asked, tile)
        try:
            return _multiply(queries, keys, about, group, fitting, out)
        except OutOfResources:  # only now is it known how much shared memory it takes
            if fitting.stages > 1:
                _fitting[asked] = fitting._replace(stages=fitting.stages - 1)
            elif fitting.keys > _FEWEST_KEYS:
                _fitting[asked] = fitting._replace(keys=fitting.keys // 2, stages=3)
            else:
                raise


def _multiply(
    queries: tuple[Tensor, Tensor], keys: Tensor, about: tuple[Tensor, Tensor], group: int, tile: Tile, out: Tensor
) -> None:
    rounded, numbers = queries
    norms, errors = about
    count, width = rounded.shape
    blocks, tiles = -(-count // tile.queries), len(norms) // tile.keys
    each = _WIDE_TILES
    if width <= tile.width:
        each = -(-tiles // max(1, _PROGRAMS * _processors(rounded.device) // blocks))
    strides = errors.stride(0) // 16, out.stride(0) // 16
    grid = (blocks * -(-tiles // each),)
    _group_minima[grid](
        *(rounded, numbers, keys, norms, errors, out, count, len(keys), blocks, each, tiles, *strides),
        *(width, group, *tile[:4]),
        num_warps=tile.warps,
    )


@functools.cache
def _processors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def measure_groups(queries: Tensor, keys: Tensor, chosen: Tensor | None, group: int) -> Tensor:
    """True distances of all keys of some groups, of whatever magnitude, by direct differences.

    Args:
        queries: Shape `(b, D)`, float32.
        keys: Shape `(N, D)`, contiguous, floating point.
        chosen: Shape `(b, n)`, int64: groups; None are all n.
        group: How many keys a group has.

    Returns:
        Float32 `(b, n * group)`; infinite behind the last key. A distance that float32 cannot hold is its largest.
    """
    count, groups = (len(queries), -(-len(keys) // group)) if chosen is None else chosen.shape
    distances = torch.empty(count, groups * group, dtype=torch.float32, device=queries.device)
    block = min(128, max(16, triton.next_power_of_2(keys.shape[1])))
    _measure_groups[(count, -(-groups * group // _MEASURED))](
        *(queries, keys, distances if chosen is None else chosen, distances, len(keys), groups),
        *(chosen is None, keys.shape[1], group, _MEASURED, block),
    )
    return distances


def slack(width: int) -> float:
    """What rounding in float32 changes of a sum of so many products, as a part of the product of the norms.

    Half a unit for every addition, and the rest for what comes before and after. Tensor cores cut off what they add,
    up to a whole unit: their products take this twice.
    """
    return (width + 64) * 2.0**-24


@triton.jit(do_not_specialize=["scale", "kept", "count"])
def _round_queries(
    q_ptr, c_ptr, typical_ptr, out_ptr, numbers_ptr, scale, kept, count,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move a query x by the center, and stretch -x to the length 2^15.

    With h the norm of x (or 2^-60 if that is more) the numbers are: alpha = 2^14 / h, which times |z|^2 - 2 x.z is
    alpha |z|^2 plus the product of z with the stretched x; alpha |x|^2; how much rounding moved the stretched x; what
    turns alpha times a squared distance into the unit of the minima; and the root of this unit, 2^7 / (h + typical).
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    there = columns < D
    x = tl.load(q_ptr + row * D + columns, mask=there, other=0.0) * scale
    x = x - tl.load(c_ptr + columns, mask=there, other=0.0)
    norm = tl.sqrt_rn(tl.sum(x * x, axis=0))
    length = tl.maximum(norm, _LEAST_LENGTH)
    inverse = 1.0 / length
    stretched = x * (inverse * -_LENGTH)
    rounded = stretched.to(tl.float16)
    tl.store(out_ptr + row * W + columns, rounded, mask=columns < W)
    moved = rounded.to(tl.float32) - stretched
    # Of a query too far away to square it there is no minimum.
    root = tl.where(norm < float("inf"), 128.0 / (length + tl.load(typical_ptr)), float("nan"))
    numbers_ptr += row
    tl.store(numbers_ptr, inverse * _LENGTH / 2)
    tl.store(numbers_ptr + count, norm * (norm * inverse) * kept * _LENGTH / 2)
    tl.store(numbers_ptr + 2 * count, tl.sqrt_rn(tl.sum(moved * moved, axis=0)))
    tl.store(numbers_ptr + 3 * count, root * (root * (length / _LENGTH * 2)))  # in this order it is never infinite
    tl.store(numbers_ptr + 4 * count, root)


@triton.jit(do_not_specialize=["B", "N", "blocks", "each", "tiles", "errors16", "out16"])
def _group_minima(
    q_ptr, numbers_ptr, z_ptr, norms_ptr, errors_ptr, out_ptr, B, N, blocks, each, tiles, errors16, out16,
    W: tl.constexpr, G: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Multiply a block of queries with `each` of the tiles of keys.

    Column c of a tile is key `(c % L) * G + c // L` of it, L = BN / G: the keys of a group, which follow each other,
    are then columns whose scores one thread has, so that their minimum needs no exchange.
    """
    L: tl.constexpr = BN // G
    first = tl.program_id(0) // blocks * each  # programs that follow each other read the same keys
    rows = tl.program_id(0) % blocks * BB + tl.arange(0, BB)
    there = rows < B
    row = tl.minimum(rows, B - 1).to(tl.int64)
    alpha = tl.load(numbers_ptr + row)
    base = tl.load(numbers_ptr + B + row)
    moved = tl.load(numbers_ptr + 2 * B + row)
    unit = tl.load(numbers_ptr + 3 * B + row)
    columns = tl.arange(0, BD)
    c = tl.arange(0, BN)
    member = c % L * G + c // L
    if W <= BD:
        if W == BD:
            q_all = tl.load(q_ptr + row[:, None] * W + columns[None, :])
        else:
            q_all = tl.load(q_ptr + row[:, None] * W + columns[None, :], mask=columns[None, :] < W, other=0.0)
    for tile in tl.range(first, tl.minimum(first + each, tiles), num_stages=STAGES if W <= BD else 1):
        key = tl.minimum(tile * BN + member, N - 1).to(tl.int64)  # the norm of one that is not there is infinite
        if W <= BD:
            if W == BD:
                z = tl.load(z_ptr + key[:, None] * W + columns[None, :])
            else:
                z = tl.load(z_ptr + key[:, None] * W + columns[None, :], mask=columns[None, :] < W, other=0.0)
            products = tl.dot(q_all, tl.trans(z))
        else:
            products = tl.zeros((BB, BN), tl.float32)
            for d in tl.range(0, W, BD, num_stages=STAGES):
                if W % BD == 0:
                    q = tl.load(q_ptr + row[:, None] * W + (d + columns)[None, :])
                    z = tl.load(z_ptr + key[:, None] * W + (d + columns)[None, :])
                else:
                    inside = (d + columns)[None, :] < W
                    q = tl.load(q_ptr + row[:, None] * W + (d + columns)[None, :], mask=inside, other=0.0)
                    z = tl.load(z_ptr + key[:, None] * W + (d + columns)[None, :], mask=inside, other=0.0)
                products = tl.dot(q, tl.trans(z), products)
        scores = alpha[:, None] * tl.load(norms_ptr + tile * BN + member)[None, :] + products
        least = tl.min(tl.reshape(scores, (BB, G, L)), axis=1)
        groups = tile * L + tl.arange(0, L)
        rounding = tl.load(errors_ptr + groups) * _LENGTH
        longest = tl.load(errors_ptr + errors16 * 16 + groups)
        least = (least + base[:, None] - rounding[None, :] - moved[:, None] * longest[None, :]) * unit[:, None]
        least = tl.minimum(least, _MOST_HALF)
        least = least - tl.abs(least) * 2.0**-10 - 2.0**-24  # rounding it to the nearest cannot bring it up again
        tl.store(
            out_ptr + rows.to(tl.int64)[:, None] * (out16 * 16) + groups[None, :],
            least.to(tl.float16),
            mask=there[:, None],
        )


@triton.jit(do_not_specialize=["N", "count"])
def _measure_groups(
    q_ptr, z_ptr, chosen_ptr, out_ptr, N, count,
    WHOLE: tl.constexpr, D: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Where squares overflow or vanish, those of the differences times two powers of two are summed up instead."""
    query = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    asked = row < count * G
    chosen = row // G if WHOLE else tl.load(chosen_ptr + query * count + row // G, mask=asked, other=0)
    key = chosen.to(tl.int64) * G + row % G
    there = asked & (key < N)
    squares = tl.zeros((ROWS,), tl.float32)
    for d in range(0, D, BD):
        apart = _differences(q_ptr + query * D, z_ptr, key, there, d, D, BD)
        squares += tl.sum(apart * apart, axis=1)
    away = tl.sqrt_rn(squares)
    doubtful = there & ((squares < 2.0**-86) | (squares > 2.0**120))
    if tl.max(doubtful.to(tl.int32), axis=0) > 0:
        of_tiny = tl.zeros((ROWS,), tl.float32)
        of_huge = tl.zeros((ROWS,), tl.float32)
        for d in range(0, D, BD):
            apart = _differences(q_ptr + query * D, z_ptr, key, there, d, D, BD)
            apart = tl.minimum(tl.maximum(apart, -_MOST), _MOST)
            tiny = apart * 2.0**96
            of_tiny += tl.sum(tiny * tiny, axis=1)
            huge = apart * 2.0**-96
            of_huge += tl.sum(huge * huge, axis=1)
        away = tl.where(squares < 2.0**-86, tl.sqrt_rn(of_tiny) * 2.0**-96, away)
        away = tl.where(squares > 2.0**120, tl.minimum(tl.sqrt_rn(of_huge) * 2.0**96, _MOST), away)
    tl.store(out_ptr + query * count * G + row, tl.where(there, away, float("inf")), mask=asked)


@triton.jit
def _differences(q_ptr, z_ptr, key, there, d, D: tl.constexpr, BD: tl.constexpr):
    """Columns d to d + BD of some keys, less those of the query, float32."""
    columns = d + tl.arange(0, BD)
    if D % BD == 0:
        q = tl.load(q_ptr + columns)
        z = tl.load(z_ptr + key[:, None] * D + columns[None, :], mask=there[:, None], other=0.0)
    else:
        q = tl.load(q_ptr + columns, mask=columns < D, other=0.0)
        z = tl.load(
            z_ptr + key[:, None] * D + columns[None, :], mask=there[:, None] & (columns < D)[None, :], other=0.0
        )
    return z.to(tl.float32) - q[None, :]
