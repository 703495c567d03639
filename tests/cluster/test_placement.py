"""Room for the shards of a pool on a cluster, and their names."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_resmem import InputError, RayMemory, ShardUnavailableError
from tests.cluster.ending import SECONDS, ended

pytestmark = pytest.mark.slow


def test_no_room(ray_address: str, tmp_path: Path) -> None:
    memory = RayMemory(3, cpus_per_shard=100, storage_path=tmp_path, request_timeout_s=1.0)
    with pytest.raises(ShardUnavailableError, match=r"Asked: 3 x \{'CPU': 100\}. The cluster has: .*CPU 16"):
        memory.add(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
    memory = RayMemory(1, gpus_per_shard=1, storage_path=tmp_path, request_timeout_s=1.0)
    with pytest.raises(ShardUnavailableError, match="GPU 0"):
        memory.add(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))


def test_no_room_beside_other_pools(ray_address: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"cpus_per_shard": 0.001, "storage_path": tmp_path, "request_timeout_s": SECONDS}
    first, second = RayMemory(2, **options), RayMemory(1, name="mine", **options)
    for memory in (first, second):
        memory.shards.open()
    crowded = RayMemory(1, cpus_per_shard=15.9999, storage_path=tmp_path, request_timeout_s=1.0)
    with pytest.raises(ShardUnavailableError, match=r"shutdown\(\) of a memory frees") as caught:
        crowded.shards.open()
    assert f"{first.shards.name!r} (2 actors)" in str(caught.value)
    assert "'mine' (1 actor)" in str(caught.value)
    for memory in (first, second):
        ended(memory)


def test_a_name_that_is_taken_starts_no_shards(
    ray_address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    from lightning_resmem.cluster import placement

    memory = RayMemory(1, name="taken", storage_path=tmp_path, request_timeout_s=SECONDS)
    memory.shards.open()
    monkeypatch.setattr(placement, "assign", lambda nodes, num_shards: [1, 0])  # as it may be on several nodes
    with pytest.raises(InputError, match="name='taken'"):
        RayMemory(2, name="taken", storage_path=tmp_path, request_timeout_s=SECONDS).shards.open()
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert "taken/0.0" in names
    assert "taken/1.0" not in names
    ended(memory)
