"""`memory(queries)` against scikit-learn's KNeighborsRegressor with the same kernel, C = 100, k = 53."""

import numpy as np
import torch
from _harness import features, report, seconds, thread_counts, use_threads, without_numba
from sklearn.neighbors import KNeighborsRegressor

from lightning_resmem import LocalMemory, ResMemParams

CLASSES, K, SIGMA = 100, 53, 0.7


def knn_predict(queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The weighted vote that evaluates self-supervised learning, as lightly writes it: cosine, labels alone."""
    similarities, nearest = torch.mm(queries, bank).topk(K, dim=1)
    votes = torch.zeros(len(queries) * K, CLASSES)
    votes.scatter_(1, labels[nearest].view(-1, 1), 1.0)
    return (votes.view(len(queries), K, CLASSES) * (similarities / 0.1).exp()[:, :, None]).sum(dim=1).argsort(dim=1)


def main() -> None:
    keys, queries, source = features()
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(len(keys), CLASSES, generator=generator)
    targets = torch.randint(CLASSES, (len(keys),), generator=generator)
    memory, plain = (LocalMemory(params=ResMemParams(k=K, sigma=SIGMA)) for _ in range(2))
    for each in (memory, plain):
        each.add(keys, outputs, targets)
    with without_numba():
        plain(queries)
    residuals = memory.task.residuals(outputs, targets).numpy()
    table = []
    for threads in thread_counts():
        use_threads(threads)
        contestants = {"ours": lambda: memory(queries), "ours, without Numba": lambda: plain(queries)}
        for algorithm in ("brute", "kd_tree"):
            learner = KNeighborsRegressor(
                K, weights=lambda away: np.exp((away.min(axis=1, keepdims=True) - away) / SIGMA), algorithm=algorithm
            ).fit(keys.numpy(), residuals)
            contestants[f"scikit-learn {algorithm}"] = lambda learner=learner: learner.predict(queries.numpy())
        bank, cosine = (torch.nn.functional.normalize(rows, dim=1) for rows in (keys, queries))
        contestants["knn_predict (cosine, labels alone)"] = lambda cosine=cosine, bank=bank: knn_predict(
            cosine, bank.T, targets
        )
        difference = np.abs(memory(queries).numpy() - contestants["scikit-learn brute"]()).max()
        assert difference < 1e-3, difference
        times = seconds(contestants)
        for name, taken in times.items():
            table.append([str(threads), name, f"{taken:.3f}", f"{taken / times['ours']:.1f}"])
    title = f"memory(queries) end to end ({source}, 1,000 queries, C = {CLASSES}, k = {K})"
    report("end_to_end", title, ["threads", "prediction", "seconds", "times ours"], table)


if __name__ == "__main__":
    main()
