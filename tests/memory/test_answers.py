"""What a memory answers with: which rows it samples, whatever their number, magnitude or the default dtype."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lightning_resmem import GridTuner, LocalMemory, Predictions, Ranking, ResMemParams, SparseConfig
from lightning_resmem.memory import answers
from lightning_resmem.memory.answers import Neighbors, evenly_spaced, typical_distance
from tests import oracle
from tests.made import Made


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    try:
        yield request.param
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_answer_is_shown_with_its_numbers_where_these_are_few() -> None:
    few = Neighbors(torch.tensor([[0.5, 1.0]]), torch.tensor([[3, 4]]))
    assert repr(few) == "Neighbors(distances=tensor([[0.5000, 1.0000]]), ids=tensor([[3, 4]]))"
    many = Predictions(*torch.zeros(3, 50, 7))
    assert repr(many) == "Predictions(base=Tensor(50, 7), knn=Tensor(50, 7), resmem=Tensor(50, 7))"
    assert repr(Ranking(torch.arange(99), torch.zeros(99))) == "Ranking(ids=Tensor(99,), scores=Tensor(99,))"


@pytest.mark.parametrize("count", [1, 2, 299, 512, 513, 2**24 + 1, 2**25, 2**40 + 3])
def test_evenly_spaced_rows_are_there_from_the_first_to_the_last(count: int) -> None:
    ids = torch.arange(1).expand(count) if count > 1000 else torch.arange(count)
    assert len(evenly_spaced(ids)) == min(count, 512)
    if count <= 1000:
        assert evenly_spaced(ids).tolist() == np.linspace(0, count - 1, min(count, 512)).astype(int).tolist()
        assert evenly_spaced(ids, 2).tolist() == sorted({0, count - 1})


def test_rows_beyond_the_whole_numbers_of_float32() -> None:
    rows = 2**24 + 3
    memory = LocalMemory(index="exact")
    memory.add(torch.zeros(rows, 1, dtype=torch.bfloat16), torch.zeros(rows, 1), torch.zeros(rows, dtype=torch.int64))
    sample = evenly_spaced(memory.ids)
    assert sample[[0, -1]].tolist() == [0, rows - 1]
    assert (sample.diff() > 0).all()


def test_the_default_dtype_changes_no_answer(default_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(300, 4, generator=generator, dtype=torch.float32)
    logits = torch.randn(300, 3, generator=generator, dtype=torch.float32)
    labels = torch.randint(3, (300,), generator=generator)

    def answers() -> tuple[ResMemParams, torch.Tensor, ResMemParams, float]:
        memory = LocalMemory()
        memory.add(keys[:280], logits[:280], labels[:280])
        params = memory.params
        predicted = memory.predict(keys[280:], logits[280:])
        tuned = GridTuner().tune(memory, keys[280:], logits[280:], labels[280:])
        return params, predicted, tuned.params, tuned.score

    found = answers()
    torch.set_default_dtype(torch.float32)
    expected = answers()
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])
    assert found[2:] == expected[2:]
    torch.set_default_dtype(default_dtype)


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-25, 1.0, 1e20, 1e25, 3e37])
@pytest.mark.parametrize("key_dtype", [torch.float32, torch.bfloat16])
def test_a_memory_of_any_magnitude_is_that_of_the_oracle(magnitude: float, key_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(n, 4, generator=generator).mul(magnitude).to(key_dtype).float() for n in (100, 20))
    labels = torch.randint(3, (100,), generator=generator)
    memory = LocalMemory(params=ResMemParams(k=7, sigma=magnitude / 2), key_dtype=key_dtype)
    memory.add(keys, torch.zeros(100, 3), labels)
    distances, ids = oracle.neighbors(keys.double().numpy(), None, queries.double().numpy(), 7)
    weights = oracle.weights(distances, magnitude / 2)
    expected = np.zeros((20, 3))
    for row in range(20):
        np.add.at(expected[row], labels[ids[row]].numpy(), weights[row])
    np.testing.assert_array_equal(memory.search(queries, 7).ids.numpy(), ids)
    np.testing.assert_allclose(memory.knn(queries).numpy(), expected, atol=2e-6)
    scale = memory.distance_scale()
    assert 0.1 * magnitude < scale < 10 * magnitude
    memory.params = ResMemParams(k=7, sigma=1e-30 * magnitude)  # the nearest alone
    assert torch.equal(memory.knn(queries).argmax(dim=1), labels[ids[:, 0]])


def test_the_mean_of_the_largest_distances_is_finite() -> None:
    most = torch.finfo(torch.float32).max
    neighbors = Neighbors(torch.full((2, 11), most), torch.arange(2, 13).expand(2, 11))
    assert typical_distance(torch.arange(2), neighbors) == pytest.approx(most)


@pytest.mark.parametrize("values", ["dense", SparseConfig(4)])
def test_predictions_are_combined_in_blocks_of_rows(values: object, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, classes, block = 60, 200, 8
    memory = LocalMemory(params=ResMemParams(k=3, sigma=0.5), values=values)
    memory.add(torch.randn(5, 3), torch.randn(5, classes), torch.randint(classes, (5,)))
    embeddings, outputs = torch.randn(queries, 3), torch.randn(queries, classes)
    whole = memory.predictions(embeddings, outputs).resmem
    monkeypatch.setattr(answers, "_BLOCK_ENTRIES", block * classes)
    with Made() as made:
        found = memory.predict(embeddings, outputs)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-7)
    assert made.elements[-1] == queries * classes  # the answer
    assert made.elements[-2] <= block * classes
