"""Tests that take a GPU: skipped without one."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="takes a GPU that torch can use")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
