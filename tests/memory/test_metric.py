"""Keys that are compared in the space within classes, against plain keys that NumPy has mapped to it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_resmem import FaissIndex, InputError, LocalMemory, Multilabel, Regression, StorageError
from lightning_resmem.memory.converting import Kept, converted
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.metric import moments, within_class
from lightning_resmem.memory.storage.saved import read_saved
from lightning_resmem.tasks import Task
from tests.memory.test_contract import CLASSES, PARAMS, ROWS, Data
from tests.saved_files import edited


def space(keys: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the matrix, from the formula."""
    rows, labels = keys.double().numpy(), targets.numpy()
    around = rows - np.stack([rows[labels == label].mean(axis=0) for label in labels])
    spread, directions = np.linalg.eigh(around.T @ around / len(rows))
    return rows.mean(axis=0), directions @ np.diag((spread + spread.mean()) ** -0.5) @ directions.T


def mapped(rows: Tensor, found: tuple[np.ndarray, np.ndarray]) -> Tensor:
    return torch.from_numpy((rows.double().numpy() - found[0]) @ found[1]).float()


@pytest.fixture
def data() -> Data:
    data = Data()
    data.keys[:, 0] = 30 + 20 * data.keys[:, 0]  # plain distances would be those of this column
    data.keys += torch.randn(CLASSES, data.keys.shape[1])[data.targets]
    data.queries[:, 0] = 30 + 20 * data.queries[:, 0]
    return data


def local(data: Data) -> LocalMemory:
    memory = LocalMemory(params=PARAMS)
    data.add_to(memory, torch.arange(ROWS))
    memory.build()
    return memory


def filled(data: Data, **options: Any) -> LocalMemory:
    memory = LocalMemory(params=PARAMS, metric="within_class", **options)
    data.add_to(memory, torch.randperm(ROWS))
    return memory


def check(memory: ResidualMemory, data: Data, found: tuple[np.ndarray, np.ndarray], kept: Tensor | None = None) -> None:
    """The memory answers as one of plain keys in that space does, with the rows `kept`."""
    same = copy.copy(data)
    same.keys, queries = mapped(data.keys, found), mapped(data.queries, found)
    plain = LocalMemory(params=PARAMS)
    same.add_to(plain, torch.arange(len(data.ids)) if kept is None else kept)
    near, expected = memory.search(data.queries, PARAMS.k), plain.search(queries, PARAMS.k)
    assert torch.equal(near.ids, expected.ids)
    torch.testing.assert_close(near.distances, expected.distances, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(memory(data.queries), plain(queries), rtol=0, atol=1e-4)
    rows = data.keys if kept is None else data.keys[kept]
    assert torch.equal(memory._query_rows(memory.ids), rows)  # kept as they came


@pytest.mark.parametrize("index", ["exact", FaissIndex("HNSW16", ef_search=300), FaissIndex("SQ8", rerank=4)])
def test_answers_are_those_of_plain_keys_in_that_space(index: str | FaissIndex, data: Data, tmp_path: Path) -> None:
    memory = filled(data, index=index)
    found = space(data.keys, data.targets)
    check(memory, data, found)
    assert not torch.equal(memory.search(data.queries, 9).ids, local(data).search(data.queries, 9).ids)
    memory.save(tmp_path / "memory")
    loaded, mmap = LocalMemory.load(tmp_path / "memory"), LocalMemory.load(tmp_path / "memory", mmap=True)
    for same in (loaded, mmap, pickle.loads(pickle.dumps(memory))):
        check(same, data, found)
        assert same.stats()["metric"] == "within_class"
    assert loaded.stats()["bytes"] == local(data).stats()["bytes"] + data.keys.nbytes


def test_the_space_stays_when_rows_change_and_is_another_one_after_clear(data: Data, tmp_path: Path) -> None:
    memory = LocalMemory(params=PARAMS, metric="within_class")
    first, later = torch.arange(200), torch.arange(200, ROWS)
    data.add_to(memory, first)
    memory.build()
    found = space(data.keys[first], data.targets[first])
    data.add_to(memory, later)
    check(memory, data, found)
    memory.save(tmp_path / "memory")
    memory = LocalMemory.load(tmp_path / "memory")
    memory.remove(data.ids[:30])
    data.keys[40:50] += 1
    memory.update(data.ids[40:50], embeddings=data.keys[40:50])
    check(memory, data, found, torch.arange(30, ROWS))
    with read_saved(tmp_path / "memory") as saved:
        half = converted([saved], Kept(key_dtype=torch.float16))
    assert torch.equal(half.key_map.matrix, memory.key_map.matrix)
    memory.clear()
    data.add_to(memory, torch.arange(ROWS))
    check(memory, data, space(data.keys, data.targets))


@pytest.mark.parametrize("values", ["dense", "sparse"])
def test_parts_of_the_rows_give_the_map_of_all(values: str, data: Data) -> None:
    data.keys += 1000  # sums of squares are large beside what is left of them
    parts = []
    for places in torch.randperm(ROWS).split([10, 150, 140]):
        memory = LocalMemory(params=PARAMS, values=values)
        data.add_to(memory, places)
        parts.append(memory.moments())
    found, (mean, matrix) = within_class(parts), space(data.keys, data.targets)
    np.testing.assert_allclose(found.mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(found.matrix.numpy(), matrix, rtol=1e-7, atol=1e-9)


def test_rows_that_are_alike_within_classes_are_compared_as_they_are() -> None:
    keys, targets = 1000 * torch.randn(5, 3), torch.arange(5)
    found = within_class([moments(keys.repeat(2, 1), targets.repeat(2), 5)])
    torch.testing.assert_close(found(keys), keys - keys.mean(dim=0), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("task", [Regression(), Multilabel()])
def test_tasks_without_classes_are_refused(task: Task) -> None:
    with pytest.raises(InputError, match=f'metric="within_class".*{type(task).__name__}'):
        LocalMemory(task, metric="within_class")
    with pytest.raises(InputError, match="metric='cosine'"):
        LocalMemory(metric="cosine")


def test_a_map_that_cannot_be_is_damage(data: Data, tmp_path: Path) -> None:
    filled(data).save(tmp_path)
    edited(tmp_path, lambda manifest: manifest["tensors"].pop("map_mean"))
    with pytest.raises(StorageError, match="map_mean"):
        LocalMemory.load(tmp_path)


def test_the_mapped_keys_are_estimated(data: Data) -> None:
    plain, mapping = LocalMemory(), LocalMemory(metric="within_class")
    more = sum(mapping.estimate_bytes(100, 6, 12).values()) - sum(plain.estimate_bytes(100, 6, 12).values())
    assert more == 100 * 6 * 4


def test_a_map_is_saved_in_double_precision(data: Data, tmp_path: Path) -> None:
    """A device without it has the map in single precision."""
    memory = filled(data)
    memory.build()
    key_map = memory._rows.key_map
    assert key_map is not None
    memory._rows.key_map = type(key_map)(*(part.float() for part in key_map))
    near = LocalMemory.load(memory.save(tmp_path)).search(data.queries, PARAMS.k)
    assert torch.equal(near.ids, memory.search(data.queries, PARAMS.k).ids)
