"""Fixtures for the tests of RayMemory."""

import pytest

from tests.memory.conftest import _one_thread
from tests.memory.test_contract import Data

__all__ = ["_one_thread"]


@pytest.fixture
def data() -> Data:
    return Data()
