"""Exact search on a CUDA GPU: products in half precision of which only the smallest of every few keys are written."""

import functools
import importlib.util
import logging
import math
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_resmem.memory.capacity import free_bytes, size
from lightning_resmem.memory.search.interface import Found, Nearest
from lightning_resmem.memory.search.measuring import largest_number
from lightning_resmem.memory.search.replay import Replays, padded

if TYPE_CHECKING:  # there may be no Triton
    from lightning_resmem.memory.search.certifying import Screen

_log = logging.getLogger("lightning_resmem")

# More neighbours are searched another way: so many groups would be measured that their minima save little.
_MOST_NEIGHBORS = 2048
# Times the groups that are measured: so many there have to be.
_GROUPS = 4
# Numbers of keys, once for every query, up to which all keys are measured where there are fewer groups.
_ALL_MEASURED = 2**28
# The same, where there are more groups, which would take longer to find; narrow keys count as so wide.
_FEW, _NARROW = 2**23, 64
# Groups that there are at least, if there are as many keys.
_LEAST_GROUPS = 2048
# Positions are counted in int32, up to what is a multiple of everything.
_MOST_KEYS = 2**31 - 2**16
# Distances beyond those wanted that are put in order, as keys may be equally near.
_SPARE = 16
# Bytes of minima and of distances that are held at once, and numbers that are rounded at once: with what is made from
# them no search takes more than 512 MiB beside the keys and their copy.
_MINIMA_BYTES = 192 * 2**20
_DISTANCES_BYTES = 64 * 2**20
_ROUNDED = 2**22
# Bytes of both up to which a search is recorded: those of a larger one take a GPU longer than a host to start them.
_RECORDED_BYTES = 64 * 2**20
WORK_BYTES = 512 * 2**20
# Keys whose mean is taken for that of all.
_SAMPLE = 4096


def is_worthwhile(queries: Tensor, keys: Tensor, k: int) -> bool:
    """Whether `Groups` finds k of these keys, and faster than products in float32."""
    return (
        runs_on(keys.device)
        and k <= _MOST_NEIGHBORS
        and (_has_groups(keys, k) or len(queries) * keys.numel() <= _ALL_MEASURED)
        and len(keys) < _MOST_KEYS
        and keys.is_contiguous()
    )


def _has_groups(keys: Tensor, k: int) -> bool:
    """Whether there are clearly more groups than are measured: else their minima save nothing."""
    return len(keys) >= _GROUPS * _wanted(k) * group_size(*keys.shape)


def runs_on(device: torch.device) -> bool:
    """Whether there is Triton, and it works on this device."""
    # AMD's matrix cores may take the smallest numbers for zero, which the bounds do not know of.
    return device.type == "cuda" and torch.version.hip is None and _works(device)


@functools.cache
def _works(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        keys = torch.arange(1024.0, device=device).view(64, 16)
        found = Groups(keys, half_copy=True).nearest(keys[40:42], 1)
        if found.positions.tolist() != [[40], [41]] or found.unsure is not None:
            raise ArithmeticError("of 64 keys it does not find the nearest")
        return True
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler that is missing, a GPU too old: the same search works without
        _log.warning(
            "Exact search does without Triton, which does not work on %s (%s: %s), and is slower.",
            device,
            type(error).__name__,
            error,
        )
        return False


def _kernels() -> ModuleType:
    from lightning_resmem.memory.search import kernels

    return kernels


def _certifying() -> ModuleType:
    from lightning_resmem.memory.search import certifying

    return certifying


def _selecting() -> ModuleType:
    from lightning_resmem.memory.search import selecting

    return selecting


def _wanted(k: int) -> int:
    """Groups to measure: more than enough for nearly all queries."""
    return k + k // 4 + 16


def group_size(rows: int, width: int) -> int:
    """Keys of a group: of few or wide ones fewer, as to measure a group costs more than to write a minimum."""
    few = max(1, rows // _LEAST_GROUPS)
    return min(32 if width <= 128 else 16, 1 << few.bit_length() - 1)


def kept_bytes(rows: int, width: int, dtype: torch.dtype, half_copy: bool) -> int:
    """Of what is kept beside the keys from the first search on: the copy in half precision, norms and errors."""
    copied = rows * _padded_width(width) * 2 if half_copy and not _is_read_as_it_is(width, dtype) else 0
    return copied + 4 * rows + 8 * rows // group_size(rows, width)


def _padded_width(width: int) -> int:
    """A multiple of 16 bytes, which are read at once."""
    return -(-width // 8) * 8


def _is_read_as_it_is(width: int, dtype: torch.dtype) -> bool:
    return dtype == torch.float16 and width % 8 == 0


class Groups:
    """The nearest keys, from a lower bound of the distance to every group of up to 32 keys that follow each other.

    With x and z the query and a key, both less about the mean of the keys and times a power of two, and x' and z' what
    they are in float16, |x|^2 + |z|^2 - 2 x'.z' differs from the squared distance by at most

        2 |x| |z - z'| + 2 |x - x'| |z'|

    by the Cauchy-Schwarz inequality, and what float32 rounds. The first factor of the keys in each product is, for
    every group, the largest of its keys: a key far away makes the bounds of its own group worse and no other's. So the
    minimum over a group, less the bound, is no larger than any squared distance to it. The groups with the smallest
    are measured, in float32 by direct differences. A query is sure of its neighbours if the k-th is nearer than the
    largest of those minima allow any other key to be.

    Args:
        keys: Shape `(N, D)`, contiguous, on a GPU.
        half_copy: Whether keys are rounded once and kept, or at every search. Keys in float16 whose width is a multiple
            of 8 are read as they are.
    """

    def __init__(self, keys: Tensor, half_copy: bool) -> None:
        self._keys, self._group, self._width = keys, group_size(*keys.shape), _padded_width(keys.shape[1])
        self._as_it_is = _is_read_as_it_is(keys.shape[1], keys.dtype)
        largest = 0.0 if self._as_it_is else largest_number(keys)
        # The largest number less the center is then at most 2^15, which float16 has.
        self._scale = 2.0 ** (14 - max(-112, math.frexp(largest)[1])) if largest else 1.0
        self._center = self._find_center()
        kept = half_copy and not self._as_it_is and _has_room(keys)
        self._copy = self._room(len(keys)) if kept else None
        padded = -(-len(keys) // _kernels().PADDED) * _kernels().PADDED
        self._squared_norms = torch.full((padded,), torch.inf, device=keys.device)
        self._errors = torch.zeros(2, padded // self._group, device=keys.device)
        self._prepare()
        self._typical = self._squared_norms[: len(keys)].median().sqrt()
        self._shared_bytes = _shared_bytes(keys.device)
        self._replays = Replays() if keys.is_cuda else None
        if keys.is_cuda:  # whichever stream searches finds it finished
            torch.cuda.current_stream(keys.device).synchronize()

    @property
    def nbytes(self) -> int:
        """Of what is kept beside the keys."""
        held = (self._squared_norms, self._errors) + (() if self._copy is None else (self._copy,))
        return sum(tensor.nbytes for tensor in held) + (0 if self._replays is None else self._replays.nbytes)

    def nearest(self, queries: Tensor, k: int) -> Nearest:
        """The k nearest keys of each query, and which may have nearer ones. The GPU is waited for once if none may.

        Args:
            queries: Shape `(B, D)`, float32.
            k: For which `is_worthwhile`.

        Returns:
            Distances and positions in order, of equally near keys those at the lowest positions. What a query found
            that is not sure is of no use; one that is not finite never is.
        """
        queries, count = queries.contiguous(), len(queries)
        rows, bytes_of_each = self._blocks(k)
        if self._replays is not None and padded(count) <= min(rows, _RECORDED_BYTES // bytes_of_each):
            nearest = self._replays.search(queries, k, self._find)
            if nearest is not None:
                return nearest
        found = Found.empty(count, k, queries.device)
        try:
            self._find(queries, found)
        except BaseException:
            found.wait()
            raise
        return Nearest(found.distances, found.positions, found.unsure(count))

    def _measured(self, k: int) -> int:
        """How many groups are measured."""
        groups = self._errors.shape[1]
        return min(_wanted(k), groups) if _has_groups(self._keys, k) else groups

    def _blocks(self, k: int) -> tuple[int, int]:
        """Queries that are searched for at once, and the bytes that each takes for minima and distances."""
        minima, distances = self._errors.shape[1] * 2, self._measured(k) * self._group * 4
        rows = min(_MINIMA_BYTES // minima, _DISTANCES_BYTES // distances)
        return max(16, rows // 128 * 128), minima + distances

    def _find(self, queries: Tensor, found: Found) -> None:
        """`nearest`, written into `found`. The GPU is not waited for."""
        rows, _ = self._blocks(found.positions.shape[1])
        for start in range(0, len(queries), rows):
            block = slice(start, start + rows)
            part = found.distances[block], found.positions[block], found.sure[block]
            self._find_block(queries[block], Found(*part, found.all_sure))

    def _find_block(self, queries: Tensor, found: Found) -> None:
        kernels, certifying, group, k = _kernels(), _certifying(), self._group, found.distances.shape[1]
        with torch.cuda.device_of(queries):  # where Triton starts kernels
            groups, screen = self._near_groups(queries, self._measured(k))
            measured = kernels.measure_groups(queries, self._keys, groups, group)
            count = min(k + _SPARE, measured.shape[1])
            near, columns = _selecting().smallest(measured, count)
            candidates = certifying.Candidates(near, columns, groups, count == measured.shape[1])
            certifying.take_nearest(candidates, screen, group, found)

    def _near_groups(self, queries: Tensor, wanted: int) -> tuple[Tensor | None, "Screen | None"]:
        """Groups `(b, wanted)`, and what is known of the others; None where these are all."""
        kernels, certifying = _kernels(), _certifying()
        compared = len(queries) * len(self._keys) * max(_NARROW, self._width)
        if wanted == self._errors.shape[1] or compared <= _FEW:
            return None, None
        asked = kernels.round_queries(queries, self._center, self._scale, self._typical, self._width)
        limits, groups = _selecting().smallest(self._minima(asked), wanted)
        return groups, certifying.Screen(limits, asked[1], 1 - 4 * kernels.slack(queries.shape[1]), 1 / self._scale)

    def _minima(self, queries: tuple[Tensor, Tensor]) -> Tensor:
        """What the keys of each group are away at least, as `kernels.group_minima` writes it."""
        kernels, group, count = _kernels(), self._group, len(queries[0])
        tile = kernels.choose_tile(count, self._width, self._shared_bytes)
        out = torch.empty(count, self._errors.shape[1], dtype=torch.float16, device=self._keys.device)
        whole = self._keys if self._as_it_is else self._copy
        if whole is not None:
            kernels.group_minima(queries, whole, (self._squared_norms, self._errors), group, tile, out)
            return out
        chunk = self._chunk
        room = self._room(min(chunk, len(self._keys)))
        for start in range(0, len(self._keys), chunk):
            end = min(start + chunk, len(self._squared_norms))
            about = self._squared_norms[start:end], self._errors[:, start // group : end // group]
            keys, _ = self._rounded(start, room)
            kernels.group_minima(queries, keys, about, group, tile, out[:, start // group : end // group])
        return out

    @property
    def _chunk(self) -> int:
        """Keys that are rounded at once."""
        padded: int = _kernels().PADDED
        return max(1, _ROUNDED // self._width // padded) * padded

    def _room(self, rows: int) -> Tensor:
        return torch.zeros(rows, self._width, dtype=torch.float16, device=self._keys.device)

    def _rounded(self, start: int, room: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk of keys in float16, written into `room`, and in float32."""
        part = self._keys[start : start + self._chunk]
        exact = part.float()
        if self._as_it_is:
            return part, exact
        exact = exact * self._scale - self._center
        room[: len(part), : part.shape[1]] = exact
        return room[: len(part)], exact

    def _find_center(self) -> Tensor:
        """Near the mean of the keys, less those far away, which would move it to where no others are."""
        if self._as_it_is:
            return torch.zeros(self._keys.shape[1], device=self._keys.device)
        sample = self._keys[:: -(-len(self._keys) // _SAMPLE)].float() * self._scale
        norms = torch.linalg.vector_norm(sample, dim=1)
        near = norms <= 2 * norms.median()
        center: Tensor = (sample * near[:, None]).sum(dim=0) / near.sum()
        return center

    def _prepare(self) -> None:
        """Norms and errors of all keys, and the copy if there is one."""
        slack = 2 * _kernels().slack(self._keys.shape[1])  # as of products on tensor cores
        room = self._room(0 if self._as_it_is else min(self._chunk, len(self._keys)))
        for start in range(0, len(self._keys), self._chunk):
            rounded, exact = self._rounded(start, room if self._copy is None else self._copy[start:])
            squared = exact.square().sum(dim=1)
            self._squared_norms[start : start + len(exact)] = squared * (1 - slack)
            norms = squared.sqrt()
            errors = torch.linalg.vector_norm(exact.sub_(rounded[:, : exact.shape[1]]), dim=1)
            about = torch.stack([errors + slack * norms, (norms + errors) * (1 + slack)])
            groups = -(-len(exact) // self._group)
            about = torch.nn.functional.pad(about, (0, groups * self._group - len(exact)))
            first = start // self._group
            self._errors[:, first : first + groups] = about.unflatten(1, (groups, self._group)).amax(dim=2)


def _has_room(keys: Tensor) -> bool:
    """Whether a copy of the keys fits on their GPU; says so if not."""
    needed, free = kept_bytes(len(keys), keys.shape[1], keys.dtype, half_copy=True), free_bytes(keys.device)
    if free is None or needed + WORK_BYTES <= free:
        return True
    _log.warning(
        "Exact search on %s rounds the keys at every search, which takes longer: a copy of them in half precision "
        "takes %s, and %s are free. LocalMemory(key_dtype=torch.float16) needs none if the width is a multiple of 8.",
        keys.device,
        size(needed),
        size(free),
    )
    return False


def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have."""
    if device.type != "cuda":
        return 2**18
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 99 * 2**10))
