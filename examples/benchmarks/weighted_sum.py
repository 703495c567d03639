# ruff: noqa: B023 -- every closure is called before its loop goes on
"""The weighted residual sum against gather + einsum."""

import torch
from _harness import report, seconds, thread_counts, use_threads

from lightning_resmem.functional import weighted_residual
from lightning_resmem.memory.values.sparse import SparseConfig
from lightning_resmem.tasks import Multiclass


def main() -> None:
    table = []
    for queries, k, classes, rows in ((1000, 53, 100, 45_000), (500, 53, 1000, 45_000)):
        positions, weights = torch.randint(rows, (queries, k)), torch.rand(queries, k)
        values = torch.randn(rows, classes)
        sparse = SparseConfig(16).build(Multiclass(), classes)
        sparse.replace(sparse.stored(values, torch.randint(classes, (rows,))))
        contestants = {
            "ours (embedding_bag)": lambda: weighted_residual(positions, weights, values),
            "gather + einsum": lambda: torch.einsum("bk,bkc->bc", weights, values[positions]),
            "ours, sparse values (m = 16)": lambda: sparse.residual_sum(positions, weights, 1.4),
        }
        for threads in thread_counts():
            use_threads(threads)
            for name, taken in seconds(contestants, rounds=9).items():
                table.append([f"{queries} x {k} x {classes}", str(threads), name, f"{taken * 1e3:.2f}"])
    report("weighted_sum", "Weighted residual sum", ["queries x k x classes", "threads", "sum", "ms"], table)


if __name__ == "__main__":
    main()
