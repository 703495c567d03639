"""A small memory, and one that was saved."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_resmem import LocalMemory, ResMemParams


@pytest.fixture
def make() -> Callable[..., LocalMemory]:
    def made(rows: int = 200, fill: float | None = None, **options: object) -> LocalMemory:
        memory = LocalMemory(params=ResMemParams(k=3), **options)
        keys = torch.randn(rows, 4) if fill is None else torch.full((rows, 4), fill)
        outputs = torch.randn(rows, 5) if fill is None else torch.full((rows, 5), fill)
        memory.add(keys, outputs, torch.randint(5, (rows,)))
        return memory

    return made


@pytest.fixture
def saved(make: Callable[..., LocalMemory], tmp_path: Path) -> Path:
    path = make().save(tmp_path / "memory")
    assert isinstance(path, Path)
    return path
