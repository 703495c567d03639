"""How much a factory string may ask for."""

import pytest

from lightning_resmem import FaissIndex, InputError


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Flat" * 10_000, "has 40000 characters, more than 200"),
        ("L2norm," * 5000 + "Flat", "has 35004 characters"),
        ("HNSW999999", "HNSW999999 is more than FAISS can be given here, 1024 at most"),
        ("IVF4096_HNSW99999,Flat", "HNSW99999 is more"),
        ("NSG99999", "NSG99999 is more"),
        ("IVF99999999,Flat", "99999999 is more than FAISS can be given here, 4194304 at most"),
        ("IVF" + "9" * 100, "is more than"),
        ("PQ8x24", "x24 is more than FAISS can be given here, 16 at most"),
        ("IMI2x16,Flat", "IMI2x16 is more than FAISS can be given here, 12 at most"),
        ("PCA99999999,Flat", "99999999 is more"),
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
