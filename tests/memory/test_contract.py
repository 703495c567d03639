"""One contract for every kind of index and values, against ResMem in float64."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_resmem import LocalMemory, Multiclass, Multilabel, Regression, ResMemParams
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.memory.values.dense import DenseConfig
from lightning_resmem.memory.values.sparse import SparseConfig
from tests import oracle

ROWS, WIDTH, CLASSES = 300, 6, 12
PARAMS = ResMemParams(k=9, sigma=0.8, softmax_temperature=1.3)

# The approximate ones search so widely here that they find everything.
INDEXES = {
    "auto": "auto",
    "exact": "exact",
    "flat": "Flat",
    "hnsw": FaissIndex("HNSW16", ef_search=300),
    "ivf": FaissIndex("IVF4,Flat", nprobe=4),
    "sq8": FaissIndex("SQ8", rerank=4),
}
VALUES = {
    "auto": ("auto", 1e-5),
    "dense": ("dense", 1e-5),
    "dense16": (DenseConfig(torch.float16), 2e-3),
    "sparse-all": (SparseConfig(CLASSES), 1e-3),
}
Make = Callable[..., LocalMemory]


@pytest.fixture(params=INDEXES)
def index(request: pytest.FixtureRequest) -> str | FaissIndex:
    return INDEXES[request.param]


@pytest.fixture(params=VALUES)
def values(request: pytest.FixtureRequest) -> tuple[object, float]:
    return VALUES[request.param]


class Data:
    """Random rows, in the order of their ids, and queries."""

    def __init__(self, rows: int = ROWS) -> None:
        self.keys, self.outputs = torch.randn(rows, WIDTH), 2 * torch.randn(rows, CLASSES)
        self.targets = torch.randint(CLASSES, (rows,))
        self.ids = torch.randperm(10 * rows)[:rows].sort().values
        self.queries, self.query_outputs = torch.randn(7, WIDTH), torch.randn(7, CLASSES)

    def add_to(self, memory: LocalMemory, positions: torch.Tensor) -> None:
        for part in positions.split(64):
            memory.add(self.keys[part], self.outputs[part], self.targets[part], self.ids[part])

    def check(self, memory: LocalMemory, tolerance: float, kept: torch.Tensor | None = None) -> None:
        """The memory answers as one with exactly the rows `kept`."""
        rows = torch.arange(len(self.ids)) if kept is None else kept
        keys, ids = self.keys[rows].numpy(), self.ids[rows].numpy()
        distances, found = oracle.neighbors(keys, ids, self.queries.numpy(), PARAMS.k)
        neighbors = memory.search(self.queries, PARAMS.k)
        np.testing.assert_array_equal(neighbors.ids.numpy(), found)
        np.testing.assert_allclose(neighbors.distances.numpy(), distances, rtol=1e-4, atol=1e-4)
        weights = oracle.weights(distances, PARAMS.sigma)
        places = np.searchsorted(ids, found)
        residuals = oracle.residuals(self.outputs[rows].numpy(), self.targets[rows].numpy(), softmax_temperature=1.3)
        expected = oracle.weighted_sum(places, weights, residuals)
        np.testing.assert_allclose(memory(self.queries).numpy(), expected, atol=tolerance)
        assert memory(self.queries).sum(dim=1).abs().max() < 1e-2
        labels = oracle.label_average(places, weights, self.targets[rows].numpy(), CLASSES)
        np.testing.assert_allclose(memory.knn(self.queries).numpy(), labels, atol=1e-4)
        assert torch.equal(memory.ids, self.ids[rows])
        assert len(memory) == len(rows)


@pytest.fixture
def data() -> Data:
    return Data()


def test_answers_as_the_oracle_in_any_order_of_arrival(index: object, values: tuple, data: Data) -> None:
    memory = LocalMemory(params=PARAMS, index=index, values=values[0])
    data.add_to(memory, torch.randperm(ROWS))
    memory.build()
    data.check(memory, values[1])


def test_survives_saving_and_loading(index: object, values: tuple, data: Data, tmp_path: Path) -> None:
    memory = LocalMemory(params=PARAMS, index=index, values=values[0])
    data.add_to(memory, torch.arange(ROWS))
    memory.provenance = {"fingerprint": "f"}
    memory.save(tmp_path / "memory")
    for mmap in (False, True):
        loaded = LocalMemory.load(tmp_path / "memory", mmap=mmap)
        data.check(loaded, values[1])
        assert torch.equal(loaded(data.queries), memory(data.queries))
        assert (loaded.params, loaded.provenance, loaded.tunable) == (PARAMS, {"fingerprint": "f"}, False)
        assert loaded.stats()["index"] == memory.stats()["index"]


def test_edited_memory_is_one_built_from_the_final_rows(
    index: object, values: tuple, data: Data, tmp_path: Path
) -> None:
    memory = LocalMemory(params=PARAMS, index=index, values=values[0])
    first, later = torch.randperm(ROWS).split([200, 100])
    data.add_to(memory, first)
    memory.build()
    data.add_to(memory, later)  # after build
    memory.search(data.queries, 3)
    gone = torch.randperm(ROWS)[:80]
    memory.remove(data.ids[gone[:50]])
    memory.remove(data.ids[gone[50:]])
    kept = torch.ones(ROWS, dtype=torch.bool).index_fill(0, gone, False).nonzero()[:, 0]
    data.check(memory, values[1], kept)

    relabeled, moved, reread = kept[::3].flip(0), kept[1::3], kept[::2]
    data.targets[relabeled] = torch.randint(CLASSES, (len(relabeled),))
    memory.update(data.ids[relabeled], targets=data.targets[relabeled])
    data.check(memory, values[1], kept)
    data.keys[moved] = torch.randn(len(moved), WIDTH)
    memory.update(data.ids[moved], embeddings=data.keys[moved])
    data.check(memory, values[1], kept)
    data.outputs[reread] = 2 * torch.randn(len(reread), CLASSES)
    memory.update(data.ids[reread], outputs=data.outputs[reread])
    data.check(memory, values[1], kept)

    memory.save(tmp_path / "memory")
    data.check(LocalMemory.load(tmp_path / "memory"), values[1], kept)
    again = LocalMemory.load(tmp_path / "memory", mmap=True)  # editing a mapped memory leaves its files alone
    data.add_to(again, gone[:20])
    again.remove(data.ids[kept[:10]])
    final = torch.cat([kept[10:], gone[:20]]).sort().values
    data.check(again, values[1], final)
    data.check(LocalMemory.load(tmp_path / "memory"), values[1], kept)


def test_more_neighbors_than_rows(index: object, values: tuple) -> None:
    data = Data(rows=8 if index != INDEXES["ivf"] else 200)
    memory = LocalMemory(params=PARAMS, index=index, values=values[0])
    data.add_to(memory, torch.arange(len(data.ids)))
    k = len(data.ids) + 3
    neighbors = memory.search(data.queries, k)
    assert (neighbors.ids[:, -3:] == -1).all()
    assert torch.isinf(neighbors.distances[:, -3:]).all()
    assert torch.isfinite(neighbors.distances[:, :-3]).all()
    assert torch.isfinite(memory(data.queries)).all()


def test_new_params_need_no_new_rows(index: object, values: tuple, data: Data) -> None:
    memory = LocalMemory(params=ResMemParams(k=2, sigma=5.0), index=index, values=values[0])
    data.add_to(memory, torch.arange(ROWS))
    memory(data.queries)
    memory.params = PARAMS
    data.check(memory, values[1])


def test_fetched_rows_are_the_rows(values: tuple, data: Data) -> None:
    memory = LocalMemory(params=PARAMS, values=values[0])
    data.add_to(memory, torch.arange(ROWS))
    chosen = torch.tensor([250, 3, 3, 99])
    rows = memory.fetch(data.ids[chosen])
    assert torch.equal(rows.targets, data.targets[chosen])
    np.testing.assert_allclose(
        torch.softmax(rows.outputs.float(), dim=1).numpy(),
        oracle.softmax(data.outputs[chosen].numpy()),
        atol=2e-3,
    )


@pytest.mark.parametrize("task", [Multilabel(), Regression()])
def test_other_tasks(task: Multilabel | Regression, index: object) -> None:
    data = Data()
    targets = torch.rand(ROWS, CLASSES).round() if isinstance(task, Multilabel) else torch.randn(ROWS, CLASSES)
    memory = LocalMemory(task, PARAMS, index=index)
    memory.add(data.keys, data.outputs, targets)
    expected = oracle.predict(
        data.keys.numpy(),
        data.outputs.numpy(),
        targets.numpy(),
        data.queries.numpy(),
        data.query_outputs.numpy(),
        task=task.name,
        k=PARAMS.k,
        sigma=PARAMS.sigma,
        softmax_temperature=PARAMS.softmax_temperature,
        strength=1.0,
    )
    found = memory.predictions(data.queries, data.query_outputs)
    np.testing.assert_allclose(found.resmem.numpy(), expected.resmem, atol=1e-4)
    np.testing.assert_allclose(found.knn.numpy(), expected.knn, atol=1e-4)


def test_autocast_of_the_trainer_does_not_reach_the_sums(values: tuple, data: Data) -> None:
    memory = LocalMemory(Multiclass(), PARAMS, values=values[0])
    data.add_to(memory, torch.arange(ROWS))
    expected = memory(data.queries)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(memory(data.queries), expected)


def test_removing_everything_leaves_an_empty_memory(data: Data) -> None:
    memory = LocalMemory(params=PARAMS)
    data.add_to(memory, torch.arange(ROWS))
    memory.remove(data.ids)
    assert len(memory) == 0
    data.add_to(memory, torch.arange(ROWS))
    data.check(memory, 1e-5)
