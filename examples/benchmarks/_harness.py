"""Interleaved timings, the shared features, and a table on the screen and for the documentation."""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

TABLES = Path(__file__).parents[2] / "docs" / "benchmarks"


def seconds(contestants: dict[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
    """Median seconds of each; they take turns, so that a busy moment of the machine hits all of them."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            run()  # as in a loop over batches: with its own data in the caches, not that of the one before
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def thread_counts() -> list[int]:
    """One thread, and all."""
    return sorted({1, os.cpu_count() or 1})


def use_threads(count: int) -> None:
    """Let torch, FAISS, NumPy and scikit-learn compute with so many threads."""
    import faiss
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(count)
    faiss.omp_set_num_threads(count)
    threadpool_limits(count)


@contextmanager
def without_numba() -> Iterator[None]:
    """What is first searched here does without the compiled loop, then and later."""
    with patch("lightning_resmem.memory.search.rough._fused", lambda: None):
        yield


def features_file() -> Path | None:
    """The file of CIFAR-10 features: the first argument, if it is no option, or the variable RESMEM_FEATURES."""
    first = sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
    given = first or os.environ.get("RESMEM_FEATURES")
    return Path(given) if given else None


def features() -> tuple[torch.Tensor, torch.Tensor, str]:
    """45,000 keys and 1,000 queries of width 64, and where they come from."""
    file, generator = features_file(), torch.Generator().manual_seed(0)
    if file is None:
        print("No features file (give a path, or set RESMEM_FEATURES): random data of the same size instead.")
        keys, queries = (torch.randn(rows, 64, generator=generator).relu() for rows in (45_000, 1_000))
        return keys, queries, "random"
    with np.load(file) as data:
        keys, queries = (torch.from_numpy(data[f"{part}_embeddings"]).float() for part in ("train", "test"))
    drawn = torch.randperm(len(queries), generator=generator)[:1000]  # the files are sorted by class
    return keys, queries[drawn], "CIFAR-10 features"


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """The same for a page."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *rows))


def report(name: str, title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table and write it as Markdown where the documentation includes it."""
    show(title, header, rows)
    TABLES.mkdir(parents=True, exist_ok=True)
    (TABLES / f"{name}.md").write_text(markdown(header, rows))


def report_whole(wanted: Iterable[str], name: str, title: str, header: list[str], rows: list[list[str]]) -> None:
    """The same, but what the documentation includes is replaced only by a table that has a line of each name wanted."""
    missing = set(wanted) - {row[0] for row in rows}
    if not missing:
        return report(name, title, header, rows)
    show(title, header, rows)
    print(f"{name}.md stays as it is: this table has nothing on {', '.join(sorted(missing))}.")
