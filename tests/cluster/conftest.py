"""Fixtures for the tests of RayMemory."""

import uuid
from pathlib import Path

import pytest
import torch

from tests.memory.conftest import _one_thread
from tests.memory.test_contract import Data

__all__ = ["_one_thread"]


@pytest.fixture
def data() -> Data:
    return Data()


@pytest.fixture(params=["path", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where shards are kept."""
    return str(tmp_path / "pool") if request.param == "path" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    """Of one shard, 60."""
    return {
        "embeddings": torch.randn(60, 4),
        "outputs": torch.randn(60, 3),
        "targets": torch.randint(3, (60,)),
        "ids": torch.arange(60),
    }
