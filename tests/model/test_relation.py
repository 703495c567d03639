"""How numbers follow from others: along a line, along a curve, or not at all."""

import pytest
import torch

from lightning_resmem.model.relation import relation


def noisy(y):
    return y + 0.05 * torch.randn_like(y)


def test_lines():
    y = torch.randn(8, 2)
    slope, shift, is_curve = relation(y, y * torch.tensor([2.0, -0.1]) + torch.tensor([0.0, 7.0]))
    torch.testing.assert_close(slope.float(), torch.tensor([2.0, -0.1]))
    torch.testing.assert_close(shift.float(), torch.tensor([0.0, 7.0]), atol=1e-6, rtol=0)
    assert not is_curve.any()
    assert relation(y, torch.ones_like(y)) is None


@pytest.mark.parametrize("curve", [torch.log1p, torch.sqrt, torch.square, torch.exp, lambda y: 1 / (1 + y)])
@pytest.mark.parametrize("rows", [16, 200])
def test_curves(curve, rows):
    torch.manual_seed(0)
    y = torch.rand(rows, 2) * 9
    assert relation(y, torch.stack([y[:, 0], curve(y[:, 1])], dim=1)).is_curve.tolist() == [False, True]
    counts = torch.arange(rows)[:, None] % 4  # few numbers, often
    assert relation(counts, curve(counts.float())).is_curve.all()


@pytest.mark.parametrize("other", [noisy, lambda y: 0.9 * y + 0.1 * y.roll(1), torch.relu, torch.abs, torch.randn_like])
@pytest.mark.parametrize("rows", [6, 16, 200])
def test_others(other, rows):
    torch.manual_seed(0)
    for _ in range(20):
        y = torch.randn(rows, 1)
        assert relation(y, other(y)) is None
