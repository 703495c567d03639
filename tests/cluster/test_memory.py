"""RayMemory against LocalMemory and ResMem in float64, on a Ray of one node."""

import copy
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_resmem import (
    EmptyMemoryError,
    FaissIndex,
    InputError,
    LocalMemory,
    Multilabel,
    RayMemory,
    Regression,
    ResMemModule,
    ResMemParams,
    ShardUnavailableError,
    SparseConfig,
    StaleMemoryError,
    StorageError,
    explain,
    influence,
    label_errors,
    memorize,
)
from lightning_resmem.cluster.files import to_files
from lightning_resmem.memory.storage.saved import read_saved
from lightning_resmem.trainer.restoring import RestorableMemory
from lightning_resmem.trainer.save_directory import SaveDirectory
from tests.cluster.ending import SECONDS, ended
from tests.language import VOCABULARY, Causal, loader, rows_of
from tests.language import texts as some_texts
from tests.memory.test_contract import CLASSES, PARAMS, ROWS, WIDTH, Data
from tests.memory.test_times import Dated
from tests.models import trainer
from tests.saved_files import file_of
from tests.simulated_gpu import DEVICE, simulated_gpu

pytestmark = pytest.mark.slow

SHARDS = (1, 2, 3, 5)


@pytest.fixture(scope="module")
def pools(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RayMemory]]:
    """Memories over 1, 2, 3 and 5 shards, which share five actors (a test uses one of them), and one of other kinds."""
    from lightning_resmem.cluster.pool import Pool

    path = tmp_path_factory.mktemp("shards")
    options: dict[str, Any] = {"params": PARAMS, "storage_path": path, "request_timeout_s": SECONDS}
    made = {str(count): RayMemory(count, **options) for count in SHARDS}
    largest = made[str(max(SHARDS))]
    largest.shards.open()
    for count in SHARDS[:-1]:
        config = replace(largest.shards.pool.config, num_shards=count)
        made[str(count)].shards.use(Pool(config, largest.shards.pool.actors[:count], SECONDS))
    kinds = {"index": FaissIndex("IVF4,Flat", nprobe=4), "values": SparseConfig(CLASSES), "key_dtype": torch.bfloat16}
    made["replicated"] = RayMemory(2, **options)
    config = replace(largest.shards.pool.config, num_shards=2, replicas=2)
    actors = largest.shards.pool.actors
    made["replicated"].shards.config = config
    made["replicated"].shards.use(Pool(config, [actors[0] + actors[1], actors[2] + actors[3]], SECONDS))
    made["other"] = RayMemory(2, **options, **kinds)
    made["other"].shards.open()
    yield made
    largest.shutdown()
    made["other"].shutdown()
    assert not list(path.iterdir())


@pytest.fixture(params=[str(count) for count in SHARDS])
def memory(request: pytest.FixtureRequest, pools: dict[str, RayMemory]) -> RayMemory:
    return cleared(pools[request.param])


@pytest.fixture
def two(pools: dict[str, RayMemory]) -> RayMemory:
    return cleared(pools["2"])


def cleared(memory: RayMemory) -> RayMemory:
    pool = memory.shards.pool
    # Another memory may have changed the shards since.
    pool.known[:] = [[answer["number"] for answer in replicas] for replicas in pool.everywhere("state")]
    memory.clear()
    memory.params = PARAMS
    return memory


def local(data: Data, **options: Any) -> LocalMemory:
    memory = LocalMemory(params=PARAMS, **options)
    data.add_to(memory, torch.arange(len(data.ids)))
    return memory


# -- the contract


def test_answers_as_the_oracle_and_as_one_memory(memory: RayMemory, data: Data) -> None:
    data.add_to(memory, torch.randperm(ROWS))
    assert len(memory) == ROWS
    memory.build()
    data.check(memory, 1e-5)
    one = local(data)
    for k in (1, PARAMS.k, ROWS // 4, ROWS + 5):
        expected, found = one.search(data.queries, k), memory.search(data.queries, k)
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.distances, expected.distances)
    for expected, found in zip(
        one.predictions(data.queries, data.query_outputs),
        memory.predictions(data.queries, data.query_outputs),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert memory.distance_scale() == pytest.approx(one.distance_scale())


def test_shards_compare_keys_in_the_space_of_all_rows(
    two: RayMemory, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two.shards, "config", replace(two.shards.config, metric="within_class"))
    first = torch.arange(ROWS - 50)
    data.add_to(two, first)
    one = LocalMemory(params=PARAMS, metric="within_class")
    data.add_to(one, first)
    one.build()
    two.build()
    for memory in (one, two):  # the space stays
        data.add_to(memory, torch.arange(ROWS - 50, ROWS))
    two.save(tmp_path)
    expected = one.search(data.queries, PARAMS.k)
    assert not torch.equal(expected.ids, local(data).search(data.queries, PARAMS.k).ids)
    for memory in (two, LocalMemory.load(tmp_path)):
        found = memory.search(data.queries, PARAMS.k)
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.distances, expected.distances)
    two.clear()
    with read_saved(tmp_path) as saved:
        two._take(saved)
    assert torch.equal(two.search(data.queries, PARAMS.k).ids, expected.ids)


def test_queries_on_a_gpu_go_out_and_answers_come_back_as_one_copy_each(two: RayMemory, data: Data) -> None:
    data.add_to(two, torch.arange(ROWS))
    expected = two.search(data.queries, PARAMS.k)
    expected_sums = two.sums(expected)
    with simulated_gpu() as gpu:
        queries = data.queries.to(DEVICE)
        gpu.waits.clear()
        found = two.search(queries, PARAMS.k)
        sums = two.sums(found)
        waits = [wait.split(" at ")[0] for wait in gpu.waits]
        assert waits == ["copy from the GPU", "copy to the GPU"] * 2, gpu.waits
        assert sums.tail is expected_sums.tail is None
        for part, wanted in zip((*found, *sums[:2]), (*expected, *expected_sums[:2]), strict=True):
            assert part.device == DEVICE
            assert torch.equal(part.cpu(), wanted)


def test_explains_as_one_memory(two: RayMemory, data: Data) -> None:
    data.add_to(two, torch.randperm(ROWS))
    one, queries = local(data), (data.queries, data.query_outputs)
    expected, found = explain(one, *queries), explain(two, *queries)
    assert torch.equal(found.neighbors.ids, expected.neighbors.ids)
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.contributions, expected.contributions, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.rest, expected.rest, rtol=0, atol=2e-6)
    id = int(expected.neighbors.ids[0, 0])
    assert torch.equal(influence(two, id, data.queries).queries, influence(one, id, data.queries).queries)
    targets = data.query_outputs.argmax(dim=1)
    for by, validation in (("self_confidence", {}), ("base_loss", {}), ("harm", {"targets": targets})):
        rows = {"embeddings": data.queries, "outputs": data.query_outputs, **validation} if validation else {}
        ranked, same = (label_errors(memory, by, **rows) for memory in (two, one))
        assert torch.equal(ranked.ids, same.ids)
        torch.testing.assert_close(ranked.scores, same.scores, rtol=0, atol=1e-5)


def test_other_kinds_of_index_and_values(pools: dict[str, RayMemory], data: Data, tmp_path: Path) -> None:
    memory = cleared(pools["other"])
    data.keys = data.keys.bfloat16().float()
    data.add_to(memory, torch.randperm(ROWS))
    data.check(memory, 1e-3)
    saved = memory.save(tmp_path / "memory")
    one = LocalMemory.load(saved)
    data.check(one, 1e-3)
    found, expected = memory.stats(), one.stats()
    assert found.pop("shards")
    assert found == expected
    assert (found["recall"], found["nprobe"]) == (1.0, 4)


def test_edited_memory_is_one_built_from_the_final_rows(memory: RayMemory, data: Data, tmp_path: Path) -> None:
    first, later = torch.randperm(ROWS).split([200, 100])
    data.add_to(memory, first)
    memory.build()
    data.add_to(memory, later)  # after build
    gone = torch.randperm(ROWS)[:80]
    memory.remove(data.ids[gone])
    assert len(memory) == ROWS - 80
    kept = torch.ones(ROWS, dtype=torch.bool).index_fill(0, gone, False).nonzero()[:, 0]
    data.check(memory, 1e-5, kept)
    relabeled, moved, reread = kept[::3].flip(0), kept[1::3], kept[::2]
    data.targets[relabeled] = torch.randint(CLASSES, (len(relabeled),))
    memory.update(data.ids[relabeled], targets=data.targets[relabeled])
    data.keys[moved], data.outputs[reread] = torch.randn(len(moved), WIDTH), torch.randn(len(reread), CLASSES)
    memory.update(data.ids[moved], embeddings=data.keys[moved])
    memory.update(data.ids[reread], outputs=data.outputs[reread])
    data.check(memory, 1e-5, kept)
    data.check(LocalMemory.load(memory.save(tmp_path / "memory")), 1e-5, kept)


def test_fewer_rows_than_shards(memory: RayMemory) -> None:
    for rows in (1, 2):
        cleared(memory)
        data = Data(rows)
        data.add_to(memory, torch.arange(rows))
        data_params, memory.params = memory.params, ResMemParams(k=4, sigma=0.8, softmax_temperature=1.3)
        one = local(data)
        one.params = memory.params
        neighbors = memory.search(data.queries, 4)
        assert torch.equal(neighbors.ids, one.search(data.queries, 4).ids)
        assert (neighbors.ids[:, rows:] == -1).all()
        torch.testing.assert_close(memory(data.queries), one(data.queries), rtol=0, atol=1e-6)
        torch.testing.assert_close(memory.knn(data.queries), one.knn(data.queries), rtol=0, atol=1e-6)
        memory.params = data_params


def test_equal_distances_come_in_the_order_of_ids(memory: RayMemory) -> None:
    rows = 40
    keys = torch.randint(2, (rows, 2)).float()
    outputs, targets = torch.randn(rows, 3), torch.randint(3, (rows,))
    memory.add(keys, outputs, targets)
    one = LocalMemory(params=PARAMS)
    one.add(keys, outputs, targets)
    for k in (1, 7, 40):
        assert torch.equal(memory.search(keys[:5], k).ids, one.search(keys[:5], k).ids)


def test_fetched_rows_are_the_rows(memory: RayMemory, data: Data) -> None:
    data.add_to(memory, torch.randperm(ROWS))
    chosen = torch.tensor([250, 3, 3, 99])
    rows, expected = memory.fetch(data.ids[chosen]), local(data).fetch(data.ids[chosen])
    for name, tensor in expected.tensors().items():
        assert torch.equal(rows.tensors()[name], tensor)
    assert len(memory.fetch(torch.tensor([], dtype=torch.int64))) == 0


def test_saved_memories_are_one_format(two: RayMemory, data: Data, tmp_path: Path) -> None:
    one = local(data)
    one.provenance = {"fingerprint": "f", "head": "net.fc"}
    one.save(tmp_path / "local")
    spread = RayMemory.load(tmp_path / "local", 3, storage_path=tmp_path / "shards", request_timeout_s=SECONDS)
    try:
        data.check(spread, 1e-5)
        assert (spread.params, spread.tunable, spread.provenance) == (PARAMS, False, one.provenance)
        spread.save(tmp_path / "spread")
    finally:
        ended(spread)
    data.add_to(two, torch.randperm(ROWS))
    two.provenance = one.provenance
    two.save(tmp_path / "two")
    back = LocalMemory.load(tmp_path / "spread")
    assert torch.equal(back(data.queries), one(data.queries))
    assert (back.params, back.tunable, back.provenance) == (PARAMS, False, one.provenance)
    for name in ("keys", "ids", "outputs", "targets"):
        files = [file_of(tmp_path / place, name) for place in ("local", "spread", "two")]
        assert len({file.read_bytes() for file in files}) == len({file.name for file in files}) == 1


def test_a_saved_memory_is_read_as_it_was_configured(ray_address: str, data: Data, tmp_path: Path) -> None:
    one = local(data)
    one.provenance = {"fingerprint": "f"}
    one.save(tmp_path / "saved")
    options: dict[str, Any] = {"name": "kept", "storage_path": tmp_path / "shards", "request_timeout_s": SECONDS}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        memory = RayMemory(2, **options).restored(tmp_path / "saved", dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    try:
        data.check(memory, 1e-5)
        assert (memory.params, memory.tunable, memory.provenance) == (PARAMS, False, one.provenance)
        # What a callback reads is what it was given, and a pool that was kept is used again.
        again = RestorableMemory(RayMemory(2, **options), SaveDirectory(None, "resmem")).read(tmp_path / "saved")
        assert isinstance(again, RayMemory)
        assert pids(again) == pids(memory)
        assert torch.equal(again(data.queries), memory(data.queries))
        with pytest.raises(InputError, match=r"name='kept' is a pool of 2 shards .* not of 3 shards"):
            RayMemory(3, **options).restored(tmp_path / "saved")
        one.remove(one.ids[:1])
        one.save(tmp_path / "saved")
        with pytest.raises(InputError, match=r"name='kept' is a pool .*connect\('kept'\)\.shutdown"):
            RayMemory(2, **options).restored(tmp_path / "saved")
    finally:
        ended(memory)
    assert isinstance(RestorableMemory(None, SaveDirectory(None, "resmem")).read(tmp_path / "saved"), LocalMemory)


def pids(memory: RayMemory) -> list[int]:
    return [shard["pid"] for shard in memory.stats()["shards"]]


@pytest.mark.parametrize("task", [Multilabel(), Regression()])
def test_other_tasks(task: Multilabel | Regression, ray_address: str, tmp_path: Path) -> None:
    data = Data()
    targets = torch.rand(ROWS, CLASSES).round() if isinstance(task, Multilabel) else torch.randn(ROWS, CLASSES)
    memory = RayMemory(1, task, PARAMS, storage_path=tmp_path, request_timeout_s=SECONDS)
    one = LocalMemory(task, PARAMS)
    try:
        for each in (memory, one):
            each.add(data.keys, data.outputs, targets)
        for expected, found in zip(
            one.predictions(data.queries, data.query_outputs),
            memory.predictions(data.queries, data.query_outputs),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    finally:
        ended(memory)


def test_tokens(ray_address: str, tmp_path: Path) -> None:
    """Positions of left-padded sequences, through the pass of a trainer, are those of a LocalMemory."""
    model, texts, one = Causal(), some_texts(9), LocalMemory(params=PARAMS)
    memory = RayMemory(2, params=PARAMS, storage_path=tmp_path / "pool", request_timeout_s=SECONDS)
    try:
        pooled, local = (
            memorize(trainer(tmp_path), model, loader(texts, 4, side="left"), memory=each, tuner=None)
            for each in (memory, one)
        )
        assert torch.equal(memory.ids, one.ids)
        assert (
            list(zip(*(part.tolist() for part in memory.locate(memory.ids)), strict=True))
            == rows_of(model, texts).places
        )
        [batch] = loader(some_texts(5, seed=1), 5)
        for found, expected in zip(pooled.predictions(batch), local.predictions(batch), strict=True):
            assert found.shape == (*batch["input_ids"].shape, VOCABULARY)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        explained, expected = (combined.explain(batch, top=2).neighbors.ids for combined in (pooled, local))
        assert torch.equal(explained, expected)
    finally:
        ended(memory)


# -- errors


def test_bad_rows_change_nothing(two: RayMemory, data: Data) -> None:
    data.add_to(two, torch.arange(ROWS))
    two.build()
    row = torch.zeros(1, WIDTH), torch.zeros(1, CLASSES), torch.zeros(1).long()
    with pytest.raises(InputError, match="widths"):
        two.add(torch.zeros(1, WIDTH + 1), *row[1:])
    with pytest.raises(InputError, match="embeddings"):
        two.add(torch.full((1, WIDTH), torch.nan), *row[1:])
    with pytest.raises(InputError, match="outside"):
        two.add(*row[:2], torch.tensor([CLASSES]))
    with pytest.raises(InputError, match=f"repeated: {int(data.ids[7])}"):
        two.add(*row, ids=data.ids[7:8])
    unknown = torch.tensor([10 * ROWS + 1])
    for edit in (two.remove, two.fetch, lambda ids: two.update(ids, targets=row[2])):
        with pytest.raises(InputError, match=f"{10 * ROWS + 1}.*not in the memory"):
            edit(unknown)
    with pytest.raises(InputError, match="queries"):
        two.search(torch.zeros(1, WIDTH + 1), 3)
    with pytest.raises(InputError, match="k=0"):
        two.search(torch.zeros(1, WIDTH), 0)
    data.check(two, 1e-5)


def test_a_chunk_that_one_shard_cannot_keep_is_in_none_and_can_be_added_again(two: RayMemory, data: Data) -> None:
    first, second = torch.arange(ROWS).split([200, 100])
    data.add_to(two, first)
    two.shards.flush()
    storage = Path(two.shards.pool.config.storage_path) / "shard-0001-0"
    away = storage.rename(storage.with_name("away"))
    data.add_to(two, second)
    with pytest.raises(StorageError, match=rf"vanished.*64 rows with the ids {int(data.ids[200])}, .*add it again"):
        two.shards.flush()
    assert len(two) == 200
    away.rename(storage)
    assert torch.equal(answers_again(two, lambda: two.ids), data.ids[first].sort().values)
    data.check(two, 1e-5, first)
    data.add_to(two, second)
    assert len(two) == ROWS
    data.check(two, 1e-5)


def answers_again(memory: RayMemory, ask: Callable[[], Any]) -> Any:
    """What is asked for, when a shard has looked for its storage, which it does now and then."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return ask()
        except ShardUnavailableError:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("name", ["2", "replicated"])
def test_an_edit_that_one_shard_cannot_keep_is_made_in_none_and_can_be_repeated(
    name: str, pools: dict[str, RayMemory], data: Data
) -> None:
    memory = cleared(pools[name])
    data.add_to(memory, torch.arange(ROWS))
    memory.build()
    predicted = memory.predict(data.queries, data.query_outputs)
    storage = Path(memory.shards.pool.config.storage_path) / "shard-0001-0"  # with replicas, the second of shard 0
    gone, changed = data.ids[:100], {"embeddings": torch.randn(80, WIDTH), "targets": torch.zeros(80).long()}
    for words, edit in (
        ("removed: remove", lambda: memory.remove(gone)),
        ("updated: update", lambda: memory.update(data.ids[90:170], **changed)),
    ):
        away = storage.rename(storage.with_name("away"))
        with pytest.raises(StorageError, match=rf"vanished.* rows with the ids .* was not {words} it again"):
            edit()
        assert len(memory) == ROWS
        away.rename(storage)
        assert torch.equal(answers_again(memory, lambda: memory.ids), data.ids.sort().values)
        assert torch.equal(memory.predict(data.queries, data.query_outputs), predicted)
        data.check(memory, 1e-5)
    memory.update(data.ids[90:170], **changed)
    data.keys[90:170], data.targets[90:170] = changed.values()
    data.check(memory, 1e-5)
    memory.remove(gone)
    assert len(memory) == ROWS - 100
    data.check(memory, 1e-5, torch.arange(100, ROWS))


def test_an_id_that_two_chunks_have_is_found_by_build(two: RayMemory, data: Data) -> None:
    data.add_to(two, torch.arange(ROWS))
    data.add_to(two, torch.arange(5, 6))
    with pytest.raises(InputError, match=f"repeated: {int(data.ids[5])}"):
        two.build()


def test_empty_memory(two: RayMemory) -> None:
    assert len(two) == 0
    for ask in (two.build, lambda: two.search(torch.zeros(1, WIDTH), 1), lambda: two.ids):
        with pytest.raises(EmptyMemoryError):
            ask()
    two.add(torch.zeros(2, WIDTH), torch.zeros(2, CLASSES), torch.zeros(2).long())
    two.remove([0, 1])
    with pytest.raises(EmptyMemoryError):
        two.build()


# -- sharing


def test_copies_ask_the_same_shards(pools: dict[str, RayMemory], data: Data) -> None:
    memory = cleared(pools["5"])
    unused = pickle.loads(pickle.dumps(RayMemory(2, params=PARAMS)))
    assert len(unused) == 0
    data.add_to(memory, torch.arange(ROWS))
    memory.build()
    for twin in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        data.check(twin, 1e-5)


class Head(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def test_rows_that_another_driver_has_replaced_are_not_answered_from(
    pools: dict[str, RayMemory], data: Data, tmp_path: Path
) -> None:
    memory = cleared(pools["5"])
    data.add_to(memory, torch.arange(ROWS))
    module = ResMemModule(Head(), memory)
    other = pickle.loads(pickle.dumps(memory))
    other.remove(data.ids[:1])  # an edit is not another memory
    assert torch.equal(memory.ids, data.ids[1:])
    assert len(LocalMemory.load(memory.save(tmp_path / "edited"))) == ROWS - 1
    module(data.queries)
    other.clear()
    data.add_to(other, torch.arange(ROWS // 2))
    other.build()
    row = torch.zeros(1, WIDTH), torch.zeros(1, CLASSES), torch.zeros(1).long()
    for ask in (
        lambda: module(data.queries),
        lambda: memory.search(data.queries, 3),
        lambda: memory.ids,
        lambda: memory.fetch(data.ids[:1]),
        lambda: memory.remove(data.ids[:1]),
        lambda: memory.save(tmp_path / "memory"),
        lambda: (memory.add(*row), memory.build()),
    ):
        with pytest.raises(StaleMemoryError, match=r"has cleared the pool .*RayMemory.connect"):
            ask()
    assert not (tmp_path / "memory").exists()
    data.check(other, 1e-5, torch.arange(ROWS // 2))
    memory.clear()
    with pytest.raises(StaleMemoryError):
        other.search(data.queries, 3)


def test_rows_that_another_driver_changes_are_not_saved_as_a_mixture(
    pools: dict[str, RayMemory], data: Data, tmp_path: Path
) -> None:
    memory = cleared(pools["5"])
    data.add_to(memory, torch.arange(ROWS))
    memory.build()
    other = pickle.loads(pickle.dumps(memory))
    files = to_files(memory.shards)
    assert sum(len(places) for places, _ in files["keys"].parts()) == ROWS
    other.build_shards()  # changes no rows
    assert sum(len(places) for places, _ in files["keys"].parts()) == ROWS
    other.update(data.ids[:1], targets=data.targets[:1])
    with pytest.raises(StorageError, match="were changed while they were read"):
        list(files["keys"].parts())
    assert len(LocalMemory.load(memory.save(tmp_path / "memory"))) == ROWS
    other.remove(data.ids)
    with pytest.raises(EmptyMemoryError, match="another process has removed its rows"):
        memory.save(tmp_path / "empty")


def test_many_callers_at_once(two: RayMemory, data: Data) -> None:
    data.add_to(two, torch.arange(ROWS))
    one = local(data)
    expected = [one.knn(data.queries[i : i + 1]) for i in range(7)]

    def ask(turn: int) -> bool:
        return torch.allclose(two.knn(data.queries[turn % 7][None]), expected[turn % 7], atol=1e-6)

    two.build()
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(ask, range(60)))


def test_a_search_goes_on_while_the_caller_does_something_else(two: RayMemory, data: Data) -> None:
    data.add_to(two, torch.arange(ROWS))
    two.build()
    started = [two.search_async(data.queries[i : i + 1], 3) for i in range(7)]
    one = local(data)
    for i, search in enumerate(started):
        assert torch.equal(search.result(timeout=SECONDS).ids, one.search(data.queries[i : i + 1], 3).ids)
        assert torch.equal(search.result().ids, one.search(data.queries[i : i + 1], 3).ids)  # again


def test_phase_two_moves_two_rows_of_outputs_for_a_query_whatever_k(two: RayMemory, data: Data) -> None:
    data.add_to(two, torch.arange(ROWS))
    two.build()
    for k in (1, 100):
        neighbors = two.search(data.queries, k)
        parts = two._ask("weighted_sums", (neighbors.ids.numpy(), np.ones((7, k), np.float32)), 1.0)
        assert [sum(column.nbytes for column in part) for part in parts] == [2 * 7 * CLASSES * 4] * 2


# -- what is told


def test_stats_and_metrics(two: RayMemory, data: Data) -> None:
    assert RayMemory(2).stats()["rows"] == 0
    assert RayMemory(2).metrics() == {}
    data.add_to(two, torch.arange(ROWS))
    two.build()
    two.search(data.queries, 3)
    stats, one = two.stats(), local(data)
    one.build()
    shards = stats.pop("shards")
    assert stats == one.stats()
    assert [shard["shard"] for shard in shards] == [0, 1]
    assert sum(shard["rows"] for shard in shards) == ROWS
    assert sum(shard["bytes"] for shard in shards) == stats["bytes"]
    assert len({shard["pid"] for shard in shards}) == 2
    for shard in shards:
        assert shard["alive"]
        assert shard["restarts"] == 0
        assert shard["searches"] >= 1
        assert 0 < shard["search_p50_ms"] <= shard["search_p99_ms"]
        assert len(shard["node"]) == 56
    assert two.metrics() == {"resmem/shards_alive": 2.0, "resmem/coverage": 1.0}


def test_building_shows_a_bar_only_when_asked(two: RayMemory, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    data.add_to(two, torch.arange(ROWS))
    two.build()
    assert "Building shards" not in capsys.readouterr().err
    two.remove(data.ids[:1])
    two.show_progress = True
    two.build()
    two.show_progress = False
    assert "Building shards" in capsys.readouterr().err


# -- building


def test_an_index_is_trained_once_for_all_shards(
    pools: dict[str, RayMemory], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    memory = cleared(pools["other"])
    keys = (torch.randn(800, WIDTH) + 20 * torch.arange(4).repeat_interleave(200)[:, None]).bfloat16().float()
    memory.add(keys, torch.zeros(800, 2), torch.zeros(800).long())
    memory.build()
    import faiss
    import ray

    indexes = [
        faiss.deserialize_index(np.frombuffer(ray.get(actor.index.remote(0), timeout=SECONDS)[1], np.uint8))
        for (actor,) in memory.shards.pool.actors
    ]
    centroids = [index.quantizer.reconstruct_n(0, 4) for index in indexes]
    np.testing.assert_array_equal(centroids[0], centroids[1])
    one = LocalMemory(params=PARAMS)
    one.add(keys, torch.zeros(800, 2), torch.zeros(800).long())
    assert torch.equal(memory.search(keys[:50], 10).ids, one.search(keys[:50], 10).ids)


def test_rows_with_times_as_in_a_local_memory(pools: dict[str, RayMemory], tmp_path: Path) -> None:
    data, memory, local = Dated(), cleared(pools["3"]), LocalMemory(params=PARAMS)
    labels = data.targets.argmax(dim=1)
    for each in (memory, local):
        each.add(data.keys, data.outputs, labels, data.ids, data.times)
        each.remove(data.ids[:20])
    columns = [column[:20] for column in (data.keys, data.outputs, labels, data.ids, data.times)]
    for each in (memory, local):
        each.add(*columns)
        each.update(data.ids[:5], embeddings=data.keys[:5] + 1)
    assert memory.are_dated
    expected, found = local.at(data.asked_at), memory.at(data.asked_at)
    for ours, theirs in zip(found.search(data.queries, 9), expected.search(data.queries, 9), strict=True):
        assert torch.equal(ours, theirs)
    answers = (each.predictions(data.queries, data.query_outputs) for each in (found, expected))
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert memory.distance_scale() == local.distance_scale()
    with pytest.raises(InputError, match=r"memory.at\(now\)"):
        memory.search(data.queries, 3)
    memory.save(tmp_path / "memory")
    loaded = LocalMemory.load(tmp_path / "memory").at(data.asked_at)
    assert torch.equal(loaded.search(data.queries, 9).ids, expected.search(data.queries, 9).ids)
    restored = cleared(pools["3"])
    with read_saved(tmp_path / "memory", mmap=True) as saved:
        restored._take(saved)
    assert torch.equal(restored.at(data.asked_at).search(data.queries, 9).ids, loaded.search(data.queries, 9).ids)
