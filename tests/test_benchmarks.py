"""What the benchmarks share."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_resmem.memory.search.exact import ExactIndex


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["benchmark.py"])
    import _harness

    return _harness


def test_queries_are_drawn_from_all_classes(harness, monkeypatch, tmp_path):
    classes = np.repeat(np.arange(10), 200)  # sorted, as in the files that are made of the test images
    rows = np.tile(classes[:, None], 64).astype(np.float16)
    np.savez(tmp_path / "features.npz", train_embeddings=rows, test_embeddings=rows)
    monkeypatch.setenv("RESMEM_FEATURES", str(tmp_path / "features.npz"))
    _, queries, _ = harness.features()
    assert queries.shape == (1000, 64)
    assert torch.bincount(queries[:, 0].long(), minlength=10).min() > 60
    assert torch.equal(queries, harness.features()[1])


def test_search_without_numba(harness):
    keys = torch.randn(300, 8)
    with harness.without_numba():
        distances, ids = ExactIndex(keys).search(keys[:5], 1)
    assert ids[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert distances.max() == 0


def test_a_line_for_every_data_set(harness, monkeypatch, tmp_path):
    import real_data

    monkeypatch.setattr(harness, "TABLES", tmp_path)
    monkeypatch.setattr(real_data, "STEPS", 60)
    monkeypatch.setattr(real_data, "ALTERNATIVES", ("wine",))
    real_data.main(["--only", "wine", "diabetes", "--seeds", "2"])
    _, _, wine, diabetes = (tmp_path / "real_data.md").read_text().splitlines()
    for line, name, least, most in ((wine, "wine", 85, 100), (diabetes, "diabetes", 40, 90)):
        base, knn, resmem = (float(cell.split(" ± ")[0]) for cell in line.split(" | ")[2:5])
        assert line.startswith(f"| {name} |")
        assert least < min(base, knn, resmem) <= max(base, knn, resmem) <= most
    others = (tmp_path / "real_data_others.md").read_text()
    for kind in ("kNN-LM", "stacking", "temperature scaling", "4 times longer", "4 times wider"):
        assert f"| wine | {kind} |" in others
