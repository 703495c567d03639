"""What survives what: killed processes, readers beside a save, full disks and power cuts."""

import multiprocessing
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lightning_resmem import LocalMemory, ResMemParams, StorageError
from lightning_resmem.memory.storage import files
from lightning_resmem.memory.storage.disk import write
from lightning_resmem.memory.storage.tensor_file import Streamed
from tests.disks import ext4, mounted

ROWS = 2000


def filled(value: int, rows: int = ROWS) -> LocalMemory:
    """A memory in which all numbers are the same, so that a mixture of two shows."""
    memory = LocalMemory(params=ResMemParams(k=3, sigma=float(value)))
    full = torch.full((rows, 8), float(value))
    memory.add(full, full, torch.full((rows,), value), torch.arange(rows) * value)
    return memory


def whole(memory: LocalMemory) -> int:
    """Of which value all of a memory is."""
    rows = memory.stored(slice(None))
    value = int(memory.params.sigma)
    assert (rows["keys"] == value).all()
    assert (rows["outputs"] == value).all()
    assert (rows["targets"] == value).all()
    assert torch.equal(rows["ids"], torch.arange(len(memory)) * value)
    return value


def save_for_ever(target: Path) -> None:
    torch.set_num_threads(1)
    memories = [filled(1), filled(2)]
    while True:
        for memory in memories:
            memory.save(target)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.BaseContext:
    """Starts processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "lightning_resmem.memory.local"])
    return context


@pytest.mark.slow
def test_sigkill_at_any_moment_leaves_a_whole_memory(
    tmp_path: Path, processes: multiprocessing.context.BaseContext
) -> None:
    target, draw, half_done = tmp_path / "memory", random.Random(0), 0
    for _ in range(30):
        process = processes.Process(target=save_for_ever, args=(target,))
        process.start()
        before = (target / "manifest.json").stat().st_ino if (target / "manifest.json").exists() else None
        until(lambda before=before: (p := target / "manifest.json").exists() and p.stat().st_ino != before)
        process.join(draw.uniform(0, 0.03))
        process.kill()
        process.join()
        half_done += len(list(target.iterdir())) != 5
        assert whole(LocalMemory.load(target)) in (1, 2)
        assert whole(LocalMemory.load(target, mmap=True)) in (1, 2)
    assert half_done  # some were killed while they wrote
    filled(3).save(target)
    assert len(list(target.iterdir())) == 5
    assert os.listdir(tmp_path) == ["memory"]


@pytest.mark.slow
@pytest.mark.parametrize("mmap", [False, True])
def test_loading_beside_a_save_gives_one_of_the_memories(
    tmp_path: Path, processes: multiprocessing.context.BaseContext, mmap: bool
) -> None:
    target = tmp_path / "memory"
    filled(1).save(target)
    process = processes.Process(target=save_for_ever, args=(target,))
    process.start()
    try:
        seen, loads, deadline = set(), 0, time.monotonic() + 60
        while (loads < 300 or len(seen) < 2) and time.monotonic() < deadline:
            seen.add(whole(LocalMemory.load(target, mmap=mmap)))
            loads += 1
    finally:
        process.kill()
        process.join()
    assert seen == {1, 2}


def test_savers_at_once_end_with_a_whole_memory_and_clear_errors(tmp_path: Path) -> None:
    target, start, errors = tmp_path / "memory", threading.Barrier(4), []

    def save(value: int) -> None:
        memory = filled(value)
        start.wait(60)
        for attempt in range(500):
            if attempt >= 10 and errors:  # two of them have met
                break
            try:
                memory.save(target)
            except StorageError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=save, args=(value,)) for value in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors
    assert all("Another process or thread is saving a memory" in error for error in errors)
    assert whole(LocalMemory.load(target)) in (1, 2, 3, 4)
    assert len(list(target.iterdir())) == 5


@pytest.mark.parametrize("index", ["exact", "Flat"])
def test_a_full_disk_keeps_the_old_memory(tmp_path: Path, index: str) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        small, large = filled(1, rows=1000), filled(2, rows=20_000)
        almost = LocalMemory(params=ResMemParams(k=3), index=index)
        almost.add(torch.randn(3000, 64), torch.randn(3000, 2), torch.zeros(3000, dtype=torch.int64))
        small.save(disk / "memory")
        before = {path.name: path.read_bytes() for path in (disk / "memory").iterdir()}
        for memory in (large, almost) if index == "Flat" else (large,):
            with pytest.raises(StorageError, match=r"could not be saved to .*Check the free space"):
                memory.save(disk / "memory")
            assert {path.name: path.read_bytes() for path in (disk / "memory").iterdir()} == before
        assert os.listdir(disk) == ["memory"]
        assert whole(LocalMemory.load(disk / "memory")) == 1


def test_a_full_disk_is_an_error_for_rows_that_come_in_parts(tmp_path: Path) -> None:
    """Their file is mapped: without room on the disk for it, writing to it would end the process."""

    def parts() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield torch.arange(100_000), torch.ones(100_000, 8)

    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        with pytest.raises(StorageError, match=r"could not be saved to .*No space left on device"):
            write(disk / "memory", {}, {"keys": Streamed((100_000, 8), torch.float32, parts)})
        assert os.listdir(disk) == []


def test_a_mount_point_is_saved_to(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=4m", "tmpfs") as disk:
        (disk / "lost+found").mkdir()
        filled(1).save(disk)
        filled(2).save(disk)
        assert whole(LocalMemory.load(disk)) == 2


@pytest.mark.slow
def test_a_power_cut_leaves_the_old_memory_and_after_a_save_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image of a disk, copied while it is mounted, is what a machine finds that lost its power at that moment."""
    copies: list[tuple[int, Path]] = []

    with monkeypatch.context() as patched, ext4(tmp_path) as (disk, image):

        def cut(value: int) -> None:
            """The power goes now, when the memory of this value has to be there."""
            copies.append((value, tmp_path / f"copy{len(copies)}"))
            shutil.copyfile(image, copies[-1][1])

        sync = files.sync
        for value in (1, 2):  # a new memory, and one in the place of another
            if value == 2:
                patched.setattr(files, "sync", lambda stream: (sync(stream), cut(1)))  # after each file of the new one
            filled(value).save(disk / "a" / "memory")
            cut(value)
    assert len(copies) == 2 + 5
    for place, (value, copy) in enumerate(copies):
        with mounted(tmp_path / f"disk{place}", "-o", "loop", str(copy)) as disk:
            assert whole(LocalMemory.load(disk / "a" / "memory")) == value
