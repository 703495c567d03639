"""The fast path is the plain one: ties, missing neighbours, any number of strengths and any block size."""

import pytest
import torch

from lightning_resmem.tasks import Multiclass
from lightning_resmem.tuning import multiclass
from lightning_resmem.tuning.multiclass import multiclass_sweep


@pytest.mark.parametrize("entries", [1, 50, 2**16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_and_losses_are_those_of_the_task(dtype, entries, monkeypatch):
    monkeypatch.setattr(multiclass, "_CPU_ENTRIES", entries)
    generator = torch.Generator().manual_seed(0)
    base = torch.softmax(torch.randn(40, 5, generator=generator, dtype=dtype), dim=1)
    residual = torch.randn(40, 5, generator=generator, dtype=dtype)
    targets = torch.randint(0, 5, (40,), generator=generator)
    strengths = [0.0, 0.25, 1.0, 3.0]
    right, losses = multiclass_sweep(base, residual, strengths, targets)
    for row, strength in enumerate(strengths):
        combined = base + strength * residual
        assert torch.equal(right[row], combined.argmax(1) == targets)
        torch.testing.assert_close(losses[row], Multiclass().loss(combined, base, targets))


def test_of_equal_entries_the_first_is_the_prediction():
    base, residual = (
        torch.tensor([[0.5, 0.5, 0.0]] * 3),
        torch.tensor([[0.25, -0.25, 0.0], [-0.25, 0.25, 0.0], [0.0] * 3]),
    )
    for label in range(3):
        targets = torch.full((3,), label)
        right = multiclass_sweep(base, residual, [0.0, 1.0], targets)[0]
        for row, strength in enumerate((0.0, 1.0)):
            assert torch.equal(right[row], (base + strength * residual).argmax(1) == targets)
