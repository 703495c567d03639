import warnings

import pytest
import torch

from lightning_resmem import LocalMemory, ResMemWarning
from lightning_resmem.memory.capacity import available_bytes, check_capacity, free_bytes


def test_available_is_what_the_kernel_says(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:      64 kB\n")
    assert available_bytes(meminfo, tmp_path / "none") == 64 * 1024


def test_available_within_the_limit_of_a_container(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable: 64 kB\n")
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_bytes(meminfo, tmp_path) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, tmp_path) == 64 * 1024


def test_this_machine_has_some_memory():
    assert available_bytes() > 2**20


def test_warns_with_the_way_out_only_where_it_does_not_fit():
    needed = {"keys": 600, "values": 300}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_capacity(needed, available=900)
        check_capacity(needed, available=None)
    with pytest.warns(ResMemWarning, match="key_dtype=torch.float16"):
        check_capacity(needed, available=899)
    with pytest.warns(ResMemWarning, match="each of 2 processes"):
        check_capacity(needed, available=1799, copies=2)


@pytest.mark.parametrize("key_dtype", [torch.float32, torch.float16])
def test_estimate_covers_what_is_stored(key_dtype):
    rows, width, num_outputs = 1000, 16, 5
    memory = LocalMemory(key_dtype=key_dtype)
    memory.add(torch.randn(rows, width), torch.randn(rows, num_outputs), torch.zeros(rows, dtype=torch.int64))
    memory.build()
    estimate = memory.estimate_bytes(rows, width, num_outputs)
    stored = memory.stats()["bytes"]
    assert stored <= sum(estimate.values()) <= 2 * stored
    assert estimate["keys"] == rows * width * key_dtype.itemsize


def test_free_bytes_of_a_device():
    assert free_bytes(torch.device("cpu")) > 2**20
    assert free_bytes(torch.device("meta")) is None
