"""Keys that an exact search may fail on, drawn on any device, and what it has to find among them."""

from collections.abc import Callable

import torch
from torch import Tensor

_MOST = torch.finfo(torch.float32).max


class Draw:
    """Numbers at random, on a device: the same ones for the same seed."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def normal(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=self._generator(seed), device=self.device)

    def uniform(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.rand(*shape, generator=self._generator(seed), device=self.device)

    def count(self, rows: int) -> Tensor:
        return torch.arange(rows, device=self.device)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


def _with_outlier(keys: Tensor) -> Tensor:
    keys[7:8] *= 1e6
    return keys


DATA: dict[str, Callable[[Draw, int, int], Tensor]] = {
    "normal": lambda draw, n, d: draw.normal(n, d),
    "features after a ReLU": lambda draw, n, d: draw.normal(n, d).relu() * 3,
    "far from zero": lambda draw, n, d: draw.normal(n, d) + 100,
    "one outlier": lambda draw, n, d: _with_outlier(draw.normal(n, d)),
    "very different norms": lambda draw, n, d: draw.normal(n, d) * draw.normal(n, 1, seed=3).exp().square(),
    "clusters": lambda draw, n, d: draw.normal(8, d, seed=4)[draw.count(n) % 8] + 0.01 * draw.normal(n, d),
    "one direction": lambda draw, n, d: draw.normal(n, 1).expand(n, d).contiguous(),
    "on a grid": lambda draw, n, d: (draw.normal(n, d) * 2).round(),
    "every key twice": lambda draw, n, d: draw.normal(-(-n // 2), d).repeat(2, 1)[:n],
    "small differences": lambda draw, n, d: draw.normal(1, d).sign() * 30 + 0.02 * draw.normal(n, d, seed=6),
    "constant": lambda draw, n, d: 0.3 + 0 * draw.normal(n, d),
    "zero": lambda draw, n, d: 0 * draw.normal(n, d),
    "1e25": lambda draw, n, d: draw.normal(n, d) * 1e25,
    "1e38": lambda draw, n, d: draw.uniform(n, d) * 3e38,
    "1e-20": lambda draw, n, d: draw.normal(n, d) * 1e-20,
    "1e-30": lambda draw, n, d: draw.normal(n, d) * 1e-30,
    "1e-38": lambda draw, n, d: draw.normal(n, d) * 1e-38,
    "1e-30 to 1e30": lambda draw, n, d: draw.normal(n, d) * 10 ** (draw.uniform(n, 1, seed=5) * 60 - 30),
}


def check(keys: Tensor, queries: Tensor, found: tuple[Tensor, Tensor], k: int) -> None:
    """Each distance is float64's to float tolerance, and that of the row that was found, once; equal ones in order."""
    distances, positions = found
    away = torch.cdist(queries.double(), keys.double(), compute_mode="donot_use_mm_for_euclid_dist").clamp_max(_MOST)
    expected = away.topk(k, largest=False).values
    torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=1e-44)
    torch.testing.assert_close(away.gather(1, positions), expected, rtol=1e-5, atol=1e-44)
    assert bool((positions.sort(dim=1).values.diff(dim=1) > 0).all())
    assert bool((positions.diff(dim=1) > 0)[distances.diff(dim=1) == 0].all())
