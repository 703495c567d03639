"""What threads that work at the same time have in common."""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType


class Lock:
    """A lock for one thread at a time; a copy, also a pickled one, is a lock of its own.

    Examples:
        >>> lock = Lock()
        >>> with lock:
        ...     pass
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["Lock"], tuple[()]]:
        return Lock, ()


_lock = threading.RLock()
# How many are in a context, and what leaves it.
_entered: dict[Hashable, tuple[int, ExitStack]] = {}


@contextmanager
def together(key: Hashable, context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """A context that changes something for all threads: whoever comes first enters it, whoever goes last leaves it.

    It may be entered again by one that is in it, and left in any order.

    Args:
        key: Tells contexts apart.
        context: Makes the one of this key.

    Examples:
        >>> @contextmanager
        ... def loud():
        ...     print("on")
        ...     yield
        ...     print("off")
        >>> with together("sound", loud), together("sound", loud):
        ...     print("both")
        on
        both
        off
    """
    with _lock:
        inside, stack = _entered.get(key, (0, ExitStack()))
        if not inside:
            stack.enter_context(context())
        _entered[key] = inside + 1, stack
    try:
        yield
    finally:
        with _lock:
            inside, _ = _entered[key]
            if inside > 1:
                _entered[key] = inside - 1, stack
            else:
                del _entered[key]
                stack.close()
