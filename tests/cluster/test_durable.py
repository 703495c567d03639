"""The rows of a shard: changes that are taken back, and callers that know of other rows."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lightning_resmem import LocalMemory, ResMemParams, StaleMemoryError, StorageError
from lightning_resmem.cluster.durable import withdrawal
from lightning_resmem.cluster.shard import Shard
from lightning_resmem.memory.metric import KeyMap
from tests.cluster.test_shard import Peer, check, config, ids, part
from tests.disks import ext4, mounted


def test_rows_are_taken_back_once_and_not_taken_later(url: str, rows: dict[str, torch.Tensor]) -> None:
    shard = Shard(config(url), 0, 0)
    shard.apply("a", "add", part(rows, 0, 30), 0)
    shard.apply("b", "add", part(rows, 30, 60), 1)
    shard.build("exact", None, 2)
    for _ in range(2):
        assert shard.apply(withdrawal("b"), "withdraw", ids(*range(30, 60)), 2) == 3
    for same in (shard, Shard(config(url), 0, 0)):
        check(same, rows, list(range(30)), 3)
        assert same.apply("b", "add", part(rows, 30, 60), 3) == 3  # sent before, arrived later
    again = Shard(config(url), 0, 0)
    again.apply("c", "add", part(rows, 30, 60), 3)
    check(again, rows, list(range(60)), 4)


def test_taking_back_what_never_arrived_removes_no_rows(url: str, rows: dict[str, torch.Tensor]) -> None:
    shard = Shard(config(url), 0, 0)
    shard.apply("a", "add", part(rows, 0, 60), 0)
    assert shard.apply(withdrawal("b"), "withdraw", ids(3, 4), 1) == 2  # it was to add rows of ids that are there
    for same in (shard, Shard(config(url), 0, 0)):
        assert same.apply("b", "add", part(rows, 3, 5), 2) == 2
        check(same, rows, list(range(60)), 2)


def edits(rows: dict[str, torch.Tensor]) -> dict[str, bytes]:
    changed = {"ids": torch.tensor([7, 3]), "embeddings": torch.randn(2, 4), "targets": torch.tensor([0, 1])}
    return {"remove": ids(3, 7, 3), "update": safetensors.torch.save(changed)}


@pytest.mark.parametrize("operation", ["remove", "update"])
@pytest.mark.parametrize("restarted", [False, True])
def test_an_edit_is_taken_back_once_and_not_made_later(
    operation: str, restarted: bool, url: str, rows: dict[str, torch.Tensor]
) -> None:
    shard = Shard(config(url), 0, 0)
    shard.apply("a", "add", part(rows, 0, 60), 0)
    shard.build("exact", None, 1)
    shard.apply("b", operation, edits(rows)[operation], 1)
    if restarted:
        shard = Shard(config(url), 0, 0)
    for _ in range(2):
        assert shard.apply(withdrawal("b"), "restore", ids(3, 7), 2) == 3
    for same in (shard, Shard(config(url), 0, 0)):
        check(same, rows, list(range(60)), 3)
        assert same.apply("b", operation, edits(rows)[operation], 3) == 3  # sent before, arrived later
        check(same, rows, list(range(60)), 3)


def test_an_edit_that_never_arrived_is_not_taken_back(url: str, rows: dict[str, torch.Tensor]) -> None:
    shard = Shard(config(url), 0, 0)
    shard.apply("a", "add", part(rows, 0, 60), 0)
    shard.apply("b", "remove", ids(5), 1)
    assert shard.apply(withdrawal("c"), "restore", ids(3, 4), 2) == 3
    for same in (shard, Shard(config(url), 0, 0)):
        assert same.apply("c", "remove", ids(3, 4), 3) == 3
        check(same, rows, [i for i in range(60) if i != 5], 3)


@pytest.mark.parametrize("then", ["changed", "built"])
def test_an_edit_that_others_have_built_upon_cannot_be_taken_back(
    then: str, url: str, rows: dict[str, torch.Tensor]
) -> None:
    shard = Shard(config(url), 0, 0)
    shard.apply("a", "add", part(rows, 0, 60), 0)
    shard.apply("b", "remove", ids(5), 1)
    if then == "changed":
        shard.apply("c", "update", edits(rows)["update"], 2)
    else:
        shard.build("exact", None, 2)
    with pytest.raises(StorageError, match="another process has changed or built them since"):
        shard.apply(withdrawal("b"), "restore", ids(5), 2)


@pytest.mark.slow
def test_an_edit_that_was_acknowledged_survives_a_power_cut(tmp_path: Path, rows: dict[str, torch.Tensor]) -> None:
    with ext4(tmp_path) as (disk, image):
        shard = Shard(config(str(disk / "pool")), 0, 0)
        shard.apply("a", "add", part(rows, 0, 40), 0)
        shard.build("exact", None, 1)
        shard.apply("b", "add", part(rows, 40, 60), 1)
        shard.apply("c", "remove", ids(5, 45), 2)
        shutil.copyfile(image, tmp_path / "copy")
    with mounted(tmp_path / "disk again", "-o", "loop", str(tmp_path / "copy")) as disk:
        check(Shard(config(str(disk / "pool")), 0, 0), rows, [i for i in range(60) if i not in (5, 45)], 3)


def test_a_replica_that_has_copied_an_edit_takes_it_back(
    tmp_path: Path, rows: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.get", lambda answer, timeout: answer)  # the other shard is in this process
    shard, other = (Shard(config(str(tmp_path / "pool")), 0, replica) for replica in range(2))
    other.apply("a", "add", part(rows, 0, 60), 0)
    other.apply("b", "remove", ids(5, 6), 1)
    number = shard.copy_from(Peer(other), 1)
    assert shard.apply("b", "remove", ids(5, 6), number) == number
    for each in (shard, other):
        check(each, rows, list(range(60)), each.apply(withdrawal("b"), "restore", ids(5, 6), 1))


def asks(shard: Shard, rows: dict[str, torch.Tensor]) -> list[Callable[..., Any]]:
    """All that a shard is asked for with what the caller knows."""
    queries, some, weights = rows["embeddings"][:2].numpy(), rows["ids"][:2].numpy(), torch.ones(2, 1).numpy()
    return [
        lambda *known: shard.search((queries,), 3, *known),
        lambda *known: shard.weighted_sums((some[:, None], weights), 1.0, *known),
        lambda *known: shard.fetch(some, *known),
        lambda *known: shard.stored(0, 1, (), "", *known),
        lambda *known: shard.ids(*known),
        lambda *known: shard.has(some, *known),
        lambda *known: shard.index(*known),
        lambda *known: shard.build("exact", None, *known),
        lambda *known: shard.apply("e", "add", part(rows, 0, 1), *known),
    ]


def test_who_knows_of_other_rows_is_told(
    tmp_path: Path, rows: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.get", lambda answer, timeout: answer)
    url = str(tmp_path / "pool")
    shard = Shard(config(url), 0, 0)
    shard.apply("a", "add", part(rows, 0, 60), 0)
    before = shard.state()["filling"]
    assert Shard(config(url), 0, 0).state()["filling"] == before
    shard.apply("b", "clear", safetensors.torch.save({}), 1, before)
    emptied = Shard(config(url), 0, 1)
    emptied.copy_from(Peer(shard), 1)
    assert emptied.state()["filling"] == Shard(config(url), 0, 1).state()["filling"] == "b"
    shard.apply("c", "add", part(rows, 0, 60), 2, "b")
    filled = Shard(config(url), 0, 2)
    filled.copy_from(Peer(shard), 1)
    shard.build("exact", None, 3, "b")
    about = safetensors.torch.save({"about": torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8)})
    shard.apply("d", "describe", about, 3, "b")
    for each in (shard, Shard(config(url), 0, 0), filled, Shard(config(url), 0, 2)):
        number = each.state()["number"]
        for ask in asks(each, rows):
            with pytest.raises(StaleMemoryError, match=r"has cleared the pool 'pool'.*connect\('pool'\)"):
                ask(number, before)
        check(each, rows, list(range(60)), number)
        assert len(each.ids(number, "b")) == 60


def test_replicas_that_made_the_same_changes_in_another_order_are_of_one_version(
    url: str, rows: dict[str, torch.Tensor]
) -> None:
    first, second = Shard(config(f"{url}/first"), 0, 0), Shard(config(f"{url}/second"), 0, 1)
    for shard, order in ((first, "ab"), (second, "ba")):
        for key in order:
            shard.apply(key, "add", part(rows, 30 * "ab".index(key), 30 * "ab".index(key) + 20), 0)
    version = first.version(2)
    assert second.version(2) == version
    first.apply("c", "add", part(rows, 50, 60), 2)
    for shard in (first, second):  # where it has not arrived
        shard.apply(withdrawal("c"), "withdraw", ids(*range(50, 60)), 2)
    assert first.version(3) == second.version(3) != version
    version = first.version(3)
    first.build("exact", None, 3)
    again = Shard(config(f"{url}/first"), 0, 0)
    assert again.stored(0, 5, (), version, 3) == second.stored(0, 5, (), version, 3)
    again.apply("d", "remove", ids(0), 3)
    for same in (again, Shard(config(f"{url}/first"), 0, 0)):
        with pytest.raises(StorageError, match="were changed while they were read"):
            same.stored(0, 5, (), version, 4)


def test_the_map_of_keys_survives_a_restart_and_goes_to_a_replica(
    tmp_path: Path, rows: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.get", lambda answer, timeout: answer)  # the other shard is in this process
    shard, other = (Shard(config(str(tmp_path / "pool")), 0, replica) for replica in range(2))
    other.apply("a", "add", part(rows, 0, 60), 0)
    key_map = KeyMap(torch.ones(4).double(), torch.diag(torch.tensor([5.0, 1, 1, 1]).double()))
    other.apply("b", "measure", safetensors.torch.save(key_map._asdict()), 1)
    memory = LocalMemory(params=ResMemParams())
    memory.add(**{**rows, "embeddings": key_map(rows["embeddings"])})
    memory.remove(rows["ids"][60:])
    wanted, queries = memory.search(key_map(rows["embeddings"][:5]), 7), rows["embeddings"][:5].numpy()
    copied = shard.copy_from(Peer(other), 2)
    restarted = Shard(config(str(tmp_path / "pool")), 0, 1)  # from the journal
    other.build("exact", None, 2)
    for each, known in ((shard, copied), (other, 2), (restarted, 2), (Shard(config(str(tmp_path / "pool")), 0, 1), 2)):
        distances, found = each.search((queries,), 7, known)
        assert (found.tolist(), distances.tolist()) == (wanted.ids.tolist(), wanted.distances.tolist())
        keys = torch.from_numpy(each.sample(60).copy())  # what FAISS is trained on
        assert torch.equal(keys.sort(dim=0).values, memory._query_rows(memory.ids).sort(dim=0).values)
