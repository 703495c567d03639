"""The life of a pool: found by its name, ended, and what it keeps on disk."""

import copy
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from lightning_resmem import InputError, RayMemory, ShardUnavailableError, StorageError
from lightning_resmem.cluster import abandoned
from tests.cluster.ending import SECONDS, ended
from tests.memory.test_contract import PARAMS, ROWS, Data

pytestmark = pytest.mark.slow


def test_a_named_pool_is_found_until_it_is_shut_down(ray_address: str, data: Data, tmp_path: Path) -> None:
    memory = RayMemory(2, name="shared", storage_path=tmp_path, request_timeout_s=SECONDS)
    data.add_to(memory, torch.arange(ROWS))
    memory.build()
    memory.params, memory.provenance = PARAMS, {"fingerprint": "f"}
    memory.publish()
    with pytest.raises(InputError, match=r"RayMemory.connect\('shared'\)"):
        RayMemory(2, name="shared", storage_path=tmp_path, request_timeout_s=SECONDS).shards.open()
    actors = [psutil.Process(shard["pid"]) for shard in memory.stats()["shards"]]
    del memory
    for actor in actors:
        actor.suspend()
    try:
        with pytest.raises(ShardUnavailableError, match=r"name='shared' .* request_timeout_s=0.2"):
            RayMemory.connect("shared", request_timeout_s=0.2)
    finally:
        for actor in actors:
            actor.resume()
    for wrong in ({"request_timeout_s": 0}, {"on_shard_loss": "ignore"}, {"namespace": ""}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            RayMemory.connect("shared", **wrong)
    found = RayMemory.connect("shared", request_timeout_s=SECONDS)
    data.check(found, 1e-5)
    assert (found.params, found.provenance, found.tunable) == (PARAMS, {"fingerprint": "f"}, True)
    ended(found)
    assert len(found) == 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="is no pool"):
        RayMemory.connect("shared", request_timeout_s=5.0)


def test_a_pool_that_was_shut_down_elsewhere_is_missed_and_leaves_nothing(
    ray_address: str, data: Data, tmp_path: Path
) -> None:
    (tmp_path / "left").mkdir()
    os.close(abandoned.claim(str(tmp_path / "left")) or 0)  # by a process that has ended
    memory = RayMemory(1, params=PARAMS, storage_path=tmp_path, request_timeout_s=SECONDS)
    data.add_to(memory, torch.arange(ROWS))
    memory.build()
    twin = copy.deepcopy(memory)
    data.check(twin, 1e-5)
    [directory] = tmp_path.iterdir()
    os.kill(memory.stats()["shards"][0]["pid"], signal.SIGKILL)  # it cannot delete its rows itself
    abandoned.sweep(str(tmp_path))
    assert (directory / "shard-0000-0").exists()
    memory.shutdown()
    assert not list(tmp_path.iterdir())
    started = time.monotonic()
    with pytest.raises(ShardUnavailableError, match="its process is gone"):
        twin.search(data.queries, 1)
    assert time.monotonic() - started < SECONDS / 2


def test_a_storage_path_that_cannot_be_made(ray_address: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memory = RayMemory(1, storage_path=tmp_path / "file" / "below", request_timeout_s=SECONDS)
    with pytest.raises(ShardUnavailableError, match=r"storage_path .*below.* cannot be made \(NotADirectoryError"):
        memory.add(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))


def test_a_storage_path_that_vanishes(ray_address: str, data: Data, tmp_path: Path) -> None:
    memory = RayMemory(1, params=PARAMS, storage_path=tmp_path / "shards", request_timeout_s=SECONDS)
    data.add_to(memory, torch.arange(ROWS))
    memory.build()
    shutil.rmtree(tmp_path / "shards")
    data.check(memory, 1e-5)  # what it holds, it answers
    for change in (lambda: memory.remove(data.ids[:1]), memory.build):
        with pytest.raises((StorageError, ShardUnavailableError), match="vanished"):
            change()
    memory.clear()  # makes the directory again, or other actors
    data.add_to(memory, torch.arange(ROWS))
    data.check(memory, 1e-5)
    ended(memory)
