"""A shard by itself, in this process: changes are kept, undone, made once, and found again by the next process."""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from lightning_resmem import InputError, LocalMemory, Multiclass, ResMemParams, SparseConfig, StorageError
from lightning_resmem.cluster.config import PoolConfig
from lightning_resmem.cluster.journal import Entry, Journal
from lightning_resmem.cluster.merging import total
from lightning_resmem.cluster.shard import RowsLostError, Shard
from lightning_resmem.functional import neighbor_weights

CLASSES = 3


def config(url: str, index: str = "exact") -> PoolConfig:
    return PoolConfig(
        num_shards=1,
        task=Multiclass(),
        index=index,
        values="auto",
        key_dtype=torch.float32,
        namespace="tests",
        name="pool",
        cpus_per_shard=1,
        gpus_per_shard=0,
        placement="PACK",
        storage_path=url,
        request_timeout_s=60.0,
        replicas=1,
        on_shard_loss="raise",
    )


def part(rows: dict[str, torch.Tensor], start: int, stop: int) -> bytes:
    memory = LocalMemory(params=ResMemParams())
    memory.add(**{name: tensor[start:stop] for name, tensor in rows.items()})
    return safetensors.torch.save(memory.stored(slice(None)) | {"num_outputs": torch.tensor(CLASSES)})


def ids(*numbers: int) -> bytes:
    return safetensors.torch.save({"ids": torch.tensor(numbers)})


def check(shard: Shard, rows: dict[str, torch.Tensor], kept: list[int], known: int) -> None:
    memory = LocalMemory(params=ResMemParams())
    memory.add(**{name: tensor[kept] for name, tensor in rows.items()})
    queries = rows["embeddings"][:5] + 0.1
    expected = memory.search(queries, 7)
    distances, found = shard.search((queries.numpy(),), 7, known)
    assert found.tolist() == expected.ids.tolist()
    assert distances.tolist() == expected.distances.tolist()
    assert shard.ids(known).tolist() == kept
    weights = torch.full((5, 7), 1 / 7)
    wanted = memory.weighted_sums(expected.ids, weights, 1.3)
    answer = shard.weighted_sums((found, weights.numpy()), 1.3, known)
    assert answer is not None
    torch.testing.assert_close(torch.from_numpy(answer[0]), torch.stack(wanted[:2]), rtol=0, atol=1e-6)
    assert (len(answer), wanted.tail) == (1, None)  # nothing was cut


def test_what_was_acknowledged_is_there_after_a_restart(url: str, rows: dict[str, torch.Tensor]) -> None:
    shard = Shard(config(url), 0, 0)
    assert shard.apply("a", "add", part(rows, 0, 30), 0) == 1
    check(Shard(config(url), 0, 0), rows, list(range(30)), 1)  # never built
    state = shard.build("exact", None, 1)
    assert (state["rows"], state["number"], state["built"]) == (30, 1, True)
    check(Shard(config(url), 0, 0), rows, list(range(30)), 1)
    shard.apply("b", "add", part(rows, 30, 60), 1)
    shard.apply("c", "remove", ids(3, 40), 2)
    kept = [i for i in range(60) if i not in (3, 40)]
    check(shard, rows, kept, 3)
    check(Shard(config(url), 0, 0), rows, kept, 3)
    shard.apply("d", "clear", safetensors.torch.save({}), 3)
    again = Shard(config(url), 0, 0)
    assert again.state()["rows"] == 0
    assert again.search((rows["embeddings"][:2].numpy(),), 3, 4)[1].shape == (2, 0)
    assert again.weighted_sums((rows["ids"][:2, None].numpy(), rows["outputs"][:2, :1].numpy()), 1.0, 4) is None
    again.apply("e", "add", part(rows, 5, 60), 4)
    check(Shard(config(url), 0, 0), rows, list(range(5, 60)), 5)


def test_shards_whose_values_are_cut_answer_as_one_memory(tmp_path: Path, rows: dict[str, torch.Tensor]) -> None:
    options = {"task": Multiclass(), "values": SparseConfig(2)}
    one = LocalMemory(params=ResMemParams(k=9, sigma=0.8, softmax_temperature=1.3), **options)
    one.add(**rows)
    neighbors = one.search(rows["embeddings"][:5] + 0.1, 9)
    held = neighbors.ids.numpy(), neighbor_weights(neighbors.distances, 0.8).numpy()
    answers: list[object] = [None]  # a shard without rows
    for places in (slice(0, 25), slice(25, 60)):
        part = LocalMemory(params=ResMemParams(), **options)
        part.add(**{name: tensor[places] for name, tensor in rows.items()})
        shard = Shard(replace(config(str(tmp_path / f"{places.start}")), values=SparseConfig(2)), 0, 0)
        stored = part.stored(slice(None)) | {"num_outputs": torch.tensor(CLASSES)}
        shard.apply("a", "add", safetensors.torch.save(stored), 0)
        answers.append(shard.weighted_sums(held, 1.3, 1))
    sums, wanted = total(answers, 5, CLASSES, torch.device("cpu")), one.sums(neighbors)
    assert (wanted.tail > 0.01).all()
    torch.testing.assert_close(sums, wanted, rtol=0, atol=1e-6)


def test_a_repeated_request_is_made_once(url: str, rows: dict[str, torch.Tensor]) -> None:
    shard = Shard(config(url), 0, 0)
    for _ in range(3):
        assert shard.apply("a", "add", part(rows, 0, 60), 0) == 1
    # The process ended before it could acknowledge.
    again = Shard(config(url), 0, 0)
    assert again.apply("a", "add", part(rows, 0, 60), 0) == 1
    check(again, rows, list(range(60)), 1)


def test_a_change_that_is_refused_is_neither_made_nor_kept(url: str, rows: dict[str, torch.Tensor]) -> None:
    shard = Shard(config(url), 0, 0)
    shard.apply("a", "add", part(rows, 0, 60), 0)
    shard.build("exact", None, 1)
    with pytest.raises(InputError, match="repeated"):
        shard.apply("b", "add", part(rows, 10, 20), 1)
    with pytest.raises(InputError, match="not in the memory"):
        shard.apply("c", "remove", ids(1, 1000), 1)
    for same in (shard, Shard(config(url), 0, 0)):
        check(same, rows, list(range(60)), 1)


def test_a_change_that_cannot_be_kept_is_undone(
    url: str, rows: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Shard(config(url), 0, 0)
    shard.apply("a", "add", part(rows, 0, 30), 0)

    def full(self: Journal, entry: Entry) -> None:
        raise StorageError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write", full)
        with pytest.raises(StorageError, match="No space"):
            shard.apply("b", "add", part(rows, 30, 60), 1)
    check(shard, rows, list(range(30)), 1)
    assert shard.apply("b", "add", part(rows, 30, 60), 1) == 2
    check(shard, rows, list(range(60)), 2)


def test_rows_that_are_gone_are_missed(tmp_path: Path, rows: dict[str, torch.Tensor]) -> None:
    shard = Shard(config(str(tmp_path / "pool")), 0, 0)
    shard.apply("a", "add", part(rows, 0, 60), 0)
    shard.destroy()
    again = Shard(config(str(tmp_path / "pool")), 0, 0)
    queries = rows["embeddings"][:2].numpy()
    for ask in (
        lambda: again.search((queries,), 3, 1),
        lambda: again.weighted_sums((queries, queries), 1.0, 1),
        lambda: again.ids(1),
        lambda: again.fetch(rows["ids"].numpy(), 1),
        lambda: again.stored(0, 1, (), "", 1),
        lambda: again.apply("b", "add", part(rows, 0, 1), 1),
        lambda: again.build("exact", None, 1),
        lambda: again.ping(1),
    ):
        with pytest.raises(RowsLostError, match=r"does not hold its rows .change 0 of 1"):
            ask()
    assert again.apply("c", "clear", safetensors.torch.save({}), 1) == 2  # from here on nothing is missing


def test_damaged_rows_are_told_to_whoever_asks(tmp_path: Path, rows: dict[str, torch.Tensor]) -> None:
    shard = Shard(config(str(tmp_path / "pool")), 0, 0)
    shard.apply("a", "add", part(rows, 0, 60), 0)
    shard.build("exact", None, 1)
    [file] = (tmp_path / "pool").rglob("keys-*.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    again = Shard(config(str(tmp_path / "pool")), 0, 0)
    with pytest.raises(RowsLostError, match="is damaged"):
        again.search((rows["embeddings"][:2].numpy(),), 3, 0)


def test_readers_share_and_a_writer_is_alone(tmp_path: Path, rows: dict[str, torch.Tensor]) -> None:
    shard = Shard(config(str(tmp_path / "pool")), 0, 0)
    shard.apply("a", "add", part(rows, 0, 60), 0)
    shard.build("exact", None, 1)
    inside = threading.Barrier(3, timeout=20.0)

    def read() -> None:
        with shard._reading(1):
            inside.wait()  # only if all three are in at once
            release.wait(20.0)

    release = threading.Event()
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    inside.wait()
    done = []
    writer = threading.Thread(target=lambda: done.append(shard.apply("b", "remove", ids(0), 1)))
    writer.start()
    time.sleep(0.1)
    assert not done
    release.set()
    writer.join(20.0)
    assert done == [2]
    for reader in readers:
        reader.join(20.0)


def damaged(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("built", [False, True])
def test_a_damaged_change_is_told_to_whoever_asks_until_the_memory_is_cleared(
    built: bool, tmp_path: Path, rows: dict[str, torch.Tensor]
) -> None:
    shard = Shard(config(str(tmp_path / "pool")), 0, 0)
    shard.apply("a", "add", part(rows, 0, 20), 0)
    if built:
        shard.build("exact", None, 1)
    shard.apply("b", "add", part(rows, 20, 40), 1)
    shard.apply("c", "add", part(rows, 40, 60), 2)
    [file] = (tmp_path / "pool").rglob("*2-add-b-*")
    damaged(file)
    again = Shard(config(str(tmp_path / "pool")), 0, 0)
    for ask in (again.state, lambda: again.ids(0), lambda: again.apply("d", "remove", ids(1), 0)):
        with pytest.raises(RowsLostError, match=f"{file.name} is damaged"):
            ask()
    assert again.apply("e", "clear", safetensors.torch.save({}), 0) == 4  # also of what could not be read
    again.apply("f", "add", part(rows, 0, 60), 4)
    check(Shard(config(str(tmp_path / "pool")), 0, 0), rows, list(range(60)), 5)


def test_a_change_without_a_checksum_that_cannot_be_made_is_named(
    tmp_path: Path, rows: dict[str, torch.Tensor]
) -> None:
    directory = tmp_path / "pool" / "shard-0000-0"
    directory.mkdir(parents=True)
    (directory / "0000000001-add-a.safetensors").write_bytes(part(rows, 0, 60))
    check(Shard(config(str(tmp_path / "pool")), 0, 0), rows, list(range(60)), 1)
    (directory / "0000000001-add-a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(RowsLostError, match=r"change 1 .add. cannot be made again"):
        Shard(config(str(tmp_path / "pool")), 0, 0).state()


class Peer:
    """What a shard asks another for, by Ray."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._shard, name))


@pytest.mark.parametrize("emptied", [False, True])
def test_rows_of_a_replica_take_the_place_of_damaged_ones(
    emptied: bool, tmp_path: Path, rows: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.get", lambda answer, timeout: answer)  # the other shard is in this process
    shard, other = (Shard(config(str(tmp_path / "pool")), 0, replica) for replica in range(2))
    other.apply("a", "add", part(rows, 0, 60), 0)
    for number in range(4):  # a replica that has made more changes than the other
        shard.apply(f"a{number}", "add", part(rows, number, number + 1), number)
    if emptied:
        other.apply("b", "clear", safetensors.torch.save({}), 1)
    for file in (tmp_path / "pool" / "shard-0000-0").glob("*-add-*"):
        damaged(file)
    again = Shard(config(str(tmp_path / "pool")), 0, 0)
    number = again.copy_from(Peer(other), 4)
    for same in (again, Shard(config(str(tmp_path / "pool")), 0, 0)):
        assert same.ids(max(4, number)).tolist() == ([] if emptied else list(range(60)))


def until_it_answers(ask: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30.0
    while True:
        try:
            ask()
        except RowsLostError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return


def test_a_shard_comes_back_when_its_storage_does(tmp_path: Path, rows: dict[str, torch.Tensor]) -> None:
    pool, away = tmp_path / "pool", tmp_path / "away"
    shard = Shard(config(str(pool)), 0, 0)
    shard.apply("a", "add", part(rows, 0, 30), 0)
    shard.build("exact", None, 1)
    shard.apply("b", "add", part(rows, 30, 40), 1)
    pool.rename(away)
    with pytest.raises(StorageError, match="vanished"):
        shard.apply("c", "add", part(rows, 40, 60), 2)
    pool.write_text("a file, so that no directory can be made here")
    started_meanwhile = Shard(config(str(pool)), 0, 0)
    for each in (shard, started_meanwhile):
        with pytest.raises(RowsLostError):
            each.state()
    pool.unlink()
    away.rename(pool)
    for each in (shard, started_meanwhile):
        until_it_answers(lambda each=each: each.ids(2))
        check(each, rows, list(range(40)), 2)
    assert shard.apply("c", "add", part(rows, 40, 60), 2) == 3
    check(shard, rows, list(range(60)), 3)


def test_a_shard_that_found_an_empty_storage_comes_back_when_that_is_filled(
    tmp_path: Path, rows: dict[str, torch.Tensor]
) -> None:
    pool, away = tmp_path / "pool", tmp_path / "away"
    Shard(config(str(pool)), 0, 0).apply("a", "add", part(rows, 0, 60), 0)
    pool.rename(away)
    again = Shard(config(str(pool)), 0, 0)  # as where nothing is mounted yet
    with pytest.raises(RowsLostError, match="does not hold its rows"):
        again.ids(1)
    shutil.rmtree(pool)
    away.rename(pool)
    until_it_answers(lambda: again.ids(1))
    check(again, rows, list(range(60)), 1)


def test_a_change_that_was_kept_although_the_storage_said_otherwise_is_made(
    url: str, rows: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, write = Shard(config(url), 0, 0), Journal.write

    def unsure(self: Journal, entry: Entry) -> None:
        write(self, entry)
        raise StorageError("connection lost")

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write", unsure)
        assert shard.apply("a", "add", part(rows, 0, 60), 0) == 1
    check(shard, rows, list(range(60)), 1)
