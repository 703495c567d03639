"""FAISS behind our interface: what it finds, and what it cannot do."""

import logging
import os
import warnings

import numpy as np
import pytest
import torch

from lightning_resmem import InputError, LocalMemory, ResMemError, ResMemParams, ResMemWarning
from lightning_resmem.memory.search import faiss_index
from lightning_resmem.memory.search.exact import ExactIndex
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.memory.search.faiss_search import FaissSearch
from tests import oracle


def _recall(search: FaissSearch, queries: torch.Tensor, k: int = 10) -> float:
    exact = ExactIndex(search.keys).search(queries, k)[1]
    found = search.search(queries, k)[1]
    return float((found[:, :, None] == exact[:, None]).any(dim=2).float().mean())


def test_min_recall_is_reached_by_reading_more_lists(caplog: pytest.LogCaptureFixture) -> None:
    keys = torch.randn(5000, 16)
    low = FaissSearch(keys, FaissIndex("IVF64,Flat"))
    with caplog.at_level(logging.INFO, "lightning_resmem"):
        high = FaissSearch(keys, FaissIndex("IVF64,Flat", min_recall=0.95))
    assert low.settings() == {"nprobe": 1}
    assert high.settings()["nprobe"] > 4
    assert low.recall < 0.95 <= high.recall
    assert abs(_recall(high, keys[:500]) - high.recall) < 0.03
    assert f"with nprobe {high.settings()['nprobe']}" in caplog.text
    assert "recall@10" in caplog.text


def test_min_recall_is_reached_by_following_more_candidates() -> None:
    keys = torch.randn(3000, 32)
    search = FaissSearch(keys, FaissIndex("HNSW4", ef_search=4, min_recall=0.9))
    assert search.settings()["ef_search"] > 4
    assert search.recall >= 0.9


def test_unreachable_recall_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lightning_resmem"):
        search = FaissSearch(torch.randn(3000, 16), FaissIndex("IVF4,PQ2x4", min_recall=0.99))
    assert search.settings() == {"nprobe": 4}
    assert "below min_recall=0.99" in caplog.text
    assert "rerank" in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("IVF64,Flat", r'with nprobe=1: give index=FaissIndex\("IVF64,Flat", min_recall=0.95\), or a larger nprobe='),
        (FaissIndex("HNSW4", ef_search=4), r"with ef_search=4: .*min_recall=0.95\), or a larger ef_search="),
        ("PQ4x4", r'nearest rows: give index=FaissIndex\("PQ4x4", rerank=4\)\.'),
    ],
)
def test_low_recall_that_nobody_asked_about_warns(config: str | FaissIndex, message: str) -> None:
    config = FaissIndex(config) if isinstance(config, str) else config
    with pytest.warns(ResMemWarning, match=message):
        search = FaissSearch(torch.randn(5000, 16), config)
    assert search.recall < 0.9


def test_high_recall_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResMemWarning)
        FaissSearch(torch.randn(5000, 16), FaissIndex("IVF64,Flat", nprobe=64))


def test_reranking_measures_true_distances_and_finds_more() -> None:
    keys, queries = torch.randn(3000, 16), torch.randn(50, 16)
    coarse = FaissSearch(keys, FaissIndex("PQ4x4"))
    fine = FaissSearch(keys, FaissIndex("PQ4x4", rerank=20))
    assert _recall(fine, queries) > _recall(coarse, queries) + 0.1
    distances, positions = fine.search(queries, 10)
    true = (keys[positions] - queries[:, None]).norm(dim=2)
    torch.testing.assert_close(distances, true)
    assert (distances.diff(dim=1) >= 0).all()


def test_pretransformed_index_takes_nprobe() -> None:
    assert FaissSearch(torch.randn(2000, 16), FaissIndex("PCA8,IVF16,Flat", nprobe=5)).settings() == {"nprobe": 5}


def test_places_that_few_lists_cannot_fill_are_missing() -> None:
    keys = torch.randn(1000, 4)
    distances, positions = FaissSearch(keys, FaissIndex("IVF20,Flat", nprobe=1)).search(keys[:5], 500)
    assert ((positions < 0) == torch.isinf(distances)).all()
    assert (positions < 0).any()
    memory = LocalMemory(params=ResMemParams(k=500), index=FaissIndex("IVF20,Flat", nprobe=1))
    memory.add(keys, torch.randn(1000, 3), torch.randint(3, (1000,)))
    assert torch.isfinite(memory(keys[:5])).all()
    assert (memory.search(keys[:5], 500).ids[positions < 0] == -1).all()


def test_same_index_from_the_same_rows() -> None:
    keys, queries = torch.randn(3000, 8), torch.randn(20, 8)
    first, second = (FaissSearch(keys, FaissIndex("IVF32,PQ4x4")).search(queries, 5) for _ in range(2))
    assert torch.equal(first[1], second[1])


def test_threads_are_those_of_torch() -> None:
    import faiss

    search = FaissSearch(torch.randn(100, 4), FaissIndex("Flat"))
    faiss.omp_set_num_threads(7)
    search.search(torch.randn(2, 4), 1)
    assert faiss.omp_get_max_threads() == torch.get_num_threads()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("IVF5000,Flat", "cannot be trained on 200 keys"),
        ("PQ3", "'PQ3' cannot be built for keys of width 4"),
    ],
)
def test_what_faiss_cannot_do_names_the_index(config: str | FaissIndex, message: str) -> None:
    memory = LocalMemory(index=config)
    memory.add(torch.randn(200, 4), torch.randn(200, 2), torch.zeros(200).long())
    with pytest.raises(InputError, match=message):
        memory.build()


def test_forked_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    search = FaissSearch(torch.randn(10, 4), FaissIndex("Flat"))
    monkeypatch.setattr(os, "getpid", lambda: 0)
    with pytest.raises(ResMemError, match="spawn"):
        search.search(torch.randn(1, 4), 1)


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"lightning-resmem\[cpu\]"):
        FaissSearch(torch.randn(10, 4), FaissIndex("Flat"))
    with pytest.raises(InputError, match=r"lightning-resmem\[cpu\]"):
        LocalMemory(index="Flat").rehearse(None, 4)


@pytest.mark.parametrize(
    "factory",
    ["L2norm,Flat", "PCA8,Flat", "PCAW8,Flat", "OPQ4,PQ4x4", "RR8,Flat", "SQ8", "PQ4x4", "LSH", "HNSW16_SQ8",
     "ITQ16,LSH", "IVF8,SQ4", "PQ4x4,RFlat", "Flat", "IVF8,Flat", "HNSW16"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::lightning_resmem.ResMemWarning")
def test_distances_are_those_of_the_keys_whatever_the_index_compares(factory: str) -> None:
    keys, queries = torch.randn(3000, 16) * 5, torch.randn(20, 16) * 5
    distances, positions = FaissSearch(keys, FaissIndex(factory)).search(queries, 10)
    true = (keys[positions] - queries[:, None]).norm(dim=2)
    torch.testing.assert_close(distances, true)
    assert (distances.diff(dim=1) >= 0).all()


def test_recall_is_that_in_the_space_of_the_keys() -> None:
    directions = torch.nn.functional.normalize(torch.randn(3000, 16), dim=1)
    with pytest.warns(ResMemWarning, match="finds a share of only"):
        apart = FaissSearch(directions * torch.rand(3000, 1) * 5, FaissIndex("L2norm,Flat"))
    assert apart.recall < 0.9
    assert abs(_recall(apart, apart.keys[:500]) - apart.recall) < 0.1
    assert FaissSearch(directions * 5, FaissIndex("L2norm,Flat")).recall > 0.99  # of one norm: the same order


@pytest.mark.parametrize("magnitude", [1e-25, 1e25])
@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat", "HNSW8", "auto"])
def test_keys_that_faiss_cannot_square_are_compared_exactly_and_told_of(
    index: str, magnitude: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss_index, "_EXACT_WORK", 1000)
    keys, queries = torch.randn(500, 8) * magnitude, torch.randn(20, 8) * magnitude
    memory = LocalMemory(params=ResMemParams(k=5, sigma=magnitude), index=index)
    memory.add(keys, torch.randn(500, 2), torch.zeros(500).long())
    with pytest.warns(ResMemWarning, match="cannot compare keys whose largest number is"):
        memory.build()
    assert memory.stats()["index"] == "exact"
    distances, ids = oracle.neighbors(keys.double().numpy(), None, queries.double().numpy(), 5)
    found = memory.search(queries, 5)
    np.testing.assert_array_equal(found.ids.numpy(), ids)
    np.testing.assert_allclose(found.distances.numpy(), distances, rtol=1e-5)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8", "SQ8"])
@pytest.mark.parametrize("far", [1e20, 3e38])
@pytest.mark.filterwarnings("ignore::lightning_resmem.ResMemWarning")
def test_a_query_that_faiss_cannot_square_has_neighbours(factory: str, far: float) -> None:
    keys, queries = torch.randn(500, 8), torch.randn(5, 8)
    queries[2] = far
    search = FaissSearch(keys, FaissIndex(factory))
    distances, positions = search.search(queries, 5)
    expected, _ = oracle.neighbors(keys.double().numpy(), None, queries[2:3].double().numpy(), 5)
    most = float(np.finfo(np.float32).max)
    np.testing.assert_allclose(distances[2:3].numpy(), np.minimum(expected, most), rtol=1e-5)
    assert len(set(positions[2].tolist())) == 5
    others = torch.tensor([0, 1, 3, 4])
    alone = search.search(queries[others], 5)
    assert torch.equal(positions[others], alone[1])
    torch.testing.assert_close(distances[others], alone[0])
