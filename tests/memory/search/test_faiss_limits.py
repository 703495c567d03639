"""How much a factory string may ask for, before FAISS sees it."""

import pytest

from lightning_resmem import FaissIndex, InputError


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Flat" * 10_000, "has 40000 characters, at most 200 are read"),
        ("L2norm," * 5000 + "Flat", "has 35004 characters"),
        ("HNSW999999", "the last number of 'HNSW999999' has to lie between 2 and 1024"),
        ("IVF4096_HNSW99999,Flat", "'HNSW99999' has to lie"),
        ("NSG99999", "'NSG99999' has to lie"),
        ("IVF99999999,Flat", "'99999999' has to lie"),
        ("IVF" + "9" * 100, "has to lie between"),
        ("PQ8x24", "'PQ8x24' has to lie between 1 and 16"),
        ("IMI2x16,Flat", "'IMI2x16' has to lie between 1 and 12"),
        ("PCA99999999,Flat", "'PCA99999999' has to lie"),
    ],
)
def test_more_than_faiss_can_do_is_refused_before_it_tries(factory: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FaissIndex(factory)


@pytest.mark.parametrize(
    "factory",
    [
        "Flat",
        "HNSW32",
        "HNSW1024",
        "IVF4096,Flat",
        "OPQ32,IVF4096,PQ32",
        "IVF1024_HNSW32,PQ16x4fs",
        "PQ8x16",
        "IMI2x8,PQ8",
    ],
)
def test_what_people_use_is_not(factory: str) -> None:
    assert FaissIndex(factory).factory == factory
