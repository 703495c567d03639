"""What a RayMemory costs over a LocalMemory with the same rows, what it moves, and how it should scale.

Two shards on this machine, 20,000 rows of width 128, 100 classes, k = 50.
"""

import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import ray
import torch
from _harness import report, seconds

from lightning_resmem import LocalMemory, RayMemory, ResMemParams

ROWS, WIDTH, CLASSES, K, SHARDS = 20_000, 128, 100, 50, 2
CALLS = 40
GIGABIT = 1e9 / 8


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(count, WIDTH, generator=generator),
        torch.randn(count, CLASSES, generator=generator),
        torch.randint(CLASSES, (count,), generator=generator),
    )


def overhead(local: LocalMemory, spread: RayMemory) -> list[list[str]]:
    """Medians of `memory(queries)`; the two take turns."""
    table = []
    for batch in (1, 32, 256, 1024):
        queries = torch.randn(batch, WIDTH)
        times = seconds({"local": lambda q=queries: local(q), "ray": lambda q=queries: spread(q)}, rounds=31)
        here, there = 1e3 * times["local"], 1e3 * times["ray"]
        table.append([str(batch), f"{here:.1f}", f"{there:.1f}", f"{there - here:+.1f}"])
    return table


def phase_two(spread: RayMemory) -> list[list[str]]:
    """Bytes that one shard is sent and sends back, as measured on the arrays that travel."""
    table = []
    queries = torch.randn(1024, WIDTH)
    for k in (1, 10, 50, 200, 1000):
        neighbors = spread.search(queries, k)
        ids, weights = neighbors.ids.numpy(), np.ones((1024, k), np.float32)
        parts = spread._ask("weighted_sums", (ids, weights), 1.0)
        naive = 1024 * k * CLASSES * 4
        table.append([str(k), f"{(ids.nbytes + weights.nbytes) / 2**10:,.0f}", f"{parts[0].nbytes / 2**10:,.0f}"])
        table[-1].append(f"{naive / 2**10:,.0f}")
    return table


def throughput(spread: RayMemory) -> list[list[str]]:
    """Batches a second with several callers in this process."""
    table = []
    for batch in (1, 256):
        queries, line = torch.randn(batch, WIDTH), [str(batch)]
        for callers in (1, 2, 4):
            rates = []
            for _ in range(3):
                started = time.perf_counter()
                with ThreadPoolExecutor(callers) as threads:
                    list(threads.map(lambda _, q=queries: spread(q), range(CALLS)))
                rates.append(CALLS / (time.perf_counter() - started))
            line.append(f"{statistics.median(rates):.0f}")
        table.append(line)
    return table


def scaling(local: LocalMemory, fixed: float) -> list[list[str]]:
    """Milliseconds of a batch of 1,024 by a model: the search of a shard, what travels, and what is fixed.

    A shard compares its rows with the queries at the rate that one thread of this machine measures; the caller's
    network carries, for each shard, queries, neighbours, ids with weights and two sums.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    queries = torch.randn(1024, WIDTH)
    per_row = seconds({"search": lambda: local.search(queries, K)}, rounds=7)["search"] / ROWS
    torch.set_num_threads(threads)
    moved = 1024 * (4 * WIDTH + 12 * K + 12 * K + 2 * 4 * CLASSES)
    table = []
    for count in (1_000_000, 10_000_000, 100_000_000):
        for shards in (1, 4, 16, 64, 256):
            search = count / shards * per_row
            line = [f"{count:,}", str(shards), f"{1e3 * search:,.0f}"]
            for gigabits in (1, 10, 100):
                network = shards * moved / (gigabits * GIGABIT)
                line.append(f"{1e3 * (fixed + search + network):,.0f}")
            table.append(line)
    return table


def main() -> None:
    # The store is small, and so are the shards of others that run on this machine.
    ray.init(num_cpus=SHARDS, include_dashboard=False, object_store_memory=200 * 2**20, logging_level="ERROR")
    params, data = ResMemParams(k=K, sigma=2.0), rows(ROWS)
    local, spread = LocalMemory(params=params), RayMemory(SHARDS, params=params)
    for memory in (local, spread):
        memory.add(*data)
        memory.build()
    costs = overhead(local, spread)
    header = ["queries", "LocalMemory, ms", "RayMemory, ms", "difference, ms"]
    report("ray_overhead", f"RayMemory over LocalMemory ({SHARDS} shards, {ROWS:,} rows)", header, costs)
    header = ["k", "sent to a shard, KiB", "sent back, KiB", "the rows' residuals would be, KiB"]
    report("ray_phase_two", "Phase two for 1,024 queries, per shard", header, phase_two(spread))
    header = ["queries", "1 caller, batches/s", "2 callers", "4 callers"]
    report("ray_throughput", "Concurrent callers", header, throughput(spread))
    header = ["rows", "shards", "search of a shard, ms", "batch at 1 Gbit/s, ms", "10 Gbit/s", "100 Gbit/s"]
    report("ray_scaling", "Scaling model", header, scaling(local, max(0.0, float(costs[0][3])) / 1e3))
    spread.shutdown()


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP's threads would spin for a while after every operation of the LocalMemory, on the shards' cores. It is
        # read when torch is loaded.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    main()
