"""Which FAISS index is built, and what is refused."""

import logging
import warnings

import pytest
import torch

from lightning_resmem import InputError, LocalMemory, ResMemParams
from lightning_resmem.memory.search import faiss_index
from lightning_resmem.memory.search.faiss_index import FaissIndex, choose


@pytest.mark.parametrize("factory", ["exakt", "Exact", "HNSW 32", "IVF,Flat", "IVF4096,Flt", ""])
def test_what_faiss_does_not_understand_is_refused_where_it_is_written(factory: str) -> None:
    with pytest.raises(InputError, match=f"index='{factory}' is not understood: give .* or a FAISS factory string"):
        FaissIndex(factory)


@pytest.mark.parametrize(
    ("factory", "settings", "message"),
    [
        ("Flat", {"nprobe": 3}, "nprobe=3 does nothing for index='Flat'"),
        ("IVF4,Flat", {"ef_search": 3}, "ef_search=3 does nothing for index='IVF4,Flat'"),
        (5, {}, "factory=5"),
    ],
)
def test_settings_that_an_index_does_not_have(factory: str, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FaissIndex(factory, **settings)


def test_settings_that_an_index_of_this_width_does_not_have() -> None:
    with pytest.raises(InputError, match="nprobe=3 does nothing for index='PQ3'"):
        LocalMemory(index=FaissIndex("PQ3", nprobe=3)).rehearse(None, 6)


@pytest.mark.parametrize(
    "factory", ["Flat", "PQ3", "PQ48", "OPQ32,IVF4096,PQ32", "IVF65536_HNSW32,Flat", "IMI2x8,Flat"]
)
def test_what_fits_some_width_is_let_through(factory: str) -> None:
    assert FaissIndex(factory).factory == factory


@pytest.mark.parametrize(
    ("factory", "rows", "message"),
    [
        ("IVF256,Flat", 255, "'IVF256,Flat' has 256 lists, and there are only 255 rows"),
        ("PCA2,IVF256_HNSW8,SQ8", 255, "has 256 lists"),
        ("IVF256,Flat", 256, None),
        ("IVF256,Flat", None, None),
        ("IMI2x5,Flat", 200, None),  # 1,024 lists of two quantizers with 32 centroids each
        ("HNSW8", 1, None),
        ("PQ3", None, "width 4"),
    ],
)
def test_a_rehearsal_refuses_what_building_would(factory: str, rows: int | None, message: str | None) -> None:
    memory = LocalMemory(index=factory)
    if message is None:
        memory.rehearse(rows, 4)
    else:
        with pytest.raises(InputError, match=message):
            memory.rehearse(rows, 4)
    if rows is not None:
        memory.add(torch.randn(rows, 4), torch.randn(rows, 2), torch.zeros(rows).long())
        with pytest.raises(InputError) if message else warnings.catch_warnings(action="ignore"):
            memory.build()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nprobe": 0}, "nprobe=0"),
        ({"ef_search": -1}, "ef_search=-1"),
        ({"rerank": -1}, "rerank=-1"),
        ({"min_recall": 1.5}, "min_recall=1.5"),
    ],
)
def test_numbers_out_of_range(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FaissIndex("Flat", **arguments)


def test_gpu_limits_are_told_early() -> None:
    with pytest.raises(InputError, match="k=4000"):
        faiss_index.check_gpu_k(torch.device("cuda"), 4000, FaissIndex("Flat"))
    with pytest.raises(InputError, match=r"lightning-resmem\[gpu\]"):
        faiss_index.check_device(object(), torch.device("cuda"), FaissIndex("Flat"))
    with pytest.raises(InputError, match="does not run on mps"):
        faiss_index.check_device(object(), torch.device("mps"), FaissIndex("Flat"))


@pytest.mark.parametrize(
    ("rows", "width", "device", "free", "installed", "factory"),
    [
        (45_000, 64, "cpu", 2**40, True, None),
        (2**23, 128, "cpu", 2**40, True, None),  # the last size that is searched exactly
        (2**23 + 1, 128, "cpu", 2**40, True, "IVF16384,Flat"),
        (2**23 + 1, 128, "cpu", 2**32, True, "IVF16384,SQ8"),
        (2**23 + 1, 128, "cpu", 2**40, False, None),
        (2**26, 512, "cuda", 2**40, True, None),
    ],
)
def test_auto_rule(rows: int, width: int, device: str, free: int, installed: bool, factory: str | None) -> None:
    config, reason = choose(rows, width, torch.device(device), free, installed)
    assert (config and config.factory) == factory
    if factory:
        assert config.min_recall == 0.95
        assert (config.rerank > 0) == factory.endswith("SQ8")
        assert factory in reason
    else:
        assert reason.startswith("exact")


def test_auto_builds_what_the_rule_says_and_logs_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(faiss_index, "_EXACT_WORK", 1000)
    memory = LocalMemory(params=ResMemParams())
    memory.add(torch.randn(4000, 8), torch.randn(4000, 2), torch.zeros(4000).long())
    with caplog.at_level(logging.INFO, "lightning_resmem"):
        memory.build()
    assert memory.stats()["index"] == "IVF256,Flat"
    assert memory.stats()["recall"] >= 0.95
    assert "chose IVF256,Flat: 4000 x 8 keys" in caplog.text
