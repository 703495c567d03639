"""Work by several threads at once, which change places as often as can be."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def _restless() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(0)`, ..., `work(count - 1)` return, or raise, each in its own thread, all started together."""
    start = threading.Barrier(count)

    def started(number: int) -> Any:
        start.wait()
        return work(number)

    with _restless(), ThreadPoolExecutor(count) as threads:
        return list(threads.map(started, range(count)))
