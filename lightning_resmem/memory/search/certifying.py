"""The last kernel of `groups`: measured candidates in order, and whether they certainly are the nearest."""
# Triton has hardly any types, and what it compiles is no ordinary Python.
# mypy: disable-error-code="no-any-return, no-untyped-def, untyped-decorator"

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lightning_resmem.memory.search.interface import Found
from lightning_resmem.memory.search.measuring import FARTHEST

# Candidates that a program puts in order, and those that it compares them with at once.
_ORDERED, _COMPARED = 128, 32
_FARTHEST = tl.constexpr(FARTHEST)


class Candidates(NamedTuple):
    """What was measured for some queries.

    Attributes:
        distances: Of the nearest, in any order, float32 `(b, m)`.
        columns: Where `kernels.measure_groups` wrote them, int64 `(b, m)`.
        groups: That were measured, int64 `(b, n)`; None if all were.
        are_all: Whether there was nothing else to measure in these groups.
    """

    distances: Tensor
    columns: Tensor
    groups: Tensor | None
    are_all: bool


class Screen(NamedTuple):
    """What is known of the groups that were not measured.

    Attributes:
        limits: The minima of those that were, float16 `(b, n)`: no other is smaller than the largest of them.
        numbers: Of the queries, from `kernels.round_queries`.
        kept: What rounding leaves of a minimum at least, as a part of it.
        unit: The distance of the keys that is 1 where minima are computed.
    """

    limits: Tensor
    numbers: Tensor
    kept: float
    unit: float


def take_nearest(candidates: Candidates, screen: Screen | None, group: int, found: Found) -> None:
    """Put the nearest candidates in order, by distance and then by position, and see whether they are the nearest.

    Args:
        candidates: At least `k` of each query.
        screen: None where all groups were measured.
        group: How many keys a group has.
        found: Written to, `all_sure` only where a query is not sure.
    """
    distances, columns, groups, are_all = candidates
    count, num = distances.shape
    # What is not looked at has to be something.
    limits, numbers, kept, unit = screen or Screen(distances, distances, 1.0, 1.0)
    _take_nearest[(count, -(-num // _ORDERED))](
        *(distances, columns, columns if groups is None else groups, limits, numbers, *found),
        *(count, num, limits.shape[1], found.distances.shape[1], kept, unit),
        *(group, groups is None, screen is not None, are_all, _ORDERED, _COMPARED),
    )


@triton.jit
def _in_order(distances_ptr, columns_ptr, groups_ptr, place, asked, G: tl.constexpr, WHOLE: tl.constexpr):
    """Candidates as numbers of that order: the bits of a distance, which is not negative, and then of the position."""
    distance = tl.load(distances_ptr + place, mask=asked, other=float("inf"))
    position = tl.load(columns_ptr + place, mask=asked, other=0)
    if not WHOLE:
        position = tl.load(groups_ptr + position // G, mask=asked, other=0) * G + position % G
    order = (distance.to(tl.int32, bitcast=True).to(tl.int64) << 32) | position
    return distance, position, tl.where(asked, order, 0x7FFFFFFFFFFFFFFF)


@triton.jit(do_not_specialize=["count", "num", "groups", "k", "kept", "unit"])
def _take_nearest(
    distances_ptr, columns_ptr, groups_ptr, limits_ptr, numbers_ptr, nearest_ptr, positions_ptr, sure_ptr, all_sure_ptr,
    count, num, groups, k, kept, unit,
    G: tl.constexpr, WHOLE: tl.constexpr, SCREENED: tl.constexpr, ALL: tl.constexpr, OWN: tl.constexpr,
    OTHER: tl.constexpr,
):  # fmt: skip
    """Each candidate finds its place by counting those before it; what has the last place knows whether all is sure."""
    query = tl.program_id(0).to(tl.int64)
    distances_ptr += query * num
    columns_ptr += query * num
    groups_ptr += query * groups
    own = tl.program_id(1) * OWN + tl.arange(0, OWN)
    distance, position, order = _in_order(distances_ptr, columns_ptr, groups_ptr, own, own < num, G, WHOLE)
    place = tl.zeros((OWN,), tl.int32)
    farthest = tl.zeros((OTHER,), tl.float32)
    for start in range(0, num, OTHER):
        other = start + tl.arange(0, OTHER)
        away, _, before = _in_order(distances_ptr, columns_ptr, groups_ptr, other, other < num, G, WHOLE)
        place += tl.sum((before[None, :] < order[:, None]).to(tl.int32), axis=1)
        farthest = tl.maximum(farthest, tl.where(other < num, away, 0.0))
    taken = (own < num) & (place < k)
    tl.store(nearest_ptr + query * k + place, distance, mask=taken)
    tl.store(positions_ptr + query * k + place, position, mask=taken)
    sure = distance < _FARTHEST
    if not ALL:  # or candidates as near as the last may be at lower positions
        sure = sure & (distance < tl.max(farthest, axis=0))
    if SCREENED:
        limit = tl.full((OTHER,), -float("inf"), tl.float32)
        for start in range(0, groups, OTHER):
            other = start + tl.arange(0, OTHER)
            minima = tl.load(limits_ptr + query * groups + other, mask=other < groups, other=-float("inf"))
            limit = tl.maximum(limit, minima.to(tl.float32))
        # Of a limit below zero, or for a query too far away, comes NaN, and nothing is below that.
        reach = tl.sqrt_rn(tl.max(limit, axis=0) * kept) / tl.load(numbers_ptr + 4 * count + query) * unit
        sure = sure & (distance < reach)
    last = taken & (place == k - 1)
    tl.store(sure_ptr + query + tl.zeros((OWN,), tl.int32), sure, mask=last)
    tl.store(all_sure_ptr + tl.zeros((OWN,), tl.int32), sure, mask=last & ~sure)
