"""The smallest numbers of each row, by a kernel in Triton: several times as fast as `topk` for few queries."""
# Triton has hardly any types, and what it compiles is no ordinary Python.
# mypy: disable-error-code="no-any-return, no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers that a program looks at, how many times those that it keeps they are at least, and how many a warp has.
_PIECE, _TIMES, _OF_A_WARP = 4096, 4, 1024


def smallest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The smallest numbers of each row, in any order, and their columns.

    Of equal ones those at the lowest columns of a piece are taken.

    Args:
        values: Shape `(b, n)`, contiguous: float16, or float32 without negative numbers.
        count: How many, at most n.

    Returns:
        Numbers and columns, int64, both `(b, count)`.
    """
    columns = None
    while True:
        rows, n = values.shape
        piece = min(max(_PIECE, triton.next_power_of_2(_TIMES * count)), triton.next_power_of_2(n))
        pieces = -(-n // piece)
        kept = values.new_empty(rows, pieces * count)
        places = torch.empty(rows, pieces * count, dtype=torch.int64, device=values.device)
        _smallest[(rows, pieces)](
            *(values, places if columns is None else columns, kept, places, n, count, piece, columns is not None),
            num_warps=min(16, max(1, piece // _OF_A_WARP)),
        )
        if pieces == 1:
            return kept, places
        values, columns = kept, places


@triton.jit(do_not_specialize=["count"])
def _smallest(
    values_ptr, columns_ptr, kept_ptr, places_ptr, n, count, PIECE: tl.constexpr, HAS_COLUMNS: tl.constexpr
):  # fmt: skip
    """Bisect for a number that `count` are not above; numbers are compared as their bits, which need no exceptions."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    # Behind the last are NaN, which come after all others, and after those that there are.
    values = tl.load(values_ptr + row * n + c, mask=c < n, other=float("nan"))
    if values.dtype == tl.float16:
        bits = values.to(tl.int16, bitcast=True).to(tl.int32)
        high = 0x7C01  # the first behind infinity
        order = tl.minimum(tl.where(bits < 0, bits ^ 0x7FFF, bits), high)
    else:
        high = 0x7F800001
        order = tl.minimum(tl.maximum(values.to(tl.int32, bitcast=True), 0), high)
    low = tl.min(order, axis=0)
    while low < high:
        middle = low + (high - low) // 2
        found = tl.sum((order <= middle).to(tl.int32), axis=0)
        low = tl.where(found < count, middle + 1, low)
        high = tl.where(found < count, high, middle)
        low = tl.where(found == count, high, low)
    below = order < high
    equal = order == high
    # Both are counted at once: there are less than 2^15 of either.
    seen = tl.cumsum(below.to(tl.int32) + (equal.to(tl.int32) << 15), axis=0)
    place = tl.where(below, (seen & 0x7FFF) - 1, tl.sum(below.to(tl.int32), axis=0) + (seen >> 15) - 1)
    taken = (below | equal) & (place < count)
    to = (row * tl.num_programs(1) + tl.program_id(1)) * count + place
    column = tl.minimum(c, n - 1).to(tl.int64)  # behind the last there may be none to take
    if HAS_COLUMNS:
        column = tl.load(columns_ptr + row * n + column, mask=taken)
    tl.store(kept_ptr + to, values, mask=taken)
    tl.store(places_ptr + to, column, mask=taken)
