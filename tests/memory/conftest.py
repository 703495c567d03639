"""Fixtures for the tests of memories."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # FAISS's OpenMP threads spin while they wait: on a busy machine small searches take seconds with two of them.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
