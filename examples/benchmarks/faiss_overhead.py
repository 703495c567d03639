# ruff: noqa: B023 -- every closure is called before its loop goes on
"""What our interface adds to a FAISS index, 1,000 queries, k = 53."""

import numpy as np
import torch
from _harness import features, report, seconds, thread_counts, use_threads

from lightning_resmem import LocalMemory, ResMemParams
from lightning_resmem.memory.search.faiss_index import FaissIndex


def main() -> None:
    keys, queries, source = features()
    table = []
    for config in (FaissIndex("Flat"), FaissIndex("HNSW32", ef_search=64), FaissIndex("IVF1024,Flat", nprobe=64)):
        memory = LocalMemory(params=ResMemParams(k=53), index=config)
        memory.add(keys, torch.zeros(len(keys), 1), torch.zeros(len(keys)).long())
        memory.build()
        raw = memory._rows.index.index
        for threads in thread_counts():
            use_threads(threads)
            times = seconds(
                {
                    "raw": lambda: raw.search(np.ascontiguousarray(queries), 53),
                    "ours": lambda: memory.search(queries, 53),
                },
                rounds=7,
            )
            recall = f"{memory.stats()['recall']:.3f}"
            ratio = f"{times['ours'] / times['raw']:.3f}"
            table.append([config.factory, str(threads), recall, f"{times['raw']:.4f}", f"{times['ours']:.4f}", ratio])
    header = ["index", "threads", "recall@10", "raw FAISS, s", "ours, s", "ratio"]
    report("faiss_overhead", f"FAISS through LocalMemory ({source})", header, table)


if __name__ == "__main__":
    main()
