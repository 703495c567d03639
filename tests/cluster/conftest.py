"""Fixtures for the tests of RayMemory."""

from tests.memory.conftest import _one_thread

__all__ = ["_one_thread"]
