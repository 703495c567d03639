"""Which FAISS index is built, and what is refused."""

import json
import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch

from lightning_resmem import InputError, LocalMemory, ResMemParams, StorageError
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
        ("PQ2", 255, "'PQ2' cannot be trained on 255 keys: a codebook has 256 entries"),
        ("IVF4,PQ2", 200, "256 entries"),
        ("OPQ2,PQ2x3", 200, "256 entries"),  # OPQ trains codebooks of its own
        ("HNSW8_PQ2", 200, "256 entries"),
        ("PQ2x4fs", 15, "16 entries"),
        ("PRQ2x1x3", 7, "8 entries"),
        ("RQ2x3", 8, None),
        ("PQ2x3", 8, None),
        ("NSG8,Flat", 114, "takes more than 114 rows"),
        ("LSQ2x3", 7, None),
        ("PQ2x11", 2047, "2048 entries"),
        ("PCA5,Flat", 1100, "reduces keys to width 5, and there are 1100 rows of width 4"),
        ("PCAWR5,IVF4,Flat", None, "and keys have width 4"),
        ("PCA3,Flat", 2, "reduces keys to width 3, and there are 2 rows"),
        ("PCA4,Flat", 4, None),
        ("RR5,Flat", 10, None),
        ("IDMap,Flat", 10, "leave out IDMap"),
        ("PCA4,IDMap2,Flat", 10, "leave out IDMap"),
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
        ({"rerank": None}, "rerank=None"),
        ({"nprobe": 2**62}, "nprobe=4611686018427387904.*below"),
        ({"ef_search": 1.5}, "ef_search=1.5"),
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


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Flat" * 10_000, r"factory='FlatFlatFlatFlatFlat'\.\.\. has 40000 characters"),
        ("HNSW999999", "'HNSW999999' has to lie between 2 and 1024"),
        ("HNSW0", "between 2 and 1024"),
        ("HNSW1,Flat", "between 2 and 1024"),
        ("IVF16_HNSW0,Flat", "'HNSW0' has to lie"),
        ("IVF16(HNSW000000),Flat", "'HNSW000000' has to lie"),
        ("NSG0", "'NSG0' has to lie between 8 and 1024"),
        ("NSG2,Flat", "'NSG2' has to lie"),
        ("ZnLattice2x3_4", "ends the process"),
        ("IVF0,Flat", "between 1 and 16777216"),
        ("IVF99999999999999999999,Flat", "between 1 and 16777216"),
        ("PQ4x40", "'PQ4x40' has to lie between 1 and 16"),
        ("IMI2x30,Flat", "'IMI2x30' has to lie"),
        ("PLSQ2x4x30", "'LSQ2x4x30' has to lie"),
        ("PCA99999999,Flat", "'PCA99999999' has to lie between 1 and 16384"),
        ("OPQ4_99999,PQ4", "'OPQ4_99999' has to lie"),
        ("RR65536,Flat", "'RR65536' has to lie"),
        ("PQ" + "9" * 190, "has to lie"),
    ],
)
def test_descriptions_that_would_end_the_process_never_reach_faiss(
    factory: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)  # whoever asked it would get another error
    with pytest.raises(InputError, match=message):
        FaissIndex(factory)


@pytest.mark.parametrize("factory", ["HNSW0", "HNSW999999", "Flat" * 10_000])
def test_a_manifest_with_such_a_description_is_damaged(factory: str, tmp_path: Path) -> None:
    memory = LocalMemory(params=ResMemParams(), index="Flat")
    memory.add(torch.randn(20, 4), torch.randn(20, 2), torch.zeros(20).long())
    manifest = memory.save(tmp_path / "memory") / "manifest.json"
    written = json.loads(manifest.read_text())
    written["index"]["factory"] = factory
    manifest.write_text(json.dumps(written))
    with pytest.raises(StorageError, match="damaged"):
        LocalMemory.load(tmp_path / "memory")


@pytest.mark.parametrize("error", ["RuntimeError", "OSError", "ImportError", "AttributeError"])
def test_a_faiss_that_does_not_import_is_told_of_and_auto_does_without(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "faiss").mkdir()
    (tmp_path / "faiss" / "__init__.py").write_text(f"raise {error}('libcudart.so.12: cannot open')")
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=rf"does not work here \({error}: libcudart.so.12: cannot open\)\. .*CUDA 12"):
        FaissIndex("HNSW32")
    monkeypatch.setattr(faiss_index, "_EXACT_WORK", 1000)
    memory = LocalMemory(params=ResMemParams())
    memory.add(torch.randn(500, 8), torch.randn(500, 2), torch.zeros(500).long())
    with caplog.at_level(logging.WARNING, "lightning_resmem"):
        memory.build()
    assert memory.stats()["index"] == "exact"
    assert "libcudart.so.12: cannot open" in caplog.text
