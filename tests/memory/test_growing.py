"""Growing, reordering and dropping rows, and what it takes."""

import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_resmem.memory.growing import GrowingTensor


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 30), st.integers(0, 2**32))
def test_chunks_reordered_and_dropped(chunks: list[int], reserved: int, seed: int) -> None:
    torch.manual_seed(seed)
    expected, rows = torch.randn(sum(chunks) + 1, 3), GrowingTensor()
    rows.reserve(reserved)
    for chunk in expected.split([*chunks, 1]):
        rows.append(chunk)
        assert torch.equal(rows.finish(), expected[: len(rows)])
    order, kept = torch.randperm(len(expected)), torch.rand(len(expected)) < 0.6
    rows.reorder(order)
    rows.keep(kept)
    assert torch.equal(rows.finish(), expected[order][kept])
    rows.append(expected[:1])
    assert torch.equal(rows.finish(), torch.cat([expected[order][kept], expected[:1]]))


_PEAK = """
import resource, torch
from lightning_resmem import LocalMemory, ResMemParams

rows, width = 250_000, 128
memory = LocalMemory(params=ResMemParams(k=10))
chunk = torch.randn(1000, width), torch.randn(1000, 10), torch.zeros(1000).long()
memory.add(*chunk)  # what torch itself needs is loaded before the measurement
memory.search(chunk[0][:5], 3)
memory.clear()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for part in torch.randperm(rows).split(1000):
    memory.add(*chunk, ids=part)
memory(chunk[0][:20])
memory.remove(torch.arange(0, rows, 2))
memory(chunk[0][:20])
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(peak / (rows * (4 * width + 2 * 4 * 10 + 16)))
"""


def test_filling_in_any_order_and_searching_takes_half_as_much_again() -> None:
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) <= 1.5
