"""Columns of a few classes and the rest: what a sweep measures on them is what it measures on all classes."""

import numpy as np
import pytest
import torch

from lightning_resmem import LocalMemory, ResMemParams, SparseConfig
from lightning_resmem.memory.answers import Neighbors
from lightning_resmem.tuning import sweep, tables
from lightning_resmem.tuning.rows import Rows
from lightning_resmem.tuning.sweep import Sweep
from tests import oracle
from tests.tuning.validation import scores

CLASSES, TOP_M, KS = 60, 3, (2, 6)
SETTINGS = [
    ResMemParams(k, sigma, temperature, strength)
    for temperature in (0.5, 1.0, 3.0)
    for sigma in (0.3, 2.0)
    for k in KS
    for strength in (0.5, 1.0, 4.0)  # the last one turns the sign of all that was cut
]


class SomeMissing(LocalMemory):
    """As an approximate index does, it finds nothing for some places."""

    def search(self, queries: torch.Tensor, k: int) -> Neighbors:
        distances, ids = super().search(queries, k)
        return Neighbors(distances.masked_fill(ids % 5 == 0, torch.inf), ids.masked_fill(ids % 5 == 0, -1))


def part(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, 4, generator=generator)
    outputs = 2 * torch.randn(count, CLASSES, generator=generator)
    return embeddings, outputs, torch.randint(CLASSES, (count,), generator=generator)


def swept(kind: type[LocalMemory], scale: float = 1.0) -> Sweep:
    memory = kind(params=ResMemParams(), values=SparseConfig(TOP_M))
    memory.add(*part(50, 1))
    memory.build()
    embeddings, own, targets = part(40, 2)
    return Sweep(memory, Rows(embeddings, scale * own, targets, None), KS, lambda rows: rows)


@pytest.mark.parametrize("entries", [1, 2**22])  # row by row, and all at once
@pytest.mark.parametrize("scale", [1.0, 0.1])  # of a base that does not know, the rest has most of the mass
@pytest.mark.parametrize("kind", [LocalMemory, SomeMissing])
def test_measures_what_all_classes_measure(
    kind: type[LocalMemory], scale: float, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_ENTRIES", entries)
    narrow = swept(kind, scale)
    monkeypatch.setattr(sweep, "narrow_table", tables.Table)
    whole = swept(kind, scale)
    for found, wanted in zip(narrow.measure(SETTINGS), whole.measure(SETTINGS), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert len(narrow.measure(SETTINGS[:1]).score) == 1
    columns = narrow._narrow.base(1.0)
    assert columns.shape[1] <= KS[-1] * (TOP_M + 1) + 1 + 8 + 1 < CLASSES
    torch.testing.assert_close(columns.sum(dim=1), torch.ones(40))


def test_measures_what_the_oracle_predicts() -> None:
    (keys, outputs, targets), (embeddings, own, wanted) = part(50, 1), part(40, 2)
    measured = swept(LocalMemory).measure(SETTINGS)
    for index, setting in enumerate(SETTINGS):
        numbers = {name: getattr(setting, name) for name in ("k", "sigma", "softmax_temperature", "strength")}
        combined = oracle.predict_with_cut_outputs(keys, outputs, targets, embeddings, own, top_m=TOP_M, **numbers)
        base = oracle.softmax(own, setting.softmax_temperature)
        right, losses = scores(combined, base, wanted, "multiclass")
        assert float(measured.score[index]) == pytest.approx(np.mean(right), abs=1e-6)
        assert float(measured.loss[index]) == pytest.approx(np.mean(losses), abs=2e-3)
