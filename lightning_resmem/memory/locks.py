"""A lock that many readers hold together and a writer alone."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, TypeVar

from lightning_resmem.errors import ResMemError


class ReadWriteLock:
    """Many readers at a time, or one writer, who waits for them.

    Nobody waits forever: readers that come while a writer waits go after it, and before the next one. A thread may read
    again where it reads or writes, and write again where it writes. A copy, also a pickled one, is a lock of its own.

    Raises:
        ResMemError: If a thread that reads wants to write, which it would wait for itself to finish.

    Examples:
        >>> lock = ReadWriteLock()
        >>> with lock.reading(), lock.reading():
        ...     pass
        >>> with lock.writing():
        ...     pass
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reading: dict[int, int] = {}  # how often each thread reads
        self._writer, self._depth = 0, 0  # the thread that writes, and how often
        self._writers = 0  # that wait
        # Readers that wait for the next writer to end, and those for whose sake the writer after it waits.
        self._after, self._owed, self._ended = 0, 0, 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Together with other readers."""
        me = threading.get_ident()
        with self._changed:
            depth = self._reading.get(me, 0)
            if not depth and self._writer != me and (self._writer or self._writers):
                self._wait_for_writer()
            self._reading[me] = depth + 1
        try:
            yield
        finally:
            with self._changed:
                if depth:
                    self._reading[me] = depth
                else:
                    del self._reading[me]
                    if self._writers:
                        self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Alone."""
        me = threading.get_ident()
        with self._changed:
            if self._writer != me:
                if me in self._reading:
                    raise ResMemError("A thread cannot change what it reads: leave `with memory.reading()` first.")
                self._wait_for_all(me)
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._writer = 0
                    self._let_readers_in()

    def _wait_for_writer(self) -> None:
        self._after += 1
        ended = self._ended
        try:
            self._changed.wait_for(lambda: self._ended != ended and not self._writer)
        finally:
            if self._ended == ended:  # interrupted
                self._after -= 1
            else:
                self._owed -= 1
            self._changed.notify_all()

    def _wait_for_all(self, me: int) -> None:
        self._writers += 1
        try:
            self._changed.wait_for(lambda: not (self._reading or self._owed or self._writer))
            self._writer = me
        finally:
            self._writers -= 1
            if self._writer != me:  # interrupted
                self._let_readers_in()

    def _let_readers_in(self) -> None:
        self._ended += 1
        self._owed, self._after = self._owed + self._after, 0
        self._changed.notify_all()

    def __reduce__(self) -> tuple[type["ReadWriteLock"], tuple[()]]:
        return ReadWriteLock, ()


class Guarded:
    """Something that threads read together, and change alone.

    Methods that change it are `exclusive`.
    """

    _lock: ReadWriteLock

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Answers that belong together: other threads that change rows or params wait until they are given.

        What is asked in one call belongs together by itself. A thread cannot change what it reads. The rows of a memory
        over a cluster are not held: others may change them meanwhile.
        """
        with self._lock.reading():
            yield


_Self = TypeVar("_Self", bound=Guarded)
_Given = ParamSpec("_Given")
_Returned = TypeVar("_Returned")


def exclusive(
    method: Callable[Concatenate[_Self, _Given], _Returned],
) -> Callable[Concatenate[_Self, _Given], _Returned]:
    """Let a method have what it belongs to alone."""

    @functools.wraps(method)
    def alone(self: _Self, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Returned:
        with self._lock.writing():
            return method(self, *args, **kwargs)

    return alone
