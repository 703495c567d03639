"""What a shard measures of itself, for `RayMemory.stats` and for what watches the cluster (Ray's metrics)."""

from collections import deque

import numpy as np
from ray.util.metrics import Gauge, Histogram

from lightning_resmem.cluster.config import PoolConfig

# Searches that the times of `stats` are of.
_TIMED_SEARCHES = 1000


class Meters:
    """Times of the searches of a shard, its rows and its bytes.

    Args:
        config: Of the pool.
        shard: Which shard, from 0.
        replica: Which copy of it, from 0.
    """

    def __init__(self, config: PoolConfig, shard: int, replica: int) -> None:
        self._seconds: deque[float] = deque(maxlen=_TIMED_SEARCHES)
        tags = {"pool": str(config.name), "shard": str(shard), "replica": str(replica)}
        self._histogram = Histogram(
            "resmem_search_seconds", boundaries=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0], tag_keys=(*tags,)
        )
        self._rows, self._bytes = (Gauge(f"resmem_shard_{kind}", tag_keys=(*tags,)) for kind in ("rows", "bytes"))
        for metric in (self._histogram, self._rows, self._bytes):
            metric.set_default_tags(tags)

    def searched(self, seconds: float) -> None:
        """Note that a search took so long."""
        self._seconds.append(seconds)
        self._histogram.observe(seconds)

    def holds(self, rows: int, size: int) -> None:
        """Note how many rows and bytes the shard has."""
        self._rows.set(rows)
        self._bytes.set(size)

    def times(self) -> dict[str, float]:
        """How many searches were timed, and two quantiles of what they took."""
        milliseconds = np.array(self._seconds or [0.0]) * 1e3
        return {
            "searches": len(self._seconds),
            "search_p50_ms": float(np.percentile(milliseconds, 50)),
            "search_p99_ms": float(np.percentile(milliseconds, 99)),
        }
