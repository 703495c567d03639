"""Save small memories and what they predict, with the version that is installed: `python make.py DIRECTORY`."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from lightning_resmem import (
    DenseConfig,
    Gate,
    LocalMemory,
    Multiclass,
    Multilabel,
    Regression,
    ResMemParams,
    SparseConfig,
)

GATE = Gate(bias=0.3, distance=-0.8, confidence=-0.4)
MEMORIES = {
    "dense-with-gate": (Multiclass(), ResMemParams(k=5, sigma=0.7, strength=0.8, gate=GATE), "exact", DenseConfig()),
    "sparse": (Multiclass(), ResMemParams(k=5, sigma=0.7, softmax_temperature=1.3), "exact", SparseConfig(top_m=2)),
    "multilabel": (Multilabel(), ResMemParams(k=4, sigma=0.9, softmax_temperature=1.5), "exact", DenseConfig()),
    "regression": (Regression(), ResMemParams(k=6, sigma=1.1, strength=0.5), "exact", DenseConfig()),
    "faiss": (Multiclass(), ResMemParams(k=3, sigma=0.5), "HNSW8", DenseConfig()),
}


def rows(task: object, count: int) -> tuple[Tensor, Tensor, Tensor]:
    embeddings, outputs = torch.randn(count, 4), 2 * torch.randn(count, 5)
    targets = {"Multilabel": torch.randint(2, (count, 5)).float(), "Regression": torch.randn(count, 5)}
    return embeddings, outputs, targets.get(type(task).__name__, torch.randint(5, (count,)))


def main(directory: Path) -> None:
    for name, (task, params, index, values) in MEMORIES.items():
        torch.manual_seed(0)
        memory = LocalMemory(task=task, params=params, index=index, values=values)
        memory.add(*rows(task, 30), ids=100 + torch.randperm(30))
        memory.build()
        memory.save(directory / name)
        queries, outputs, _ = rows(task, 6)
        found, predictions = memory.search(queries, k=3), memory.predictions(queries, outputs)
        told = {
            "queries": queries,
            "outputs": outputs,
            "ids": found.ids,
            "distances": found.distances,
            "base": predictions.base,
            "knn": predictions.knn,
            "resmem": predictions.resmem,
        }
        # float32 in the decimals of float64: nothing is lost.
        lines = [f"{json.dumps(what)}: {json.dumps(tensor.tolist())}" for what, tensor in told.items()]
        (directory / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
