# ruff: noqa: B023 -- every closure is called before its loop goes on
"""Exact search, k = 53, against FAISS Flat, addmm + topk, cdist + topk and scikit-learn."""

import argparse

import faiss
import torch
from _harness import features, report, seconds, thread_counts, use_threads, without_numba
from sklearn.neighbors import NearestNeighbors

from lightning_resmem.memory.search.exact import ExactIndex

K = 53


def addmm_topk(keys: torch.Tensor, norms: torch.Tensor, queries: torch.Tensor) -> None:
    for block in queries.split(256):
        torch.addmm(norms, block, keys.T, alpha=-2).topk(K, largest=False)


def cdist_topk(keys: torch.Tensor, queries: torch.Tensor) -> None:
    for block in queries.split(256):
        torch.cdist(block, keys).topk(K, largest=False)


def of_few() -> None:
    """Milliseconds of one thread, for as many queries as a request may have."""
    keys, queries, source = features()
    use_threads(1)
    table = []
    for rows in (100, 3_000, 45_000):
        for count in (1, 4, 16):
            index, flat, some = ExactIndex(keys[:rows]), faiss.IndexFlatL2(keys.shape[1]), queries[:count]
            flat.add(keys[:rows].numpy())
            norms = keys[:rows].square().sum(dim=1)
            contestants = {
                "ours": lambda: index.search(some, K),
                "FAISS Flat": lambda: flat.search(some.numpy(), K),
                "addmm + topk": lambda: addmm_topk(keys[:rows], norms, some),
            }
            times = seconds(contestants, rounds=101)
            title = f"{source}, {count} x {rows:,} x {keys.shape[1]}"
            table.append([title, *(f"{1e3 * times[name]:.3g}" for name in contestants)])
    report("exact_search_few", "Few queries, ms", ["queries x rows x width", *contestants], table)


def of_many() -> None:
    """Seconds of one thread and of all."""
    keys, queries, source = features()
    generator = torch.Generator().manual_seed(0)
    sizes = [(keys, queries, f"{source}, 1,000 queries x 45,000 x 64")]
    for count, rows, width in ((256, 500_000, 64), (500, 200_000, 512), (64, 1_000_000, 128)):
        shapes = torch.randn(rows, width, generator=generator), torch.randn(count, width, generator=generator)
        sizes.append((*shapes, f"random, {count} queries x {rows:,} x {width}"))
    table = []
    for keys, queries, title in sizes:
        exact, plain, flat = ExactIndex(keys), ExactIndex(keys), faiss.IndexFlatL2(keys.shape[1])
        with without_numba():
            plain.search(queries, K)
        flat.add(keys.numpy())
        norms = keys.square().sum(dim=1)
        contestants = {
            "ours": lambda: exact.search(queries, K),
            "ours, without Numba": lambda: plain.search(queries, K),
            "FAISS Flat": lambda: flat.search(queries.numpy(), K),
            "addmm + topk": lambda: addmm_topk(keys, norms, queries),
            "cdist + topk": lambda: cdist_topk(keys, queries),
        }
        if len(keys) < 100_000:
            for algorithm in ("brute", "kd_tree"):
                finder = NearestNeighbors(algorithm=algorithm).fit(keys.numpy())
                contestants[f"scikit-learn {algorithm}"] = lambda finder=finder: finder.kneighbors(queries.numpy(), K)
        for threads in thread_counts():
            use_threads(threads)
            times = seconds(contestants, rounds=3 if len(keys) < 100_000 else 2)
            for name, taken in times.items():
                table.append([title, str(threads), name, f"{taken:.3f}", f"{taken / times['ours']:.2f}"])
    report("exact_search", "Exact search", ["data", "threads", "search", "seconds", "times ours"], table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("features", nargs="?", help="a file of CIFAR-10 features; or set RESMEM_FEATURES")
    parser.add_argument("--few", action="store_true", help="only the table of few queries")
    if not parser.parse_args().few:
        of_many()
    of_few()


if __name__ == "__main__":
    main()
