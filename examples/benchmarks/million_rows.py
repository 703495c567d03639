"""A million rows: bytes at the peak of building and searching, opening from disk, and values for 32,000 classes.

Every case runs in a process of its own, so that its peak is its own.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _harness import report

from lightning_resmem import LocalMemory, ResMemParams
from lightning_resmem.memory.answers import Neighbors
from lightning_resmem.memory.values.sparse import SparseConfig

ROWS, CHUNK = 1_000_000, 50_000
MIB = 2**20


def start_peak() -> int:
    """Forget the peak so far (Linux); returns the bytes in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def filled(memory: LocalMemory, width: int, classes: int) -> LocalMemory:
    memory.reserve(ROWS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(0, ROWS, CHUNK):
        embeddings = torch.randn(CHUNK, width, generator=generator)
        outputs = torch.randn(CHUNK, classes, generator=generator)
        memory.add(embeddings, outputs, torch.randint(classes, (CHUNK,), generator=generator))
    memory.build()
    return memory


def build_and_search(directory: str) -> list[list[str]]:
    before = start_peak()
    memory = filled(LocalMemory(params=ResMemParams(k=50, sigma=2.0), index="exact"), 128, 10)
    stored = memory.stats()["bytes"] + ROWS * 10 * 4  # residuals are derived from the outputs, and kept beside them
    built = peak() - before
    memory(torch.randn(1024, 128))
    searched = peak() - before
    memory.save(directory)
    return [
        ["1,000,000 x 128, C = 10: keys and values", f"{stored / MIB:.0f} MiB"],
        ["peak of building", f"{built / MIB:.0f} MiB, {built / stored:.2f} times"],
        ["peak of building and predicting 1,024 queries", f"{searched / MIB:.0f} MiB, {searched / stored:.2f} times"],
    ]


def open_mapped(directory: str) -> list[list[str]]:
    before, start = start_peak(), time.perf_counter()
    LocalMemory.load(directory, mmap=True)
    return [
        ["opening it with mmap=True", f"{time.perf_counter() - start:.3f} s, {(peak() - before) / MIB:.0f} MiB more"],
    ]


def many_classes(directory: str) -> list[list[str]]:
    classes, rows, step = 32_000, 40_000, 2_000  # bytes grow with the rows; the dense logits take the time
    memory = LocalMemory(params=ResMemParams(k=50), index="exact", values=SparseConfig(top_m=16))
    generator = torch.Generator().manual_seed(0)
    for _ in range(0, rows, step):
        outputs = torch.randn(step, classes, generator=generator)
        memory.add(torch.randn(step, 2), outputs, torch.randint(classes, (step,), generator=generator))
    own = memory.stats()["bytes"] / rows - (2 * 4 + 8)  # without keys and ids
    distances, ids = torch.rand(1024, 50).sort(dim=1).values, torch.randint(rows, (1024, 50))
    memory.sums(Neighbors(distances[:1], ids[:1]))
    before, start = start_peak(), time.perf_counter()
    memory.sums(Neighbors(distances, ids))
    taken, more = time.perf_counter() - start, peak() - before
    return [
        ["32,000 classes, top_m = 16: values", f"{own:.0f} bytes a row, {own * ROWS / 1e6:.0f} MB for 1,000,000 rows"],
        [
            "combining 1,024 queries x 50",
            f"{taken:.2f} s, {more / MIB:.0f} MiB more (each of the two results is {1024 * classes * 4 / MIB:.0f} MiB)",
        ],
    ]


def main() -> None:
    cases: list[Callable[[str], list[list[str]]]] = [build_and_search, open_mapped, many_classes]
    table: list[list[str]] = []
    with tempfile.TemporaryDirectory() as directory:
        for case in cases:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                table += pool.apply(case, (f"{directory}/memory",))
    report("million_rows", "A million rows", ["what", "measured"], table)


if __name__ == "__main__":
    main()
