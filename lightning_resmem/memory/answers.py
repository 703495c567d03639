"""What a memory answers."""

from typing import NamedTuple

from torch import Tensor


class Neighbors(NamedTuple):
    """The nearest rows of each query, ascending by distance.

    Attributes:
        distances: Euclidean, shape `(B, k)`, float32; `inf` where the memory has fewer than `k` rows.
        ids: Shape `(B, k)`, int64; -1 where the memory has fewer than `k` rows.
    """

    distances: Tensor
    ids: Tensor


class Predictions(NamedTuple):
    """The three predictions that are always reported side by side, each of shape `(B, C)`."""

    base: Tensor
    knn: Tensor
    resmem: Tensor
