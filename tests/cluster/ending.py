"""End the pool of a test, and every process of it."""

import time

import psutil

from lightning_resmem import RayMemory

SECONDS = 120.0  # machines may be busy


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ended(memory: RayMemory) -> None:
    """Shut down, and wait until the processes are gone."""
    pids = [shard["pid"] for shard in memory.stats()["shards"]]
    memory.shutdown()
    deadline = time.monotonic() + SECONDS
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
