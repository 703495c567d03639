"""Readers together, a writer alone, and nobody waits forever."""

import copy
import pickle
import threading
import time

import pytest

from lightning_resmem.errors import ResMemError
from lightning_resmem.memory.locks import ReadWriteLock
from lightning_resmem.together import Lock
from tests.threads import at_once

# What takes no time may take so long on a busy machine.
_SECONDS = 30.0


def _until(found) -> None:
    deadline = time.monotonic() + _SECONDS
    while not found():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def test_a_writer_is_alone() -> None:
    lock, inside, seen = ReadWriteLock(), [], []

    def work(number: int) -> None:
        for _ in range(200):
            if number % 4:
                with lock.reading():
                    inside.append("reads")
                    seen.append(tuple(inside))
                    inside.remove("reads")
            else:
                with lock.writing():
                    inside.append("writes")
                    seen.append(tuple(inside))
                    inside.remove("writes")

    at_once(8, work)
    assert not [together for together in seen if "writes" in together and len(together) > 1]


def test_overlapping_readers_do_not_keep_a_writer_waiting() -> None:
    """Each of two readers leaves when the other has come once more, the second one step ahead: there is always one."""
    lock, ended, rounds = ReadWriteLock(), threading.Event(), [0, 0]
    came = [threading.Semaphore(0), threading.Semaphore(0)]

    def read(number: int) -> None:
        other = came[1 - number]
        if number:
            other.acquire(timeout=_SECONDS)
        while not ended.is_set():
            with lock.reading():
                came[number].release()
                rounds[number] += 1
                other.acquire(timeout=0.2)  # the other one waits when a writer does

    readers = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for reader in readers:
        reader.start()
    try:
        _until(lambda: min(rounds) > 3)
        writer = threading.Thread(target=lambda: [lock.writing().__enter__(), ended.set()], daemon=True)
        writer.start()
        assert ended.wait(10), "the writer waited for 10 s"
    finally:
        ended.set()
        for reader in came:
            reader.release()


def test_writers_one_after_the_other_do_not_keep_a_reader_waiting() -> None:
    lock, ended, written = ReadWriteLock(), threading.Event(), []

    def write() -> None:
        while not ended.is_set():
            with lock.writing():
                written.append(1)

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    for _ in range(20):
        _until(lambda: len(written) > 10)
        before = len(written)
        with lock.reading():
            pass
        assert before
    ended.set()
    for writer in writers:
        writer.join()


def test_a_reader_that_waits_lets_one_writer_go_first() -> None:
    lock, order = ReadWriteLock(), []

    def write(name: str) -> None:
        with lock.writing():
            order.append(name)

    def read() -> None:
        with lock.reading():
            order.append("reader")

    with lock.reading():
        first = threading.Thread(target=write, args=("first",))
        first.start()
        _until(lambda: lock._writers == 1)
        reader = threading.Thread(target=read)
        reader.start()
        _until(lambda: lock._after == 1)
        second = threading.Thread(target=write, args=("second",))
        second.start()
        _until(lambda: lock._writers == 2)
    for thread in (first, reader, second):
        thread.join(_SECONDS)
    assert order.index("reader") == 1


def test_a_thread_reads_again_while_a_writer_waits() -> None:
    lock, written = ReadWriteLock(), threading.Event()

    def write() -> None:
        with lock.writing():
            written.set()

    with lock.reading():
        writer = threading.Thread(target=write)
        writer.start()
        _until(lambda: lock._writers == 1)
        with lock.reading():
            assert not written.is_set()
    assert written.wait(_SECONDS)
    writer.join()


def test_who_writes_may_read_and_write_and_who_reads_may_not_write() -> None:
    lock = ReadWriteLock()
    with lock.writing(), lock.writing(), lock.reading(), lock.reading():
        pass
    with lock.reading(), pytest.raises(ResMemError, match="cannot change what it reads"), lock.writing():
        pass
    with lock.writing():
        pass


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda lock: pickle.loads(pickle.dumps(lock))])
def test_a_copy_is_a_lock_of_its_own(copied) -> None:
    lock, single = ReadWriteLock(), Lock()
    with lock.writing(), single:
        others = copied(lock), copied(single)

        def work(_: int) -> bool:
            with others[0].writing(), others[1]:
                return True

        assert at_once(2, work) == [True, True]
